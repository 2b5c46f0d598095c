"""`hvd-lb train` submitted to other places: containers, a Slurm job, an MPIJob of Kubernetes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import rich_click as click

from hvd_lb import __version__
from hvd_lb.data.remote.address import Address, is_address
from hvd_lb.data.spec import absolute_spec, data_folder, data_spec
from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.options import carried_environment, named_environment
from hvd_lb.launch.starters.allocation import on_node
from hvd_lb.launch.starters.ssh import reach_over_ssh
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.docker import submit as docker
from hvd_lb.launch.submit.docker.check import docker_preflight
from hvd_lb.launch.submit.kubernetes import follow as kubectl
from hvd_lb.launch.submit.kubernetes import manifest as kubernetes
from hvd_lb.launch.submit.slurm import follow as slurm_submit
from hvd_lb.launch.submit.slurm import script as slurm_script
from hvd_lb.launch.target import Target
from hvd_lb.machine.placement import DeviceName
from hvd_lb.resolve import check_options
from hvd_lb_cli.arguments import forwarded_arguments
from hvd_lb_cli.options.given import given_options
from hvd_lb_cli.options.launch import FORWARDED, LAUNCH_OPTIONS
from hvd_lb_cli.options.submit import PUBLISHED_IMAGE, SubmitOptions, options_of_systems
from hvd_lb_cli.options.train import TrainOptions
from hvd_lb_cli.output.show import print_preflight
from hvd_lb_cli.output.terminal import plain_console

_STARTED = {
    "local": "on this machine",
    "ssh": "over ssh",
    "slurm": "in a Slurm allocation",
    "submit-slurm": "as a Slurm job",
    "submit-kubernetes": "on Kubernetes",
}


def is_submission(target: Target, train: TrainOptions) -> bool:
    """Whether this process only has the command run; UserError for options that have no meaning there."""
    options = train.submit
    if options.image is not None and train.slurm.container_image is not None:
        raise UserError("--image is for Docker and --container-image for Pyxis: give one of them")
    if options.image is not None and options.detach and not target.kind.startswith("submit"):
        raise UserError(
            "--detach is not for containers of --image, which end with this process: run it in tmux"
        )
    if target.kind.startswith("submit"):
        return True
    if options.submit:
        raise UserError(
            "--submit submits a job that is written here: give --launcher slurm or kubernetes, outside of an allocation"
        )
    if options.image is None:
        return False
    if target.kind == "local":
        raise UserError(
            "--image runs in containers on other hosts: name them with --hosts, or on this machine use docker run"
        )
    return True


def refuse_unused(context: click.Context, target: Target, options: SubmitOptions) -> None:
    """UserError for an option that was given and that nothing would read: it was meant for another place."""
    given = given_options(context)
    if "container_mount" in given and "container_image" not in given:
        raise UserError("--container-mount is for processes in an image: give --container-image as well")
    over_ssh, on_kubernetes = target.kind == "ssh", target.kind == "submit-kubernetes"
    read = {
        "ssh_": over_ssh,
        "strict_host_keys": over_ssh,
        "network_interface": target.kind != "local",
        "container_port": options.image is not None and not on_kubernetes,
        "container_": target.kind in ("slurm", "submit-slurm"),
        "slurm_": target.kind == "submit-slurm",
        "sbatch": target.kind == "submit-slurm",
        "k8s_": on_kubernetes,
        "per_node": target.kind.startswith("submit"),
    }
    if "min_processes" in given and "elastic" not in given:
        raise UserError(
            "--min-processes is for runs that go on when processes are lost: give --elastic as well"
        )
    if "elastic_policy" in given and "elastic" not in given:
        raise UserError(
            "--elastic-policy is for runs that go on when processes are lost: give --elastic as well"
        )
    for name in ("host_discovery", "max_processes"):
        if name in given and "elastic" not in given:
            raise UserError(f"{given[name]} is for runs that hosts join and leave: give --elastic as well")
    if "max_processes" in given and "host_discovery" not in given:
        raise UserError(
            "--max-processes is for hosts that --host-discovery finds: give --processes, or a script that prints "
            "localhost:1, and later localhost:4"
        )
    in_containers = options.image is not None or "container_image" in given
    if "host_discovery" in given and in_containers:
        raise UserError(
            "--host-discovery is not possible in containers, which are started once: name the hosts with --hosts"
        )
    if "elastic" in given and in_containers and not over_ssh and not on_kubernetes:
        raise UserError(
            f"--elastic is not possible yet for a run that is started {_STARTED[target.kind]} in "
            "containers: leave it out, and see --restarts"
        )
    for name, option in given.items():
        prefix = next((prefix for prefix in read if name.startswith(prefix)), None)
        if prefix and not read[prefix]:
            raise UserError(
                f"{option} has no meaning for a run that is started {_STARTED[target.kind]}: leave it out, or see "
                "--launcher"
            )


def _submission(command: click.Command, options: TrainOptions, target: Target) -> Submission:
    """The command line as it is to run there: paths absolute, --device decided, without options that say where to run.

    Clusters are for GPUs: --device auto asks for them. UserError where something is left open that only this machine
    knows.
    """
    fields, recipe = options.fields, options.recipe
    given = check_options(fields, recipe)
    spec = data_spec(fields, given)
    data = data_folder(spec)
    val = fields.get("val") or given.get("val")
    for address in filter(is_address, filter(None, (spec, val))):
        if Address.of(address).query:
            raise UserError(
                f"{absolute_spec(address)}: a signed URL would be shown to all who may see the job; give the job "
                "credentials of its own and an s3:// or gs:// address"
            )
    if val is not None and (options.submit.image or target.kind == "submit-kubernetes"):
        _refuse_unmounted(val, data)
    device_name: DeviceName = "cpu" if options.device == "cpu" else "cuda"
    recipe_file = (
        Path(recipe).expanduser().absolute() if recipe and Path(recipe).expanduser().is_file() else None
    )
    dropped = (
        (LAUNCH_OPTIONS - FORWARDED) | options_of_systems(command) | set(SubmitOptions.__dataclass_fields__)
    )
    resume, timeline = options.resume, options.launch.timeline
    named = {"--resume": None if resume == "auto" else Path(resume), "--timeline": timeline}
    elsewhere = {option: path.expanduser().absolute() for option, path in named.items() if path}
    line = [
        *forwarded_arguments(
            sys.argv[1:],
            command,
            {*dropped, "device", "data", "val", "output", "recipe", "resume", "timeline"},
        ),
        *("--data", absolute_spec(spec), "--device", device_name),
        *(("--val", absolute_spec(val)) if val is not None else ()),
        *(("--recipe", str(recipe_file or recipe)) if recipe else ()),
        *(word for option, path in elsewhere.items() for word in (option, str(path))),
    ]
    # The same command finds its run again, as in default_output.
    digest = hashlib.sha256("\0".join(line).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    folder = (options.output or Path("runs") / f"train-{digest}").expanduser().absolute()
    if options.submit.image or target.kind == "submit-kubernetes":
        for option, path in elsewhere.items():
            if not path.is_relative_to(folder):
                raise UserError(
                    f"{option} {path}: containers have the folder of --output ({folder}); give a path in there"
                )
    return Submission(
        arguments=(*line, "--output", str(folder)),
        name=folder.name,
        device=device_name,
        processes=(processes := options.processes or _processes({**given, **fields}, target)),
        per_node=min(options.submit.per_node, processes),
        output=folder,
        data=data,
        recipe=recipe_file,
        image=options.submit.image,
        container_port=options.submit.container_port,
        environment=named_environment(options.launch.env, os.environ),
        elastic=options.launch.elastic,
    )


def _refuse_unmounted(val: str, data: Path | None) -> None:
    """UserError for validation images that containers, which have the folder of --data only, would not have."""
    if is_address(val):
        return
    folder = data_folder(val)
    if folder is None or data is None or not folder.is_relative_to(data):
        raise UserError(
            f"--val {val}: containers have only the folder of --data ({data}); give a --val that lies in there"
        )


def submit(command: click.Command, options: TrainOptions, target: Target) -> int:
    """Print or submit the job, or run it in containers; the exit status."""
    submission = _submission(command, options, target)
    dry_run = options.launch.dry_run
    if options.submit.detach and not options.submit.submit and not dry_run:
        raise UserError("--detach has nothing to leave where a job is only printed: give --submit as well")
    on_gpus = submission.device == "cuda" and target.kind.startswith("submit")
    if submission.elastic and on_gpus and options.launch.engine != "torch":
        raise UserError(
            "--elastic is possible on GPUs, which a job has without --device cpu, with --engine torch only: give that "
            "or --device cpu as well, or leave --elastic out"
        )
    if target.kind == "submit-kubernetes":
        image = options.submit.image or f"{PUBLISHED_IMAGE}:{__version__}"
        documents = kubernetes.manifests(replace(submission, image=image), options.kubernetes)
        if options.submit.submit and not dry_run:
            return kubectl.submit(documents, click.echo, follow=not options.submit.detach)
        click.echo(kubernetes.to_yaml(documents), nl=False)
        return 0
    if target.kind == "submit-slurm":
        program = [sys.executable, "-P", "-m", "hvd_lb_cli.main"]
        batch = slurm_script.script(submission, options.slurm, program)
        if options.submit.submit and not dry_run:
            follow = not options.submit.detach
            return slurm_submit.submit(
                batch, submission.output, submission.environment, click.echo, follow=follow
            )
        click.echo(batch, nl=False)
        return 0
    environment = carried_environment(os.environ) | dict(submission.environment)
    submission = replace(submission, environment=environment)
    reach = on_node if target.kind == "slurm" else reach_over_ssh(options.launch)
    hosts = [(host.name, _slots(host)) for host in target.hosts]
    if dry_run:
        click.echo("\n".join(docker.describe(submission, hosts, reach)))
        return 0
    report = docker_preflight(submission, [name for name, _ in hosts], reach, options.launch)
    if report.problems:
        print_preflight(plain_console(), report)
    report.refuse()
    return docker.run_in_containers(submission, hosts, reach)


def _slots(host: Host) -> int:
    if host.slots is None:
        raise UserError(f"--image with {host}: say how many processes it takes, its GPUs, as in {host}:8")
    return host.slots


def _processes(fields: Mapping[str, Any], target: Target) -> int:
    """One for each virtual worker, unless the hosts take fewer."""
    gpus, slots = int(fields.get("gpus") or 0), sum(map(_slots, target.hosts))
    if not gpus and not slots:
        raise UserError("--gpus is left out: say how many GPUs the job shall have, such as --gpus 256")
    return min(gpus or slots, slots or gpus)
