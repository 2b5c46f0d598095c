"""Which machines a run may use: named by the user, listed in a file, or found in what a scheduler left behind.

A host's slots are the processes it takes, one per GPU. None means: as many as the host has GPUs (or cores, on the
CPU), which the preflight finds out.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.machine.placement import NAME_MORE

#: Where the MPI operator of Kubernetes mounts the list of a job's worker pods.
MPIJOB_HOSTFILE = Path("/etc/mpi/hostfile")

#: So many hosts are told one by one.
FEW = 8
# A name that can be nothing else on a command line: no option, no user, no shell syntax.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,252}", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A machine and how many processes it takes; None: not said. `cpus` are then those that a job may have there."""

    name: str
    slots: int | None = None
    cpus: int | None = None

    def __str__(self) -> str:
        return self.name if self.slots is None else f"{self.name}:{self.slots}"


def parse_hosts(text: str) -> list[Host]:
    """The hosts of `--hosts h1:8,h2:8`; the slots may be left out. UserError when that is not what it is."""
    return _distinct(
        [_host(item.strip(), f"--hosts {text!r}") for item in text.split(",")], f"--hosts {text!r}"
    )


def read_hostfile(path: Path, where: str = "") -> list[Host]:
    """The hosts of a file; `where` says in errors which it is.

    In the form of Open MPI or Horovod, `h1 slots=8`, `h1:8` or `h1` a line, # for comments; in that of PBS, a host on
    as many lines as it has slots; in that of Grid Engine, `h1 8 queue processors`.
    """
    from hvd_lb.recipe_file import read_named  # here: heads and agents need no YAML

    where = where or f"hostfile {path}"
    try:
        text = read_named(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"{where} cannot be read ({reason}): expected lines such as `h1 slots=8`") from None
    return hosts_in(text, where)


def hosts_in(text: str, where: str) -> list[Host]:
    """The hosts of a text in one of those forms."""
    hosts = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.partition("#")[0].split()
        if fields:
            hosts.append(_hostfile_line(fields, f"{where}, line {number}"))
    if not hosts:
        raise UserError(f"{where} names no host: expected lines such as `h1 slots=8`")
    return _distinct(hosts, where)


def assign(hosts: Sequence[Host], processes: int, more: str = NAME_MORE) -> list[Host]:
    """Hosts are filled in order: those with slots for the ranks 0 … processes − 1, trimmed.

    UserError if there are too few, with `more`, how to get more of them.
    """
    there = sum(host.slots or 0 for host in hosts)
    if processes > there:
        raise UserError(
            f"{processes} processes are asked for and {in_words(hosts)} take {there}: "
            f"{more}, or share the virtual workers with --processes {there}"
        )
    assigned = []
    for host in hosts:
        slots = min(host.slots or 0, processes)
        processes -= slots
        if slots:
            assigned.append(Host(host.name, slots))
    return assigned


def in_words(hosts: Sequence[Host | str]) -> str:
    """Hosts for a sentence: a few one by one, many as Slurm writes them, `h[1-32]:8 (32 hosts)`."""
    names = list(map(str, hosts))
    if len(names) <= FEW:
        return ", ".join(names)
    runs: list[tuple[str, list[str], str]] = []
    for name in names:
        # the last number of the host's own name; slots and domain follow
        match = re.fullmatch(r"(\d+\.\d+\.\d+\.|[^.:]*?)(\d+)([^\d.:]*(?:[.:].*)?)", name)
        before, number, after = match.groups() if match else (name, "", "")
        if runs and runs[-1][::2] == (before, after) and number == _next(runs[-1][1][-1]):
            runs[-1][1].append(number)
        else:
            runs.append((before, [number], after))
    parts = [f"{a}[{of[0]}-{of[-1]}]{z}" if len(of) > 1 else f"{a}{of[0]}{z}" for a, of, z in runs]
    return f"{', '.join([*parts[:FEW], '…'][: len(parts)])} ({len(names)} hosts)"


def _next(number: str) -> str:
    return str(int(number) + 1).zfill(len(number)) if number else ""


def host_of_rank(hosts: Sequence[Host], rank: int) -> str:
    """The name of the host that a rank runs on, when hosts are filled in order."""
    return place_of_rank(hosts, rank)[0]


def place_of_rank(hosts: Sequence[Host], rank: int) -> tuple[str, int, int]:
    """That host, and which of how many ranks it is there."""
    for host in hosts:
        slots = host.slots or 0
        if rank < slots:
            return host.name, rank, slots
        rank -= slots
    raise ValueError(f"no host takes {rank + 1} more processes")


def is_this_machine(host: str) -> bool:
    """Whether a name or address is this machine's own: only then can a socket be bound to it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def _host(item: str, where: str) -> Host:
    name, colon, slots = item.partition(":")
    if not _NAME.fullmatch(name) or (colon and not re.fullmatch("[0-9]{1,9}", slots, re.ASCII)):
        raise UserError(
            f"{where}: {item!r} is not a host, expected a name or address and its slots, such as h1:8"
            + ("; give the user as `User` in ~/.ssh/config" if "@" in item else "")
        )
    return Host(name, _slots(slots, where) if colon else None)


def _hostfile_line(fields: list[str], where: str) -> Host:
    host = _host(fields[0], where)
    if len(fields) == 4 and re.fullmatch("[0-9]{1,9}", fields[1], re.ASCII):
        return Host(host.name, _slots(fields[1], where))
    for field in fields[1:]:
        key, _, value = field.partition("=")
        if key in ("slots", "max_slots", "max-slots") and re.fullmatch("[0-9]{1,9}", value, re.ASCII):
            if key == "slots":
                host = Host(host.name, _slots(value, where))
        else:
            raise UserError(f"{where}: {field!r} is not understood, expected `{host.name} slots=8`")
    return host


def _slots(text: str, where: str) -> int:
    if not 1 <= int(text) <= 1024:
        raise UserError(f"{where}: {text} slots, expected 1 to 1,024 processes on a host")
    return int(text)


def _distinct(hosts: Iterable[Host], where: str) -> list[Host]:
    """Each host once, as it was first named; one that is named again brings further slots, as in Open MPI.

    Where none has a number and some are named again, each time is one slot, as in a file of PBS.
    """
    named = list(hosts)
    again = len({host.name for host in named}) < len(named)
    if again and all(host.slots is None for host in named):
        named = [Host(host.name, 1) for host in named]
    merged: dict[str, Host] = {}
    for host in named:
        before = merged.get(host.name)
        if before and (before.slots is None or host.slots is None):
            raise UserError(f"{where}: {host.name} is named twice: name it once, with all its slots")
        merged[host.name] = (
            Host(host.name, host.slots + before.slots) if before and before.slots and host.slots else host
        )
    return list(merged.values())
