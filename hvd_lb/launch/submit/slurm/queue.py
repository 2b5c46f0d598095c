"""A submitted job of Slurm as its run directory knows it: is it waiting, and taking it out of the queue."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.slurm.script import log_file
from hvd_lb.machine.slurm import line_of_job
from hvd_lb.report.run_directory import RunDirectory, write_json

_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESV_DEL_HOLD"}


def note(output: Path, job: str) -> None:
    """That the run was submitted as this job."""
    with suppress(OSError):
        write_json(RunDirectory(output).submitted, {"system": "Slurm", "job": job})


def submitted_job(run: RunDirectory) -> str | None:
    """The number of the run's job, or None where it was not submitted."""
    try:
        submitted = json.loads(run.submitted.read_bytes())
        return str(submitted["job"]) if submitted["system"] == "Slurm" else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def job_state(job: str, log: Path | None = None) -> dict[str, str] | None:
    """What Slurm says of a job, nothing when it does not answer now; None for one that it no longer knows.

    With `log` also for one that writes to another file: numbers of jobs are used again, and by other clusters.
    """
    done = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # of names of files
        check=False,
    )
    said = line_of_job(done.stdout, job)
    if "Invalid job id" in done.stderr or (log and said and f" StdOut={log} " not in f"{said} "):
        return None
    return dict(re.findall(r"(\w+)=(\S*)", said))


def waiting(run: RunDirectory) -> str | None:
    """Why the run's job has not started, or not again, in Slurm's words; None where it has, or Slurm is not here."""
    job = submitted_job(run)
    if job is None or shutil.which("scontrol") is None:
        return None
    state = job_state(job, log_file(run.path.absolute(), job)) or {}
    if state.get("JobState") not in _WAITING:
        return None
    return f"Slurm job {job} is {state['JobState'].lower()} ({state.get('Reason', 'no reason given')})"


def cancel(run: RunDirectory) -> str:
    """Take the run's waiting job out of the queue; what was done. UserError where Slurm refuses."""
    job = submitted_job(run)
    done = subprocess.run(
        ["scancel", "--state=PENDING", str(job)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(
            f"scancel {job} failed: {' '.join(done.stderr.split()) or f'status {done.returncode}'}"
        )
    return f"Slurm job {job}, which was waiting, is cancelled"
