"""Hosts that come and go while an elastic run goes on: what the user's script prints, asked again and again.

`--host-discovery SCRIPT` prints a host and its slots a line, as in a hostfile. Hosts that are new are examined as those
at the start are, and those that are not ready are told once.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.launch.agent.process import dies_with_parent
from hvd_lb.launch.hosts import Host, hosts_in
from hvd_lb.launch.preflight.ask import written_by

_EVERY_SECONDS = 5.0
_PATIENCE_SECONDS = 30.0
_END_SECONDS = 2.0  # for a script that is under way when the run ends


@dataclass(frozen=True)
class Come:
    """So many processes may be on this host."""

    name: str
    slots: int
    interface: str
    note: str = ""  #: for a person


@dataclass(frozen=True)
class Gone:
    """Processes of this host are to leave."""

    name: str


Examined = tuple[Sequence[Come], Mapping[str, str]]
"""Who is ready, and why others are not, by name."""
Examine = Callable[[Sequence[Host], Set[str], Mapping[str, int]], Examined]
"""Of all hosts that are there, those with these names; so many processes of the job are on each."""


def discovered(script: Path, over: threading.Event | None = None) -> list[Host]:
    """What the script prints now. UserError in one line where it fails, names no host, or runs when it is `over`."""
    said = f"--host-discovery {script}"
    try:
        status, out, errors = _run(script, over or threading.Event())
    except TimeoutError:
        raise UserError(
            f"{said} has not ended after {_PATIENCE_SECONDS:.0f} s: it has to print hosts"
        ) from None
    except OSError as error:
        raise UserError(
            f"{said} cannot be run ({error.strerror}): give a program that prints hosts"
        ) from None
    if status:
        last = next(iter(reversed(errors.strip().splitlines())), f"exit code {status}")
        raise UserError(f"{said} failed: {last}")
    return hosts_in(out, said)


def _run(script: Path, over: threading.Event) -> tuple[int, str, str]:
    """How it ended and what it wrote; TimeoutError, and nothing of it is left, where it takes too long."""
    with subprocess.Popen(
        [script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=dies_with_parent(),
    ) as process:
        try:
            if written := written_by(process, None, _PATIENCE_SECONDS, over.is_set):
                return process.returncode, *written
            raise TimeoutError
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            raise


class Discovery:
    """A thread that asks the script while it is entered; `news` is what is to be done, or told to a person.

    `known` are hosts that the job has, and how many processes are on them. Hosts are examined by another thread: one
    that does not answer keeps other new ones waiting, but none that is to go. `over` is set when it is left.
    """

    def __init__(
        self, script: Path, known: Mapping[str, int], examine: Examine, over: threading.Event | None = None
    ):
        self._script, self._examine = script, examine
        self._present = dict(known)
        self._told: dict[str, str] = {}  # what was said last of a host, and of the script itself
        self._news: queue.SimpleQueue[Come | Gone | str] = queue.SimpleQueue()
        self._over = over or threading.Event()
        self._thread = threading.Thread(target=self._ask, name="host discovery", daemon=True)
        self._examination: Future[Examined] | None = None  # under way

    def __enter__(self) -> Discovery:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(_END_SECONDS)

    def news(self) -> list[Come | Gone | str]:
        """Since the last call."""
        return [self._news.get() for _ in range(self._news.qsize())]

    def _ask(self) -> None:
        while not self._over.wait(_EVERY_SECONDS):
            self.look()

    def look(self) -> None:
        """Ask once; when the script fails, or hosts cannot be examined, all stays as it was."""
        try:
            self._look()
        except UserError as error:
            self._tell("", f"{error}; the hosts stay as they are")
        except Exception as error:  # whatever it is: without this thread nobody would join or leave any more
            what = " ".join(f"{type(error).__name__}: {error}".split())
            self._tell("", f"--host-discovery has failed ({what}); the hosts stay as they are")
        else:
            self._told.pop("", None)

    def _look(self) -> None:
        hosts = discovered(self._script, self._over)
        names = {host.name for host in hosts}
        for name in sorted(self._present.keys() - names):
            self._news.put(Gone(name))
            del self._present[name]
        self._told = {name: told for name, told in self._told.items() if name in {"", *names}}
        for host in hosts:
            if host.slots and host.slots < self._present.get(host.name, 0):
                self._news.put(Come(host.name, host.slots, ""))
                self._present[host.name] = host.slots
        new = {host.name for host in hosts if (host.slots or 1) > self._present.get(host.name, 0)}
        if new and not self._examination:
            self._examination = _begun(self._examine, hosts, new, dict(self._present))
        if not self._examination:
            return
        wait([self._examination], _EVERY_SECONDS)
        if self._examination.done():
            examination, self._examination = self._examination, None
            ready, problems = examination.result()
            for come in ready:
                if come.name in new:  # still
                    if come.note:
                        self._news.put(come.note)
                    self._news.put(come)
                    self._told.pop(come.name, None)
                    self._present[come.name] = come.slots
            for name in new & problems.keys():
                self._tell(name, f"{name} cannot join: {problems[name]}")

    def _tell(self, about: str, text: str) -> None:
        if self._told.get(about) != text:
            self._told[about] = text
            self._news.put(text)


def _begun(
    examine: Examine, hosts: Sequence[Host], names: Set[str], present: Mapping[str, int]
) -> Future[Examined]:
    """An examination in a thread of its own, which ends with this process."""
    examination: Future[Examined] = Future()

    def run() -> None:
        try:
            examination.set_result(examine(hosts, names, present))
        except BaseException as error:
            examination.set_exception(error)

    threading.Thread(target=run, name="examination of hosts", daemon=True).start()
    return examination
