"""Processes on this machine: `horovodrun` for several, a plain process for one; and what became of them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_lb.errors import UserError
from hvd_lb.job import Job
from hvd_lb.launch.stopping import AT_ONCE
from hvd_lb.report.run_directory import RunDirectory, replace_text
from hvd_lb.world.horovod import import_horovod

# Long enough for the slowest step, short enough that a hang does not last the night (off by default in Horovod).
_STALL_SECONDS = 1800
_PR_SET_PDEATHSIG = 1


def worker_command(job: Job, job_file: Path) -> list[str]:
    """The command line that runs a job here."""
    worker = [sys.executable, "-m", "hvd_lb.launch.worker", str(job_file)]
    if job.processes == 1:
        return worker
    return [
        *(sys.executable, "-m", "horovod.runner.launch"),
        *(
            "--gloo",
            "-np",
            str(job.processes),
            "-H",
            f"localhost:{job.processes}",
            "--network-interface",
            "lo",
        ),
        *("--stall-check-shutdown-time-seconds", str(_STALL_SECONDS)),
        *worker,
    ]


def check_launcher(processes: int) -> None:
    """UserError when several processes are asked for and there is no Horovod that could connect them."""
    if processes > 1:
        try:
            import_horovod()
        except UserError as error:
            raise UserError(f"{error}; or use --processes 1 or `hvd-lb simulate`") from None


class Workers:
    """The running processes of a job; their output goes to RUN/logs/workers.log."""

    def __init__(self, job: Job, run: RunDirectory, lock: int):
        run.job.write_text(job.model_dump_json(indent=1), "utf-8")
        for old in run.logs.glob("error-*.json"):
            old.unlink()
        for stale in (run.heartbeat, run.stop, run.stopped):
            stale.unlink(missing_ok=True)
        self._run = run
        self.log = run.logs / "workers.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                worker_command(job, run.job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A process of its own group: Ctrl-C reaches the launching process alone, which then ends the job.
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(job.threads), "PYTHONUNBUFFERED": "1"},
                pass_fds=(lock,),
                preexec_fn=_die_with_parent,
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """Exit status, or None while the job is still running after so many seconds."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def ask_to_stop(self, number: int) -> None:
        """Ask for a checkpoint after the present step and an end; `number` is the signal that caused it."""
        replace_text(self._run.stop, str(number))

    def stopped(self) -> dict[str, Any] | None:
        """When the job has ended so, the signal that caused it and the steps that were done."""
        return json.loads(self._run.stopped.read_text("utf-8")) if self._run.stopped.exists() else None

    def stop(self) -> None:
        """End the job at once: politely, then not."""
        if self.poll() is None:
            replace_text(self._run.stop, AT_ONCE)
        for sign, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
            if self.poll() is not None:
                return
            os.killpg(self._process.pid, sign)
            if self.wait(seconds) is not None:
                return

    def failure(self, status: int) -> WorkerFailure:
        """Why the job ended with `status`: what the process said that failed first, else how it was ended."""
        errors = [json.loads(path.read_text("utf-8")) for path in sorted(self._run.logs.glob("error-*.json"))]
        # When one process fails Horovod's other processes fail in turn, with an error of Horovod's own.
        errors.sort(key=lambda error: (error["kind"] == "HorovodInternalError", error["time"]))
        if errors and errors[0]["kind"] != "HorovodInternalError":
            return WorkerFailure.from_error(errors[0], self.log)
        return _killed(status, self.log)


@dataclass(frozen=True)
class WorkerFailure:
    """The first failure of a job, for a person."""

    message: str
    rank: int | None
    host: str
    log: Path

    @staticmethod
    def from_error(error: dict[str, Any], log: Path) -> WorkerFailure:
        plain = error["kind"] in ("UserError", "Diverged")
        message = error["message"] if plain else f"{error['kind']}: {error['message']}"
        return WorkerFailure(message, error["rank"], error["host"], log)

    def __str__(self) -> str:
        who = "a worker" if self.rank is None else f"rank {self.rank}"
        return f"{who} on {self.host} failed: {self.message} (full log: {self.log})"


_EXIT_OF_RANK = re.compile(r"Process name: (\d+)\s*\n\s*Exit code: (-?\d+)")


def _killed(status: int, log: Path) -> WorkerFailure:
    """What can be said of a process that could not say anything itself."""
    text = log.read_text("utf-8", errors="replace")
    if match := _EXIT_OF_RANK.search(text):
        rank, code = int(match[1]), int(match[2])
    else:
        rank, code = None, status
    # A shell reports a signal as 128 + its number, Python as its negative.
    number = -code if code < 0 else code - 128
    if number in {int(sign) for sign in signal.Signals}:
        message = f"ended by {signal.Signals(number).name}"
        if number == signal.SIGKILL:
            message += " (killed by hand, or the machine ran out of memory)"
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        message = f"ended with exit code {code}" + (f"; last said: {lines[-1].strip()}" if lines else "")
    return WorkerFailure(message, rank, "localhost", log)


def _die_with_parent() -> None:
    """The job does not outlive the process that watches it, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
