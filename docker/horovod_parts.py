"""What docker/build-horovod.sh needs done in Python: the cache key, the toolkit folder, the patch, the wheel.

Runs under the interpreter the wheel is for, which has torch but perhaps nothing else, so only the standard
library is used. torch's version file is read instead of importing torch, which would take seconds.
"""

import argparse
import hashlib
import importlib.util
import json
import platform
import re
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

HOROVOD = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
PATCH = Path(__file__).with_name("horovod.patch")
PATCH_PARTS = 9
BUILD_TOOLS = (
    "cmake>=4,<5",
    "setuptools>=77",
    "wheel",
    "packaging",
    "cffi>=1.4",
    "cloudpickle",
    "psutil",
    "pyyaml",
)
# What compiles for CUDA; PyPI has no whole compiler of an older one.
CUDA_TOOLS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
# Compute capabilities for the toolkit of a CUDA major version; the last is also kept as PTX.
ARCHITECTURES = {12: "70,75,80,86,90", 13: "75,80,86,90,100,110,120"}


class BuildError(Exception):
    """Says in one line why no wheel can be built and what to do."""


def torch_versions() -> dict[str, str | None]:
    """The version and CUDA version of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(f"{sys.executable} has no torch: pip install torch first")
    values = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return {"torch": str(values["__version__"]), "cuda": values.get("cuda")}


def cpu_flags() -> str:
    """The instruction sets Horovod asks for (its half-precision sums use them) that this CPU has."""
    if platform.machine() != "x86_64":
        return ""
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    have = set(found.group(1).split()) if found else set()
    return " ".join(f"-m{flag}" for flag in ("f16c", "avx", "fma") if flag in have)


def describe(mpi: str, architectures: str, arch_flags: str, system: str = "") -> dict[str, object]:
    """Everything that goes into the wheel. Its hash names the cache entry.

    `system` is the folder of an installed CUDA toolkit, which is used in place of PyPI's wheels.
    """
    versions = torch_versions()
    cuda = versions["cuda"]
    toolkit = system_toolkit(Path(system), cuda) if system and cuda is not None else None
    if cuda is not None and int(cuda.split(".")[0]) not in ARCHITECTURES:
        raise BuildError(
            f"torch {versions['torch']} is for CUDA {cuda}, expected CUDA 12 or 13: install a torch of PyPI"
        )
    if cuda is not None and toolkit is None and int(cuda.split(".")[0]) < 13:
        raise BuildError(
            f"torch {versions['torch']} is for CUDA {cuda}, of which PyPI has no compiler: set HVD_LB_CUDA_HOME to an "
            "installed toolkit, or do without Horovod (hvd-lb train --engine torch)"
        )
    here = Path(__file__).resolve().parent
    scripts = hashlib.sha256()
    for name in ("build-horovod.sh", "horovod_parts.py", PATCH.name):
        scripts.update((here / name).read_bytes())
    return {
        "horovod": HOROVOD,
        "patch_parts": PATCH_PARTS,
        "sdist": SDIST_SHA256,
        **versions,
        "python": platform.python_version(),
        "abi": sysconfig.get_config_var("SOABI"),
        "platform": f"{platform.system()}-{platform.machine()}-{'-'.join(platform.libc_ver())}",
        "mpi": mpi or None,
        "toolkit": toolkit,
        "nccl": cuda is not None,
        "gloo": True,
        "architectures": (architectures or ARCHITECTURES[int(cuda.split(".")[0])]) if cuda else None,
        "cpu_flags": arch_flags or cpu_flags(),
        "scripts": scripts.hexdigest(),
    }


def cache_key(description: dict[str, object]) -> str:
    """A folder name: readable in front, the hash of all of the description behind.

    Patch releases of Python share one ABI, so only `abi` counts.
    """
    parts = {name: value for name, value in description.items() if name != "python"}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
    return f"horovod-{description['horovod']}-torch-{description['torch']}-{description['abi']}-{digest}"


def system_toolkit(folder: Path, cuda: str) -> str:
    """The CUDA version of an installed toolkit; BuildError where it is none, or not of torch's major version."""
    try:
        said = subprocess.run(
            [folder / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        raise BuildError(
            f"HVD_LB_CUDA_HOME={folder} has no bin/nvcc that runs: name a CUDA toolkit"
        ) from None
    found = re.search(r"release (\d+\.\d+)", said)
    version = found.group(1) if found else "unknown"
    if version.split(".")[0] != cuda.split(".")[0]:
        raise BuildError(
            f"HVD_LB_CUDA_HOME={folder} is CUDA {version}, torch is for {cuda}: name a toolkit of CUDA "
            f"{cuda.split('.')[0]}, or leave HVD_LB_CUDA_HOME out to take PyPI's wheels"
        )
    return version


def requirements(description: Mapping[str, object]) -> list[str]:
    """What the throw-away build environment installs; without a `toolkit` that the machine has, CUDA's compiler too."""
    cuda = description["cuda"]
    if cuda is None:
        return list(BUILD_TOOLS)
    major, minor = str(cuda).split(".")[:2]
    tools = [] if description.get("toolkit") else [f"{name}=={major}.{minor}.*" for name in CUDA_TOOLS]
    if nccl_folder() is None:
        tools.append(f"nvidia-nccl-cu{major}")
    return [*BUILD_TOOLS, *tools]


def wheel_folders(*beginnings: str) -> list[Path]:
    """Those of NVIDIA's wheels on the path: up to CUDA 12 each library has its own, then `cu13` holds them all."""
    parents = [Path(entry) / "nvidia" for entry in sys.path if (Path(entry) / "nvidia").is_dir()]
    return [
        folder
        for parent in parents
        for folder in sorted(parent.iterdir())
        if folder.name.startswith(beginnings)
    ]


def nccl_folder() -> Path | None:
    return next(
        (folder for folder in wheel_folders("nccl") if (folder / "include" / "nccl.h").exists()), None
    )


def link_tree(source: Path, target: Path) -> None:
    """Links every file of `source` into real folders below `target`; what is there already stays."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        place = target / entry.name
        if entry.is_dir():
            link_tree(entry, place)
        elif not place.exists():
            place.symlink_to(entry.resolve())


def make_toolkit(target: Path, system: Path | None = None) -> None:
    """Gives the CUDA and NCCL wheels, or an installed toolkit and NCCL's wheel, one shape: bin, include, nvvm, lib64.

    The wheels lack the names the linker looks for (libcudart.so, libnccl.so), so those are links too.
    """
    nccl = nccl_folder()
    if nccl is None:
        raise BuildError("the NCCL wheel has no nccl.h: reinstall torch")
    shape = {"bin": "bin", "include": "include", "nvvm": "nvvm", "lib": "lib64", "lib64": "lib64"}
    for source in [system] if system else wheel_folders("cu", "nvtx", "nvjitlink"):
        for inside, place in shape.items():
            if (source / inside).is_dir():
                link_tree(source / inside, target / place)
    (target / "lib").symlink_to("lib64")  # where nvcc looks since CUDA 13.2
    for part in ("include", "lib"):
        link_tree(nccl / part, target / "nccl" / part)
    for needed in ("bin/nvcc", "include/cuda_runtime.h", "include/cublas_v2.h", "nvvm/bin/cicc"):
        if not (target / needed).exists():
            missing = f"{system} has" if system else "the CUDA wheels have"
            raise BuildError(f"{missing} no {needed}: reinstall {'it' if system else 'torch'}")
    for folder, name in (("lib64", "libcudart.so"), ("nccl/lib", "libnccl.so")):
        plain = target / folder / name
        if not plain.exists():
            plain.symlink_to(sorted((target / folder).glob(f"{name}.*"))[0].name)


def changes() -> list[tuple[str, str, str]]:
    """The hunks of PATCH: a file, a text in it, and what is to stand in its place."""
    found = []
    name, old, new, left = "", "", "", (0, 0)
    for line in PATCH.read_text().splitlines(keepends=True):
        if any(left):
            old += line[1:] if line[0] in " -" else ""
            new += line[1:] if line[0] in " +" else ""
            left = (left[0] - (line[0] in " -"), left[1] - (line[0] in " +"))
            if not any(left):
                found.append((name, old, new))
        elif line.startswith("+++ b/"):
            name = line.removeprefix("+++ b/").strip()
        elif lengths := re.match(r"@@ -\d+,(\d+) \+\d+,(\d+) @@", line):
            old, new, left = "", "", (int(lengths[1]), int(lengths[2]))
    return found


def patch(source: Path) -> None:
    """Applies PATCH; a text that is not there exactly once means another Horovod than was tried."""
    for name, old, new in changes():
        text = (source / name).read_text()
        if text.count(old) != 1:
            first = next(line for line in old.splitlines() if line.strip())
            raise BuildError(
                f"{name} of Horovod {HOROVOD} has what {PATCH.name} replaces at {first.strip()!r} {text.count(old)} "
                "times, expected once"
            )
        (source / name).write_text(text.replace(old, new))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("describe")
    command.add_argument("--mpi", default="")
    command.add_argument("--architectures", default="")
    command.add_argument("--arch-flags", default="")
    command.add_argument("--system", default="")
    for name in ("key", "requirements"):
        commands.add_parser(name).add_argument("description", type=Path)
    command = commands.add_parser("toolkit")
    command.add_argument("target", type=Path)
    command.add_argument("--system", default="")
    commands.add_parser("patch").add_argument("source", type=Path)
    commands.add_parser("sdist")
    arguments = parser.parse_args()
    if arguments.command == "describe":
        described = describe(arguments.mpi, arguments.architectures, arguments.arch_flags, arguments.system)
        print(json.dumps(described, indent=1, sort_keys=True))
    elif arguments.command == "key":
        print(cache_key(json.loads(arguments.description.read_text())))
    elif arguments.command == "requirements":
        print("\n".join(requirements(json.loads(arguments.description.read_text()))))
    elif arguments.command == "toolkit":
        make_toolkit(arguments.target, Path(arguments.system) if arguments.system else None)
    elif arguments.command == "patch":
        patch(arguments.source)
    else:
        print(f"horovod=={HOROVOD} --hash=sha256:{SDIST_SHA256}")


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"build-horovod: {error}")
