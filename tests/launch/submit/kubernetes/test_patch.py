"""--k8s-patch: what is merged how, and that the outcome is still the run's job."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_manifest import ON_VOLUME, SCHEMA, SMALL, container, pod, problems

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.kubernetes.mpijob import mpijob
from hvd_lb.launch.submit.kubernetes.patch import patched, read_patch

JOB = mpijob(SMALL, ON_VOLUME)


def merged(text: str) -> dict[str, Any]:
    """The MPIJob with the patch, which leaves the one it is made from alone."""
    before = copy.deepcopy(JOB)
    (document,) = patched([JOB], list(yaml.safe_load_all(text)))
    assert before == JOB
    return document


def worker(patch: str) -> str:
    return f"spec: {{mpiReplicaSpecs: {{Worker: {{template: {{spec: {patch}}}}}}}}}"


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_objects_are_merged_and_null_removes() -> None:
    document = merged("spec: {runPolicy: {ttlSecondsAfterFinished: 600, backoffLimit: null}}")
    assert document["spec"]["runPolicy"] == {"cleanPodPolicy": "Running", "ttlSecondsAfterFinished": 600}
    assert problems(document, SCHEMA) == []


# Test cases of RFC 7386, appendix A, that are objects: what is there, the patch, and the outcome.
RFC_7386 = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("there", "patch", "outcome"), RFC_7386)
def test_a_merge_patch(there: dict[str, Any], patch: dict[str, Any], outcome: dict[str, Any]) -> None:
    document = {**JOB, "spec": {**JOB["spec"], "x": there}}
    assert patched([document], [{"spec": {"x": patch}}])[0]["spec"]["x"] == outcome


def test_containers_variables_and_volumes_are_merged_by_their_keys() -> None:
    document = merged(
        worker("""{
          containers: [
            {name: worker, imagePullPolicy: Always, env: [{name: A, value: a}],
             volumeMounts: [{mountPath: /cache, name: cache}]},
            {name: tcpxo, image: daemon}],
          volumes: [{name: cache, emptyDir: {}}, {name: shared-memory, emptyDir: {sizeLimit: 1Gi}}]}""")
    )
    first, second = pod(document, "Worker")["containers"]
    assert first["imagePullPolicy"] == "Always"
    assert first["command"] == container(JOB, "Worker")["command"]
    assert [mount["mountPath"] for mount in first["volumeMounts"]] == ["/dev/shm", "/runs", "/cache"]
    assert second == {"name": "tcpxo", "image": "daemon"}
    memory, runs, cache = pod(document, "Worker")["volumes"]
    assert memory["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert (runs["name"], cache["name"]) == ("volume-0", "cache")
    assert pod(document, "Launcher") == pod(JOB, "Launcher")


def test_an_item_can_be_removed() -> None:
    added = merged(worker("{containers: [{name: worker, env: [{name: A, value: a}, {name: B, value: b}]}]}"))
    patch = yaml.safe_load(worker("{containers: [{name: worker, env: [{name: A, $patch: delete}]}]}"))
    (document,) = patched([added], [patch])
    assert container(document, "Worker")["env"] == [{"name": "B", "value": "b"}]


def test_other_lists_are_replaced() -> None:
    document = merged(worker("{tolerations: [{key: a, operator: Exists}]}"))
    (document,) = patched([document], [yaml.safe_load(worker("{tolerations: [{key: b, operator: Exists}]}"))])
    assert pod(document, "Worker")["tolerations"] == [{"key": "b", "operator": "Exists"}]


@pytest.mark.parametrize(
    ("patch", "place"),
    [
        ("metadata: {name: mine}", "metadata.name"),
        ("metadata: {namespace: other}", "metadata.namespace"),
        ("metadata: {annotations: {hvd-lb-output: 'pvc:runs/b'}}", "metadata.annotations.hvd-lb-output"),
        ("metadata: {annotations: null}", "metadata.annotations.hvd-lb-run"),
        ("metadata: null", "metadata.name"),
        ("apiVersion: kubeflow.org/v1", "apiVersion"),
        ("spec: null", "spec.slotsPerWorker"),
        ("spec: {slotsPerWorker: 4}", "spec.slotsPerWorker"),
        ("spec: {mpiReplicaSpecs: {Worker: {replicas: 3}}}", "spec.mpiReplicaSpecs.Worker.replicas"),
        (
            worker("{containers: [{name: worker, command: [sh]}]}"),
            "spec.mpiReplicaSpecs.Worker.template.spec.containers[worker].command",
        ),
        (worker("{containers: []}"), "JOB"),
        (
            worker("{containers: [sh]}"),
            "spec.mpiReplicaSpecs.Worker.template.spec.containers[worker].command",
        ),
        (
            worker("{containers: [{name: worker, $patch: delete}]}"),
            "spec.mpiReplicaSpecs.Worker.template.spec.containers[worker].command",
        ),
        (
            worker("{containers: [{name: worker, volumeMounts: [{mountPath: /runs, name: other}]}]}"),
            "spec.mpiReplicaSpecs.Worker.template.spec.containers[worker].volumeMounts[/runs].name",
        ),
    ],
)
def test_what_would_make_it_another_job_is_refused(patch: str, place: str) -> None:
    if place == "JOB":  # nothing is merged into nothing
        assert merged(patch) == JOB
        return
    said = refusal(lambda: merged(patch))
    assert said.startswith(f"--k8s-patch changes {place} of the MPIJob, by which it is this run's")


def test_what_is_said_again_changes_nothing() -> None:
    assert patched([JOB], [copy.deepcopy(JOB)]) == [JOB]


def test_a_patch_for_another_kind() -> None:
    assert refusal(lambda: merged("kind: Pod")) == (
        "--k8s-patch is for kind Pod: expected `kind: ` with one of MPIJob"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "expected a manifest in part"),
        (b"# nothing\n---\n", "expected a manifest in part"),
        (b"- op: add\n", "expected a manifest in part"),
        (b"spec\n", "expected a manifest in part"),
        (b"spec: {1: 2}\n", "expected a manifest in part"),
        (b"spec: [{true: 2}]\n", "expected a manifest in part"),
        (b"spec: {\n", "line 2: "),
        (b"spec: !!python/object/apply:os.system [id]\n", "line 1: could not determine a constructor"),
        (b"\xff\xfe", "no YAML"),
        (b"[" * 100_000, "expected a manifest in part"),
    ],
)
def test_what_is_no_patch_is_told_in_one_line(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "patch.yaml").write_bytes(text)
    said = refusal(lambda: read_patch(tmp_path / "patch.yaml"))
    assert said.startswith(f"--k8s-patch {tmp_path}/patch.yaml")
    assert reason in said


def test_a_patch_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in refusal(lambda: read_patch(tmp_path / "none"))
    assert "Is a directory" in refusal(lambda: read_patch(tmp_path))


def test_a_file_is_read_as_kubernetes_reads_it(tmp_path: Path) -> None:
    (tmp_path / "patch.json").write_text('{"metadata": {"annotations": {"day": 1}}}')
    (tmp_path / "patch.yaml").write_text("metadata:\n  annotations:\n    day: 2026-11-26\n")
    assert read_patch(tmp_path / "patch.json") == [{"metadata": {"annotations": {"day": 1}}}]
    assert read_patch(tmp_path / "patch.yaml") == [{"metadata": {"annotations": {"day": "2026-11-26"}}}]
