"""Findings about the libraries, the GPUs they drive and their versions, from the answers of the probes."""

import json
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

from hvd_lb.data.loading.nvjpeg import NEEDED
from hvd_lb.doctor.ask import Answer, ProbeError
from hvd_lb.doctor.finding import Finding, State
from hvd_lb.machine.packages import untried

_SET_UP = "run `make train`, or install the wheel whose path docker/build-horovod.sh PYTHON prints"


def check_python(version: tuple[int, ...]) -> Finding:
    text = ".".join(str(part) for part in version)
    if version < (3, 11):
        return Finding("Python", "wrong", text, "use Python 3.11 or newer", required=True)
    return Finding("Python", "ok", f"{text}, {sys.prefix}", required=True)


def check_torch(torch: Answer) -> Finding:
    if isinstance(torch, ProbeError):
        return _broken("torch", torch, installed_version("torch"), "pip install torch")
    built = f"for CUDA {torch['cuda']}" if torch["cuda"] else "for the CPU only"
    newer = "; newer than hvd-lb was tried with: --selftest compares" if untried() else ""
    return Finding("torch", "ok", f"{torch['version']}, {built}{newer}", required=True)


def check_torchvision(torchvision: Answer) -> Finding:
    if isinstance(torchvision, ProbeError):
        fix = "pip install --upgrade torchvision, which then fits this torch"
        return _broken("torchvision", torchvision, installed_version("torchvision"), fix)
    return Finding("torchvision", "ok", str(torchvision["version"]), required=True)


def check_driver(gpus: Answer, torch: Answer) -> Finding:
    """The NVIDIA driver must know the CUDA major version that torch is built for."""
    name = "NVIDIA driver"
    if isinstance(gpus, ProbeError):
        return Finding(name, "missing", f"none: {gpus}", "for GPUs: install NVIDIA's driver, 580 or newer")
    detail = f"{gpus['driver']}, CUDA {gpus['cuda']}"
    needed = None if isinstance(torch, ProbeError) else torch["cuda"]
    if needed and int(gpus["cuda"].split(".")[0]) < int(needed.split(".")[0]):
        fix = f"install a driver for CUDA {needed} or newer (580 for 13.0)"
        return Finding(name, "wrong", f"{detail}, but torch is for CUDA {needed}", fix, required=True)
    return Finding(name, "ok", detail)


def check_gpus(gpus: Answer, torch: Answer, visible: str | None) -> Finding:
    """Every GPU of the machine that is not hidden on purpose must work in torch."""
    if isinstance(gpus, ProbeError) or not gpus["names"]:
        return Finding("GPUs", "missing", "none; runs are on the CPU", "train with --device cpu, or simulate")
    detail = _count_names([f"{n}, {g:.0f} GiB" for n, g in zip(gpus["names"], gpus["gib"], strict=True)])
    if isinstance(torch, ProbeError):
        return Finding("GPUs", "wrong", f"{detail}; torch does not work", "see torch above", required=True)
    usable = sum(device["works"] for device in torch["devices"])
    if visible is not None and usable == len(torch["devices"]):
        shown = f"{usable} of {len(gpus['names'])} by CUDA_VISIBLE_DEVICES={visible!r}: {detail}"
        return Finding("GPUs", "ok" if usable else "missing", shown)
    if usable == len(gpus["names"]):
        return Finding("GPUs", "ok", detail)
    fix = "install a torch of PyPI (2.11 and newer are built for CUDA 13) and a driver that fits"
    return Finding("GPUs", "wrong", f"torch works on {usable} of: {detail}", fix, required=True)


def check_horovod(
    horovod: Answer, installed: str | None, build: dict[str, Any], torch: Answer, horovodrun: str | None
) -> Iterator[Finding]:
    """Four lines: the library, its controllers, its tensor operations, its launcher."""
    if isinstance(horovod, ProbeError) and installed is None:
        yield Finding("Horovod", "missing", "not installed; several processes use torch.distributed", _SET_UP)
        return
    if isinstance(horovod, ProbeError):
        yield _broken("Horovod", horovod, installed, _SET_UP)
        return
    built, runs = build.get("torch"), None if isinstance(torch, ProbeError) else torch["version"]
    detail = f"{horovod['version']}, built for " + (f"torch {built}" if built else "an unknown torch")
    if built and runs and _public(built) != _public(runs):
        yield Finding("Horovod", "wrong", f"{detail}, but torch is {runs}", _SET_UP, required=True)
    else:
        yield Finding("Horovod", "ok", detail, required=True)

    controllers = [label for key, label in (("gloo", "Gloo"), ("mpi", "MPI")) if horovod[key]]
    listed = ", ".join(controllers) or "none"
    state: State = "ok" if horovod["gloo"] else "wrong"
    yield Finding("  controllers", state, listed, "" if state == "ok" else _SET_UP, required=True)

    operations = ", ".join([*(["NCCL"] if horovod["nccl"] else []), *controllers]) or "none"
    if not horovod["nccl"] and not isinstance(torch, ProbeError) and torch["devices"]:
        yield Finding("  operations", "wrong", f"{operations}, but GPUs need NCCL", _SET_UP, required=True)
    else:
        yield Finding("  operations", "ok", operations)

    if horovodrun is None:
        yield Finding("  horovodrun", "missing", "no such command; `hvd-lb` needs none", _SET_UP)
    else:
        yield Finding("  horovodrun", "ok", horovodrun)


def check_dali(dali: Answer, installed: str | None) -> Finding:
    fix = "pip install nvidia-dali-cuda130, or train with --loader torchvision"
    if isinstance(dali, ProbeError):
        return _broken("DALI", dali, installed, fix)
    if not dali["works"]:
        return Finding("DALI", "wrong", f"{dali['version']} computes wrongly", fix, required=True)
    about = f"{dali['version']}, a CPU pipeline runs"
    if (found := dali.get("nvjpeg")) is None:  # that of a CUDA toolkit may do
        return Finding("DALI", "ok", about, required=True)
    about += f", nvJPEG {'.'.join(map(str, found))}"
    if tuple(found) >= NEEDED:
        return Finding("DALI", "ok", about, required=True)
    needed = ".".join(map(str, NEEDED))
    slow = f"{about}, older than {needed}: slower on GPUs, which cannot decode windows by it"
    return Finding("DALI", "wrong", slow, f"pip install 'nvidia-nvjpeg>={needed}'")


def check_open_mpi(version: str | None, horovod: Answer) -> Finding:
    fix = "for MPI: apt-get install openmpi-bin libopenmpi-dev, then rebuild Horovod; Gloo needs none"
    if version is None:
        return Finding("Open MPI", "missing", "no mpirun; runs use Gloo", fix)
    if not isinstance(horovod, ProbeError) and not horovod["mpi"]:
        return Finding("Open MPI", "ok", f"{version}; Horovod was built without it")
    return Finding("Open MPI", "ok", version)


def horovod_build() -> dict[str, Any]:
    """What docker/build-horovod.sh wrote into the installed wheel; empty for any other Horovod."""
    spec = util.find_spec("horovod")
    if spec is None or spec.origin is None:
        return {}
    record = Path(spec.origin).with_name("hvd_lb_build.json")
    try:
        return dict(json.loads(record.read_text()))
    except (OSError, ValueError):
        return {}


def find_horovodrun() -> str | None:
    """The launcher of this interpreter's environment, else the one on the path."""
    own = Path(sys.executable).with_name("horovodrun")
    return str(own) if own.exists() else shutil.which("horovodrun")


def _broken(name: str, error: ProbeError, installed: str | None, fix: str) -> Finding:
    """A required library that gave no answer: not installed, or installed and unusable."""
    if installed is None:
        return Finding(name, "missing", "not installed", fix, required=True)
    return Finding(name, "wrong", f"{installed} does not work: {error}", fix, required=True)


def installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _public(version: str) -> str:
    """2.14.1+cu130 -> 2.14.1"""
    return version.partition("+")[0]


def _count_names(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
