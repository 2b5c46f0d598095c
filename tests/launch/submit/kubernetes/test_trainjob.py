"""A run as a TrainJob: against the published types, and alike to the MPIJob in all that runs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_follow import ANSWERS, Kubectl, conditions, ended, refusal
from test_manifest import EVERYTHING, IMAGENET, ON_VOLUME, SCHEMA, SMALL, problems

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.kubernetes.follow import farewell, submit
from hvd_lb.launch.submit.kubernetes.kinds import TRAINJOB
from hvd_lb.launch.submit.kubernetes.manifest import manifests, to_yaml
from hvd_lb.launch.submit.kubernetes.mpijob import mpijob
from hvd_lb.launch.submit.kubernetes.trainjob import trainjob

TYPES = yaml.safe_load(Path(__file__).with_name("trainjob_v1alpha1.yaml").read_text("utf-8"))
_POD = SCHEMA["spec!"]["mpiReplicaSpecs!"]["Worker"]["template"]
OPTIONS = {"least": ON_VOLUME, "everything": replace(EVERYTHING, root=False)}


def with_pods(schema: Any) -> Any:
    """The schema with that of pods in its place; in a Job these also say restartPolicy."""
    if isinstance(schema, dict):
        return {name: with_pods(kind) for name, kind in schema.items()}
    if isinstance(schema, list):
        return [with_pods(schema[0])]
    if schema == "pod":
        return {**_POD, "spec": {**_POD["spec"], "restartPolicy": "one of Never | OnFailure"}}
    return schema


def replicated(runtime: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod templates of the runtime's jobs."""
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return {job["name"]: job["template"]["spec"]["template"] for job in jobs}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("submission", [SMALL, IMAGENET], ids=["digits", "imagenet"])
def test_the_documents_are_what_the_api_takes(submission: Any, options: Any) -> None:
    if submission is IMAGENET and options is ON_VOLUME:
        submission = replace(submission, data=None)
    documents = trainjob(submission, options)
    assert [document["kind"] for document in documents] == ["TrainingRuntime", "TrainJob"]
    for document in documents:
        assert problems(document, with_pods(TYPES[document["kind"]])) == []
    assert list(yaml.safe_load_all(to_yaml(documents))) == documents


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kubeflows_own_models_know_every_field(options: Any) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    runtime, job = trainjob(SMALL, options)
    for document, model in (
        (runtime, models.TrainerV1alpha1TrainingRuntime),
        (job, models.TrainerV1alpha1TrainJob),
    ):
        assert model.from_dict(copy.deepcopy(document)).to_dict() == document


def test_its_pods_are_those_of_the_mpijob() -> None:
    options = OPTIONS["everything"]
    runtime, _ = trainjob(IMAGENET, options)
    specs = mpijob(IMAGENET, options)["spec"]["mpiReplicaSpecs"]
    for name, role in (("launcher", "Launcher"), ("node", "Worker")):
        template = copy.deepcopy(replicated(runtime)[name])
        assert template["spec"].pop("restartPolicy") == "Never"
        other = copy.deepcopy(specs[role]["template"])
        (container,) = template["spec"]["containers"]
        assert container["name"] == "node"  # Trainer mounts the keys in those of this name only
        container["name"] = other["spec"]["containers"][0]["name"]
        assert template == other


@pytest.mark.parametrize(("processes", "nodes", "slots"), [(256, 32, 8), (20, 3, 8), (3, 1, 3)])
def test_nodes_and_slots(processes: int, nodes: int, slots: int) -> None:
    runtime, job = trainjob(replace(IMAGENET, data=None, processes=processes), ON_VOLUME)
    assert job["spec"]["trainer"] == {"numNodes": nodes, "numProcPerNode": slots}
    policy = runtime["spec"]["mlPolicy"]
    assert (policy["numNodes"], policy["mpi"]["numProcPerNode"]) == (nodes, slots)
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == job["metadata"]["name"]


def test_only_the_job_waits_in_a_queue_and_both_say_whose_they_are() -> None:
    runtime, job = trainjob(SMALL, OPTIONS["everything"])
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert "kueue.x-k8s.io/queue-name" not in runtime["metadata"]["labels"]
    assert runtime["metadata"]["annotations"] == job["metadata"]["annotations"]
    assert job["metadata"]["annotations"]["hvd-lb-output"] == "pvc:store/runs/digits"


def test_root_is_refused() -> None:
    with pytest.raises(UserError, match="use --k8s-kind mpijob"):
        trainjob(SMALL, replace(ON_VOLUME, root=True))


def test_a_patch_says_for_which_of_the_two_it_is() -> None:
    options = replace(ON_VOLUME, kind="trainjob")
    patch = {"kind": "TrainJob", "spec": {"suspend": True}}
    assert manifests(SMALL, replace(options, patch=(patch,)))[1]["spec"]["suspend"] is True
    said = refusal(lambda: manifests(SMALL, replace(options, patch=({"spec": {}},))))
    assert said == (
        "--k8s-patch does not say its kind: expected `kind: ` with one of TrainingRuntime, TrainJob"
    )
    node = {
        "name": "node",
        "template": {"spec": {"template": {"spec": {"containers": [{"name": "node", "command": ["sh"]}]}}}},
    }
    bad = {"kind": "TrainingRuntime", "spec": {"template": {"spec": {"replicatedJobs": [node]}}}}
    assert "replicatedJobs[node].template.spec.template.spec.containers[node].command" in refusal(
        lambda: manifests(SMALL, replace(options, patch=(bad,)))
    )


DOCUMENTS = trainjob(SMALL, ON_VOLUME)
NAME = DOCUMENTS[1]["metadata"]["name"]


def pod(role: str, phase: str, **status: Any) -> dict[str, Any]:
    labels = {"jobset.sigs.k8s.io/replicatedjob-name": role}
    metadata = {"name": f"{NAME}-{role}-0-0-x", "labels": labels, "creationTimestamp": "2025-11-24T09:00:00Z"}
    return {"metadata": metadata, "status": {"phase": phase, **status}}


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    monkeypatch.setenv("PATH", str(tmp_path))
    kubectl = Kubectl(tmp_path)
    pods = [
        [0, json.dumps({"items": [pod("node", "Running"), pod("launcher", phase, **status)]}), ""]
        for phase, status in (("Running", {}), ("Failed", ended(3)))
    ]
    over = {**DOCUMENTS[1], **conditions("Complete", "over")}
    kubectl.answers(
        raw=[[0, '{"resources": [{"name": "trainjobs"}]}', ""]],
        trainingruntimes=[[0, json.dumps(DOCUMENTS[0]), ""]],
        trainjobs=[[0, json.dumps(over), ""], [0, json.dumps(DOCUMENTS[1]), ""]],
        pods=pods,
        events=ANSWERS["events"],
    )
    return kubectl


def test_one_that_has_ended_is_replaced_and_followed(kubectl: Kubectl) -> None:
    assert submit(DOCUMENTS, kubectl.said.append, poll_seconds=0) == 3
    deleted = [call["words"][2] for call in kubectl.called("delete")]
    assert deleted == [
        "trainjobs.v1alpha1.trainer.kubeflow.org",
        "trainingruntimes.v1alpha1.trainer.kubeflow.org",
    ]
    (create,) = kubectl.called("create")
    assert list(yaml.safe_load_all(create["stdin"])) == DOCUMENTS  # the runtime first: the job needs it
    (logs,) = kubectl.called("logs")
    assert logs["words"][-1] == f"pod/{NAME}-launcher-0-0-x"
    assert kubectl.said == [
        f"TrainJob {NAME} has ended: starting it again",
        f"TrainJob {NAME} submitted to namespace default",
        "the launcher ended with exit status 3",
    ]


def test_a_runtime_of_another_run_is_left_alone(kubectl: Kubectl) -> None:
    other = copy.deepcopy(DOCUMENTS[0])
    other["metadata"]["annotations"]["hvd-lb-output"] = "pvc:runs/bob"
    answers = json.loads((kubectl.folder / "answers.json").read_text())
    kubectl.answers(**{**answers, "trainingruntimes": [[0, json.dumps(other), ""]]})
    assert f"the TrainingRuntime {NAME} in namespace default is of the run in pvc:runs/bob" in refusal(
        lambda: submit(DOCUMENTS, print, poll_seconds=0)
    )
    assert {call["words"][1] for call in kubectl.calls} == {"get"}


def test_the_farewell_can_be_typed() -> None:
    _, follow, checkpoint, end = farewell(TRAINJOB, "vision", NAME)
    assert follow.endswith(f"kubectl -n vision logs -f job/{NAME}-launcher-0")
    assert f"exec job/{NAME}-launcher-0 -- sh -c 'kill -TERM 1'" in checkpoint
    assert end.endswith(f"kubectl -n vision delete trainjobs.v1alpha1.trainer.kubeflow.org {NAME}")
