"""`--launcher kubernetes`: a run as an MPIJob of Kubeflow's MPI operator (kubeflow.org/v2beta1); `follow` submits it.

The operator makes a launcher pod and one worker pod per node, names these in /etc/mpi/hostfile of the launcher pod and
mounts one key pair, made for this job, in all pods. Worker pods run the image's sshd and wait; the launcher runs
`hvd-lb train ... --launcher ssh`, which finds that file.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import yaml

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions, Toleration
from hvd_lb.launch.submit.kubernetes.volumes import checked_volumes, pod_volumes, volume_mounts

#: Where the sshd of worker pods listens: no port below 1024, so no root is needed.
SSH_PORT = 12345
API_VERSION = "kubeflow.org/v2beta1"
GPU = "nvidia.com/gpu"

# The image's unprivileged user. ssh looks for keys in the home that /etc/passwd names, so another uid would find none.
_USER_ID, _HOME, _ROOT_HOME = 1000, "/home/hvd-lb", "/root"
# The longest name that leaves room for "-worker-9999" and "-launcher" in a host name of 63 characters.
_NAME_LENGTH = 50
_LABEL = {"app.kubernetes.io/name": "hvd-lb"}

Manifest = dict[str, Any]


def manifest(submission: Submission, options: KubernetesOptions) -> Manifest:
    """The MPIJob of a run; UserError when the run could not work that way."""
    image = _checked_image(submission)
    home = _ROOT_HOME if options.root else _HOME
    volumes = checked_volumes(submission, options.volumes)
    mounted = volume_mounts(volumes)
    common = {
        "image": image,
        "env": [{"name": key, "value": _literal(value)} for key, value in submission.environment.items()],
        "securityContext": _container_security(options.root),
    }
    launcher = {
        "name": "launcher",
        **common,
        "envFrom": [{"secretRef": {"name": secret}} for secret in options.secrets],
        "command": [_literal(word) for word in launcher_command(submission)],
        "resources": {"requests": {"cpu": "2", "memory": "4Gi"}},
        "volumeMounts": mounted,
    }
    worker = {
        "name": "worker",
        **common,
        "command": sshd_command(f"{home}/.ssh"),
        # Ready, and with a host name that resolves, when sshd answers. Never asked again: it may be slow under load.
        "startupProbe": {"tcpSocket": {"port": SSH_PORT}, "periodSeconds": 2, "failureThreshold": 60},
        "resources": _worker_resources(submission, options),
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}, *mounted],
    }
    shared_memory = {
        "name": "shared-memory",
        "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory},
    }
    labels = {**_LABEL, **({"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {})}
    return {
        "apiVersion": API_VERSION,
        "kind": "MPIJob",
        "metadata": {
            "name": job_name(submission.name),
            "namespace": options.namespace,
            "labels": labels,
            "annotations": {
                "hvd-lb-run": _text(submission.name),
                "hvd-lb-output": _text(str(submission.output)),
            },
        },
        "spec": {
            "slotsPerWorker": _slots(submission),
            "mpiImplementation": "OpenMPI",
            "sshAuthMountPath": f"{home}/.ssh",
            "launcherCreationPolicy": "WaitForWorkersReady",
            # Not tried again by itself: the same command goes on from the last checkpoint.
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 0},
            "mpiReplicaSpecs": {
                "Launcher": {
                    "replicas": 1,
                    "restartPolicy": "Never",
                    # When its node is drained, hvd-lb writes a checkpoint, for which there has to be time.
                    "template": _pod(
                        launcher,
                        options,
                        pod_volumes(volumes),
                        {"terminationGracePeriodSeconds": 300},
                    ),
                },
                "Worker": {
                    "replicas": submission.nodes,
                    "restartPolicy": "Never",
                    "template": _pod(
                        worker,
                        options,
                        [shared_memory, *pod_volumes(volumes)],
                        {"nodeSelector": dict(options.node_selector)} if options.node_selector else {},
                    ),
                },
            },
        },
    }


def launcher_command(submission: Submission) -> list[str]:
    """What runs in the launcher pod. sshd gives sessions none of a pod's variables: the launcher hands them on."""
    variables = [word for name in submission.environment for word in ("--env", name)]
    return ["hvd-lb", *submission.arguments, *variables, "--launcher", "ssh", "--ssh-port", str(SSH_PORT)]


def job_name(name: str) -> str:
    """`name` itself where Kubernetes takes it for a service and in host names, else what it can take and a hash."""
    if re.fullmatch(rf"[a-z](?:[a-z0-9-]{{0,{_NAME_LENGTH - 2}}}[a-z0-9])?", name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    words = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    if not re.match("[a-z]", words):
        words = f"hvd-lb-{words}"
    return f"{words[: _NAME_LENGTH - 1 - len(digest)].strip('-')}-{digest}"


def sshd_command(keys: str) -> list[str]:
    """The command of a worker pod: an sshd that admits the job's key alone and has it as its own host key as well.

    `keys` is where the operator mounts it. StrictModes has to be off: a mounted Secret is a folder of links that all
    may write to. The image's sshd_config holds for all that is not said here.
    """
    options = {
        "HostKey": f"{keys}/id_rsa",
        "AuthorizedKeysFile": f"{keys}/authorized_keys",
        "StrictModes": "no",
        "PidFile": "none",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        # horovodrun opens a session per process, all at once; of more than 10 the default turns some away.
        "MaxStartups": "1024",
    }
    words = ["/usr/sbin/sshd", "-D", "-e", "-p", str(SSH_PORT)]
    for key, value in options.items():
        words += ["-o", f"{key}={value}"]
    return words


def to_yaml(document: Manifest) -> str:
    """The manifest as text, in the order it was written; every string is one for Go's YAML as well."""
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Go's YAML takes 1e-3, 0o17, y and more for something else than a string, where Python's does not.
    plain = re.fullmatch(r"(--)?[A-Za-z/][A-Za-z0-9/._-]+", text, re.ASCII)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def _pod(
    container: Manifest, options: KubernetesOptions, volumes: list[Manifest], more: Manifest
) -> Manifest:
    spec: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **({"imagePullSecrets": [{"name": options.pull_secret}]} if options.pull_secret else {}),
        "securityContext": _pod_security(options.root),
        **more,
        **({"tolerations": [_toleration(one) for one in options.tolerations]} if options.tolerations else {}),
        "containers": [{key: value for key, value in container.items() if value not in ([], {})}],
        **({"volumes": volumes} if volumes else {}),
    }
    # A service mesh's proxy would stand between the ranks, and keep the launcher pod from ending.
    return {"metadata": {"labels": {**_LABEL, "sidecar.istio.io/inject": "false"}}, "spec": spec}


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


def _worker_resources(submission: Submission, options: KubernetesOptions) -> Manifest:
    memory = {"memory": options.memory} if options.memory else {}
    requests = {**({"cpu": options.cpus} if options.cpus else {}), **memory}
    devices = {GPU: _slots(submission)} if submission.device == "cuda" else {}
    limits = {**memory, **devices, **options.resources}
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


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


def _slots(submission: Submission) -> int:
    """Processes of a worker pod, and its GPUs; the last one may have some left over."""
    return min(submission.per_node, submission.processes)


def _text(text: str) -> str:
    """With bytes that are no text, as file names may have, written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _literal(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and environments; a doubled $ stands for itself."""
    return text.replace("$", "$$")
