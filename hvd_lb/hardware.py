"""What this machine offers, and how a run uses it: device, processes, threads. None of it touches the mathematics."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hvd_lb.cores import usable_cores
from hvd_lb.errors import UserError
from hvd_lb.recipe import Recipe
from hvd_lb.reproducible import cpu_features, cpu_info, version

DeviceName = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Placement:
    """`processes` (p) on `device`, each with `threads` CPU threads; `hosts` is empty for this machine alone."""

    device: DeviceName
    processes: int
    threads: int
    hosts: tuple[str, ...] = ()


def choose_device(name: str) -> DeviceName:
    """cpu or cuda for "auto", "cpu" or "cuda"."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but this machine has 0 CUDA GPUs: name machines that have some with --hosts, use "
            "--device cpu, try it out with `hvd-lb simulate`, or see `hvd-lb doctor` if there should be one"
        )
    return "cuda" if name == "cuda" else "cpu"


def default_gpus(device: DeviceName) -> int:
    """Virtual workers where nobody said how many: one per GPU of this machine."""
    return torch.cuda.device_count() if device == "cuda" else 1


def place(device: DeviceName, *, gpus: int, processes: int | None, threads: int | None) -> Placement:
    """Processes and threads for `gpus` virtual workers on this machine; UserError when they cannot be had."""
    if device == "cuda":
        there = torch.cuda.device_count()
        wanted = processes or gpus
        if wanted > there:
            raise UserError(
                f"{wanted} GPUs are asked for and this machine has {there}: name more machines with --hosts, share "
                f"the virtual workers with --processes {there}, use --device cpu, or try it out with `hvd-lb simulate`"
            )
    else:
        wanted = processes or min(gpus, usable_cores())
    check_processes(wanted, gpus)
    return Placement(device, wanted, threads or max(1, usable_cores() // wanted))


def check_processes(processes: int, gpus: int) -> None:
    """UserError when so many processes cannot share the virtual workers."""
    if not 1 <= processes <= gpus:
        raise UserError(
            f"--processes {processes} for {gpus} virtual workers: expected 1 to {gpus}, as each process hosts at least "
            "one"
        )


def loader_threads(recipe: Recipe, threads: int, processes_here: int) -> int:
    """Threads that read and decode for one of this machine's processes, which computes with `threads`.

    As many as the recipe says; no pixel depends on it. So where it says nothing and a reproducible run fixes the
    threads of computing, decoding still gets its share of the cores.
    """
    if recipe.loader_threads:
        return recipe.loader_threads
    return max(threads, usable_cores() // processes_here) if recipe.reproducible else threads


def describe_environment(placement: Placement, command: Sequence[str]) -> dict[str, Any]:
    """What environment.json tells about where and how a run was made."""
    packages = (
        "hvd-lb",
        "torch",
        "torchvision",
        "nvidia-dali-cuda130",
        "horovod",
        "numpy",
        "pydantic",
        "safetensors",
    )
    return {
        "command": list(command),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "cuda": torch.version.cuda,
        "devices": _devices(placement),
        "processes": placement.processes,
        "threads_per_process": placement.threads,
        "hosts": list(placement.hosts) or [socket.gethostname()],
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": cpu_features(),
        "cores": usable_cores(),
        "git_commit": _git_commit(),
        "executable": sys.executable,
    }


def _devices(placement: Placement) -> list[str]:
    if placement.device == "cuda":
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ["cpu"]


def _cpu_name() -> str:
    names = (
        line.partition(":")[2].strip() for line in cpu_info().splitlines() if line.startswith("model name")
    )
    return next(names, platform.processor() or "unknown")


def _git_commit() -> str | None:
    """The commit of hvd-lb's own checkout, with "+changes" if it was edited; None when installed without one."""
    git, root = shutil.which("git"), Path(__file__).resolve().parent.parent
    if git is None or not (root / ".git").exists():
        return None
    run = [git, "-C", str(root)]
    commit = subprocess.run(
        [*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*run, "status", "--porcelain"], capture_output=True, text=True, check=False
    ).stdout
    return (commit + ("+changes" if changed.strip() else "")) or None
