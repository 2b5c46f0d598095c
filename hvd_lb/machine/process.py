"""A process: what tells it from all others, of other machines and boots too; whether it is there; how it ended; its
memory."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

# glibc's mallopt (malloc.h)
_TRIM_THRESHOLD, _MMAP_MAX, _MXFAST = -1, -4, 1
_NO_TCACHE = "glibc.malloc.tcache_count=0"


def this_process() -> dict[str, Any]:
    """Host, machine, number and start of this process: numbers are used again, and containers count anew."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
    }


def started(pid: int) -> int | None:
    """When a process was started, in clock ticks since the machine was; None where it is no more."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def is_running(process: Mapping[str, Any]) -> bool | None:
    """Whether that process is there still; None where only its own machine can tell.

    `process` holds what `this_process` gave there. LookupError, TypeError or ValueError where it is damaged.
    """
    pid, host, machine = int(process["pid"]), process["host"], process["machine"]
    if (host, machine) != (socket.gethostname(), _machine()):
        return None
    return process["started"] == started(pid) is not None


def signal_name(number: int) -> str:
    """Such as SIGKILL. Signals of real time, all but the first and the last, have numbers only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _machine() -> str:
    """One boot of one machine, and what counts its processes: a container counts its own."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def this_life() -> str:
    """One boot of this machine, or one start of this container: whoever comes back under its name has another."""
    return f"{_machine()} {started(1)}"


def peak_memory(device: str = "cpu") -> int:
    """The most memory that this process has held at once, in bytes: on a GPU that of tensors, else resident memory.

    Linux: of this program alone. `getrusage` there begins with what the process held that started it.
    """
    if device.startswith("cuda"):
        import torch  # who only asks for a process needs none

        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text("utf-8", "replace")
    except OSError:  # macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@cache
def keep_memory() -> None:
    """What this process frees it keeps, for its next step: glibc gives large tensors back to Linux at once.

    A step needs the same memory as the last one, and each page that comes anew costs a fault and 4,096 zeros written.
    What the user has set of this (MALLOC_MMAP_MAX_, GLIBC_TUNABLES) stays. Nothing happens where malloc is not glibc's.

    What is kept must not fall to pieces: an aligned tensor leaves some bytes before and after it. If these do not go
    back to their neighbours when all are freed, the next tensor of that size has no room there. So small pieces are not
    set aside for small requests, here and, as only variables can say that to a process, by `memory_variables`.
    """
    if _set_by_user("mmap_", "trim_"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
        mallopt(_MXFAST, 0)


def memory_variables() -> dict[str, str]:
    """What a process has to be started with for `keep_memory` to keep no more than it has to."""
    if _set_by_user("mmap_", "trim_", "tcache_"):
        return {}
    present = os.environ.get("GLIBC_TUNABLES")
    return {"GLIBC_TUNABLES": f"{present}:{_NO_TCACHE}" if present else _NO_TCACHE}


def _set_by_user(*settings: str) -> bool:
    """Whether any of malloc's settings that begin so is in the environment."""
    words = (*os.environ, *os.environ.get("GLIBC_TUNABLES", "").split(":"))
    return any(
        re.match(rf"(MALLOC_|glibc\.malloc\.)({'|'.join(settings)})", word, re.IGNORECASE) for word in words
    )
