"""The container of one host, as the launching process holds it: its standard streams, and what has become of it."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.docker.commands import explain


class DockerContainer:
    """The `docker run` of one host, and what it says."""

    def __init__(self, host: str, command: Sequence[str], events: queue.SimpleQueue[Any]):
        self.host = host
        self._events = events
        self._said: deque[str] = deque(maxlen=30)
        self._forwarded = threading.Event()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            # A process of its own group: Ctrl-C reaches this process alone, which then hands it on.
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()
        threading.Thread(target=self._follow, args=(self._process.stdout,), daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """To the host process; one that has ended does not hear it, and its end is an event of its own."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def forward(self) -> None:
        """From now on, write its errors to this process's."""
        self._forwarded.set()

    def release(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def ended(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))
            return True
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def why(self, submission: Submission, status: int) -> str:
        """Why it ended, for a person."""
        return explain(submission, status, list(self._said))

    def _follow(self, stream: BinaryIO) -> None:
        """Its first line is the host process's answer, all after that the command's output."""
        answer = b""
        with stream:
            while not answer.endswith(b"\n") and (byte := stream.read(1)):
                answer += byte
            if answer.endswith(b"\n"):
                self._events.put(Started(self, json.loads(answer)["host_key"]))
            while output := stream.read(65536):
                with suppress(OSError, ValueError):  # nobody reads it any more
                    sys.stdout.buffer.write(output)
                    sys.stdout.buffer.flush()
        self._listener.join()
        self._events.put(Ended(self, self._process.wait()))

    def _listen(self, stream: BinaryIO) -> None:
        with stream:
            for line in stream:
                text = line.decode("utf-8", "replace")
                self._said.append(text.rstrip())
                if "Unable to find image" in text:
                    say(f"{self.host}: pulling the image")
                if self._forwarded.is_set():
                    with suppress(OSError, ValueError):
                        sys.stderr.write(text)
                        sys.stderr.flush()


@dataclass(frozen=True)
class Started:
    """A container is a host, with this key."""

    container: DockerContainer
    key: str


@dataclass(frozen=True)
class Ended:
    """A container is gone."""

    container: DockerContainer
    status: int


def say(line: str) -> None:
    """Beside the run's own output."""
    print(f"hvd-lb: {line}", file=sys.stderr, flush=True)
