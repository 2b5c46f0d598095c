"""Submitting a batch script to Slurm and following the job to its end: `--launcher slurm --submit`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.slurm.queue import job_state, note
from hvd_lb.launch.submit.slurm.script import log_file

_INTERRUPTED = 130
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}


def submit(
    script: str,
    output: Path,
    environment: Mapping[str, str],
    say: Callable[[str], None] = print,
    *,
    follow: bool = True,
    poll_seconds: float = 5.0,
) -> int:
    """Submit the script of a run that writes to `output`, show its log, and return its exit status.

    `environment` are variables for the job, beside those of this process. Ctrl-C leaves the job as it is (130), and
    without `follow` it is left at once (0).
    UserError where there is no sbatch, or it refuses the script; then no folder is left.
    """
    logs = log_file(output, "%j").parent
    made = [folder for folder in (logs, *logs.parents) if not folder.exists()]
    logs.mkdir(parents=True, exist_ok=True)
    try:
        job = _sbatch(script, environment)
    except UserError:
        for folder in made:
            with suppress(OSError):  # somebody has put something there
                folder.rmdir()
        raise
    note(output, job)
    log = log_file(output, job)
    say(f"job {job} submitted; its log is {log}")
    status = 0
    try:
        if follow:
            return _follow(job, log, say, poll_seconds)
    except KeyboardInterrupt:
        say(f"job {job} goes on.")
        status = _INTERRUPTED
    run = shlex.quote(os.fspath(output))
    for line in (
        f"see how it is:           hvd-lb status {run}",
        f"follow it:               tail -F {shlex.quote(os.fspath(log))}",
        f"end with a checkpoint:   hvd-lb stop {run}, or scancel {job}",
    ):
        say(line)
    return status


def _sbatch(script: str, environment: Mapping[str, str]) -> str:
    """The number of the new job."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=script,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            check=False,
        )
    except FileNotFoundError:
        raise UserError(
            "--submit needs sbatch, and there is none on PATH: submit from a login node of the cluster, or leave "
            "--submit out and pass the printed script to sbatch there"
        ) from None
    if done.returncode:
        reason = "; ".join(re.sub(r"^sbatch: (error|fatal): ", "", line) for line in done.stderr.splitlines())
        raise UserError(f"sbatch refuses the job: {reason or f'exit status {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]


def _follow(job: str, log: Path, say: Callable[[str], None], poll_seconds: float) -> int:
    """Tell changes of its state and what it writes, until it has ended; its exit status."""
    last_words, position, ended = "", 0, 0
    while True:
        state = job_state(job)
        position = _show(log, position)
        if state and (words := _words(state)) != last_words:
            say(f"job {job}: {words}")
            last_words = words
        # Twice: between the end of one start and the next, a job that is put back into the queue looks ended.
        ended = ended + 1 if state is None or state.get("JobState") in _ENDED else 0
        if ended == 2:
            _show(log, position)
            return _exit_status(state or {})
        time.sleep(poll_seconds)


def _words(state: Mapping[str, str]) -> str:
    """The state in words: with the reason where it waits, the nodes where it runs, how often it began again."""
    name, reason, nodes = state.get("JobState", ""), state.get("Reason", "None"), state.get("NodeList", "")
    more = nodes if name == "RUNNING" else reason if name in ("PENDING", *_ENDED) and reason != "None" else ""
    starts = int(state.get("Restarts", "0"))
    again = f", start {starts + 1}" if starts else ""
    return f"{name.lower()}{f' ({more})' if more else ''}{again}"


def _show(log: Path, position: int) -> int:
    """Write what the log has got since `position` to stdout; the new position."""
    try:
        with log.open("rb") as file:
            file.seek(position)
            text = file.read()
    except OSError:  # it is not there yet, or cannot be read just now
        return position
    with suppress(OSError):  # nobody reads it any more
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
    return position + len(text)


def _exit_status(state: Mapping[str, str]) -> int:
    """That of the script, 128 + the signal that ended it, or 1 when Slurm ended the job."""
    status, _, number = state.get("ExitCode", "0:0").partition(":")
    if state.get("JobState") == "COMPLETED":
        return 0
    return int(status) or (128 + int(number) if int(number) else 1)
