"""The running processes of a job, as the process sees them that started them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from contextlib import suppress
from typing import Any

from hvd_lb.data.files.reading import retried
from hvd_lb.launch.agent.head import CONTROL
from hvd_lb.launch.agent.process import dies_with_parent
from hvd_lb.launch.failure import RankFailure, find_failure
from hvd_lb.launch.job import Job
from hvd_lb.launch.launch_plan import LaunchPlan, Running
from hvd_lb.launch.preflight.discovery import Come, Gone
from hvd_lb.launch.stopping import AT_ONCE
from hvd_lb.report.run_directory import RunDirectory, replace_text
from hvd_lb.world.launched import without_job


class RankProcesses:
    """A started job. What its launcher says goes to RUN/logs/launcher.log; each rank has a log of its own beside it."""

    def __init__(self, job: Job, launch: LaunchPlan, run: RunDirectory, lock: int):
        self._run, self._launch = run, launch
        self.log = run.logs / "launcher.log"
        replace_text(run.job, job.to_json(), mode=0o600)
        # The processes that train, by their number in the job, which in its first generation is their rank.
        hosts = [host.name for host in launch.hosts for _ in range(host.slots or 0)]
        self.members = dict(enumerate(hosts))
        self._head: socket.socket | None = None
        self._heard = b""
        self._process = launch.started.begin(job.to_json()) if launch.started else self._start(job, lock)

    def _start(self, job: Job, lock: int) -> Running:
        launch = self._launch
        environment = {**without_job(os.environ), **job.environment}
        inherited = [lock]
        if launch.agents:
            self._head, theirs = socket.socketpair()
            self._head.setblocking(False)
            environment[CONTROL] = str(theirs.fileno())
            inherited.append(theirs.fileno())
        with self.log.open("wb") as log:
            process = _Group(
                launch.command(self._run.job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A process of its own group: Ctrl-C reaches the launching process alone, which then ends the job.
                start_new_session=True,
                env=environment,
                pass_fds=inherited,
                # The job does not outlive the process that watches it, however that ends.
                preexec_fn=dies_with_parent(signal.SIGTERM),
            )
        if launch.agents:
            theirs.close()
        return process

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """Exit status, or None while the job is still running after so many seconds."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def notes(self) -> list[str]:
        """What the head of the job has to say to a person since the last call; `members` are as it says."""
        with suppress(OSError):
            while self._head and (more := self._head.recv(1 << 16)):
                self._heard += more
        *lines, self._heard = self._heard.split(b"\n")
        messages = [json.loads(line) for line in lines]
        for message in messages:
            if members := message.get("members"):
                self.members = {int(number): host for number, host in members.items()}
        return [message["note"] for message in messages if "note" in message]

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to a rank, or to all, wherever they run. Ranks that no agent has started get none."""
        self._say(signal=number, rank=rank)

    def heed(self, news: Come | Gone) -> None:
        """Tell an elastic job of a host that has come, or is gone."""
        if isinstance(news, Come):
            self._say(come=news.name, slots=news.slots, interface=news.interface)
        else:
            self._say(gone=news.name)

    def connect_anew(self) -> None:
        """Have the ranks of an elastic job give up the present step, and take it again over new connections."""
        self._say(again=True)

    def ask_to_stop(self, number: int) -> None:
        """Ask for a checkpoint after the present step and an end; `number` is the signal that caused it."""
        self._run.logs.mkdir(parents=True, exist_ok=True)  # somebody may have removed the folder
        replace_text(self._run.stop, str(number))
        self._say(ends=number)  # of an elastic job there may be nobody who looks for that file

    def stopped(self) -> dict[str, Any] | None:
        """When the job has ended so, the signal that caused it, the steps done, and why it gives up if it does."""

        def read() -> bytes | None:
            return self._run.stopped.read_bytes() if self._run.stopped.exists() else None

        text = retried(read, str(self._run.stopped))
        return json.loads(text) if text else None

    def stop(self, *, ours: bool = True) -> None:
        """End the job at once: politely, then not.

        Where the run directory is not `ours` any more nobody is asked: what ranks would save, or a wish in there, would
        be another run's.
        """
        signs = [(signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)]
        try:
            if ours and self.poll() is None:
                with suppress(OSError):
                    replace_text(self._run.stop, AT_ONCE)
                self._say(stop=True)
            for sign, seconds in signs if ours else signs[1:]:
                if self.poll() is not None:
                    return
                self._process.end(sign)
                if self.wait(seconds) is not None:
                    return
        finally:
            if self._head:
                self._head.close()

    def failure(self, status: int) -> RankFailure:
        """Why the job ended with `status`."""
        agents = self._launch.agents
        return find_failure(self._run.logs, self.log, self._launch.hosts, status, agents=agents)

    def _say(self, **message: Any) -> None:
        with suppress(OSError):  # it has just ended
            if self._head:
                self._head.send(json.dumps(message).encode() + b"\n")


class _Group(subprocess.Popen[bytes]):
    """A process and those that it has started: a group of their own."""

    def end(self, sign: signal.Signals) -> None:
        os.killpg(self.pid, sign)
