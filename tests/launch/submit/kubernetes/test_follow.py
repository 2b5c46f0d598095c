"""Submitting an MPIJob and following it.

No cluster can be had here, so `kubectl` is a small program of the tests' own that answers as told and notes how it was
called. Where the real kubectl is installed, every call is given to it as well: it has to understand all of them, and to
fail for no other reason than that nobody listens on its cluster's address.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.kubernetes.follow import farewell, submit
from hvd_lb.launch.submit.kubernetes.kinds import MPIJOB
from hvd_lb.launch.submit.kubernetes.mpijob import mpijob
from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions
from hvd_lb.launch.submit.kubernetes.volumes import parse_volume

REAL_KUBECTL = shutil.which("kubectl")

JOB = mpijob(
    Submission(
        arguments=("train", "--data", "digits", "--output", "/runs/digits"),
        name="digits",
        device="cpu",
        processes=4,
        per_node=2,
        output=Path("/runs/digits"),
        image="ghcr.io/hvd-lb/hvd-lb:0.1.0",
    ),
    KubernetesOptions(namespace="vision", volumes=(parse_volume("pvc:runs:/runs"),)),
)
NAME = JOB["metadata"]["name"]

FAKE = """#!{python}
# Answers from answers.json: for each verb or kind a list of [exit status, stdout, stderr], the last one for good.
import json, os, pathlib, sys, time
folder = pathlib.Path(__file__).parent
words = sys.argv[1:]
with open(folder / "calls.jsonl", "a") as calls:
    calls.write(json.dumps({{"words": words, "stdin": sys.stdin.read()}}) + "\\n")
verb = words[1]
kind = "raw" if "--raw" in words else words[2].partition(".")[0] if verb == "get" else verb
answers = json.loads((folder / "answers.json").read_text())
count = sum(json.loads(line)["words"][1:3] == words[1:3] for line in open(folder / "calls.jsonl"))
status, out, err = answers[kind][min(count, len(answers[kind])) - 1]
sys.stdout.write(out)
sys.stdout.flush()
sys.stderr.write(err)
if verb == "logs":
    time.sleep(answers["seconds"])
sys.exit(status)
"""


def conditions(kind: str, message: str) -> dict[str, Any]:
    return {"status": {"conditions": [{"type": kind, "status": "True", "message": message}]}}


def job(**more: Any) -> str:
    return json.dumps({**JOB, **more})


def pod(role: str, number: int, phase: str, **status: Any) -> dict[str, Any]:
    labels = {"training.kubeflow.org/job-role": role}
    metadata = {
        "name": f"{NAME}-{role}-{number}",
        "labels": labels,
        "creationTimestamp": f"2025-11-24T09:00:0{number}Z",
    }
    return {"metadata": metadata, "status": {"phase": phase, **status}}


def ended(code: int, reason: str = "Completed") -> dict[str, Any]:
    return {"containerStatuses": [{"state": {"terminated": {"exitCode": code, "reason": reason}}}]}


def waiting(reason: str, message: str) -> dict[str, Any]:
    return {"containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}}]}


def pods(*items: dict[str, Any]) -> list[Any]:
    return [0, json.dumps({"items": items}), ""]


WORKERS = (pod("worker", 0, "Running"), pod("worker", 1, "Running"))
NOTHING = [0, json.dumps({"items": []}), ""]
#: A cluster with the operator, on which the job starts at once and ends well.
ANSWERS: dict[str, Any] = {
    "raw": [[0, '{"resources": [{"name": "mpijobs"}]}', ""]],
    "mpijobs": [[0, "", ""], [0, job(), ""]],
    "pods": [
        pods(*WORKERS, pod("launcher", 0, "Running")),
        pods(*WORKERS, pod("launcher", 0, "Succeeded", **ended(0))),
    ],
    "events": [NOTHING],
    "create": [[0, f"mpijob.kubeflow.org/{NAME} created\n", ""]],
    "delete": [[0, "", ""]],
    "logs": [[0, "epoch 0: top-1 error 12.5 %\n", ""]],
    "seconds": 0,
}


class Kubectl:
    """The fake on PATH, and what it was asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "kubectl").write_text(FAKE.format(python=sys.executable), "utf-8")
        (folder / "kubectl").chmod(0o755)
        self.answers()
        self.said: list[str] = []

    def answers(self, **changed: Any) -> None:
        (self.folder / "answers.json").write_text(json.dumps(ANSWERS | changed), "utf-8")

    def submit(self) -> int:
        return submit([JOB], self.said.append, poll_seconds=0)

    @property
    def calls(self) -> list[dict[str, Any]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []

    def called(self, verb: str) -> list[dict[str, Any]]:
        return [call for call in self.calls if call["words"][1] == verb]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    monkeypatch.setenv("PATH", str(tmp_path))
    return Kubectl(tmp_path)


def refusal(call: Callable[[], object]) -> str:
    """The one line that a user sees."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_job_is_applied_followed_and_its_exit_status_returned(
    kubectl: Kubectl, capfd: pytest.CaptureFixture[str]
) -> None:
    assert kubectl.submit() == 0
    assert capfd.readouterr().out == "epoch 0: top-1 error 12.5 %\n"
    (create,) = kubectl.called("create")
    assert create["words"] == ["--namespace=vision", "create", "--validate=strict", "-f", "-"]
    assert yaml.safe_load(create["stdin"]) == JOB
    (logs,) = kubectl.called("logs")
    assert logs["words"] == ["--namespace=vision", "logs", "--follow", f"pod/{NAME}-launcher-0"]
    assert not kubectl.called("delete")
    assert kubectl.said == [
        f"MPIJob {NAME} submitted to namespace vision",
        "the launcher ended with exit status 0",
    ]


def test_without_kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refusal(lambda: submit([JOB], print))
    assert message.startswith("--submit needs kubectl, and there is none on PATH: install it")


NO_CLUSTER = """E1124 09:00:00.000000 1 memcache.go:265] "Unhandled Error" err="couldn't get the API group list"
The connection to the server localhost:8080 was refused - did you specify the right host or port?
"""


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            [1, "", NO_CLUSTER],
            "does not reach a cluster (The connection to the server localhost:8080 was refused",
        ),
        (
            [1, "", "error: You must be logged in to the server (Unauthorized)\n"],
            "does not reach a cluster (error: You",
        ),
        (
            [1, "", "Error from server (NotFound): the server could not find it\n"],
            "this cluster has no MPIJob of",
        ),
        (
            [0, '{"resources": [{"name": "tfjobs"}]}', ""],
            "this cluster has no MPIJob of kubeflow.org/v2beta1",
        ),
    ],
    ids=["no cluster", "no access", "no operator", "another operator"],
)
def test_a_cluster_that_cannot_run_it(kubectl: Kubectl, raw: list[Any], message: str) -> None:
    kubectl.answers(raw=[raw])
    assert message in refusal(kubectl.submit)
    assert not kubectl.called("create")


def test_a_job_that_the_cluster_refuses(kubectl: Kubectl) -> None:
    error = (
        'Error from server (BadRequest): strict decoding error: unknown field "spec.launcherCreationPolicy"\n'
    )
    kubectl.answers(create=[[1, "", error]])
    assert refusal(kubectl.submit) == f"kubectl create failed for MPIJob {NAME}: {error.strip()}"


@pytest.mark.parametrize("code", [1, 2, 130, 137])
def test_a_failing_launcher_gives_its_exit_status(kubectl: Kubectl, code: int) -> None:
    failed = pods(*WORKERS, pod("launcher", 0, "Failed", **ended(code, "Error")))
    kubectl.answers(pods=[pods(*WORKERS, pod("launcher", 0, "Running")), failed])
    assert kubectl.submit() == code
    assert kubectl.said[-1] == f"the launcher ended with exit status {code}"


def test_a_launcher_that_has_ended_already_still_shows_its_log(
    kubectl: Kubectl, capfd: pytest.CaptureFixture[str]
) -> None:
    kubectl.answers(pods=[pods(*WORKERS, pod("launcher", 0, "Failed", **ended(2, "Error")))])
    assert kubectl.submit() == 2
    assert capfd.readouterr().out == "epoch 0: top-1 error 12.5 %\n"


def test_an_evicted_launcher_has_failed(kubectl: Kubectl) -> None:
    kubectl.answers(pods=[pods(pod("launcher", 0, "Running")), pods(pod("launcher", 0, "Failed"))])
    assert kubectl.submit() == 1


def test_a_log_that_breaks_off_goes_on(kubectl: Kubectl) -> None:
    running = pods(*WORKERS, pod("launcher", 0, "Running"))
    kubectl.answers(pods=[running, running, *ANSWERS["pods"]])
    assert kubectl.submit() == 0
    since = [call["words"][3:-1] for call in kubectl.called("logs")]
    assert since[0] == []
    assert set(map(tuple, since[1:])) == {("--since=5s",)}


def test_a_cluster_that_is_out_of_reach_for_a_while_is_asked_again(kubectl: Kubectl) -> None:
    away = [1, "", "Unable to connect to the server: net/http: TLS handshake timeout\n"]
    kubectl.answers(pods=[away, away, ANSWERS["pods"][0], away, ANSWERS["pods"][1]])
    assert kubectl.submit() == 0
    reason = "kubectl get: Unable to connect to the server: net/http: TLS handshake timeout; asking again"
    assert kubectl.said[1:] == [reason, "the launcher ended with exit status 0"]


@pytest.mark.slow
def test_one_that_stays_away_ends_the_following(kubectl: Kubectl) -> None:
    kubectl.answers(pods=[[1, "", "Unable to connect to the server: EOF\n"]])
    message = refusal(kubectl.submit)
    assert message == f"kubectl get failed for MPIJob {NAME}: Unable to connect to the server: EOF"


def test_pods_that_may_not_be_read(kubectl: Kubectl) -> None:
    kubectl.answers(
        pods=[[1, "", 'Error from server (Forbidden): pods is forbidden: User "x" cannot list\n']]
    )
    assert "pods is forbidden" in refusal(kubectl.submit)
    assert not any("asking again" in line for line in kubectl.said)


def test_events_that_may_not_be_read_do_not_matter(kubectl: Kubectl) -> None:
    forbidden = [1, "", "Error from server (Forbidden): events is forbidden\n"]
    kubectl.answers(pods=[pods(*WORKERS), *ANSWERS["pods"]], events=[forbidden])
    assert kubectl.submit() == 0


def test_a_deleted_launcher(kubectl: Kubectl) -> None:
    kubectl.answers(pods=[pods(*WORKERS, pod("launcher", 0, "Running")), pods(*WORKERS)])
    assert kubectl.submit() == 1
    assert kubectl.said[-1] == f"the launcher pod {NAME}-launcher-0 was deleted"


@pytest.mark.slow
def test_what_keeps_it_from_starting_is_said_once(kubectl: Kubectl) -> None:
    unschedulable = {
        "conditions": [
            {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": "0/3 nodes are available:\n3 Insufficient nvidia.com/gpu.",
            }
        ]
    }
    no_room = pods(pod("worker", 0, "Pending", **unschedulable), pod("worker", 1, "Pending", **unschedulable))
    no_image = pods(
        pod("worker", 0, "Running"), pod("worker", 1, "Pending", **waiting("ErrImagePull", "not found"))
    )
    making = pods(
        pod("worker", 0, "Running"), pod("worker", 1, "Pending", **waiting("ContainerCreating", ""))
    )
    quota = {"reason": "MPIJobFailed", "message": "worker pod created failed: exceeded quota"}
    kubectl.answers(
        pods=[no_room, no_room, making, no_image, pods(*WORKERS), *ANSWERS["pods"]],
        events=[NOTHING, [0, json.dumps({"items": [quota]}), ""], NOTHING],
    )
    assert kubectl.submit() == 0
    assert kubectl.said[1:-1] == [
        "2 pods waiting, Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        "0 of 2 worker pods running",
        "MPIJobFailed: worker pod created failed: exceeded quota",
        "1 of 2 worker pods running",
        "1 pod waiting, ErrImagePull: not found",
        "2 of 2 worker pods running",
    ]


def test_a_worker_that_ends_before_the_launcher_starts(kubectl: Kubectl) -> None:
    kubectl.answers(
        pods=[pods(pod("worker", 0, "Running"), pod("worker", 1, "Failed", **ended(255, "Error")))]
    )
    assert kubectl.submit() == 1
    assert kubectl.said[-1] == (
        f"{NAME}-worker-1 ended with exit status 255, so the job cannot start: see `kubectl -n vision logs "
        f"{NAME}-worker-1`, then `kubectl -n vision delete mpijobs.v2beta1.kubeflow.org {NAME}`"
    )


def test_a_job_in_a_queue_says_so(kubectl: Kubectl) -> None:
    suspended = json.loads(job())
    suspended["spec"]["runPolicy"]["suspend"] = True
    kubectl.answers(mpijobs=[[0, "", ""], [0, json.dumps(suspended), ""]], pods=[pods(), *ANSWERS["pods"]])
    assert kubectl.submit() == 0
    assert kubectl.said[1] == "the job is suspended: its queue has not admitted it yet"


@pytest.mark.parametrize(
    ("after", "line"),
    [
        (
            [0, job(**conditions("Failed", "2/2 workers are evicted")), ""],
            "failed before it started: Failed, 2/2 workers",
        ),
        ([0, "", ""], f"MPIJob {NAME} was deleted"),
    ],
)
def test_a_job_that_ends_before_its_launcher_starts(kubectl: Kubectl, after: list[Any], line: str) -> None:
    kubectl.answers(mpijobs=[[0, "", ""], after], pods=[pods()])
    assert kubectl.submit() == 1
    assert line in kubectl.said[-1]


def test_the_same_command_joins_a_job_that_runs(kubectl: Kubectl) -> None:
    kubectl.answers(mpijobs=[[0, job(), ""]])
    assert kubectl.submit() == 0
    assert kubectl.said[0] == f"MPIJob {NAME} runs already in namespace vision: following it"
    assert not kubectl.called("create")


@pytest.mark.parametrize("kind", ["Failed", "Succeeded"])
def test_the_same_command_starts_a_job_that_has_ended_again(kubectl: Kubectl, kind: str) -> None:
    kubectl.answers(mpijobs=[[0, job(**conditions(kind, "it is over")), ""], [0, job(), ""]])
    assert kubectl.submit() == 0
    (delete,) = kubectl.called("delete")
    assert delete["words"][2:] == [
        "mpijobs.v2beta1.kubeflow.org",
        NAME,
        "--cascade=foreground",
        "--wait=true",
    ]
    assert kubectl.called("create")


def of_another(annotations: dict[str, str] | None, **more: Any) -> str:
    """A job of the same name that this run has not made."""
    other = json.loads(job(**more))
    other["metadata"]["annotations"] = annotations
    return json.dumps(other)


@pytest.mark.parametrize("state", [{}, conditions("Succeeded", "over"), conditions("Failed", "over")])
@pytest.mark.parametrize(
    ("annotations", "of"),
    [
        ({"hvd-lb-output": "pvc:runs/bob/digits"}, "is of the run in pvc:runs/bob/digits"),
        ({"hvd-lb-run": "digits"}, "is not of hvd-lb"),
        (None, "is not of hvd-lb"),
    ],
)
def test_the_job_of_another_run_is_neither_followed_nor_deleted(
    kubectl: Kubectl, state: dict[str, Any], annotations: dict[str, str] | None, of: str
) -> None:
    kubectl.answers(mpijobs=[[0, of_another(annotations, **state), ""]])
    assert refusal(kubectl.submit) == (
        f"the MPIJob {NAME} in namespace vision {of}, and nothing of others is changed: choose another --output or "
        "--k8s-namespace"
    )
    assert not [call for call in kubectl.calls if call["words"][1] != "get"]


def test_a_job_of_this_run_that_runs_with_another_command_is_left_alone(kubectl: Kubectl) -> None:
    annotations = {**JOB["metadata"]["annotations"], "hvd-lb-command": "0123456789abcdef"}
    kubectl.answers(mpijobs=[[0, of_another(annotations), ""]])
    said = refusal(kubectl.submit)
    assert said.startswith(
        f"MPIJob {NAME} of this run is there already, with another command line: type that one"
    )
    assert said.endswith(f"(kubectl -n vision delete mpijobs.v2beta1.kubeflow.org {NAME})")
    assert not [call for call in kubectl.calls if call["words"][1] != "get"]


def test_when_that_one_has_ended_the_new_command_goes_on(kubectl: Kubectl) -> None:
    annotations = {**JOB["metadata"]["annotations"], "hvd-lb-command": "0123456789abcdef"}
    over = of_another(annotations, **conditions("Failed", "over"))
    kubectl.answers(mpijobs=[[0, over, ""], [0, job(), ""]])
    assert kubectl.submit() == 0
    assert kubectl.called("delete")
    assert kubectl.called("create")


def test_a_job_that_somebody_makes_at_the_same_moment_is_not_changed(kubectl: Kubectl) -> None:
    error = f'Error from server (AlreadyExists): mpijobs.kubeflow.org "{NAME}" already exists\n'
    kubectl.answers(create=[[1, "", error]])
    assert refusal(kubectl.submit) == f"kubectl create failed for MPIJob {NAME}: {error.strip()}"


FOLLOW = """
import json, sys
from hvd_lb.launch.submit.kubernetes.follow import submit
sys.exit(submit([json.load(sys.stdin)], lambda line: print(line, flush=True), poll_seconds=0.1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["waiting", "following"])
def test_ctrl_c_leaves_the_job_and_says_what_to_type(kubectl: Kubectl, stage: str) -> None:
    if stage == "waiting":
        kubectl.answers(pods=[pods(pod("worker", 0, "Running"))])
    else:
        kubectl.answers(seconds=60)
    environment = {**os.environ, "PATH": str(kubectl.folder)}
    with subprocess.Popen(
        [sys.executable, "-c", FOLLOW],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(JOB))
        process.stdin.close()
        expected = "1 of 2 worker pods running\n" if stage == "waiting" else "epoch 0: top-1 error 12.5 %\n"
        seen = [f"MPIJob {NAME} submitted to namespace vision\n", expected]
        assert [process.stdout.readline(), process.stdout.readline()] == seen
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        rest = process.stdout.read()
        assert process.wait(20) == 130
    assert rest.splitlines() == farewell(MPIJOB, "vision", NAME)
    assert not kubectl.called("delete")


def test_without_following_a_job_is_left_at_once(kubectl: Kubectl) -> None:
    assert submit([JOB], kubectl.said.append, follow=False) == 0
    assert not kubectl.called("logs")
    assert kubectl.said[0] == f"MPIJob {NAME} submitted to namespace vision"
    assert kubectl.said[1:] == farewell(MPIJOB, "vision", NAME)


def test_the_farewell_can_be_typed() -> None:
    assert farewell(MPIJOB, "vision", NAME) == [
        f"MPIJob {NAME} runs on.",
        f"follow it:               the same command again, or kubectl -n vision logs -f job/{NAME}-launcher",
        f"end with a checkpoint:   kubectl -n vision exec job/{NAME}-launcher -- sh -c 'kill -TERM 1'",
        f"end at once, remove all: kubectl -n vision delete mpijobs.v2beta1.kubeflow.org {NAME}",
    ]


@pytest.mark.slow
@pytest.mark.skipif(REAL_KUBECTL is None, reason="needs kubectl")
def test_the_real_kubectl_understands_every_call(kubectl: Kubectl) -> None:
    kubectl.answers(
        mpijobs=[[0, job(**conditions("Failed", "it is over")), ""], [0, job(), ""]],
        pods=[pods(pod("worker", 0, "Running")), *(ANSWERS["pods"][:1] * 2), *ANSWERS["pods"]],
    )
    kubectl.submit()
    typed = [shlex.split(line.rpartition("kubectl ")[2]) for line in farewell(MPIJOB, "vision", NAME)[1:]]
    calls = [*((call["words"], call["stdin"]) for call in kubectl.calls), *((words, "") for words in typed)]
    for words, stdin in {tuple(words): (words, stdin) for words, stdin in calls}.values():
        done = subprocess.run(
            [str(REAL_KUBECTL), "--server=http://127.0.0.1:1", *words],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin", "HOME": str(kubectl.folder), "KUBECONFIG": "/dev/null"},
        )
        assert done.returncode != 0
        assert "127.0.0.1:1 was refused" in done.stderr or "connection refused" in done.stderr, (
            words,
            done.stderr,
        )


@pytest.mark.skipif(REAL_KUBECTL is None, reason="needs kubectl")
def test_the_real_kubectl_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    message = refusal(lambda: submit([JOB], print))
    assert message.startswith(
        "kubectl does not reach a cluster (The connection to the server localhost:8080 was refused"
    )
