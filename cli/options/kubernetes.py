"""The options of `--launcher kubernetes`, one for each field of KubernetesOptions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import rich_click as click

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.kubernetes.options import (
    KindName,
    KubernetesOptions,
    parse_annotation,
    parse_gpu_resource,
    parse_label,
    parse_name,
    parse_namespace,
    parse_own_label,
    parse_quantity,
    parse_resource,
    parse_toleration,
)
from hvd_lb.launch.submit.kubernetes.patch import read_patch
from hvd_lb.launch.submit.kubernetes.volumes import parse_volume

_DEFAULTS = KubernetesOptions()


class _Parsed(click.ParamType[Any]):
    """A value in the form that one of the library's parsers reads."""

    def __init__(self, name: str, parse: Callable[[str], Any]):
        self.name, self._parse = name, parse

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except UserError as error:
            raise click.UsageError(str(error), ctx) from None


def _quantity(option: str) -> _Parsed:
    return _Parsed("QUANTITY", lambda text: parse_quantity(text, option))


def _name(option: str) -> _Parsed:
    return _Parsed("NAME", lambda text: parse_name(text, option))


_option = functools.partial(click.option, panel="Kubernetes")
_OPTIONS = (
    _option(
        "--k8s-kind",
        type=click.Choice(get_args(KindName)),
        default=_DEFAULTS.kind,
        show_default=True,
        help="The job of the cluster: an MPIJob of the MPI operator, or a TrainJob of Kubeflow Trainer 2.",
    ),
    _option(
        "--k8s-namespace",
        type=_Parsed("NAME", parse_namespace),
        default=_DEFAULTS.namespace,
        show_default=True,
        help="Namespace of the job.",
    ),
    _option(
        "--k8s-volume",
        type=_Parsed("SOURCE:/MOUNT[:ro]", parse_volume),
        multiple=True,
        help="A volume of all pods: pvc:CLAIM[/FOLDER]:/MOUNT, nfs:SERVER:/EXPORT:/MOUNT or host:/FOLDER:/MOUNT. "
        "--data and --output are paths on them. Again for each.",
    ),
    _option(
        "--k8s-shm",
        type=_quantity("--k8s-shm"),
        default=_DEFAULTS.shared_memory,
        show_default=True,
        help="Size of /dev/shm, by which NCCL connects the GPUs of a node; counts as memory of the pod.",
    ),
    _option(
        "--k8s-cpus",
        type=_quantity("--k8s-cpus"),
        help="Cores requested for each worker pod [default: what the cluster gives]",
    ),
    _option(
        "--k8s-memory",
        type=_quantity("--k8s-memory"),
        help="Memory requested for each worker pod, and its limit [default: what the cluster gives]",
    ),
    _option(
        "--k8s-resource",
        type=_Parsed("NAME=COUNT", parse_resource),
        multiple=True,
        help="Further devices of each worker pod, such as rdma/hca_shared_devices_a=1. Again for each.",
    ),
    _option(
        "--k8s-gpu-resource",
        type=_Parsed("NAME", parse_gpu_resource),
        default=_DEFAULTS.gpu_resource,
        show_default=True,
        help="What the cluster calls a GPU, such as amd.com/gpu. Each process gets one.",
    ),
    _option(
        "--k8s-node-selector",
        type=_Parsed("KEY=VALUE", parse_label),
        multiple=True,
        help="Worker pods run on nodes with this label only. Again for each.",
    ),
    _option(
        "--k8s-toleration",
        type=_Parsed("KEY[=VALUE][:EFFECT]", parse_toleration),
        multiple=True,
        help="A taint that does not keep the pods from a node. Again for each.",
    ),
    _option(
        "--k8s-secret",
        type=_name("--k8s-secret"),
        multiple=True,
        help="A Secret whose entries are environment variables of the launcher. Again for each.",
    ),
    _option(
        "--k8s-pull-secret",
        type=_name("--k8s-pull-secret"),
        help="The Secret by which a private image is pulled.",
    ),
    _option(
        "--k8s-queue",
        type=_name("--k8s-queue"),
        help="Kueue's local queue, which starts all pods together or none.",
    ),
    _option(
        "--k8s-priority-class",
        type=_name("--k8s-priority-class"),
        help="The PriorityClass of the pods.",
    ),
    _option(
        "--k8s-runtime-class",
        type=_name("--k8s-runtime-class"),
        help="The RuntimeClass of pods with GPUs, such as nvidia where that is not the nodes' default.",
    ),
    _option(
        "--k8s-service-account",
        type=_name("--k8s-service-account"),
        help="The ServiceAccount of the pods, by which a cloud's storage lets them in.",
    ),
    _option(
        "--k8s-label",
        type=_Parsed("KEY=VALUE", parse_own_label),
        multiple=True,
        help="A label of the job and its pods. Again for each.",
    ),
    _option(
        "--k8s-annotation",
        type=_Parsed("KEY=VALUE", parse_annotation),
        multiple=True,
        help="An annotation of the job and its pods. Again for each.",
    ),
    _option(
        "--k8s-grace",
        type=click.IntRange(30, 86400),
        metavar="SECONDS",
        default=_DEFAULTS.grace_seconds,
        show_default=True,
        help="Time for a checkpoint when a pod is told to end.",
    ),
    _option(
        "--k8s-patch",
        type=_Parsed("FILE", lambda text: read_patch(Path(text).expanduser())),
        help="YAML with further fields of the manifest, merged into it; see docs/kubernetes.md.",
    ),
    _option(
        "--k8s-root",
        is_flag=True,
        help="Run as root with IPC_LOCK, as RDMA needs it, instead of as the image's user.",
    ),
)


def kubernetes_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of KubernetesOptions; the command gets them as `kubernetes_options`."""

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> Any:
        options = KubernetesOptions(
            kind=arguments.pop("k8s_kind"),
            namespace=arguments.pop("k8s_namespace"),
            volumes=tuple(arguments.pop("k8s_volume")),
            shared_memory=arguments.pop("k8s_shm"),
            cpus=arguments.pop("k8s_cpus"),
            memory=arguments.pop("k8s_memory"),
            resources=dict(arguments.pop("k8s_resource")),
            node_selector=dict(arguments.pop("k8s_node_selector")),
            tolerations=tuple(arguments.pop("k8s_toleration")),
            secrets=tuple(arguments.pop("k8s_secret")),
            pull_secret=arguments.pop("k8s_pull_secret"),
            queue=arguments.pop("k8s_queue"),
            gpu_resource=arguments.pop("k8s_gpu_resource"),
            priority_class=arguments.pop("k8s_priority_class"),
            runtime_class=arguments.pop("k8s_runtime_class"),
            service_account=arguments.pop("k8s_service_account"),
            labels=dict(arguments.pop("k8s_label")),
            annotations=dict(arguments.pop("k8s_annotation")),
            grace_seconds=arguments.pop("k8s_grace"),
            patch=arguments.pop("k8s_patch") or (),
            root=arguments.pop("k8s_root"),
        )
        return command(kubernetes_options=options, **arguments)

    decorated: Callable[..., Any] = wrapper
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
