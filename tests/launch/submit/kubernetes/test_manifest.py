"""The MPIJob of a run: against the operator's published schema, option by option, with hostile input.

There is no cluster here. Where kubectl is installed it reads the manifests, as Go's YAML is another than Python's.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rich_click as click
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hvd_lb.errors import UserError
from hvd_lb.launch.stopping import read_wish
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.kubernetes.manifest import to_yaml
from hvd_lb.launch.submit.kubernetes.mpijob import SSH_PORT, mpijob
from hvd_lb.launch.submit.kubernetes.names import job_name
from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions, Toleration
from hvd_lb.launch.submit.kubernetes.pod import Manifest
from hvd_lb.launch.submit.kubernetes.trainjob import trainjob
from hvd_lb.launch.submit.kubernetes.volumes import Volume, parse_volume
from hvd_lb_cli.options.kubernetes import kubernetes_options

SCHEMA = yaml.safe_load((Path(__file__).parent / "mpijob_v2beta1.yaml").read_text("utf-8"))
DOCS = Path(__file__).parents[4] / "docs" / "kubernetes.md"

SMALL = Submission(
    arguments=("train", "--data", "digits", "--gpus", "4", "--device", "cpu", "--output", "/runs/digits"),
    name="digits",
    device="cpu",
    processes=4,
    per_node=2,
    output=Path("/runs/digits"),
    image="ghcr.io/hvd-lb/hvd-lb:0.1.0",
)
ON_VOLUME = KubernetesOptions(volumes=(parse_volume("pvc:runs:/runs"),))
IMAGENET = replace(
    SMALL,
    arguments=(
        "train",
        "--data",
        "/data/imagenet",
        "--gpus",
        "256",
        "--device",
        "cuda",
        "--output",
        "/runs/1",
    ),
    device="cuda",
    processes=256,
    per_node=8,
    data=Path("/data/imagenet"),
    output=Path("/runs/1"),
)
EVERYTHING = KubernetesOptions(
    namespace="vision",
    volumes=tuple(
        map(
            parse_volume,
            (
                "pvc:store/imagenet:/data",
                "pvc:store/runs:/runs",
                "nfs:files.example.com:/export:/more:ro",
                "host:/scratch:/scratch",
            ),
        )
    ),
    shared_memory="64Gi",
    cpus="96",
    memory="1Ti",
    resources={"rdma/hca_shared_devices_a": 1},
    node_selector={"node.kubernetes.io/instance-type": "p5.48xlarge"},
    tolerations=(Toleration("nvidia.com/gpu"), Toleration("dedicated", "training", "NoSchedule")),
    secrets=("tokens",),
    pull_secret="registry",
    queue="research",
    gpu_resource="nvidia.com/mig-3g.40gb",
    priority_class="high",
    runtime_class="nvidia",
    service_account="reader",
    labels={"team": "vision"},
    annotations={"networking.gke.io/default-interface": "eth0", "why": "a: b"},
    grace_seconds=900,
    root=True,
)


def problems(value: Any, schema: Any, path: str = "") -> list[str]:
    """How a value differs from the schema in mpijob_v2beta1.yaml; fields that it does not list are unknown."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no object"]
        fields = {name.rstrip("!"): kind for name, kind in schema.items()}
        missing = [name[:-1] for name in schema if name.endswith("!") and name[:-1] not in value]
        found = [f"{path}.{name}: missing" for name in missing]
        for name, item in value.items():
            found += (
                problems(item, fields[name], f"{path}.{name}")
                if name in fields
                else [f"{path}.{name}: unknown"]
            )
        return found
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        return [line for i, item in enumerate(value) for line in problems(item, schema[0], f"{path}[{i}]")]
    if schema.startswith("map of "):
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no map"]
        return [
            line
            for key, item in value.items()
            for line in problems(item, schema.removeprefix("map of "), f"{path}[{key}]")
        ]
    return [] if _fits(value, schema) else [f"{path}: {value!r} is not {schema}"]


def _fits(value: Any, schema: str) -> bool:
    kind, _, least = schema.partition(" >= ")
    if schema.startswith("one of "):
        return value in schema.removeprefix("one of ").split(" | ")
    if kind == "integer":
        return type(value) is int and value >= int(least or value)
    if kind == "boolean":
        return type(value) is bool
    if kind == "quantity":
        return type(value) is int or bool(re.fullmatch(r"[0-9.]+(m|k|[MGTP]i?|Ki)?", str(value)))
    assert kind == "string", schema
    return type(value) is str


def to_yaml_one(document: Manifest) -> str:
    return to_yaml([document])


def pod(document: Manifest, role: str) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]
    return spec


def container(document: Manifest, role: str) -> dict[str, Any]:
    (only,) = pod(document, role)["containers"]
    result: dict[str, Any] = only
    return result


@pytest.mark.parametrize("options", [ON_VOLUME, EVERYTHING], ids=["least", "everything"])
@pytest.mark.parametrize("submission", [SMALL, IMAGENET], ids=["digits", "imagenet"])
def test_the_manifest_is_what_the_api_takes(submission: Submission, options: KubernetesOptions) -> None:
    if submission is IMAGENET and options is ON_VOLUME:
        options = replace(options, volumes=(*options.volumes, parse_volume("pvc:imagenet:/data")))
    document = mpijob(replace(submission, environment={"NCCL_DEBUG": "INFO"}), options)
    assert problems(document, SCHEMA) == []
    assert yaml.safe_load(to_yaml([document])) == document


BROKEN = {
    "misspelt in the spec": (["spec"], "slotPerWorker", 8, "unknown"),
    "misspelt in the pod": (
        ["spec", "mpiReplicaSpecs", "Worker", "template", "spec"],
        "nodeSelecter",
        {},
        "unknown",
    ),
    "one that v1 had": (["spec"], "cleanPodPolicy", "Running", "unknown"),
    "in the wrong place": (["spec", "mpiReplicaSpecs", "Launcher"], "containers", [], "unknown"),
    "a number as text": (["spec"], "slotsPerWorker", "8", "is not integer"),
    "a truth value as number": (["spec"], "slotsPerWorker", True, "is not integer"),
    "no replica": (["spec", "mpiReplicaSpecs", "Worker"], "replicas", 0, "is not integer >= 1"),
    "text as truth value": (["spec", "runPolicy"], "suspend", "false", "is not boolean"),
    "not of the enum": (["spec"], "launcherCreationPolicy", "WaitForWorkers", "is not one of"),
    "an enum in other letters": (["spec", "runPolicy"], "cleanPodPolicy", "running", "is not one of"),
    "a list where an object is": (["spec"], "runPolicy", [], "is no object"),
    "a number in a map of text": (["metadata"], "labels", {"run": 1}, "is not string"),
    "another version": ([], "apiVersion", "kubeflow.org/v1", "is not one of"),
}


@pytest.mark.parametrize(("where", "field", "value", "problem"), BROKEN.values(), ids=BROKEN)
def test_the_checker_notices(where: list[str], field: str, value: Any, problem: str) -> None:
    document = copy.deepcopy(mpijob(SMALL, ON_VOLUME))
    place = document
    for step in where:
        place = place[step]
    place[field] = value
    (found,) = problems(document, SCHEMA)
    assert found.startswith(".".join(["", *where, field]))
    assert problem in found


def test_the_checker_notices_what_is_missing() -> None:
    document = mpijob(SMALL, ON_VOLUME)
    del document["spec"]["mpiReplicaSpecs"]["Launcher"]
    assert problems(document, SCHEMA) == [".spec.mpiReplicaSpecs.Launcher: missing"]


def test_the_launcher_runs_the_command_on_the_operators_hosts() -> None:
    document = mpijob(SMALL, ON_VOLUME)
    launcher = container(document, "Launcher")
    assert launcher["command"] == [
        "hvd-lb",
        *SMALL.arguments,
        "--launcher",
        "ssh",
        "--ssh-port",
        str(SSH_PORT),
    ]
    assert document["spec"]["slotsPerWorker"] == 2
    assert document["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] == 2
    assert document["spec"]["launcherCreationPolicy"] == "WaitForWorkersReady"
    assert container(document, "Worker")["startupProbe"]["tcpSocket"]["port"] == SSH_PORT
    assert "resources" not in container(document, "Worker")


def test_variables_are_the_launchers_and_handed_on_to_the_ranks() -> None:
    document = mpijob(replace(SMALL, environment={"NCCL_DEBUG": "INFO", "TOKEN": "a b"}), ON_VOLUME)
    launcher = container(document, "Launcher")
    assert launcher["env"] == [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "TOKEN", "value": "a b"}]
    assert launcher["command"][-8:-4] == ["--env", "NCCL_DEBUG", "--env", "TOKEN"]
    assert container(document, "Worker")["env"] == launcher["env"]  # NVIDIA's runtime reads some of them


@pytest.mark.parametrize(("processes", "workers", "slots"), [(256, 32, 8), (20, 3, 8), (3, 1, 3), (1, 1, 1)])
def test_gpus_are_asked_for_by_worker(processes: int, workers: int, slots: int) -> None:
    options = replace(ON_VOLUME, volumes=(*ON_VOLUME.volumes, parse_volume("pvc:imagenet:/data")))
    document = mpijob(replace(IMAGENET, processes=processes), options)
    assert document["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] == workers
    assert document["spec"]["slotsPerWorker"] == slots
    assert container(document, "Worker")["resources"] == {"limits": {"nvidia.com/gpu": slots}}
    assert "limits" not in container(document, "Launcher")["resources"]


def test_pods_are_as_the_restricted_pod_security_standard_wants_them() -> None:
    document = mpijob(SMALL, ON_VOLUME)
    for role in ("Launcher", "Worker"):
        context = pod(document, role)["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["fsGroup"] == 1000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(document, role)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod(document, role)["automountServiceAccountToken"] is False
    assert document["spec"]["sshAuthMountPath"] == "/home/hvd-lb/.ssh"


def test_root_has_what_rdma_and_sshd_need() -> None:
    document = mpijob(SMALL, replace(ON_VOLUME, root=True))
    assert document["spec"]["sshAuthMountPath"] == "/root/.ssh"
    for role in ("Launcher", "Worker"):
        assert pod(document, role)["securityContext"] == {"runAsUser": 0, "runAsGroup": 0}
        assert container(document, role)["securityContext"] == {
            "capabilities": {"add": ["IPC_LOCK", "SYS_CHROOT"]}
        }
    assert "HostKey=/root/.ssh/id_rsa" in container(document, "Worker")["command"]


def test_every_option_has_its_place() -> None:
    document = mpijob(IMAGENET, EVERYTHING)
    launcher, worker = pod(document, "Launcher"), pod(document, "Worker")
    assert document["metadata"]["namespace"] == "vision"
    assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert container(document, "Worker")["resources"] == {
        "requests": {"cpu": "96", "memory": "1Ti"},
        "limits": {"memory": "1Ti", "nvidia.com/mig-3g.40gb": 8, "rdma/hca_shared_devices_a": 1},
    }
    assert worker["volumes"][0] == {
        "name": "shared-memory",
        "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"},
    }
    assert worker["nodeSelector"] == {"node.kubernetes.io/instance-type": "p5.48xlarge"}
    assert worker["runtimeClassName"] == "nvidia"
    assert "nodeSelector" not in launcher  # it needs none of those nodes, and no GPU
    assert "runtimeClassName" not in launcher
    for role in ("Launcher", "Worker"):
        metadata = document["spec"]["mpiReplicaSpecs"][role]["template"]["metadata"]
        for of in (metadata, document["metadata"]):
            assert of["labels"]["team"] == "vision"
            assert of["labels"]["app.kubernetes.io/name"] == "hvd-lb"
            assert EVERYTHING.annotations.items() <= of["annotations"].items()
    for spec in (launcher, worker):
        assert spec["priorityClassName"] == "high"
        assert spec["serviceAccountName"] == "reader"
        assert spec["terminationGracePeriodSeconds"] == 900
        assert spec["imagePullSecrets"] == [{"name": "registry"}]
        assert spec["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists"},
            {"key": "dedicated", "value": "training", "effect": "NoSchedule"},
        ]
    assert container(document, "Launcher")["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    assert "envFrom" not in container(document, "Worker")  # sshd would not hand them on


def test_volumes_of_one_claim_are_one_volume_and_data_is_only_read() -> None:
    document = mpijob(IMAGENET, EVERYTHING)
    assert (
        pod(document, "Launcher")["volumes"]
        == pod(document, "Worker")["volumes"][1:]
        == [
            {"name": "volume-0", "persistentVolumeClaim": {"claimName": "store"}},
            {"name": "volume-1", "nfs": {"server": "files.example.com", "path": "/export", "readOnly": True}},
            {"name": "volume-2", "hostPath": {"path": "/scratch", "type": "Directory"}},
        ]
    )
    assert (
        container(document, "Launcher")["volumeMounts"]
        == container(document, "Worker")["volumeMounts"][1:]
        == [
            {"name": "volume-0", "mountPath": "/data", "subPath": "imagenet", "readOnly": True},
            {"name": "volume-0", "mountPath": "/runs", "subPath": "runs"},
            {"name": "volume-1", "mountPath": "/more", "readOnly": True},
            {"name": "volume-2", "mountPath": "/scratch"},
        ]
    )


def test_a_volume_with_data_and_output_can_be_written_to() -> None:
    one = replace(IMAGENET, data=Path("/store/imagenet"), output=Path("/store/runs/1"))
    document = mpijob(one, KubernetesOptions(volumes=(parse_volume("pvc:store:/store"),)))
    assert container(document, "Launcher")["volumeMounts"] == [{"name": "volume-0", "mountPath": "/store"}]


@pytest.mark.parametrize(
    ("submission", "volumes", "message"),
    [
        (replace(SMALL, image=None), ["pvc:runs:/runs"], "without --image"),
        (SMALL, [], "--output /runs/digits is on no volume"),
        (SMALL, ["pvc:runs:/run"], "on no volume"),
        (SMALL, ["pvc:runs:/runs:ro"], "read-only"),
        (replace(SMALL, output=Path("/runs/../x")), ["pvc:runs:/runs"], "on no volume"),
        (IMAGENET, ["pvc:runs:/runs"], "--data /data/imagenet is on no volume"),
        (
            replace(SMALL, recipe=Path("/home/me/my.yaml")),
            ["pvc:runs:/runs"],
            "my.yaml is a file on no volume",
        ),
        (SMALL, ["pvc:runs:/runs", "pvc:more:/runs"], "/runs, which is taken"),
        (SMALL, ["pvc:runs:/runs", "pvc:more:/etc/mpi"], "taken"),
        (SMALL, ["pvc:runs:/runs", "pvc:more:/home/hvd-lb/.ssh"], "taken"),
    ],
)
def test_a_run_that_could_not_work_is_refused(
    submission: Submission, volumes: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        mpijob(submission, KubernetesOptions(volumes=tuple(map(parse_volume, volumes))))
    assert "\n" not in str(caught.value)


def name_of(output: str, *volumes: str) -> str:
    submission = replace(SMALL, name=Path(output).name, output=Path(output))
    options = KubernetesOptions(volumes=tuple(map(parse_volume, volumes)))
    return str(mpijob(submission, options)["metadata"]["name"])


def test_a_job_is_named_after_where_it_writes_in_the_cluster() -> None:
    """Not after the last folder, which two people's runs may share, nor after a path in pods, which two claims may."""
    alice = name_of("/runs/alice/resnet50", "pvc:runs:/runs")
    others = [
        name_of("/runs/bob/resnet50", "pvc:runs:/runs"),
        name_of("/runs/alice/resnet50", "pvc:others:/runs"),
        name_of("/runs/alice/resnet50", "pvc:runs/more:/runs"),
        name_of("/runs/alice/resnet50", "nfs:runs:/runs:/runs"),
        name_of("/runs/alice/resnet50", "host:/runs:/runs"),
    ]
    assert len({alice, *others}) == 6
    assert all(re.fullmatch("resnet50-[0-9a-f]{8}", name) for name in (alice, *others))


def test_the_same_run_has_one_name_wherever_it_is_mounted() -> None:
    names = {
        name_of("/runs/alice/one", "pvc:runs:/runs"),
        name_of("/out/one", "pvc:runs/alice:/out", "pvc:data:/runs"),
        name_of("/runs/x/../alice/one", "pvc:runs:/runs"),
    }
    assert len(names) == 1


def test_what_a_job_says_of_its_run() -> None:
    said = mpijob(SMALL, ON_VOLUME)["metadata"]["annotations"]
    assert said["hvd-lb-run"] == "digits"
    assert said["hvd-lb-output"] == "pvc:runs/digits"
    more = mpijob(replace(SMALL, arguments=(*SMALL.arguments, "--seed", "1")), ON_VOLUME)
    assert more["metadata"]["name"] == mpijob(SMALL, ON_VOLUME)["metadata"]["name"]
    assert more["metadata"]["annotations"]["hvd-lb-command"] != said["hvd-lb-command"]
    secret = replace(SMALL, environment={"TOKEN": "a"}), replace(SMALL, environment={"TOKEN": "b"})
    first, second = (mpijob(of, ON_VOLUME)["metadata"]["annotations"]["hvd-lb-command"] for of in secret)
    assert first == second  # so it tells nothing of a value


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("digits", "digits-"),
        ("Digits", "digits-"),
        ("runs/2025 first", "runs-2025-first-"),
        ("90-epochs", "hvd-lb-90-epochs-"),
        ("", "hvd-lb-"),
        ("-", "hvd-lb-"),
        ("a" * 51, "a" * 41 + "-"),
        ("a-", "a-"),
        ("$(rm -rf /); `id` 'x' \"y\"\n", "rm-rf-id-x-y-"),
        ("模型", "hvd-lb-"),
        ("../../etc/passwd", "etc-passwd-"),
        ("x\udcff", "x-"),
    ],
)
def test_names_are_made_valid(name: str, start: str) -> None:
    assert re.fullmatch(re.escape(start) + "[0-9a-f]{8}", job_name(name, f"pvc:runs/{name}"))


@given(st.text(max_size=80) | st.from_regex(r"[a-zA-Z0-9-]{1,80}", fullmatch=True), st.text(max_size=20))
def test_any_name_gives_host_names(name: str, output: str) -> None:
    made = job_name(name, output)
    assert re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", made)  # a service's name begins with a letter
    assert len(f"{made}-worker-9999") <= 63
    assert len(f"{made}-launcher") <= 63


@given(st.lists(st.text(max_size=10), min_size=2, max_size=2, unique=True))
def test_different_outputs_have_different_names(outputs: list[str]) -> None:
    assert job_name("a", outputs[0]) != job_name("a", outputs[1])


HOSTILE = (
    *("$(PATH)", "$$(PATH)", "$", "$$", "a$", "`id`", "; rm -rf /", "'", '"', "a\nb", "\t", " x ", "", "é模"),
    *(
        "1e-3",
        "0x10",
        "0o17",
        "012",
        "1_000",
        "y",
        "N",
        "on",
        "null",
        "~",
        ".inf",
        "-1",
        "- a",
        "a: b",
        "#c",
        "*x",
        "&x",
    ),
    *(
        "!!int 3",
        "<<",
        "=",
        "true",
        "2025-11-24",
        "12:30:45",
        "%d",
        "@x",
        "{{ x }}",
        "\\",
        "\x07",
        "\x85",
        "\u2028",
    ),
)


def kubelet_expands(text: str) -> str:
    """What Kubernetes makes of a word of a command without any variables: k8s.io/kubernetes/third_party/forked/golang/
    expansion: $$ is $, $(NAME) of an unknown NAME stays, $ before anything else stays."""
    return re.sub(r"\$(\$|\([^)]*\))?", lambda match: "$" if match[1] == "$" else match[0], text)


def test_hostile_words_reach_the_command_and_the_environment_as_they_are() -> None:
    submission = replace(
        SMALL, arguments=("train", *HOSTILE), environment={f"V{i}": text for i, text in enumerate(HOSTILE)}
    )
    document = yaml.safe_load(to_yaml_one(mpijob(submission, ON_VOLUME)))
    launcher = container(document, "Launcher")
    assert tuple(map(kubelet_expands, launcher["command"][2 : 2 + len(HOSTILE)])) == HOSTILE
    assert tuple(kubelet_expands(one["value"]) for one in launcher["env"]) == HOSTILE
    assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", word) for word in launcher["command"])
    assert problems(document, SCHEMA) == []


def test_a_hostile_run_name_is_an_annotation() -> None:
    name = "a\udcff: {b}\n"
    document = yaml.safe_load(to_yaml_one(mpijob(replace(SMALL, name=name), ON_VOLUME)))
    assert document["metadata"]["annotations"]["hvd-lb-run"] == "a\\udcff: {b}\n"


def test_a_pod_with_ranks_ends_them_with_a_checkpoint_first() -> None:
    document = mpijob(SMALL, ON_VOLUME)
    assert "lifecycle" not in container(document, "Launcher")
    hook = container(document, "Worker")["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[-2:] == ["/runs/digits/logs/stop", "1"]
    assert "$(" not in hook[2]
    assert "$$" not in hook[2]
    assert pod(document, "Worker")["terminationGracePeriodSeconds"] == 300


def test_the_pods_of_an_elastic_run_leave_it_and_are_made_again() -> None:
    elastic = replace(SMALL, elastic=True)
    document = mpijob(elastic, ON_VOLUME)
    assert document["spec"]["mpiReplicaSpecs"]["Worker"]["restartPolicy"] == "OnFailure"
    assert document["spec"]["mpiReplicaSpecs"]["Launcher"]["restartPolicy"] == "Never"
    hook = container(document, "Worker")["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[3:] == ["sh", "1"]  # the run's own wish to stop is not touched
    assert "$(" not in hook[2]
    with pytest.raises(UserError, match="use --k8s-kind mpijob"):
        trainjob(elastic, ON_VOLUME)


def test_the_hook_asks_the_run_to_stop_and_waits_for_it(tmp_path: Path) -> None:
    """With the children of another process than the first one."""
    command = container(mpijob(SMALL, ON_VOLUME), "Worker")["lifecycle"]["preStop"]["exec"]["command"]
    stop = tmp_path / "a b$(x)"
    script = "import subprocess as s, sys; s.run(['sleep', sys.argv[1]]); print('done', flush=True); sys.stdin.read()"
    for seconds, asked in (("0", False), ("1", True)):
        parent = subprocess.Popen(
            [sys.executable, "-c", script, seconds], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert parent.stdin
        assert parent.stdout
        with parent:
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
            if asked:
                while not children.read_text():
                    time.sleep(0.01)
            else:
                parent.stdout.readline()
            subprocess.run([*command[:-2], str(stop), str(parent.pid)], check=True, timeout=30)
            assert not children.read_text()
            assert stop.exists() == asked
            parent.stdin.close()
    assert read_wish(stop) == "15"


needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")


def read_by_kubectl(text: str, folder: Path) -> Any:
    """A manifest as kubectl reads it, which needs no cluster for that."""
    (folder / "job.yaml").write_text(text, "utf-8")
    words = ["kubectl", "patch", "--local", "--type=merge", "--patch={}", "--output=json", "-f", "job.yaml"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_kubectl
@pytest.mark.parametrize("options", [ON_VOLUME, EVERYTHING], ids=["least", "everything"])
def test_kubectl_reads_the_same(tmp_path: Path, options: KubernetesOptions) -> None:
    hostile = replace(
        SMALL, arguments=("train", *HOSTILE), environment={f"V{i}": text for i, text in enumerate(HOSTILE)}
    )
    document = mpijob(hostile, options)
    assert read_by_kubectl(to_yaml([document]), tmp_path) == document


def test_the_worked_example_in_the_docs_is_what_the_code_prints() -> None:
    options = KubernetesOptions(
        volumes=(parse_volume("pvc:imagenet:/data:ro"), parse_volume("pvc:runs:/runs"))
    )
    example = Submission(
        arguments=(
            *("train", "--gpus", "16", "--per-gpu-batch", "32"),
            *("--data", "/data/imagenet", "--device", "cuda", "--output", "/runs/resnet50"),
        ),
        name="resnet50",
        device="cuda",
        processes=16,
        per_node=8,
        output=Path("/runs/resnet50"),
        data=Path("/data/imagenet"),
        image="ghcr.io/hvd-lb/hvd-lb:0.1.0",
        environment={"HVD_LB_CACHE": "/runs/.cache"},
    )
    assert f"```yaml\n{to_yaml_one(mpijob(example, options))}```" in DOCS.read_text("utf-8")


@click.command()
@kubernetes_options
def show(kubernetes_options: KubernetesOptions) -> None:
    show.seen = kubernetes_options  # type: ignore[attr-defined]


def parsed(*arguments: str) -> KubernetesOptions:
    result = CliRunner().invoke(show, arguments, standalone_mode=False)
    if result.exception:
        raise result.exception
    seen: KubernetesOptions = show.seen  # type: ignore[attr-defined]
    return seen


def test_without_options_the_defaults_hold() -> None:
    assert parsed() == KubernetesOptions()


def test_options_of_the_command_line() -> None:
    line = """--k8s-namespace vision --k8s-volume pvc:store/imagenet:/data --k8s-volume pvc:store/runs:/runs
        --k8s-volume nfs:files.example.com:/export:/more:ro --k8s-volume host:/scratch:/scratch --k8s-shm 64Gi
        --k8s-cpus 96 --k8s-memory 1Ti --k8s-resource rdma/hca_shared_devices_a=1
        --k8s-node-selector node.kubernetes.io/instance-type=p5.48xlarge --k8s-toleration nvidia.com/gpu
        --k8s-toleration dedicated=training:NoSchedule --k8s-secret tokens --k8s-pull-secret registry
        --k8s-queue research --k8s-root --k8s-gpu-resource nvidia.com/mig-3g.40gb --k8s-priority-class high
        --k8s-runtime-class nvidia --k8s-service-account reader --k8s-label team=vision --k8s-grace 900
        --k8s-annotation networking.gke.io/default-interface=eth0"""
    assert parsed(*line.split(), "--k8s-annotation", "why=a: b") == EVERYTHING


@pytest.mark.parametrize(
    ("text", "volume"),
    [
        ("pvc:a:/b", Volume("pvc", "a", "", "/b")),
        ("pvc:a/x/y:/b:ro", Volume("pvc", "a", "x/y", "/b", True)),
        ("nfs:10.0.0.1:/x:/b", Volume("nfs", "10.0.0.1", "/x", "/b")),
        ("nfs:fd00::1:/:/b", Volume("nfs", "fd00::1", "/", "/b")),
        ("host:/x y:/b", Volume("host", "", "/x y", "/b")),
    ],
)
def test_volumes(text: str, volume: Volume) -> None:
    assert parse_volume(text) == volume


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "runs",
            "runs:/runs",
            "pvc",
            "pvc:",
            "pvc:runs",
            "pvc:runs:",
            "pvc:runs:runs",
            "pvc::/runs",
            "pvc:runs:/",
        ),
        *(
            "pvc:Runs:/runs",
            "pvc:runs:/runs/",
            "pvc:runs:/a/../b",
            "pvc:runs/../x:/runs",
            "pvc:runs//x:/runs",
        ),
        *(
            "pvc:runs/:/runs",
            "pvc:runs:/runs:rw",
            "pvc:runs:/a\nb",
            "nfs:/x:/b",
            "nfs:host:x:/b",
            "nfs:-o:/x:/b",
        ),
        *("host:x:/b", "host:/:/b", "pvc:runs://b", "secret:x:/b", "PVC:runs:/runs"),
    ],
)
def test_what_is_no_volume_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a volume: expected pvc:CLAIM") as caught:
        parse_volume(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--k8s-namespace", name) for name in ("", "Vision", "a.b", "a" * 64, "-a", "--all")),
        *(("--k8s-shm", size) for size in ("", "64 GB", "-1", "1e3", "lots")),
        *(("--k8s-memory", size) for size in ("64GiB", "Gi")),
        ("--k8s-cpus", "all"),
        *(
            ("--k8s-resource", text)
            for text in ("rdma/x", "rdma/x=", "rdma/x=0", "=1", "a b=1", "rdma/x=1\n")
        ),
        *(("--k8s-node-selector", text) for text in ("a", "=b", "a=b c", "a=-", "/a=b")),
        *(("--k8s-toleration", text) for text in ("", "=a", "a:", "a:Never", "a=b:", "a=b c", ":NoSchedule")),
        *(("--k8s-secret", text) for text in ("", "A", "a b", "a/b")),
        ("--k8s-pull-secret", "user:password"),
        ("--k8s-queue", "Q"),
        ("--k8s-volume", "runs"),
        *(
            ("--k8s-gpu-resource", text)
            for text in ("", "gpu", "nvidia.com/", "NVIDIA.com/gpu", "nvidia.com/gpu=8")
        ),
        *(("--k8s-label", text) for text in ("a", "a=b c", "hvd-lb-run=x", "app.kubernetes.io/name=x")),
        *(("--k8s-annotation", text) for text in ("a", "=b", "a b=c", "hvd-lb-output=/x")),
        ("--k8s-priority-class", "High"),
        ("--k8s-runtime-class", "a b"),
        ("--k8s-service-account", "x/y"),
    ],
)
def test_wrong_values_are_told_in_one_line(option: str, value: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        parsed(option, value)
    message = caught.value.message
    assert message.startswith(option), message
    assert "expected" in message
    assert "\n" not in message
