"""No option is passed over in silence: each is read in a mode of its command, or refused there."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich_click as click

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.slurm.script import SlurmOptions
from hvd_lb.launch.target import Target
from hvd_lb.recipe import Recipe
from hvd_lb_cli.doctor.command import doctor
from hvd_lb_cli.options.submit import SubmitOptions
from hvd_lb_cli.simulate import simulate
from hvd_lb_cli.submit import is_submission, refuse_unused
from hvd_lb_cli.train import train

Run = Callable[..., Any]
EVERYWHERE = {"local", "ssh", "slurm", "submit-slurm", "submit-kubernetes"}
SUBMITTED = {"submit-slurm", "submit-kubernetes"}
IN_SLURM = {"slurm", "submit-slurm"}

PAIRS = {
    "container_port": "image",
    "container_mount": "container_image",
    "min_processes": "elastic",
    "elastic_policy": "elastic",
    "host_discovery": "elastic",
    "max_processes": "host_discovery",
}

# Where each option of `train` is read that is no field of the recipe. `hosts` and `hostfile` make it ssh.
TRAIN = {
    **dict.fromkeys(
        (
            "recipe",
            "device",
            "output",
            "resume",
            "track",
            "processes",
            "launcher",
            "pin",
            "hang_timeout",
            "restarts",
            "log_samples",
            "forecast",
            "env",
            "dry_run",
            "detach",
        ),
        EVERYWHERE,
    ),
    **dict.fromkeys(
        ("engine", "allreduce", "fusion_threshold", "cycle_time", "autotune", "timeline"), EVERYWHERE
    ),
    **dict.fromkeys(("elastic", "min_processes", "elastic_policy"), EVERYWHERE),
    **dict.fromkeys(("host_discovery", "max_processes"), {"local", "ssh"}),
    **dict.fromkeys(("hosts", "hostfile"), {"ssh"}),
    **dict.fromkeys(("ssh_port", "ssh_key", "strict_host_keys"), {"ssh"}),
    "network_interface": EVERYWHERE - {"local"},
    "image": EVERYWHERE - {"local"},
    "container_port": EVERYWHERE - {"local", "submit-kubernetes"},
    "per_node": SUBMITTED,
    "submit": SUBMITTED,
    **dict.fromkeys(("container_image", "container_mount"), IN_SLURM),
    **dict.fromkeys(
        (
            *("slurm_partition", "slurm_time", "slurm_account", "slurm_qos", "slurm_constraint"),
            *("slurm_cpus_per_task", "slurm_memory", "sbatch", "slurm_requeue"),
        ),
        {"submit-slurm"},
    ),
    **dict.fromkeys(
        (
            *("k8s_namespace", "k8s_volume", "k8s_shm", "k8s_cpus", "k8s_memory", "k8s_resource", "k8s_root"),
            *("k8s_node_selector", "k8s_toleration", "k8s_secret", "k8s_pull_secret", "k8s_queue"),
            *(
                "k8s_gpu_resource",
                "k8s_priority_class",
                "k8s_runtime_class",
                "k8s_service_account",
                "k8s_label",
            ),
            *("k8s_annotation", "k8s_grace", "k8s_patch", "k8s_kind"),
        ),
        {"submit-kubernetes"},
    ),
}
ROOT = Path(__file__).parents[2]
VALUES = {
    "price": "2", "track": "wandb",
    "k8s_volume": "pvc:a:/b", "k8s_shm": "1Gi", "k8s_cpus": "4", "k8s_memory": "4Gi", "k8s_resource": "a/b=1",
    "k8s_node_selector": "a=b", "k8s_gpu_resource": "a/b", "k8s_label": "a=b", "k8s_annotation": "a=b",
    "k8s_grace": "60", "k8s_kind": "trainjob", "k8s_patch": str(ROOT / "hvd_lb/recipes/digits.yaml"),
    "slurm_time": "1:00", "slurm_memory": "4G", "container_port": "2222",
    "ssh_port": "22", "per_node": "4", "slurm_cpus_per_task": "4", "fusion_threshold": "1", "cycle_time": "1",
    "hang_timeout": "60",
    "restarts": "2", "max_processes": "2",
    "min_processes": "1", "elastic_policy": "rescale",
    "allreduce": "ring", "engine": "torch", "launcher": "auto", "device": "cpu", "processes": "2", "hosts": "h1:2",
}  # fmt: skip


def parameters(command: click.Command) -> dict[str, click.Parameter]:
    return {
        option.name: option
        for option in command.params
        if option.name and option.name not in Recipe.model_fields
    }


def typed(name: str, option: click.Parameter) -> list[str]:
    """The option with a value that is one."""
    flag = isinstance(option, click.Option) and option.is_flag
    return [option.opts[0]] if flag else [option.opts[0], VALUES.get(name, "a")]


def test_the_table_has_every_option() -> None:
    assert parameters(train).keys() == TRAIN.keys()


@pytest.mark.parametrize("mode", sorted(EVERYWHERE))
def test_train_refuses_what_it_would_not_read(mode: Any) -> None:
    target = Target(mode)
    for name, option in parameters(train).items():
        if name in ("hosts", "hostfile", "host_discovery", "max_processes"):  # they are what makes it ssh
            continue
        words = typed(name, option)
        if other := PAIRS.get(name):
            words += typed(other, parameters(train)[other])
        context = train.make_context("train", words)
        submit = SubmitOptions(
            **{field: context.params[field] for field in SubmitOptions.__dataclass_fields__}
        )
        slurm = SlurmOptions(container_image=context.params["container_image"])
        refused = ""
        try:
            refuse_unused(context, target, submit)
            is_submission(target, SimpleNamespace(submit=submit, slurm=slurm))  # type: ignore[arg-type]
        except UserError as error:
            refused = str(error)
        assert bool(refused) == (mode not in TRAIN[name]), (name, mode)
        assert not refused or option.opts[0] in refused or f"--{other}".replace("_", "-") in refused


@pytest.mark.parametrize("option", PAIRS)
def test_train_refuses_half_of_a_pair(option: str) -> None:
    context = train.make_context("train", typed(option, parameters(train)[option]))
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')}"):
        refuse_unused(context, Target("submit-slurm"), SubmitOptions())


@pytest.mark.parametrize("option", ["allreduce", "fusion_threshold", "cycle_time", "autotune", "timeline"])
def test_one_process_exchanges_nothing(option: str, hvd_lb: Run, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = typed(option, parameters(train)[option])
    said = hvd_lb(
        "train", "--data", "digits", "--device", "cpu", "--processes", 1, "--launcher", "local", *words
    )
    assert said.status == 2
    assert f"--{option.replace('_', '-')} is about the exchange between processes" in said.err
    assert list(tmp_path.iterdir()) == []


# The modes of other commands: what is typed for the mode, and what is refused there.
OTHERS = [
    (simulate, (), {"output", "resume", "track", "device_profile", "price"}),
    (simulate, ("--cluster", "big-basin"), {"resume", "track"}),
    (simulate, ("--run",), {"budget", "cluster", "device_profile", "price"}),
    (simulate, ("--steps", "3"), {"budget"}),
    (doctor, (), parameters(doctor).keys() - {"hosts", "hostfile", "with_selftest", "network"}),
    (doctor, ("--hosts", "h1:1"), {"figures"}),
    (doctor, ("--network",), {"with_selftest", "image", "ssh_port", "ssh_key", "network_interface"}),
    (doctor, ("--hosts", "h1:1", "--selftest"), {"image"}),
]


@pytest.mark.parametrize(("command", "mode", "refused"), OTHERS)
def test_other_commands_refuse_what_they_would_not_read(
    command: click.Command, mode: tuple[str, ...], refused: set[str], hvd_lb: Run
) -> None:
    for name in sorted(refused):
        words = typed(name, parameters(command)[name])
        if name == "budget":
            words[1] = "3s"
        said = hvd_lb(command.name, *mode, *words)
        assert said.status == 2
        assert said.err.startswith(f"hvd-lb: error: {words[0]} is "), said.err
