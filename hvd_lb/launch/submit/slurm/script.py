"""A run as a Slurm batch script: `--launcher slurm` outside of an allocation.

The script runs `hvd-lb train --launcher slurm` on the first node of its allocation, which starts the ranks by srun.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.launch.starters.allocation import PyxisContainer
from hvd_lb.launch.submit.command import Submission

#: Seconds before its time limit by which a job is asked for a checkpoint; Slurm may be a minute early.
SIGNAL_SECONDS = 120

# The signal before the time limit is sent to this shell alone, those of scancel and of a preemption reach the run by
# themselves, and a second one would end it without a checkpoint. A run ends with 143 that was asked to end, with 138 or
# 140 by USR1 or USR2 to its processes, which is how other scripts have Slurm tell of the time limit.
_REQUEUE = """
trap 'kill -TERM "$run"' USR1
trap : TERM
{command} &
run=$!
while wait "$run"; status=$?; kill -0 "$run" 2>/dev/null; do :; done
# It has stopped with a checkpoint: before the time limit or for a more urgent job, unless it was cancelled.
if [[ $status =~ ^(143|138|140)$ ]] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  trap - TERM
  # Until Slurm ends this script: its own exit might count for the next start.
  scontrol requeue "$SLURM_JOB_ID" && sleep 300
fi
exit "$status"
"""


@dataclass(frozen=True)
class SlurmOptions:
    """What a site's Slurm has to be told; None: its default."""

    partition: str | None = None
    time: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    memory: str | None = None  #: of each node
    lines: tuple[str, ...] = ()  #: further options of sbatch, such as --exclusive
    requeue: bool = True  #: go on by itself after the time limit, a preemption or the loss of a node
    container_image: str | None = None  #: that Pyxis runs the ranks in
    container_mounts: tuple[str, ...] = ()  #: beside data, output and working directory

    def container(self, *paths: Path | None) -> PyxisContainer | None:
        """The container of the ranks, if any, which see `paths` and `container_mounts` where they are outside."""
        if self.container_image is None:
            return None
        mounts = [*(os.fspath(path) for path in paths if path is not None), *self.container_mounts]
        return PyxisContainer(self.container_image, tuple(dict.fromkeys(mounts)))


def script(submission: Submission, options: SlurmOptions, program: Sequence[str] = ("hvd-lb",)) -> str:
    """The batch script; `program` is how hvd-lb is called on the nodes.

    Variables of the submission are taken by name from the environment of sbatch: values may be secret, and who may
    see a job may see its script. UserError for an option that cannot be written down.
    """
    directives = [
        ("job-name", re.sub(r"[^A-Za-z0-9_.-]+", "-", submission.name).strip("-")[:64] or "hvd-lb"),
        ("nodes", submission.nodes),
        ("ntasks-per-node", submission.per_node),
        ("gpus-per-node", submission.per_node if submission.device == "cuda" else None),
        ("cpus-per-task", options.cpus_per_task),
        ("mem", options.memory),
        ("partition", options.partition),
        ("account", options.account),
        ("qos", options.qos),
        ("constraint", options.constraint),
        ("time", options.time),
        ("output", _pattern(log_file(submission.output, "%j"))),
        ("open-mode", "append"),
        ("signal", f"B:USR1@{SIGNAL_SECONDS}" if options.requeue else f"B:TERM@{SIGNAL_SECONDS}"),
    ]
    lines = [f"--{name}={_value(name, str(value))}" for name, value in directives if value is not None]
    # The loss of a node would end the job; that of the script's own puts it back into the queue (`agent.host`).
    lines += ["--no-kill"] if submission.elastic else []
    lines += ["--requeue" if options.requeue else "--no-requeue", *map(_line, options.lines)]
    command = shlex.join([*program, *submission.arguments, *_arguments(submission, options)])
    body = _REQUEUE.format(command=command) if options.requeue else f"\nexec {command}\n"
    return "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in lines) + body


def log_file(output: Path, job: str) -> Path:
    """What a job's script writes, in its run directory; that of all its starts, one after another."""
    return output / "logs" / f"slurm-{job}.out"


def _arguments(submission: Submission, options: SlurmOptions) -> list[str]:
    """What is added to the user's arguments."""
    arguments = ["--launcher", "slurm"]
    for name in submission.environment:
        arguments += ["--env", name]
    if submission.image is not None:
        arguments += ["--image", submission.image, "--container-port", str(submission.container_port)]
    if options.container_image is not None:
        arguments += ["--container-image", options.container_image]
    for mount in options.container_mounts:
        arguments += ["--container-mount", mount]
    return arguments


def _pattern(path: Path) -> str:
    """A path as a file name pattern of Slurm, in which %j is kept: the last part's."""
    folder = os.fspath(path.parent)
    if "\\" in folder:
        raise UserError(
            f"--output {folder!r}: Slurm writes to no folder with a backslash in its name: choose another"
        )
    return f"{folder.replace('%', '%%')}/{path.name}"


def _value(name: str, value: str) -> str:
    if not value or not value.isprintable():
        raise UserError(
            f"--{name} {value!r} cannot be written in a job script: expected printable characters"
        )
    return shlex.quote(value)


def _line(line: str) -> str:
    """A user's own option for sbatch, in sbatch's spelling."""
    text = line.removeprefix("#SBATCH").strip()
    if not re.fullmatch(r"--?[A-Za-z].*", text, re.ASCII) or not text.isprintable():
        raise UserError(
            f"--sbatch {line!r} is not an option of sbatch: expected one such as --exclusive or --mail-type=END"
        )
    return text
