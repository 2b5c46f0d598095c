"""What the processes of a launch have in common: they die with whoever started them, and may open enough files."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def dies_with_parent(sign: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """For `preexec_fn`: the kernel sends `sign` to the child when this process ends, however it ends."""
    parent = os.getpid()

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, sign)
        if os.getppid() != parent:  # it has ended just now
            os.kill(os.getpid(), sign)

    return prepare


def outlives_parent() -> None:
    """Takes back, for this process, what `dies_with_parent` did."""
    _libc.prctl(_PR_SET_PDEATHSIG, 0)


def end_predecessors() -> None:
    """Kill the other processes here with this one's command line, and with them those that die with their parent."""
    own = Path("/proc/self/cmdline").read_bytes()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended, or somebody else's
            if int(folder.name) != os.getpid() and (folder / "cmdline").read_bytes() == own:
                os.kill(int(folder.name), signal.SIGKILL)


def allow_open_files(needed: int) -> str | None:
    """Raise this process's limit of open files to `needed`, for its children, too; why not, where that cannot be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        return (
            f"{hard:,} open files are allowed and about {needed:,} needed: raise the hard limit (ulimit -Hn)"
        )
    return None
