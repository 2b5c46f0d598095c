"""`hvd-lb train` as a command that runs elsewhere: in containers, as a Slurm job, as an MPIJob of Kubernetes."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rich_click as click
from click.core import ParameterSource
from rich.console import Console

from hvd_lb import __version__
from hvd_lb.data.spec import absolute_spec, data_folder, data_spec
from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.options import LaunchOptions, carried_environment, named_environment
from hvd_lb.launch.starters.allocation import on_node
from hvd_lb.launch.starters.ssh import reach_over_ssh
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.docker import run as docker
from hvd_lb.launch.submit.docker.check import docker_preflight
from hvd_lb.launch.submit.kubernetes import follow as kubectl
from hvd_lb.launch.submit.kubernetes import manifest as kubernetes
from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions
from hvd_lb.launch.submit.slurm import follow as slurm_submit
from hvd_lb.launch.submit.slurm import script as slurm_script
from hvd_lb.launch.submit.slurm.script import SlurmOptions
from hvd_lb.launch.target import Where
from hvd_lb.machine.placement import DeviceName
from hvd_lb.resolve import check_options
from hvd_lb_cli.arguments import hand_on
from hvd_lb_cli.options.launch import HANDED_ON, LAUNCH_OPTIONS
from hvd_lb_cli.show import print_preflight

#: What the release workflow publishes; docs/image.md says how to pin a digest.
PUBLISHED_IMAGE = "ghcr.io/hvd-lb/hvd-lb"


_STARTED = {
    "local": "on this machine",
    "ssh": "over ssh",
    "slurm": "in a Slurm allocation",
    "submit-slurm": "as a Slurm job",
    "submit-kubernetes": "on Kubernetes",
}


@dataclass(frozen=True)
class ElsewhereOptions:
    """Options of `train` that only matter when the command is to run elsewhere."""

    image: str | None = None
    container_port: int = 12345
    per_node: int = 8
    submit: bool = False


_option = functools.partial(click.option, panel="Elsewhere: containers, jobs")
_OPTIONS = (
    _option(
        "--image",
        metavar="NAME",
        help=f"Run in containers of this image, one on each host; {PUBLISHED_IMAGE} is the published one.",
    ),
    _option(
        "--container-port",
        type=click.IntRange(1024, 65535),
        default=12345,
        show_default=True,
        help="With --image over ssh: where the sshd of the containers listens, on the hosts' network.",
    ),
    _option(
        "--per-node",
        type=click.IntRange(1, 1024),
        default=8,
        show_default=True,
        help="Processes on each node of a job that is written for Slurm or Kubernetes: its GPUs.",
    ),
    _option(
        "--submit",
        is_flag=True,
        help="Submit the job that --launcher slurm or kubernetes writes, and follow it.",
    ),
)


def elsewhere_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of ElsewhereOptions; the command gets them as `elsewhere_options`."""

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in ElsewhereOptions.__dataclass_fields__}
        return command(elsewhere_options=ElsewhereOptions(**given), **arguments)

    decorated: Callable[..., Any] = wrapper
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def goes_elsewhere(where: Where, options: ElsewhereOptions, slurm_options: SlurmOptions) -> bool:
    """Whether this process only has the command run; UserError for options that have no meaning there."""
    if options.image is not None and slurm_options.container_image is not None:
        raise UserError("--image is for Docker and --container-image for Pyxis: give one of them")
    if where.launcher.startswith("submit"):
        return True
    if options.submit:
        raise UserError(
            "--submit submits a job that is written here: give --launcher slurm or kubernetes, outside of an allocation"
        )
    if options.image is None:
        return False
    if where.launcher == "local":
        raise UserError(
            "--image runs in containers on other hosts: name them with --hosts, or on this machine use docker run"
        )
    return True


def refuse_unused(context: click.Context, where: Where, options: ElsewhereOptions) -> None:
    """UserError for an option that was given and that nothing would read: it was meant for another place."""
    over_ssh = where.launcher == "ssh"
    read = {
        "ssh_": over_ssh,
        "strict_host_keys": over_ssh,
        "network_interface": where.launcher != "local",
        "container_port": options.image is not None and where.launcher != "submit-kubernetes",
        "container_": where.launcher in ("slurm", "submit-slurm"),
        "slurm_": where.launcher == "submit-slurm",
        "sbatch": where.launcher == "submit-slurm",
        "k8s_": where.launcher == "submit-kubernetes",
        "per_node": where.launcher.startswith("submit"),
    }
    for option in context.command.params:
        name = option.name or ""
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            prefix = next((prefix for prefix in read if name.startswith(prefix)), None)
            if prefix and not read[prefix]:
                raise UserError(
                    f"{option.opts[0]} has no meaning for a run that is started {_STARTED[where.launcher]}: leave it "
                    "out, or see --launcher"
                )


def make_submission(
    command: click.Command,
    arguments: Sequence[str],
    fields: Mapping[str, Any],
    *,
    recipe: str | None,
    device: str,
    processes: int | None,
    output: Path | None,
    where: Where,
    launch_options: LaunchOptions,
    options: ElsewhereOptions,
) -> Submission:
    """The command line as it is to run elsewhere: its paths absolute, --device decided, nothing of where to run.

    `fields` are those of the recipe that were given. Clusters are for GPUs: --device auto asks for them.
    UserError where something is left open that only this machine knows.
    """
    given = check_options(fields, recipe)
    spec = data_spec(fields, given)
    data = data_folder(spec)
    device_name: DeviceName = "cpu" if device == "cpu" else "cuda"
    recipe_file = (
        Path(recipe).expanduser().absolute() if recipe and Path(recipe).expanduser().is_file() else None
    )
    dropped = (
        (LAUNCH_OPTIONS - HANDED_ON)
        | _options_of_systems(command)
        | set(ElsewhereOptions.__dataclass_fields__)
    )
    line = [
        *hand_on(arguments, command, {*dropped, "device", "data", "output", "recipe"}),
        *("--data", absolute_spec(spec), "--device", device_name),
        *(("--recipe", str(recipe_file or recipe)) if recipe else ()),
    ]
    # The same command finds its run again, as in default_output.
    digest = hashlib.sha256("\0".join(line).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    folder = (output or Path("runs") / f"train-{digest}").expanduser().absolute()
    return Submission(
        arguments=(*line, "--output", str(folder)),
        name=folder.name,
        device=device_name,
        processes=processes or _processes({**given, **fields}, where),
        per_node=options.per_node,
        output=folder,
        data=data,
        recipe=recipe_file,
        image=options.image,
        container_port=options.container_port,
        environment=named_environment(launch_options.env, os.environ),
    )


def run_elsewhere(
    submission: Submission,
    where: Where,
    launch_options: LaunchOptions,
    options: ElsewhereOptions,
    kubernetes_options: KubernetesOptions,
    slurm_options: SlurmOptions,
) -> int:
    """Print or submit the job, or run it in containers; the exit status."""
    if where.launcher == "submit-kubernetes":
        image = options.image or f"{PUBLISHED_IMAGE}:{__version__}"
        job = kubernetes.manifest(replace(submission, image=image), kubernetes_options)
        if options.submit and not launch_options.dry_run:
            return kubectl.submit(job, click.echo)
        click.echo(kubernetes.to_yaml(job), nl=False)
        return 0
    if where.launcher == "submit-slurm":
        program = [sys.executable, "-P", "-m", "hvd_lb_cli.main"]
        batch = slurm_script.script(submission, slurm_options, program)
        if options.submit and not launch_options.dry_run:
            return slurm_submit.submit(batch, submission.output, submission.environment, click.echo)
        click.echo(batch, nl=False)
        return 0
    environment = carried_environment(os.environ) | dict(submission.environment)
    submission = replace(submission, environment=environment)
    reach = on_node if where.launcher == "slurm" else reach_over_ssh(launch_options)
    hosts = [(host.name, _slots(host)) for host in where.hosts]
    if launch_options.dry_run:
        click.echo("\n".join(docker.describe(submission, hosts, reach)))
        return 0
    report = docker_preflight(submission, [name for name, _ in hosts], reach, launch_options)
    if report.problems:
        print_preflight(Console(), report)
    report.refuse()
    return docker.run_in_containers(submission, hosts, reach)


def _slots(host: Host) -> int:
    if host.slots is None:
        raise UserError(f"--image with {host}: say how many processes it takes, its GPUs, as in {host}:8")
    return host.slots


def _processes(fields: Mapping[str, Any], where: Where) -> int:
    """One for each virtual worker, unless the hosts take fewer."""
    gpus, slots = int(fields.get("gpus") or 0), sum(map(_slots, where.hosts))
    if not gpus and not slots:
        raise UserError("--gpus is left out: say how many GPUs the job shall have, such as --gpus 256")
    return min(gpus or slots, slots or gpus)


def _options_of_systems(command: click.Command) -> set[str]:
    """Those that only a system that is submitted to reads."""
    prefixes = ("k8s_", "slurm_", "sbatch", "container_")
    return {option.name for option in command.params if option.name and option.name.startswith(prefixes)}
