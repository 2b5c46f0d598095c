"""Findings about the machine itself: compiler, disk, cores, memory."""

import os
import shutil
from pathlib import Path

from hvd_lb.doctor.ask import Answer, ProbeError
from hvd_lb.doctor.finding import Finding

_GIB = 2**30


def check_compiler(compiler: str | None, make: str | None) -> Finding:
    missing = [package for package, found in (("g++", compiler), ("make", make)) if found is None]
    if missing:
        fix = f"to build Horovod: apt-get install {' '.join(missing)}"
        return Finding("C++ compiler", "missing", f"no {' and no '.join(missing)}", fix)
    return Finding("C++ compiler", "ok", str(compiler))


def check_disk(name: str, folder: Path, *, least: int = _GIB) -> Finding:
    """The folder, or the nearest one above it that exists, must be writable and have `least` bytes free."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    detail = f"{free / _GIB:.0f} GiB free in {folder}"
    if not os.access(place, os.W_OK):
        return Finding(
            name, "wrong", f"{place} is not writable", "work in a folder of your own", required=True
        )
    if free < least:
        return Finding(name, "wrong", detail, f"make room: {least / _GIB:.0f} GiB at least", required=True)
    return Finding(name, "ok", detail)


def check_cores(count: int) -> Finding:
    return Finding("cores", "ok", f"{count} usable by this process")


def check_memory(available: int, *, least: int = 2 * _GIB) -> Finding:
    detail = f"{available / _GIB:.1f} GiB available"
    if available < least:
        fix = f"free some: a process needs about {least / _GIB:.0f} GiB"
        return Finding("memory", "wrong", detail, fix)
    return Finding("memory", "ok", detail)


def check_shared_memory(folder: Path, torch: Answer, *, least: int = _GIB) -> Finding:
    """NCCL connects the GPUs of one host through /dev/shm, of which containers get 64 MB."""
    if not folder.is_dir():
        return Finding("shared memory", "missing", f"no {folder}", "for several GPUs: mount it")
    total = shutil.disk_usage(folder).total
    detail = f"{total / _GIB:.1f} GiB in {folder}"
    if total < least and not isinstance(torch, ProbeError) and len(torch["devices"]) > 1:
        return Finding("shared memory", "wrong", detail, "docker run --shm-size=8g", required=True)
    return Finding("shared memory", "ok", detail)
