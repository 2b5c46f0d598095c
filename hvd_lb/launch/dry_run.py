"""What a launch would run, as a shell script to read or to copy. Pure: nothing is started or written."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from hvd_lb.launch.job import Job
from hvd_lb.launch.launch_plan import LaunchPlan
from hvd_lb.report.run_directory import RunDirectory

_END = "end of job.json"
_WIDTH = 110


def describe(job: Job, launch: LaunchPlan, run: RunDirectory) -> str:
    """Makes the run directory and the job's file, readable by its owner alone, and starts the processes.

    Taken by hand this way, a run writes all that its processes write; checkpoints, metrics, logs; but no report.
    """
    lines = [
        f"mkdir -p {_quoted(run.logs)}",
        f"(umask 077; cat > {_quoted(run.job)}) <<'{_END}'",
        job.to_json(),
        _END,
    ]
    # What the launcher itself must have; the processes find it in the job's file.
    for name, value in launch.environment.items():
        if name.startswith("OMPI_"):
            lines.append(f"export {name}={shlex.quote(value)}")
    lines.append(" \\\n    ".join(_folded(launch.command(run.job))))
    return "\n".join(lines) + "\n"


def _folded(command: list[str]) -> list[str]:
    """A command line in lines of at most about _WIDTH columns, words whole."""
    lines = [""]
    for word in map(shlex.quote, command):
        if lines[-1] and len(lines[-1]) + len(word) >= _WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _quoted(path: Path) -> str:
    return shlex.quote(os.fspath(path))
