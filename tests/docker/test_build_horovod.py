"""docker/build-horovod.sh without its compilation: the cache, what it says when it cannot build, its parts."""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

DOCKER = Path(__file__).parents[2] / "docker"
SCRIPT = DOCKER / "build-horovod.sh"
WHEEL = "horovod-0.28.1-py3-none-any.whl"
# All the script runs besides compilers.
TOOLS = (
    *(
        "awk",
        "bash",
        "cat",
        "chmod",
        "cp",
        "dirname",
        "env",
        "find",
        "flock",
        "grep",
        "head",
        "mkdir",
        "mktemp",
    ),
    *("mv", "nproc", "rm", "sha256sum", "sync", "tar", "tee"),
)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("horovod_parts", DOCKER / "horovod_parts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Machine:
    """A PATH without compilers, a cache and a folder for temporary files, all of them empty."""

    def __init__(self, root: Path) -> None:
        self.bin, self.cache, self.temporary = root / "bin", root / "cache", root / "tmp"
        for folder in (self.bin, self.temporary):
            folder.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            if found is None:
                pytest.skip(f"no {tool} here")
            (self.bin / tool).symlink_to(found)
        # Nothing of the host's compilers or package indexes: a test that would build fails at once.
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        self.environment = {
            **kept,
            "PATH": str(self.bin),
            "HVD_LB_CACHE": str(self.cache),
            "TMPDIR": str(self.temporary),
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
        }

    def add_compilers(self) -> None:
        for tool in ("g++", "make"):
            (self.bin / tool).symlink_to(self.bin / "cat")

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [str(SCRIPT), *(arguments or (sys.executable,))]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def entry(self, parts: ModuleType) -> Path:
        return self.cache / "wheels" / parts.cache_key(parts.describe("", "", ""))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def fill(entry: Path) -> Path:
    """A whole cache entry; its wheel is not one, but the script has no reason to look inside."""
    entry.mkdir(parents=True)
    wheel = entry / WHEEL
    wheel.write_bytes(b"a wheel")
    (entry / "SHA256SUMS").write_text(f"{hashlib.sha256(b'a wheel').hexdigest()}  {WHEEL}\n")
    return wheel


def test_a_cached_wheel_needs_no_compiler(machine: Machine, parts: ModuleType) -> None:
    wheel = fill(machine.entry(parts))
    run = machine.run()
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{wheel}\n", "")
    assert list(machine.temporary.iterdir()) == []


def cut_short(entry: Path) -> None:
    (entry / WHEEL).write_bytes(b"a wh")


def change_a_byte(entry: Path) -> None:
    (entry / WHEEL).write_bytes(b"a wheeL")


def lose_the_checksum(entry: Path) -> None:
    (entry / "SHA256SUMS").unlink()


def empty_the_checksum(entry: Path) -> None:
    (entry / "SHA256SUMS").write_text("")


def lose_the_wheel(entry: Path) -> None:
    (entry / WHEEL).unlink()


def name_another_wheel(entry: Path) -> None:
    (entry / WHEEL).rename(entry / "horovod-0.0.0-py3-none-any.whl")


def add_a_wheel(entry: Path) -> None:
    (entry / "horovod-0.0.0-py3-none-any.whl").write_bytes(b"another")


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        change_a_byte,
        lose_the_checksum,
        empty_the_checksum,
        lose_the_wheel,
        name_another_wheel,
        add_a_wheel,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_entry_is_not_used(damage, machine: Machine, parts: ModuleType) -> None:
    entry = machine.entry(parts)
    fill(entry)
    damage(entry)
    run = machine.run()
    assert run.stdout == ""
    assert run.returncode == 2


def test_missing_compilers_are_one_line_that_names_the_packages(machine: Machine) -> None:
    run = machine.run()
    assert run.returncode == 2
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert "apt-get install g++ make" in run.stderr


def test_a_python_without_torch_is_one_line(machine: Machine, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare")
    run = machine.run(str(tmp_path / "bare" / "bin" / "python"))
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert "has no torch" in run.stderr


@pytest.mark.parametrize("arguments", [("/no/such/python",), ("--help",), ("a", "b")])
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], machine: Machine) -> None:
    run = machine.run(*arguments)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_failed_build_leaves_no_entry(machine: Machine, parts: ModuleType) -> None:
    machine.add_compilers()
    entry = machine.entry(parts)
    fill(entry)
    cut_short(entry)
    run = machine.run()  # pip finds no build tools
    assert run.returncode not in (0, 2)
    assert "damaged" in run.stderr
    assert run.stdout == ""
    assert [path.name for path in entry.parent.glob(".new-*")] == []
    assert list(machine.temporary.iterdir()) == []


def test_a_second_build_waits_for_the_first_and_takes_its_wheel(machine: Machine, parts: ModuleType) -> None:
    machine.add_compilers()
    entry = machine.entry(parts)
    entry.parent.mkdir(parents=True)
    with open(f"{entry}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = machine.start()
        assert second.stderr is not None
        assert "waiting" in second.stderr.readline()
        wheel = fill(entry)
    output, _ = second.communicate(timeout=60)
    assert (second.returncode, output) == (0, f"{wheel}\n")


def test_the_key_names_all_that_goes_in(parts: ModuleType) -> None:
    described = parts.describe("Open MPI 4.1.4", "90", "-mavx")
    assert json.loads(json.dumps(described)) == described
    assert described["torch"].startswith(f"{__import__('torch').__version__}")
    key = parts.cache_key(described)
    for name, value in described.items():
        changed = parts.cache_key({**described, name: f"{value}1"})
        assert (changed == key) == (name == "python"), name  # patch releases share an ABI, which is named


@pytest.fixture
def wheels(tmp_path: Path, parts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two folders with the shape of torch's and of the build's CUDA wheels."""
    contents = {
        "torch/nvidia/cu13/include/cuda_runtime.h": "torch",
        "torch/nvidia/cu13/include/cublas_v2.h": "torch",
        "torch/nvidia/cu13/lib/libcudart.so.13": "torch",
        "torch/nvidia/nccl/include/nccl.h": "torch",
        "torch/nvidia/nccl/lib/libnccl.so.2": "torch",
        "build/nvidia/cu13/bin/nvcc": "build",
        "build/nvidia/cu13/include/cuda_runtime.h": "build",
        "build/nvidia/cu13/include/crt/host_defines.h": "build",
        "build/nvidia/cu13/nvvm/bin/cicc": "build",
    }
    for name, text in contents.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(parts.sys, "path", [str(tmp_path / "torch"), str(tmp_path / "build")])
    return tmp_path


def apart(folder: Path) -> None:
    """As the wheels of CUDA 12 are: a folder for each library."""
    for built, library in (("torch", "cuda_runtime"), ("build", "cuda_nvcc")):
        (folder / built / "nvidia/cu13").rename(folder / built / "nvidia" / library)


@pytest.mark.parametrize("lie", [lambda folder: None, apart], ids=["CUDA 13", "CUDA 12"])
def test_the_wheels_become_a_toolkit(lie: Callable[[Path], None], wheels: Path, parts: ModuleType) -> None:
    lie(wheels)
    toolkit = wheels / "toolkit"
    parts.make_toolkit(toolkit)
    assert (toolkit / "bin").is_dir()
    assert not (toolkit / "bin").is_symlink()
    expected = {
        "bin/nvcc": "build",
        "include/cuda_runtime.h": "torch",
        "include/crt/host_defines.h": "build",
        "nvvm/bin/cicc": "build",
        "lib64/libcudart.so": "torch",
        "lib/libcudart.so": "torch",
        "nccl/include/nccl.h": "torch",
        "nccl/lib/libnccl.so": "torch",
    }
    assert {name: (toolkit / name).read_text() for name in expected} == expected


def test_a_toolkit_without_its_compiler_is_refused(wheels: Path, parts: ModuleType) -> None:
    (wheels / "build/nvidia/cu13/bin/nvcc").unlink()
    with pytest.raises(parts.BuildError, match="bin/nvcc"):
        parts.make_toolkit(wheels / "toolkit")


def installed_toolkit(folder: Path, release: str) -> Path:
    nvcc = folder / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
    nvcc.chmod(0o755)
    for name in ("include/cuda_runtime.h", "include/cublas_v2.h", "nvvm/bin/cicc", "lib64/libcudart.so.13"):
        (folder / "cuda" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cuda" / name).write_text("system")
    return folder / "cuda"


def test_an_installed_toolkit_takes_the_place_of_the_wheels(wheels: Path, parts: ModuleType) -> None:
    system = installed_toolkit(wheels, "13.1")
    parts.make_toolkit(wheels / "toolkit", system)
    texts = {
        name: (wheels / "toolkit" / name).read_text()
        for name in ("lib64/libcudart.so", "nccl/lib/libnccl.so")
    }
    assert texts == {"lib64/libcudart.so": "system", "nccl/lib/libnccl.so": "torch"}
    assert parts.system_toolkit(system, "13.0") == "13.1"
    assert not [name for name in parts.requirements({"cuda": "13.0", "toolkit": "13.1"}) if "cuda" in name]


@pytest.mark.parametrize(
    ("release", "said"), [("12.8", "is CUDA 12.8, torch is for 13.0"), (None, "has no bin/nvcc")]
)
def test_another_toolkit_is_refused(
    release: str | None, said: str, tmp_path: Path, parts: ModuleType
) -> None:
    system = installed_toolkit(tmp_path, release) if release else tmp_path
    with pytest.raises(parts.BuildError, match=said):
        parts.system_toolkit(system, "13.0")


@pytest.mark.parametrize(
    ("cuda", "said"),
    [
        ("12.8", "is for CUDA 12.8, of which PyPI has no compiler: set HVD_LB_CUDA_HOME"),
        ("11.8", "is for CUDA 11.8, expected CUDA 12 or 13"),
    ],
)
def test_a_torch_that_nothing_can_be_built_for(
    cuda: str, said: str, parts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "torch_versions", lambda: {"torch": "2.9.1", "cuda": cuda})
    with pytest.raises(parts.BuildError, match=said):
        parts.describe("", "", "")


def test_the_patch_is_applied_once_or_not_at_all(tmp_path: Path, parts: ModuleType) -> None:
    changes = parts.changes()
    assert len(changes) == parts.PATCH.read_text().count("\n@@ ")
    for name in {name for name, *_ in changes}:
        there = "between\n".join(old for changed, old, _ in changes if changed == name)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(there)
    parts.patch(tmp_path)
    for name, _, new in changes:
        assert new in (tmp_path / name).read_text()
    with pytest.raises(parts.BuildError, match=r"CMakeLists.txt of Horovod .* 0 times, expected once"):
        parts.patch(tmp_path)


def test_a_hunk_is_a_whole_text(tmp_path: Path, parts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PATCH", tmp_path / "a.patch")
    hunk = "@@ -7,4 +7,3 @@\n one\n \n-two\n-- three\n+++ four\n"
    parts.PATCH.write_text(f"Why.\n\n--- a/f/g.cc\n+++ b/f/g.cc\n{hunk}--- no part of it\n")
    assert parts.changes() == [("f/g.cc", "one\n\ntwo\n- three\n", "one\n\n++ four\n")]


@pytest.mark.parametrize(
    ("cuda", "asked"),
    [
        (None, set()),
        ("13.0", {"nvidia-cuda-nvcc==13.0.*", "nvidia-nvvm==13.0.*"}),
    ],
)
def test_cuda_tools_are_of_the_version_of_torch(cuda: str | None, asked: set[str], parts: ModuleType) -> None:
    found = {name for name in parts.requirements({"cuda": cuda}) if name.startswith("nvidia")}
    assert asked <= found
    assert bool(found) == (cuda is not None)
