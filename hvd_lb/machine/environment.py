"""Where and how a run was made: environment.json."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvd_lb.machine.cpu import describe_cpu, kernel_variables
from hvd_lb.machine.packages import version
from hvd_lb.machine.placement import Placement


def describe_environment(placement: Placement, command: Sequence[str]) -> dict[str, Any]:
    """What environment.json tells about where and how a run was made; devices and CPU are those of its ranks."""
    import torch

    packages = (
        "hvd-lb",
        "torch",
        "torchvision",
        "nvidia-dali-cuda130",
        "horovod",
        "numpy",
        "pillow",
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
        **(
            placement.first_host
            or {**describe_cpu(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
        ),
        "variables": kernel_variables(),
        "git_commit": _git_commit(),
        "executable": sys.executable,
    }


def _devices(placement: Placement) -> list[str]:
    import torch

    if placement.device == "cpu":
        return ["cpu"]
    if placement.hosts:
        return list(placement.gpus)
    return [torch.cuda.get_device_name(i) for i in range(placement.processes)]


def _git_commit() -> str | None:
    """The commit of hvd-lb's own checkout, with "+changes" if it was edited; None when installed without one."""
    git, root = shutil.which("git"), Path(__file__).resolve().parents[2]
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root)]
    commit = subprocess.run(
        [*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*command, "status", "--porcelain"], capture_output=True, text=True, check=False
    ).stdout
    return (commit + ("+changes" if changed.strip() else "")) or None
