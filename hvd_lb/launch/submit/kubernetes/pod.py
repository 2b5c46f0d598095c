"""The pods of a job, whatever kind of job it is: their containers, devices, volumes, and what they may do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions, Toleration
from hvd_lb.launch.submit.kubernetes.volumes import Volume, pod_volumes, volume_mounts
from hvd_lb.report.run_directory import RunDirectory

# The image's unprivileged user. ssh looks for keys in the home that /etc/passwd names, so another uid would find none.
_USER_ID, _HOME, _ROOT_HOME = 1000, "/home/hvd-lb", "/root"
LABELS = {"app.kubernetes.io/name": "hvd-lb"}
_MEMORY = "shared-memory"
# Arguments: the file by which a run is asked to stop (launch/stopping), and the process whose children are waited for.
_PRE_STOP = """stop=$1 pid=$2
busy() { [ "`cat /proc/$pid/task/*/children`" ]; }
busy && printf 15 > "$stop"
while busy; do sleep 1; done"""

# Of an elastic run only the ranks of this pod end. (The pattern does not match the words of this script itself.)
_PRE_STOP_ELASTIC = """pid=$1
busy() { [ "`cat /proc/$pid/task/*/children`" ]; }
for process in /proc/[0-9]*; do
  grep -qs '[h]vd_lb.launch.agent.host' "$process/cmdline" && kill -TERM "${process#/proc/}"
done
while busy; do sleep 1; done"""

Manifest = dict[str, Any]


def home(options: KubernetesOptions) -> str:
    """Of the user that the pods run as."""
    return _ROOT_HOME if options.root else _HOME


def job_metadata(
    name: str, options: KubernetesOptions, annotations: Mapping[str, str] | None = None
) -> Manifest:
    """Of the job itself; the user's labels and annotations are on its pods, too."""
    queue = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    return {
        "name": name,
        "namespace": options.namespace,
        "labels": {**LABELS, **queue, **options.labels},
        "annotations": {**options.annotations, **(annotations or {})},
    }


def container(submission: Submission, options: KubernetesOptions, name: str, more: Manifest) -> Manifest:
    """One of the image, with the run's variables; without what is empty in `more`."""
    environment = [{"name": key, "value": literal(value)} for key, value in submission.environment.items()]
    parts = {
        "name": name,
        "image": _checked_image(submission),
        "env": environment,
        "securityContext": _container_security(options.root),
        **more,
    }
    return {key: value for key, value in parts.items() if value not in ([], {})}


def pod(container: Manifest, options: KubernetesOptions, volumes: list[Manifest], more: Manifest) -> Manifest:
    """The template of a pod with one container; `more` are fields of its spec."""
    spec: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **({"serviceAccountName": options.service_account} if options.service_account else {}),
        **({"priorityClassName": options.priority_class} if options.priority_class else {}),
        **({"imagePullSecrets": [{"name": options.pull_secret}]} if options.pull_secret else {}),
        "securityContext": _pod_security(options.root),
        "terminationGracePeriodSeconds": options.grace_seconds,
        **more,
        **({"tolerations": [_toleration(one) for one in options.tolerations]} if options.tolerations else {}),
        "containers": [container],
        **({"volumes": volumes} if volumes else {}),
    }
    # A service mesh's proxy would stand between the ranks, and keep the pods from ending.
    labels = {**LABELS, "sidecar.istio.io/inject": "false", **options.labels}
    annotations = {"annotations": dict(options.annotations)} if options.annotations else {}
    return {"metadata": {"labels": labels, **annotations}, "spec": spec}


def computing(options: KubernetesOptions) -> Manifest:
    """What says on which nodes the pods with ranks run, and how; fields of a pod's spec."""
    return {
        **({"runtimeClassName": options.runtime_class} if options.runtime_class else {}),
        **({"nodeSelector": dict(options.node_selector)} if options.node_selector else {}),
    }


def computing_resources(submission: Submission, options: KubernetesOptions) -> Manifest:
    """A GPU for each rank of the pod, and what else the user asked for."""
    memory = {"memory": options.memory} if options.memory else {}
    requests = {**({"cpu": options.cpus} if options.cpus else {}), **memory}
    devices = {options.gpu_resource: slots(submission)} if submission.device == "cuda" else {}
    limits = {**memory, **devices, **options.resources}
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def ending_well(submission: Submission) -> Manifest:
    """What a pod with ranks does when it is told to end, as its node is drained: first the run ends, with a checkpoint.

    An elastic run goes on without this pod's ranks, which leave after the present step. The ranks are below its first
    process, sshd or torchrun; where there are none, it ends at once. In hooks Kubernetes replaces no $(NAME).
    """
    if submission.elastic:
        return {"preStop": {"exec": {"command": ["sh", "-c", _PRE_STOP_ELASTIC, "sh", "1"]}}}
    stop = str(RunDirectory(submission.output).stop)
    return {"preStop": {"exec": {"command": ["sh", "-c", _PRE_STOP, "sh", stop, "1"]}}}


def computing_volumes(volumes: Iterable[Volume], options: KubernetesOptions) -> list[Manifest]:
    """The user's, and /dev/shm."""
    memory = {"name": _MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}}
    return [memory, *pod_volumes(volumes)]


def computing_mounts(volumes: Iterable[Volume]) -> list[Manifest]:
    return [{"name": _MEMORY, "mountPath": "/dev/shm"}, *volume_mounts(volumes)]


def slots(submission: Submission) -> int:
    """Ranks of a pod, and its GPUs; the last one may have some left over."""
    return min(submission.per_node, submission.processes)


def literal(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and environments; a doubled $ stands for itself."""
    return text.replace("$", "$$")


def _pod_security(root: bool) -> Manifest:
    if root:
        return {"runAsUser": 0, "runAsGroup": 0}
    return {
        "runAsUser": _USER_ID,
        "runAsGroup": _USER_ID,
        "runAsNonRoot": True,
        # The volumes become writable for this group; OnRootMismatch, as to change a million files takes an hour.
        "fsGroup": _USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security(root: bool) -> Manifest:
    if root:  # Kubernetes knows no ulimits: IPC_LOCK lifts that on locked memory. sshd changes its root.
        return {"capabilities": {"add": ["IPC_LOCK", "SYS_CHROOT"]}}
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _toleration(toleration: Toleration) -> Manifest:
    value = {"operator": "Exists"} if toleration.value is None else {"value": toleration.value}
    effect = {"effect": toleration.effect} if toleration.effect else {}
    return {"key": toleration.key, **value, **effect}


def _checked_image(submission: Submission) -> str:
    if not submission.image:
        raise UserError(
            "--launcher kubernetes without --image: pods are made from an image, name the one to run, "
            "such as --image ghcr.io/hvd-lb/hvd-lb:0.1.0"
        )
    return submission.image
