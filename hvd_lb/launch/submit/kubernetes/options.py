"""What a Kubernetes cluster has to be told beyond the run itself, and how a user writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.kubernetes.volumes import SUBDOMAIN, Volume

# Kubernetes' rules for names (DNS-1123 label), label keys and values, and quantities.
_DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_WORD = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_KEY = rf"({SUBDOMAIN}/)?{_WORD}"
_QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|[MGTP]|[KMGTP]i)?"
_RESERVED = ("hvd-lb-", "app.kubernetes.io/name", "training.kubeflow.org/", "trainer.kubeflow.org/")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


KindName = Literal["mpijob", "trainjob"]


@dataclass(frozen=True)
class Toleration:
    """The taint of a node that pods put up with; without a value any, without an effect all of that key."""

    key: str
    value: str | None = None
    effect: str | None = None


@dataclass(frozen=True)
class KubernetesOptions:
    """Where the pods run, what they are given and what is mounted in them."""

    kind: KindName = "mpijob"
    namespace: str = "default"
    volumes: tuple[Volume, ...] = ()
    shared_memory: str = "16Gi"  #: size of a worker pod's /dev/shm; counts as its memory
    cpus: str | None = None  #: requested for each worker pod
    memory: str | None = None  #: requested for each worker pod, and its limit
    resources: Mapping[str, int] = field(
        default_factory=dict
    )  #: further devices of each worker pod, such as RDMA ones
    node_selector: Mapping[str, str] = field(default_factory=dict)  #: labels of the nodes for worker pods
    tolerations: tuple[Toleration, ...] = ()
    secrets: tuple[str, ...] = ()  #: Secrets whose entries become variables of the launcher
    pull_secret: str | None = None  #: the Secret by which the image is pulled
    queue: str | None = None  #: Kueue's local queue: all pods start together or none
    gpu_resource: str = "nvidia.com/gpu"  #: what the cluster calls a GPU; each rank gets one
    priority_class: str | None = None
    runtime_class: str | None = None  #: of the pods with ranks
    service_account: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)  #: of the job and its pods, beside hvd-lb's own
    annotations: Mapping[str, str] = field(default_factory=dict)  #: likewise
    grace_seconds: int = 300  #: from the notice that a pod shall end to its end: time for a checkpoint
    patch: Sequence[dict[str, Any]] = ()  #: see `patch`
    root: bool = False  #: run as root with IPC_LOCK, which RDMA needs, instead of as the image's user


def parse_toleration(text: str) -> Toleration:
    """KEY[=VALUE][:EFFECT], as `kubectl taint` writes taints."""
    taint, _, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    if (
        not re.fullmatch(_KEY, key)
        or (value and not re.fullmatch(_WORD, value))
        or effect not in ("", *_EFFECTS)
        or text.endswith(":")
    ):
        raise UserError(
            f"--k8s-toleration {text!r} is not a taint: expected KEY, KEY=VALUE or KEY=VALUE:EFFECT with one of "
            f"{', '.join(_EFFECTS)}, such as nvidia.com/gpu:NoSchedule"
        )
    return Toleration(key, value if equals else None, effect or None)


def parse_label(text: str, option: str = "--k8s-node-selector") -> tuple[str, str]:
    """KEY=VALUE, a label."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(_KEY, key) or (value and not re.fullmatch(_WORD, value)):
        raise UserError(
            f"{option} {text!r} is not a label: expected KEY=VALUE, as `kubectl get nodes --show-labels` lists them"
        )
    return key, value


def parse_own_label(text: str) -> tuple[str, str]:
    """KEY=VALUE for the job and its pods; not one of those that are hvd-lb's and the operators' own."""
    key, value = parse_label(text, "--k8s-label")
    return _free(key, "--k8s-label"), value


def parse_annotation(text: str) -> tuple[str, str]:
    """KEY=VALUE, where the value may be any text."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(_KEY, key):
        raise UserError(
            f"--k8s-annotation {text!r} is not an annotation: expected KEY=VALUE, such as "
            "networking.gke.io/default-interface=eth0"
        )
    return _free(key, "--k8s-annotation"), value


def parse_gpu_resource(text: str) -> str:
    """A device of a vendor's plugin; Kubernetes calls it an extended resource."""
    if not re.fullmatch(rf"{SUBDOMAIN}/{_WORD}", text):
        raise UserError(
            f"--k8s-gpu-resource {text!r} is no kind of device: expected a name that `kubectl describe node` lists "
            "under Capacity, such as nvidia.com/gpu or amd.com/gpu"
        )
    return text


def parse_resource(text: str) -> tuple[str, int]:
    """NAME=COUNT, devices of a node."""
    name, equals, count = text.partition("=")
    if not equals or not re.fullmatch(_KEY, name) or not re.fullmatch("[1-9][0-9]{0,3}", count):
        raise UserError(
            f"--k8s-resource {text!r} names no devices: expected NAME=COUNT as `kubectl describe node` lists them "
            "under Capacity, such as rdma/hca_shared_devices_a=1"
        )
    return name, int(count)


def parse_quantity(text: str, option: str) -> str:
    """A number of cores or bytes, in Kubernetes' form."""
    if not re.fullmatch(_QUANTITY, text):
        raise UserError(
            f"{option} {text!r} is not a quantity: expected a number such as 64Gi or, of cores, 48"
        )
    return text


def parse_name(text: str, option: str) -> str:
    """The name of something in the cluster."""
    if not re.fullmatch(SUBDOMAIN, text):
        raise UserError(
            f"{option} {text!r} is not a name in Kubernetes: expected lower case letters, digits, - and ."
        )
    return text


def parse_namespace(text: str) -> str:
    """The name of a namespace."""
    if not re.fullmatch(_DNS_LABEL, text):
        raise UserError(
            f"--k8s-namespace {text!r} is not a namespace: expected up to 63 lower case letters, digits and -, as "
            "`kubectl get namespaces` lists them"
        )
    return text


def _free(key: str, option: str) -> str:
    if key.startswith(_RESERVED):
        raise UserError(f"{option} {key} is set by hvd-lb or an operator: expected another key")
    return key
