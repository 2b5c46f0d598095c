"""A folder for machines without a network: parts that fit together again, and nothing left out."""

import importlib.util
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

DOCKER = Path(__file__).parents[2] / "docker"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("offline", DOCKER / "offline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path, offline: ModuleType) -> Path:
    """One file in 4 parts, the last of one byte, one of exactly a part, and a small one."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, length in (("a.whl", 3001), ("b.whl", 1000), ("c.tar.gz", 10)):
        (folder / name).write_bytes(bytes(i * 7 % 251 for i in range(length)))
    files = sorted(folder.iterdir())
    (folder / offline.SUMS).write_text("".join(f"{offline.checksum(path)}  {path.name}\n" for path in files))
    offline.split(folder / "a.whl", 1000)
    return folder


def test_parts_are_joined(folder: Path, tmp_path: Path, offline: ModuleType) -> None:
    assert [path.name for path in sorted(folder.glob("a.*"))] == [f"a.whl.part-{i:03d}" for i in range(4)]
    assert max(path.stat().st_size for path in folder.iterdir()) <= 1000
    offline.join(folder, tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {name: len(data) for name, data in whole.items()} == {"a.whl": 3001, "b.whl": 1000, "c.tar.gz": 10}
    assert whole["a.whl"] == bytes(i * 7 % 251 for i in range(3001))


def test_more_than_a_thousand_parts_are_joined(tmp_path: Path, offline: ModuleType) -> None:
    folder, content = tmp_path / "folder", bytes(i * 7 % 251 for i in range(1100))
    folder.mkdir()
    (folder / "a.whl").write_bytes(content)
    (folder / offline.SUMS).write_text(f"{offline.checksum(folder / 'a.whl')}  a.whl\n")
    offline.split(folder / "a.whl", 1)
    offline.join(folder, tmp_path)
    assert (tmp_path / "a.whl").read_bytes() == content


def lose_a_part(folder: Path) -> None:
    (folder / "a.whl.part-001").unlink()


def lose_the_last_part(folder: Path) -> None:
    (folder / "a.whl.part-003").unlink()


def lose_all_parts(folder: Path) -> None:
    for part in folder.glob("a.whl.part-*"):
        part.unlink()


def flip_a_bit(folder: Path) -> None:
    part = folder / "a.whl.part-002"
    data = bytearray(part.read_bytes())
    data[5] ^= 1
    part.write_bytes(data)


@pytest.mark.parametrize("damage", [lose_a_part, lose_the_last_part, lose_all_parts, flip_a_bit])
def test_what_did_not_arrive_is_named(
    damage: Callable[[Path], None], folder: Path, tmp_path: Path, offline: ModuleType
) -> None:
    damage(folder)
    with pytest.raises(offline.OfflineError, match=r"missing or damaged in .*: a\.whl; copy"):
        offline.join(folder, tmp_path)


def test_another_folder_is_refused(tmp_path: Path, offline: ModuleType) -> None:
    with pytest.raises(offline.OfflineError, match="name a folder that `offline.py make` has made"):
        offline.install(tmp_path, sys.executable, True)
    (tmp_path / "notes").touch()
    with pytest.raises(offline.OfflineError, match=r"--sources .* is there and not empty: name a folder"):
        offline.install(tmp_path, sys.executable, True, tmp_path)
    with pytest.raises(offline.OfflineError, match="not empty"):
        offline.make(tmp_path, "present", None, 1000)


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("torch>=2.9,<3", "torch"),
        ("nvidia_ml_py>=13", "nvidia-ml-py"),
        ("jaraco.text (>=3)", "jaraco-text"),
        ('tensorboard[x]; platform_system == "Linux"', "tensorboard"),
        ("Pillow", "pillow"),
    ],
)
def test_names_of_requirements(requirement: str, name: str, offline: ModuleType) -> None:
    assert offline.canonical(requirement) == name


def test_what_only_torch_needs_stays_away(offline: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {
        "torch": ["nvidia-nccl-cu13==2.28; platform_system == 'Linux'", "jinja2"],
        "nvidia-nccl-cu13": [],
        "torchvision": ["numpy", "torch==2.14.1"],
        "Jinja2": ["MarkupSafe>=2"],
        "MarkupSafe": [],
        "numpy": [],
        "click": ['colorama; platform_system == "Windows"'],
    }
    installed = [
        {"metadata": {"name": name, "version": "1.0", "requires_dist": of}} for name, of in needs.items()
    ]
    monkeypatch.setattr(offline, "pip", lambda *arguments, output: json.dumps({"install": installed}))
    needed = ["torch>=2.9", "torchvision>=0.24", "click>=8", "jinja2>=3"]
    assert offline.without(needed, ("torch", "torchvision")) == [
        "click==1.0",
        "jinja2==1.0",
        "markupsafe==1.0",
    ]


def test_sources_are_whole(tmp_path: Path, offline: ModuleType) -> None:
    """All that git knows is among them, but what only continuous integration and git itself need."""
    offline.pack_sources(tmp_path / "sources.tar.gz")
    with tarfile.open(tmp_path / "sources.tar.gz") as tar:
        packed = {member.name for member in tar if member.isfile()}
    listed = subprocess.run(
        ["git", "ls-files"], cwd=DOCKER.parent, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git, or no repository")
    known = {name for name in listed.stdout.splitlines() if not name.startswith(".")}
    assert known - packed == set()
    assert not [name for name in packed if "__pycache__" in name]
    assert {"benchmarks/gpu.py", "tests/devices.py", "pyproject.toml"} <= packed


def test_tests_can_run_offline(offline: ModuleType) -> None:
    needed = {offline.canonical(requirement) for requirement in offline.requirements()}
    assert {"torch", *offline.TESTERS} <= needed
    assert "ruff" not in needed
