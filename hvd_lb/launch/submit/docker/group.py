"""One container per host, alive as long as this process: started in parallel, keys exchanged, one command run.

with DockerContainers(submission, ["h1", "h2"], reach) as containers:
    status = containers.run(["hvd-lb", "train", ...])

Each container's standard input comes from here, through ssh or srun where its host is another machine, and it ends
with that (hvd_lb.launch.submit.docker.host). So none is left when this process is killed or its connection is cut.
"""

from __future__ import annotations

import math
import queue
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import in_words
from hvd_lb.launch.starters.ssh import Reach
from hvd_lb.launch.stopping import heeded_signals
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.docker.commands import known_host, remove_command, run_command
from hvd_lb.launch.submit.docker.handle import DockerContainer, Ended, Started, say
from hvd_lb.launch.submit.docker.host import GRACE_SECONDS
from hvd_lb.report.text import duration

_HEARTBEAT_SECONDS = 10.0
_PATIENCE_SECONDS = 60.0  # without a word of hosts that are waited for
_REMOVE_SECONDS = 30.0


class Interrupted(Exception):
    """By the signal `number`, before the command was started."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class DockerContainers:
    """UserError on entry when a container cannot be started, with a line for each; then none is left.

    The signals that end a run are passed on to the command while it runs, and raise Interrupted before.
    """

    def __init__(self, submission: Submission, hosts: Sequence[str], reach: Reach):
        self.run_id = secrets.token_hex(6)
        self._submission, self._hosts, self._reach = submission, hosts, reach
        self._events: queue.SimpleQueue[Started | Ended | Signalled] = queue.SimpleQueue()
        self._containers: list[DockerContainer] = []
        self._beat = time.monotonic()

    def __enter__(self) -> DockerContainers:
        self._handlers = {number: signal.signal(number, self._receive) for number in heeded_signals()}
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._end()

    def run(self, command: Sequence[str]) -> int:
        """Run it in the first container; its output is written to this process's. Its exit status."""
        first = self._containers[0]
        first.forward()
        first.send({"run": list(command)})
        while True:
            event = self._next_event(math.inf)
            if isinstance(event, Signalled):
                first.send({"signal": event.number})
            elif isinstance(event, Ended) and event.container is first:
                if event.status in (125, 137, 255):  # docker's, the kernel's and ssh's own, not the command's
                    say(f"{first.host}: {first.why(self._submission, event.status)}")
                return event.status
            elif isinstance(event, Ended):
                say(f"{event.container.host}: {event.container.why(self._submission, event.status)}")

    def _start(self) -> None:
        with _new_key(self.run_id) as (private, public):
            for host in self._hosts:
                command = self._reach(host, run_command(self._submission, self.run_id, host))
                container = DockerContainer(host, command, self._events)
                self._containers.append(container)
                container.send(
                    {
                        "port": self._submission.container_port,
                        "authorized_key": public,
                        "private_key": private if container is self._containers[0] else None,
                        "environment": {
                            "HVD_LB_CACHE": str(self._submission.output / ".cache"),
                            **self._submission.environment,
                        },
                    }
                )
        keys, failures = self._host_keys()
        if failures:
            raise UserError(
                "; ".join(f"{host}: {failures[host]}" for host in self._hosts if host in failures)
            )
        known = [known_host(host, self._submission.container_port, keys[host]) for host in self._hosts]
        for container in self._containers:
            container.send({"known_hosts": known})

    def _host_keys(self) -> tuple[dict[str, str], dict[str, str]]:
        """The key of each host whose container is there, and why the others' are not."""
        keys: dict[str, str] = {}
        failures: dict[str, str] = {}
        began = told = time.monotonic()
        while missing := [host for host in self._hosts if host not in keys | failures]:
            event = self._next_event(told + _PATIENCE_SECONDS)
            if isinstance(event, Signalled):
                raise Interrupted(event.number)
            if isinstance(event, Started):
                keys[event.container.host] = event.key
            elif event is None:
                told = time.monotonic()
                say(
                    f"waiting for {in_words(missing)} since {duration(told - began)}: docker has started no container "
                    "there yet (it may be pulling the image; Ctrl-C ends all)"
                )
            else:
                failures[event.container.host] = event.container.why(self._submission, event.status)
        return keys, failures

    def _next_event(self, until: float) -> Started | Ended | Signalled | None:
        """Waits for it, and tells all containers now and then that this process is there; None after `until`."""
        while time.monotonic() < until:
            if (left := self._beat + _HEARTBEAT_SECONDS - time.monotonic()) <= 0:
                for container in self._containers:
                    container.send({})
                self._beat, left = time.monotonic(), _HEARTBEAT_SECONDS
            with suppress(queue.Empty):
                return self._events.get(timeout=min(left, max(0.0, until - time.monotonic())))
        return None

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._events.put(Signalled(number))

    def _end(self) -> None:
        """Every container ends with its input; one that does not is removed."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for container in self._containers:
            container.release()
        deadline = time.monotonic() + GRACE_SECONDS + _HEARTBEAT_SECONDS
        for container in self._containers:
            if not container.ended(deadline - time.monotonic()):
                command = self._reach(container.host, remove_command(self.run_id, container.host))
                with suppress(subprocess.TimeoutExpired):
                    subprocess.run(command, capture_output=True, timeout=_REMOVE_SECONDS, check=False)
                container.kill()


@dataclass(frozen=True)
class Signalled:
    """This process got one of the signals that end a run."""

    number: int


@contextmanager
def _new_key(run: str) -> Iterator[tuple[str, str]]:
    """A key pair of this run alone, private and public; on the disk no longer than it takes to read."""
    with tempfile.TemporaryDirectory(prefix="hvd-lb-") as folder:
        path = Path(folder) / "key"
        try:
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"hvd-lb {run}", "-f", path], check=True
            )
        except FileNotFoundError:
            raise UserError("no ssh-keygen here: apt-get install openssh-client") from None
        keys = path.read_text("utf-8"), path.with_suffix(".pub").read_text("utf-8").strip()
    yield keys
