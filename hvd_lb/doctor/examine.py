"""What this machine has for a run and what it lacks, each with the fix: `hvd-lb doctor`.

Libraries are asked in processes of their own (`hvd_lb.doctor.ask`), so a broken one is a finding like any other.
Every check takes what it judges as arguments; `examine` gathers that and keeps the order.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hvd_lb.doctor import libraries, machine
from hvd_lb.doctor.ask import ask_all, last_line
from hvd_lb.doctor.finding import Finding
from hvd_lb.machine.cache_folder import cache_folder
from hvd_lb.machine.cpu import usable_cores
from hvd_lb.machine.limits import available_memory

_LIBRARIES = ("torch", "torchvision", "horovod", "dali", "gpus")


def examine() -> Iterator[Finding]:
    """All findings about this machine and this interpreter, in the order of the table."""
    answers = ask_all(_LIBRARIES)
    torch, horovod = answers["torch"], answers["horovod"]
    yield libraries.check_python(sys.version_info[:3])
    yield libraries.check_torch(torch)
    yield libraries.check_torchvision(answers["torchvision"])
    yield libraries.check_driver(answers["gpus"], torch)
    yield libraries.check_gpus(answers["gpus"], torch, os.environ.get("CUDA_VISIBLE_DEVICES"))
    yield from libraries.check_horovod(
        horovod,
        libraries.installed_version("horovod"),
        libraries.horovod_build(),
        torch,
        libraries.find_horovodrun(),
    )
    yield libraries.check_dali(answers["dali"], libraries.installed_version("nvidia-dali-cuda130"))
    yield libraries.check_open_mpi(_first_output_line("mpirun", "--version"), horovod)
    yield machine.check_compiler(shutil.which(os.environ.get("CXX", "g++")), shutil.which("make"))
    for name, folder in (("disk, here", Path.cwd()), ("disk, cache", cache_folder())):
        yield machine.check_disk(name, folder)
    yield machine.check_cores(usable_cores())
    yield machine.check_memory(available_memory())
    yield machine.check_shared_memory(Path("/dev/shm"), torch)


def _first_output_line(*command: str) -> str | None:
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        completed.stdout.splitlines()[0]
        if completed.returncode == 0 and completed.stdout
        else last_line(completed.stderr) or None
    )
