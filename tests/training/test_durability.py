"""What is on disk when the power goes: a file gets its name after its content is synced, a name after its folder is."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_lb.report.metrics import RunObserver, truncate_metrics
from hvd_lb.report.run_directory import RunDirectory, replace_text, write_json
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint

MODEL = {"weight": torch.arange(6.0)}


class Disk:
    """Notes what is synced, by path as it was then, and what gets another name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        self.sizes: dict[str, int] = {}
        self.inodes: dict[int, tuple[int, int]] = {}  # when it was synced last, and its size then
        fsync, symlink = os.fsync, os.symlink

        def synced(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            fsync(descriptor)
            self.events.append(("sync", path))
            there = os.fstat(descriptor)
            self.sizes[path] = there.st_size
            self.inodes[there.st_ino] = len(self.events) - 1, there.st_size

        def renaming(name: str) -> None:
            original: Callable[..., None] = getattr(os, name)

            def renamed(source: Any, target: Any, **more: Any) -> None:
                original(source, target, **more)
                self.events.append(("rename", os.path.abspath(target)))

            monkeypatch.setattr(os, name, renamed)

        def linked(source: Any, target: Any, *more: Any, **others: Any) -> None:
            symlink(source, target, *more, **others)
            self.events.append(("link", os.path.abspath(target)))

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "symlink", linked)
        renaming("rename")
        renaming("replace")

    def synced(self, start: int = 0, stop: int | None = None) -> list[str]:
        return [path for what, path in self.events[start:stop] if what == "sync"]

    def named(self, path: Path) -> int:
        """When the path got its name."""
        return self.events.index(("rename", str(path)))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_of_a_checkpoint_everything_is_synced_before_it_has_its_name(tmp_path: Path, disk: Disk) -> None:
    store = CheckpointStore(tmp_path)
    final = store.save(3, MODEL, {"velocity": torch.ones(6)}, {"next": {}}, best=True)
    named = disk.named(final)
    synced = {file.name: disk.inodes[file.stat().st_ino] for file in final.iterdir()}
    assert synced.keys() == {"model.safetensors", "optimizer.safetensors", "state.json"}
    for name, (when, size) in synced.items():
        assert size == (final / name).stat().st_size  # nothing was written after that
        assert when < disk.inodes[final.stat().st_ino][0] < named  # the folder after what is in it
    links = max(disk.named(tmp_path / name) for name in ("last", "best"))
    assert disk.synced(start=links) == [str(tmp_path)]


def test_every_checkpoint_is_synced_so(tmp_path: Path, disk: Disk) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for step in range(4):
        start = len(disk.events)
        store.save(step, MODEL, MODEL, {"next": {}}, best=step == 1)
        assert len(disk.synced(start=start)) == 5  # files and folders


def test_what_an_evaluation_adds_to_a_checkpoint_is_synced(tmp_path: Path, disk: Disk) -> None:
    store = CheckpointStore(tmp_path)
    final = store.save(3, MODEL, MODEL, {"next": {}, "best_error": None})
    disk.events.clear()
    disk.inodes.clear()
    store.conclude(3, {"best_error": 4.0}, best=True)
    assert open_checkpoint(tmp_path / "best").state["best_error"] == 4.0
    when, size = disk.inodes[(final / "state.json").stat().st_ino]
    assert size == (final / "state.json").stat().st_size
    assert when < disk.named(final / "state.json") < disk.inodes[final.stat().st_ino][0]
    assert disk.named(tmp_path / "best") < disk.inodes[tmp_path.stat().st_ino][0]


@pytest.mark.parametrize("write", [write_json, lambda path, content: replace_text(path, json.dumps(content))])
def test_a_file_is_synced_before_it_replaces_another(write: Any, tmp_path: Path, disk: Disk) -> None:
    """job.json, summary.json, recipe.yaml, environment.json."""
    path = tmp_path / "job.json"
    for content in ({"a": 1}, {"a": 2, "b": [1] * 1000}):
        start = len(disk.events)
        write(path, content)
        assert json.loads(path.read_text()) == content
        (written,) = disk.synced(start=start)
        assert disk.sizes[written] == path.stat().st_size
        assert [what for what, _ in disk.events[start:]] == ["sync", "rename"]


def test_progress_twice_a_second_is_not_synced(tmp_path: Path, disk: Disk) -> None:
    replace_text(tmp_path / "progress.json", "{}", sync=False)
    assert disk.synced() == []


def test_metrics_that_are_cut_are_synced_before_they_replace_the_others(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in (0, 7, 1, 2, 3)))
    truncate_metrics(path, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    (written,) = disk.synced()
    assert disk.sizes[written] == path.stat().st_size
    assert disk.events.index(("sync", written)) < disk.named(path)


def test_bad_images_are_synced(tmp_path: Path, disk: Disk) -> None:
    run = RunDirectory(tmp_path)
    observer = RunObserver(run, 0)
    observer.bad_images([{"step": 1, "image": 4}])
    observer.close()
    assert disk.synced() == [str(run.bad_images)]
    assert disk.sizes[str(run.bad_images)] == run.bad_images.stat().st_size


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_syncs_no_folders_keeps_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As 9p and some of FUSE."""
    fsync = os.fsync

    def of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files)
    store = CheckpointStore(tmp_path)
    store.save(4, MODEL, {}, {"next": {"epoch": 0, "step": 4}})
    assert store.conclude(4, {"evaluation": None}, best=True)
    assert open_checkpoint(tmp_path / "best").step == 4

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        store.save(5, MODEL, {}, {"next": {"epoch": 0, "step": 5}})
