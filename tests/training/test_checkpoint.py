"""Checkpoints: whole or absent, every byte verified, old ones removed, nothing unpickled."""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from hvd_lb.errors import UserError
from hvd_lb.training.checkpoint import (
    BackgroundWriter,
    CheckpointStore,
    Snapshot,
    open_checkpoint,
    open_tensors,
    weights_metadata,
)

MODEL = {"weight": torch.arange(6.0).reshape(2, 3), "shared": torch.ones(4)[:2]}
OPTIMIZER = {"state/0/velocity": torch.full((2, 3), 0.5)}


def save(store: CheckpointStore, *steps: int, best: int | None = None) -> None:
    for step in steps:
        store.save(step, MODEL, OPTIMIZER, {"next": {"epoch": 0, "step": step}}, best=step == best)


def test_round_trip(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    save(store, 7)
    checkpoint = open_checkpoint(tmp_path / "checkpoints" / "last")
    assert checkpoint.step == 7
    assert checkpoint.state["next"] == {"epoch": 0, "step": 7}
    assert checkpoint.path.name == "step-00000007"
    for mine, read in ((MODEL, checkpoint.model()), (OPTIMIZER, checkpoint.optimizer())):
        assert mine.keys() == read.keys()
        assert all(torch.equal(mine[key], read[key]) for key in mine)
    assert sorted(p.name for p in checkpoint.path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert len({path.stat().st_mode for path in checkpoint.path.iterdir()}) == 1, (
        "who may read one may read all"
    )


def test_one_that_is_written_again_is_the_new_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 7)
    store.save(7, {"weight": MODEL["weight"] + 1}, OPTIMIZER, {})
    assert torch.equal(open_checkpoint(tmp_path / "last").model()["weight"], MODEL["weight"] + 1)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, 2, 3, 4, 5, best=2)
    assert [path.name for path in store.newest_first()] == ["step-00000005", "step-00000004", "step-00000002"]
    assert (tmp_path / "last").resolve().name == "step-00000005"
    assert (tmp_path / "best").resolve().name == "step-00000002"


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({"evaluation": {"top1_error": 5.0}}, 5.0),
        ({"evaluation": {"top1_error": 5.0, "ema_top1_error": 4.0}}, 4.0),
        ({"evaluation": {"top1_error": 5.0}, "evaluation_due": True}, None),  # it is of earlier weights
        ({"evaluation": None}, None),
    ],
)
def test_the_best_error_is_that_of_the_best_one(state: dict, error: float | None, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.best_error() == math.inf
    store.save(1, MODEL, OPTIMIZER, {"next": {}, **state}, best=True)
    store.save(2, MODEL, OPTIMIZER, {"next": {}, "evaluation": {"top1_error": 1.0}})
    assert store.best_error() == error


def damage_truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_flip(folder: Path) -> None:
    file = folder / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def damage_missing(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


def damage_state(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    state["next"]["step"] = 1
    (folder / "state.json").write_text(json.dumps(state))


def damage_json(folder: Path) -> None:
    (folder / "state.json").write_text("{")


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_missing, damage_state, damage_json])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_used(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)
    damage(tmp_path / "step-00000002")
    with pytest.raises(UserError, match="is damaged"):
        open_checkpoint(tmp_path / "last")
    found, problems = store.newest_intact()
    assert found is not None
    assert found.step == 1
    ((path, why),) = problems.items()
    assert path == tmp_path / "step-00000002"
    assert "step-00000002 is damaged" in why


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no checkpoint"):
        open_checkpoint(tmp_path)
    assert CheckpointStore(tmp_path / "none").newest_intact() == (None, {})


def test_an_interrupted_write_leaves_the_others_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (tmp_path / ".writing-step-00000002").mkdir()
    (tmp_path / ".writing-step-00000002" / "model.safetensors").write_bytes(b"half")
    found, problems = store.newest_intact()
    assert found is not None
    assert (found.step, problems) == (1, {})
    save(store, 2)
    assert not list(tmp_path.glob(".writing*"))


def test_going_on_from_an_older_checkpoint_discards_the_later_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 22, 44, 66, best=66)
    store.discard_after(44)
    assert not (tmp_path / "last").is_symlink()
    assert not (tmp_path / "best").is_symlink()
    save(store, 45)
    assert (tmp_path / "last").resolve().name == "step-00000045"
    assert [path.name for path in store.newest_first()] == ["step-00000045", "step-00000044"]


def killed_in(write: Callable[[], object], operation: int) -> bool:
    """Whether SIGKILL ended a process that writes, before its file operation of this number."""
    operations: list[str] = []

    def hook(event: str, _: tuple[object, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir"):
            operations.append(event)
            if len(operations) > operation:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched() -> None:
        sys.addaudithook(hook)
        write()

    process = multiprocessing.get_context("fork").Process(target=watched)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.slow
def test_killed_at_any_operation_the_next_run_finds_everything(tmp_path: Path) -> None:
    """The checkpoint being written is absent or whole; when whole, `last` and `best` point at it in the next run."""
    newest = set()
    for operation in count():
        store = CheckpointStore(tmp_path / f"{operation}", keep=1)
        save(store, 1, 2, best=1)
        killed = killed_in(partial(save, store, 3, best=3), operation)
        last, best = store.folder / "last", store.folder / "best"
        for path in (*store.newest_first(), last, best):
            open_checkpoint(path)
        found, problems = store.newest_intact()
        assert found is not None
        assert not problems
        newest.add(found.step)
        store.discard_after(found.step)
        assert open_checkpoint(last).step == found.step
        assert open_checkpoint(best).step == (3 if found.step == 3 else 1)
        save(store, 4)
        names = {"step-00000004", best.resolve().name, "last", "best"}
        assert {path.name for path in store.folder.iterdir()} == names
        if not killed:
            break
    assert newest == {2, 3}


@pytest.mark.slow
def test_killed_at_any_operation_an_evaluation_is_noted_or_still_due(tmp_path: Path) -> None:
    due = set()
    for operation in count():
        store = CheckpointStore(tmp_path / f"{operation}", keep=1)
        save(store, 1, best=1)
        store.save(2, {}, {}, {"evaluation_due": True})
        conclude = partial(store.conclude, 2, {"evaluation_due": False}, best=True)
        killed = killed_in(conclude, operation)
        for path in (*store.newest_first(), store.folder / "last", store.folder / "best"):
            open_checkpoint(path)
        found, problems = store.newest_intact()
        assert found is not None
        assert (found.step, problems) == (2, {})
        store.discard_after(2)
        assert not [path.name for path in store.folder.iterdir() if path.name.startswith(".")]
        assert open_checkpoint(store.folder / "last").step == 2
        due.add(found.state["evaluation_due"])
        if found.state["evaluation_due"]:
            assert conclude()
        assert open_checkpoint(store.folder / "best").state["step"] == 2
        if not killed:
            break
    assert due == {True, False}


@pytest.mark.parametrize("ending", ["bak", "keep", "tar", "2", ""])
def test_what_has_another_name_is_somebody_elses(ending: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 2)
    kept = tmp_path / (f"step-00000002.{ending}" if ending else "step-0000002")
    if ending == "tar":
        kept.write_bytes(b"an archive")
    else:
        shutil.copytree(tmp_path / "step-00000002", kept)
    notes = tmp_path / ".writing-notes.txt"
    notes.mkdir()
    store.discard_after(1)
    save(store, 3, 4, 5)
    assert [path.name for path in store.newest_first()] == ["step-00000005"]
    assert kept.exists()
    assert notes.exists()


def test_one_of_another_format_is_neither_passed_over_nor_called_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)
    file = tmp_path / "step-00000002" / "state.json"
    state = json.loads(file.read_text())
    del state["checksum"]
    state["format"] = 99
    state["checksum"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(state))
    with pytest.raises(
        UserError, match="has format 99 and this hvd-lb reads formats up to 2: go on with the version"
    ):
        store.newest_intact()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_one_that_may_not_be_read_is_not_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)
    (tmp_path / "step-00000002").chmod(0)
    try:
        with pytest.raises(UserError, match="cannot be read .*let this user read it"):
            store.newest_intact()
    finally:
        (tmp_path / "step-00000002").chmod(0o755)


def test_a_file_system_error_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)

    def refuse(*_: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", "model.safetensors")

    monkeypatch.setattr("hvd_lb.training.checkpoint._sha256", refuse)
    with pytest.raises(UserError, match="cannot be read .Stale file handle."):
        store.newest_intact()


def test_a_damaged_one_is_set_aside_under_another_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    for attempt in ("damaged-step-00000002", "damaged-step-00000002-2"):
        save(store, 2)
        damage_truncate(tmp_path / "step-00000002")
        found, damaged = store.newest_intact()
        assert found is not None
        assert found.step == 1
        assert [store.set_aside(path) for path in damaged] == [tmp_path / attempt]
        store.discard_after(1)
        assert not os.path.lexists(tmp_path / "last")
    assert (tmp_path / "damaged-step-00000002" / "model.safetensors").exists()
    save(store, 3, 4, 5, 6)
    assert (tmp_path / "damaged-step-00000002-2").exists()


@pytest.fixture(
    params=[errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS], ids=lambda number: errno.errorcode[number]
)
def no_symlinks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "symlink", refuse)


def test_one_that_cannot_be_removed_whole_is_no_failure_of_the_one_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS a file that somebody reads leaves another one behind, and its folder stays."""
    rmdir, stays = os.rmdir, True

    def somebody_reads(path: str, **more: int) -> None:
        if stays and ".removing-step-00000001" in str(path):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        rmdir(path, **more)

    monkeypatch.setattr(os, "rmdir", somebody_reads)
    warnings: list[str] = []
    store = CheckpointStore(tmp_path, keep=1)
    writer = BackgroundWriter(store, warn=warnings.append)
    for step in (1, 2):
        writer.save(step, MODEL, OPTIMIZER, {"next": {"epoch": 0, "step": step}})
    writer.conclude(2, {"evaluation": None}, best=True)
    writer.close()
    assert warnings == []
    assert [path.name for path in store.newest_first()] == ["step-00000002"]
    stays = False
    save(store, 3)
    assert not list(tmp_path.glob(".removing-*"))


def test_in_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    """safetensors writes such files, and does not read them: a run could not go on."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    save(CheckpointStore(folder), 7)
    found, _ = CheckpointStore(folder).newest_intact()
    assert found
    assert torch.equal(found.model()["weight"], MODEL["weight"])
    assert found.optimizer().keys() == OPTIMIZER.keys()
    assert weights_metadata(found.path / "model.safetensors") == {}
    with open_tensors(found.path / "model.safetensors") as opened:
        assert torch.equal(opened.get_tensor("weight"), MODEL["weight"])


def test_one_under_the_name_of_another_step_is_neither_used_nor_lost(tmp_path: Path) -> None:
    """To go on from it would remove it, as one of a later step."""
    store = CheckpointStore(tmp_path)
    save(store, 8, 16, 24)
    for old, new in (("08", "x"), ("16", "08"), ("x", "16")):
        (tmp_path / f"step-000000{old}").rename(tmp_path / f"step-000000{new}")
    found, problems = store.newest_intact()
    assert found
    assert (found.step, problems) == (24, {})
    shutil.rmtree(found.path)
    found, problems = store.newest_intact()
    assert found is None
    assert "step-00000016 is that after 8 steps under another name" in problems[tmp_path / "step-00000016"]
    shutil.copytree(tmp_path / "step-00000016", tmp_path / "copy")
    assert open_checkpoint(tmp_path / "copy").step == 8


@pytest.mark.usefixtures("no_symlinks")
def test_without_symbolic_links_names_are_small_files(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1, 2, 3, best=1)
    assert (tmp_path / "last").read_text() == "step-00000003\n"
    assert (tmp_path / "best").read_text() == "step-00000001\n"
    assert [path.name for path in store.newest_first()] == ["step-00000003", "step-00000001"]
    assert open_checkpoint(tmp_path / "last").step == 3
    assert open_checkpoint(tmp_path / "best").step == 1
    save(store, 4, best=4)
    assert open_checkpoint(tmp_path / "best").step == 4
    store.discard_after(3)
    assert not os.path.lexists(tmp_path / "best")


def test_a_disk_that_is_full_is_no_file_system_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(OSError, match="No space left"):
        save(CheckpointStore(tmp_path), 1)


def test_a_checkpoint_is_told_by_the_folders_that_were_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other hosts a link may lead elsewhere."""
    monkeypatch.chdir(tmp_path)
    save(CheckpointStore(tmp_path / "scratch" / "checkpoints"), 3)
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "scratch" / "checkpoints" / "step-00000003")
    for named in ("runs/checkpoints/last", "runs/checkpoints/step-00000003"):
        assert open_checkpoint(Path(named)).path == tmp_path / "runs" / "checkpoints" / "step-00000003"
    assert open_checkpoint(Path("elsewhere")).path.name == "step-00000003"


def test_a_copy_that_followed_links_goes_on(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path / "run"), 2, 4, best=2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    store = CheckpointStore(tmp_path / "copy", keep=1)
    found, damaged = store.newest_intact()
    assert found is not None
    assert (found.step, damaged) == (4, {})
    store.discard_after(4)
    assert open_checkpoint(store.folder / "best").step == 2
    save(store, 6, 8, best=8)
    assert (store.folder / "last").is_symlink()
    assert open_checkpoint(store.folder / "last").step == 8
    assert open_checkpoint(store.folder / "best").step == 8
    assert {path.name for path in store.folder.iterdir()} == {"step-00000008", "last", "best"}


def test_what_is_written_is_what_was_given_whatever_training_does_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step has changed everything in place before the thread comes to writing."""
    go_on = threading.Event()
    write = CheckpointStore.write

    def late(store: CheckpointStore, snapshot: Snapshot) -> Path:
        assert go_on.wait(60)
        return write(store, snapshot)

    monkeypatch.setattr(CheckpointStore, "write", late)
    contiguous, permuted = torch.arange(6.0), torch.arange(24.0).reshape(1, 2, 3, 4)
    permuted = permuted.to(memory_format=torch.channels_last)
    parameter = torch.nn.Parameter(torch.ones(3))
    model = {"contiguous": contiguous, "permuted": permuted, "parameter": parameter}
    expected = {name: tensor.detach().clone() for name, tensor in model.items()}
    writer = BackgroundWriter(CheckpointStore(tmp_path))
    writer.save(1, model, {"velocity": contiguous}, {"next": {}})
    with torch.no_grad():
        for tensor in model.values():
            tensor.add_(100)
    go_on.set()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "last")
    assert all(torch.equal(checkpoint.model()[name], tensor) for name, tensor in expected.items())
    assert torch.equal(checkpoint.optimizer()["velocity"], expected["contiguous"])
