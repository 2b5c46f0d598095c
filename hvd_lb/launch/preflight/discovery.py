"""Hosts that come and go while an elastic run goes on: what the user's script prints, asked again and again.

`--host-discovery SCRIPT` prints a host and its slots a line, as in a hostfile. Hosts that are new are examined as those
at the start are, and those that are not ready are told once.
"""

from __future__ import annotations

import queue
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host, hosts_in

_EVERY_SECONDS = 5.0
_PATIENCE_SECONDS = 30.0

Examine = Callable[[Sequence[Host], set[str]], tuple[dict[str, tuple[int, str]], dict[str, str]]]
"""Of all hosts that are there, those with these names: slots and network interface of who is ready, and why others are
not."""


def discovered(script: Path) -> list[Host]:
    """What the script prints now. UserError in one line where it fails, or names no host."""
    said = f"--host-discovery {script}"
    try:
        done = subprocess.run(
            [script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{said} has not ended after {_PATIENCE_SECONDS:.0f} s: it has to print hosts"
        ) from None
    except OSError as error:
        raise UserError(
            f"{said} cannot be run ({error.strerror}): give a program that prints hosts"
        ) from None
    if done.returncode:
        last = next(iter(reversed(done.stderr.strip().splitlines())), f"exit code {done.returncode}")
        raise UserError(f"{said} failed: {last}")
    return hosts_in(done.stdout, said)


@dataclass(frozen=True)
class Come:
    """Processes may be started on this host."""

    name: str
    slots: int
    interface: str


@dataclass(frozen=True)
class Gone:
    """Processes of this host are to leave."""

    name: str


class Discovery:
    """A thread that asks the script while it is entered; `news` is what is to be done, or told to a person.

    `known` are hosts that the job has, and how many processes are on them.
    """

    def __init__(self, script: Path, known: Mapping[str, int], examine: Examine):
        self._script, self._examine = script, examine
        self._present = dict(known)
        self._told: dict[str, str] = {}  # what was said last of a host, and of the script itself
        self._news: queue.SimpleQueue[Come | Gone | str] = queue.SimpleQueue()
        self._over = threading.Event()

    def __enter__(self) -> Discovery:
        threading.Thread(target=self._ask, name="host discovery", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def news(self) -> list[Come | Gone | str]:
        """Since the last call."""
        return [self._news.get() for _ in range(self._news.qsize())]

    def _ask(self) -> None:
        while not self._over.wait(_EVERY_SECONDS):
            self.look()

    def look(self) -> None:
        """Ask once; when the script fails all stays as it was."""
        try:
            hosts = discovered(self._script)
        except UserError as error:
            self._tell("", f"{error}; the hosts stay as they are")
            return
        self._told.pop("", None)
        names = {host.name for host in hosts}
        for name in sorted(self._present.keys() - names):
            self._news.put(Gone(name))
            del self._present[name]
        self._told = {name: told for name, told in self._told.items() if name in names}
        present = self._present
        if new := {host.name for host in hosts if (host.slots or 1) > present.get(host.name, 0)}:
            ready, problems = self._examine(hosts, new)
            for name, (slots, interface) in ready.items():
                self._news.put(Come(name, slots, interface))
                self._told.pop(name, None)
                present[name] = slots
            for name, problem in problems.items():
                self._tell(name, f"{name} cannot join: {problem}")

    def _tell(self, about: str, text: str) -> None:
        if self._told.get(about) != text:
            self._told[about] = text
            self._news.put(text)
