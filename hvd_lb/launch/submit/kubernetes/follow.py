"""Submitting a job with kubectl and following it to its end: `--launcher kubernetes --submit`.

The cluster is the one that kubectl's current context names. What is there under the job's name is only followed or
replaced when it is this run's.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.kubernetes.kinds import JobKind, kind_of, one_line, resource
from hvd_lb.launch.submit.kubernetes.manifest import to_yaml
from hvd_lb.launch.submit.kubernetes.names import COMMAND, whose
from hvd_lb.launch.submit.kubernetes.pod import Manifest

_TIMEOUT = "--request-timeout=30s"
_INTERRUPTED = 130
_TRIES = 30


def submit(
    documents: Sequence[Manifest],
    say: Callable[[str], None],
    *,
    follow: bool = True,
    poll_seconds: float = 2.0,
) -> int:
    """Start the job, or join it where it runs already, show its log, and return the exit status of the run.

    `documents` are what it is made of, the job itself last. One of this run that has ended is replaced. Ctrl-C leaves
    the job running (130), and without `follow` it is left at once (0). UserError when kubectl, the cluster or the
    operator is not there, the cluster refuses the job, or another run has its name.
    """
    cluster = _SubmittedJob(documents[-1], say, poll_seconds)
    cluster.check_operator()
    start(cluster, documents)
    status = 0
    try:
        if follow:
            return cluster.follow()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    for line in farewell(cluster.kind, cluster.namespace, cluster.name):
        say(line)
    return status


def start(cluster: _SubmittedJob, documents: Sequence[Manifest]) -> None:
    """Create the job unless it runs already, in place of one of this run that has ended."""
    job = documents[-1]
    name = f"{job['kind']} {cluster.name}"
    found = [cluster.find(document) for document in documents]
    for document, present in zip(documents, found, strict=True):
        _refuse_others(document, present)
    there = found[-1]
    if there is not None and cluster.kind.ending(there) is None:
        ours = job["metadata"]["annotations"].get(COMMAND)
        if there["metadata"].get("annotations", {}).get(COMMAND) != ours:
            raise UserError(
                f"{name} of this run is there already, with another command line: type that one to follow it, or end "
                f"it first (kubectl -n {cluster.namespace} delete {cluster.kind.resource} {cluster.name})"
            )
        cluster.say(f"{name} runs already in namespace {cluster.namespace}: following it")
        return
    if there is not None:
        cluster.say(f"{name} has ended: starting it again")
    for document in (
        document for document, present in [*zip(documents, found, strict=True)][::-1] if present
    ):
        # In the foreground: with the old pods still there, the operator would not make new ones.
        cluster.run("delete", resource(document), cluster.name, "--cascade=foreground", "--wait=true")
    # Not `apply`, which would change a job that somebody else has made in this moment.
    cluster.run("create", "--validate=strict", "-f", "-", stdin=to_yaml(documents))
    cluster.say(f"{name} submitted to namespace {cluster.namespace}")


def _refuse_others(document: Manifest, present: dict[str, Any] | None) -> None:
    """UserError when what is there under a document's name is another run's."""
    if present and (of := whose(present, document["metadata"]["annotations"])):
        name, namespace = document["metadata"]["name"], document["metadata"]["namespace"]
        raise UserError(
            f"the {document['kind']} {name} in namespace {namespace} is {of}, and nothing of others is changed: choose "
            "another --output or --k8s-namespace"
        )


def farewell(kind: JobKind, namespace: str, name: str) -> list[str]:
    """What to type to go on after an interruption: the job runs on."""
    kubectl = f"kubectl -n {shlex.quote(namespace)}"
    leader = kind.leader_job.format(name=name)
    return [
        f"{kind.name} {name} runs on.",
        f"follow it:               the same command again, or {kubectl} logs -f job/{leader}",
        # Not by deleting the pod: Kubernetes may then take the job for failed, and its worker pods away, at once.
        f"end with a checkpoint:   {kubectl} exec job/{leader} -- sh -c 'kill -TERM 1'",
        f"end at once, remove all: {kubectl} delete {kind.resource} {name}",
    ]


def no_start(kind: JobKind, namespace: str, name: str, pod: str, status: int) -> str:
    """What to do about a worker pod that has ended before the launcher pod was there: the operator waits for ever."""
    kubectl = f"kubectl -n {shlex.quote(namespace)}"
    return (
        f"{pod} ended with exit status {status}, so the job cannot start: see `{kubectl} logs {pod}`, "
        f"then `{kubectl} delete {kind.resource} {name}`"
    )


class _SubmittedJob:
    """One job of a cluster, as kubectl shows it."""

    def __init__(self, job: Manifest, say: Callable[[str], None], poll_seconds: float):
        found = shutil.which("kubectl")
        if found is None:
            raise UserError(
                "--submit needs kubectl, and there is none on PATH: install it (kubernetes.io/docs/tasks/tools), or "
                "leave --submit out and pass the printed manifest to `kubectl apply -f -` where there is one"
            )
        self.kind, self._job, self.say = kind_of(job), job, say
        self.namespace, self.name = job["metadata"]["namespace"], job["metadata"]["name"]
        self._kubectl, self._poll_seconds = found, poll_seconds
        self._said: set[str] = set()

    def run(self, *arguments: str, stdin: str | None = None) -> str:
        """The output of kubectl in the job's namespace; UserError with its last line when it fails."""
        done = self._call(*arguments, stdin=stdin)
        if done.returncode:
            raise UserError(
                f"kubectl {arguments[0]} failed for {self.kind.name} {self.name}: {_last_line(done.stderr)}"
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
        done = self._call("get", "--raw", f"/apis/{self.kind.api_version}", _TIMEOUT)
        reason = _last_line(done.stderr)
        if done.returncode and "NotFound" not in reason:
            raise UserError(
                f"kubectl does not reach a cluster ({reason}): expected one in `kubectl config current-context`; try "
                "`kubectl cluster-info`"
            )
        if done.returncode or f'"{self.kind.name.lower()}s"' not in done.stdout:
            raise UserError(
                f"this cluster has no {self.kind.name} of {self.kind.api_version}: install {self.kind.operator}, see "
                "docs/kubernetes.md"
            )

    def find(self, document: Manifest) -> dict[str, Any] | None:
        """What the cluster has under a document's name, or None."""
        name = document["metadata"]["name"]
        text = self.ask("get", resource(document), name, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def job(self) -> dict[str, Any] | None:
        """The job, or None where there is none."""
        return self.find(self._job)

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
            launchers = [pod for pod in pods if self.kind.is_leader(pod) and _phase(pod) != "Pending"]
            if launchers:
                return max(launchers, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
            if job is None:
                self.say(f"{self.kind.name} {self.name} was deleted")
                return None
            self._say_once([*_obstacles(pods), *self._warnings(job), _progress(self.kind, pods, job)])
            if ending := self.kind.ending(job):
                self.say(f"{self.kind.name} {self.name} failed before it started: {ending}")
                return None
            for pod in pods:
                if (status := _exit_status(pod)) is not None:
                    name = pod["metadata"]["name"]
                    self.say(no_start(self.kind, self.namespace, self.name, name, status))
                    return None
            time.sleep(self._poll_seconds)

    def _say_once(self, lines: Iterable[str]) -> None:
        for line in lines:
            if line not in self._said:
                self.say(line)
                self._said.add(line)

    def _pods(self) -> list[dict[str, Any]]:
        label = f"{self.kind.job_label}={self.name}"
        return _items(self.ask("get", "pods", "-l", label, "-o", "json"))

    def _warnings(self, job: dict[str, Any]) -> list[str]:
        """What the operator complains of: a job that is not valid, pods that a quota forbids. Not all may read that."""
        of_job = f"type=Warning,involvedObject.uid={job['metadata'].get('uid', '')}"
        done = self._call("get", "events", "--field-selector", of_job, "-o", "json", _TIMEOUT)
        events = [] if done.returncode else _items(done.stdout)
        return [f"{event.get('reason')}: {one_line(event.get('message'))}" for event in events]

    def _call(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._words(*arguments), input=stdin or "", capture_output=True, text=True, check=False
        )

    def _words(self, *arguments: str) -> list[str]:
        return [self._kubectl, f"--namespace={self.namespace}", *arguments]


def _items(text: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads(text).get("items", [])
    return items


def _phase(pod: dict[str, Any]) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [one.get("state", {}) for one in pod.get("status", {}).get("containerStatuses", [])]


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
                reason = f"{what.get('reason')}: {one_line(what.get('message'))}"
                reasons[reason] = reasons.get(reason, 0) + 1
    return [f"{count} pod{'s' if count > 1 else ''} waiting, {reason}" for reason, count in reasons.items()]


def _progress(kind: JobKind, pods: Iterable[dict[str, Any]], job: dict[str, Any]) -> str:
    """How far the start has come."""
    if kind.suspended(job):
        return "the job is suspended: its queue has not admitted it yet"
    running = sum(kind.computes(pod) and _phase(pod) == "Running" for pod in pods)
    return f"{running} of {kind.nodes(job)} worker pods running"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
