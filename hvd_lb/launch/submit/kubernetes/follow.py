"""Submitting an MPIJob with kubectl and following it to its end: `--launcher kubernetes --submit`.

The cluster is the one that kubectl's current context names.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.kubernetes.manifest import API_VERSION, Manifest, to_yaml

_RESOURCE = "mpijobs.v2beta1.kubeflow.org"
_TIMEOUT = "--request-timeout=30s"
_INTERRUPTED = 130
_TRIES = 30


def submit(manifest: Manifest, say: Callable[[str], None], *, poll_seconds: float = 2.0) -> int:
    """Start the job, or join it where it runs already, show its log, and return the launcher's exit status.

    A job of that name that has ended is replaced. Ctrl-C leaves the job running (130).
    UserError when kubectl, the cluster or the operator is not there, or the cluster refuses the job.
    """
    cluster = _SubmittedJob(
        manifest["metadata"]["namespace"], manifest["metadata"]["name"], say, poll_seconds
    )
    cluster.check_operator()
    start(cluster, manifest)
    try:
        return cluster.follow()
    except KeyboardInterrupt:
        for line in farewell(cluster.namespace, cluster.name):
            say(line)
        return _INTERRUPTED


def start(cluster: _SubmittedJob, manifest: Manifest) -> None:
    """Create the job unless it runs already, in place of one that has ended."""
    job = cluster.job()
    if job is not None and _ending(job) is None:
        cluster.say(f"MPIJob {cluster.name} runs already in namespace {cluster.namespace}: following it")
        return
    if job is not None:
        cluster.say(f"MPIJob {cluster.name} has ended: starting it again")
        # In the foreground: with the old launcher still there, the operator would not make a new one.
        cluster.run("delete", _RESOURCE, cluster.name, "--cascade=foreground", "--wait=true")
    cluster.run("apply", "--validate=strict", "-f", "-", stdin=to_yaml(manifest))
    cluster.say(f"MPIJob {cluster.name} submitted to namespace {cluster.namespace}")


def farewell(namespace: str, name: str) -> list[str]:
    """What to type to go on after an interruption: the job runs on."""
    kubectl = f"kubectl -n {shlex.quote(namespace)}"
    return [
        f"MPIJob {name} runs on.",
        f"follow it:               the same command again, or {kubectl} logs -f job/{name}-launcher",
        # Not by deleting the pod: Kubernetes may then take the job for failed, and its worker pods away, at once.
        f"end with a checkpoint:   {kubectl} exec job/{name}-launcher -- sh -c 'kill -TERM 1'",
        f"end at once, remove all: {kubectl} delete {_RESOURCE} {name}",
    ]


def no_start(namespace: str, name: str, pod: str, status: int) -> str:
    """What to do about a worker pod that has ended before the launcher pod was there: the operator waits for ever."""
    kubectl = f"kubectl -n {shlex.quote(namespace)}"
    return (
        f"{pod} ended with exit status {status}, so the job cannot start: see `{kubectl} logs {pod}`, "
        f"then `{kubectl} delete {_RESOURCE} {name}`"
    )


class _SubmittedJob:
    """One job of a cluster, as kubectl shows it."""

    def __init__(self, namespace: str, name: str, say: Callable[[str], None], poll_seconds: float):
        found = shutil.which("kubectl")
        if found is None:
            raise UserError(
                "--submit needs kubectl, and there is none on PATH: install it (kubernetes.io/docs/tasks/tools), or "
                "leave --submit out and pass the printed manifest to `kubectl apply -f -` where there is one"
            )
        self.namespace, self.name, self.say = namespace, name, say
        self._kubectl, self._poll_seconds = found, poll_seconds
        self._said: set[str] = set()

    def run(self, *arguments: str, stdin: str | None = None) -> str:
        """The output of kubectl in the job's namespace; UserError with its last line when it fails."""
        done = self._call(*arguments, stdin=stdin)
        if done.returncode:
            raise UserError(
                f"kubectl {arguments[0]} failed for MPIJob {self.name}: {_last_line(done.stderr)}"
            )
        return done.stdout

    def ask(self, *arguments: str) -> str:
        """As `run`, for what only looks: a cluster that is out of reach for a while is asked again."""
        for _ in range(_TRIES - 1):
            done = self._call(*arguments, _TIMEOUT)
            if not done.returncode:
                return done.stdout
            reason = _last_line(done.stderr)
            if any(
                f"({final})" in reason for final in ("Forbidden", "NotFound", "Unauthorized", "BadRequest")
            ):
                break
            self._say_once([f"kubectl {arguments[0]}: {reason}; asking again"])
            time.sleep(self._poll_seconds)
        return self.run(*arguments, _TIMEOUT)

    def check_operator(self) -> None:
        done = self._call("get", "--raw", f"/apis/{API_VERSION}", _TIMEOUT)
        reason = _last_line(done.stderr)
        if done.returncode and "NotFound" not in reason:
            raise UserError(
                f"kubectl does not reach a cluster ({reason}): expected one in `kubectl config current-context`; try "
                "`kubectl cluster-info`"
            )
        if done.returncode or '"mpijobs"' not in done.stdout:
            raise UserError(
                f"this cluster has no MPIJob of {API_VERSION}: install the MPI operator, release 0.5 or newer, see "
                "docs/kubernetes.md"
            )

    def job(self) -> dict[str, Any] | None:
        """The MPIJob, or None where there is none."""
        text = self.ask("get", _RESOURCE, self.name, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def follow(self) -> int:
        """Show what keeps the job from starting, then the launcher's log; the launcher's exit status."""
        launcher = self._wait_for_launcher()
        if launcher is None:
            return 1
        name, since = launcher["metadata"]["name"], list[str]()
        while True:
            subprocess.run(self._words("logs", "--follow", *since, f"pod/{name}"), check=False)
            pod = next((pod for pod in self._pods() if pod["metadata"]["name"] == name), None)
            if pod is None:
                self.say(f"the launcher pod {name} was deleted")
                return 1
            if (status := _exit_status(pod)) is not None:
                self.say(f"the launcher ended with exit status {status}")
                return status
            time.sleep(self._poll_seconds)
            since = ["--since=5s"]  # a log of hours may break off; it goes on about where it was

    def _wait_for_launcher(self) -> dict[str, Any] | None:
        """The launcher pod, once it has started; None, with the reason said, when it never will."""
        while True:
            pods, job = self._pods(), self.job()
            launchers = [pod for pod in pods if _role(pod) == "launcher" and _phase(pod) != "Pending"]
            if launchers:
                return max(launchers, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
            if job is None:
                self.say(f"MPIJob {self.name} was deleted")
                return None
            self._say_once([*_obstacles(pods), *self._warnings(job), _progress(pods, job)])
            if ending := _ending(job):
                self.say(f"MPIJob {self.name} failed before it started: {ending}")
                return None
            for pod in pods:
                if (status := _exit_status(pod)) is not None:
                    self.say(no_start(self.namespace, self.name, pod["metadata"]["name"], status))
                    return None
            time.sleep(self._poll_seconds)

    def _say_once(self, lines: Iterable[str]) -> None:
        for line in lines:
            if line not in self._said:
                self.say(line)
                self._said.add(line)

    def _pods(self) -> list[dict[str, Any]]:
        label = f"training.kubeflow.org/job-name={self.name}"
        return _items(self.ask("get", "pods", "-l", label, "-o", "json"))

    def _warnings(self, job: dict[str, Any]) -> list[str]:
        """What the operator complains of: a job that is not valid, pods that a quota forbids. Not all may read that."""
        of_job = f"type=Warning,involvedObject.uid={job['metadata'].get('uid', '')}"
        done = self._call("get", "events", "--field-selector", of_job, "-o", "json", _TIMEOUT)
        events = [] if done.returncode else _items(done.stdout)
        return [f"{event.get('reason')}: {_one_line(event.get('message'))}" for event in events]

    def _call(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._words(*arguments), input=stdin or "", capture_output=True, text=True, check=False
        )

    def _words(self, *arguments: str) -> list[str]:
        return [self._kubectl, f"--namespace={self.namespace}", *arguments]


def _items(text: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads(text).get("items", [])
    return items


def _role(pod: dict[str, Any]) -> str:
    return str(pod["metadata"].get("labels", {}).get("training.kubeflow.org/job-role"))


def _phase(pod: dict[str, Any]) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [one.get("state", {}) for one in pod.get("status", {}).get("containerStatuses", [])]


def _ending(job: dict[str, Any]) -> str | None:
    """How an MPIJob ended, or None while it has not."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Succeeded", "Failed") and condition["status"] == "True":
            return f"{condition['type']}, {_one_line(condition.get('message'))}"
    return None


def _exit_status(pod: dict[str, Any]) -> int | None:
    """The exit status of a pod's process, or None while it runs; 1 for a pod that failed without one (evicted)."""
    for state in _containers(pod):
        if ended := state.get("terminated"):
            return int(ended["exitCode"])
    return 1 if _phase(pod) == "Failed" else None


def _obstacles(pods: Iterable[dict[str, Any]]) -> list[str]:
    """Why pods that have not started have not, each reason once with the number of pods."""
    reasons: dict[str, int] = {}
    for pod in pods:
        unscheduled = [
            condition
            for condition in pod.get("status", {}).get("conditions", [])
            if condition["type"] == "PodScheduled" and condition["status"] == "False"
        ]
        waiting = [state["waiting"] for state in _containers(pod) if "waiting" in state]
        for what in (*unscheduled, *waiting):
            if what.get("reason") not in ("ContainerCreating", "PodInitializing"):
                reason = f"{what.get('reason')}: {_one_line(what.get('message'))}"
                reasons[reason] = reasons.get(reason, 0) + 1
    return [f"{count} pod{'s' if count > 1 else ''} waiting, {reason}" for reason, count in reasons.items()]


def _progress(pods: Iterable[dict[str, Any]], job: dict[str, Any]) -> str:
    """How far the start has come."""
    if job["spec"].get("runPolicy", {}).get("suspend"):
        return "the job is suspended: its queue has not admitted it yet"
    workers = job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
    running = sum(_role(pod) == "worker" and _phase(pod) == "Running" for pod in pods)
    return f"{running} of {workers} worker pods running"


def _one_line(text: object) -> str:
    return " ".join(str(text or "no message").split())


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
