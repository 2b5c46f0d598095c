"""Checkpoints: `step-00001234/{model.safetensors, optimizer.safetensors, state.json}`, `last → …`, `best → …`.

The number is that of steps done. A checkpoint is written under a temporary name, synced and renamed, so a name is
either absent or whole; state.json carries the SHA-256 of the other two files and of itself, so one that was damaged
later is recognised. Nothing is ever unpickled. While a run goes on a thread writes (`BackgroundWriter`): training waits
only until the tensors are copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvd_lb.errors import UserError
from hvd_lb.training.saved_state import FORMAT, SavedState

_STATE = "state.json"
_TENSORS = ("model", "optimizer")
_LINKS = ("last", "best")


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint on disk: its folder and its state (position, recipe, optimizer skeleton, …)."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state["step"]

    @property
    def saved(self) -> SavedState:
        """The state's fields, with defaults for what an older checkpoint lacks."""
        return SavedState.from_json(self.state)

    def model(self) -> dict[str, Tensor]:
        """Tensors of the model's state dict, on the CPU."""
        return load_file(self.path / "model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        """Tensors of the optimizer's state, on the CPU (see `hvd_lb.optim.state_dict`)."""
        return load_file(self.path / "optimizer.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, copied at one moment: tensors on the CPU that nobody else writes into."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    best: bool


class CheckpointStore:
    """The checkpoints of one run; written by rank 0 only."""

    def __init__(self, folder: Path, keep: int = 3):
        self.folder = folder
        self._keep = keep

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        best: bool = False,
    ) -> Path:
        """Write the checkpoint of `step` steps done, point `last` (and `best`) at it, remove what is too old."""
        return self.write(Snapshot(step, _copied(model), _copied(optimizer), dict(state), best))

    def write(self, snapshot: Snapshot) -> Path:
        """`save` for tensors that were copied already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in (*self.folder.glob(".writing-*"), *self.folder.glob(".removing-*")):
            shutil.rmtree(stale, ignore_errors=True)
        final = self.folder / f"step-{snapshot.step:08d}"
        writing = self.folder / f".writing-{final.name}"
        writing.mkdir()
        checksums = {}
        for name, tensors in zip(_TENSORS, (snapshot.model, snapshot.optimizer), strict=True):
            file = writing / f"{name}.safetensors"
            save_file(tensors, file)
            _sync(file)
            checksums[name] = _sha256(file)
        content = {**snapshot.state, "format": FORMAT, "step": snapshot.step, "checksums": checksums}
        content["checksum"] = _digest(content)
        (writing / _STATE).write_text(json.dumps(content, indent=1))
        _sync(writing / _STATE)
        _sync(writing)
        if final.exists():
            self._remove(final)
        for name in _LINKS if snapshot.best else ("last",):
            self._announce(name, final)
        writing.rename(final)
        self._settle_links()
        _sync(self.folder)
        self._remove_old()
        return final

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of more than `step` steps: the run goes on from there and writes them again."""
        for path in self.newest_first():
            if int(path.name.removeprefix("step-")) > step:
                self._remove(path)
        self._settle_links()
        for name in _LINKS:
            link = self.folder / name
            if link.is_symlink() and not link.exists():
                link.unlink()

    def newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)

    def newest_intact(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that can be trusted, and what is wrong with newer ones."""
        problems: list[str] = []
        for path in self.newest_first():
            try:
                return open_checkpoint(path), problems
            except UserError as error:
                problems.append(str(error))
        return None, problems

    def _announce(self, name: str, target: Path) -> None:
        """Note down that `name` points at `target` as soon as that exists."""
        announced = self.folder / f".{name}"
        announced.unlink(missing_ok=True)
        announced.symlink_to(target.name)

    def _settle_links(self) -> None:
        """Point `last` and `best` as announced, be it by a write that was killed before or after its rename."""
        for name in _LINKS:
            announced = self.folder / f".{name}"
            if announced.exists():
                os.replace(announced, self.folder / name)
            else:
                announced.unlink(missing_ok=True)

    def _remove_old(self) -> None:
        best = (self.folder / "best").resolve()
        for path in self.newest_first()[self._keep :]:
            if path.resolve() != best:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Also when this process is killed meanwhile, no part of it is left under its name."""
        removing = path.with_name(f".removing-{path.name}")
        shutil.rmtree(removing, ignore_errors=True)
        path.rename(removing)
        shutil.rmtree(removing)


class BackgroundWriter:
    """Writes checkpoints into a store in a thread of its own, one after the other.

    What a write raises (a full disk) is raised by the next `save` or by `close`.
    """

    def __init__(self, store: CheckpointStore):
        self._store = store
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        best: bool = False,
    ) -> None:
        """As `CheckpointStore.save`, but returns when everything is copied; waits for the write before this one."""
        self.close()
        snapshot = Snapshot(step, _copied(model), _copied(optimizer), dict(state), best)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="hvd-lb checkpoint")
        self._thread.start()

    def close(self) -> None:
        """Wait until everything is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._store.write(snapshot)
        except Exception as error:  # raised where somebody can act on it
            self._failure = error


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: views into buckets and channels-last tensors share or permute their memory."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        for name, tensor in tensors.items()
    }


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`, every byte verified; UserError when it is missing, damaged or foreign."""
    state_file = path / _STATE
    if not state_file.is_file():
        raise UserError(
            f"{path} is no checkpoint: expected a folder with {_STATE}, such as RUN/checkpoints/last"
        )
    try:
        state = json.loads(state_file.read_text("utf-8"))
        checksum = state.pop("checksum")
        intact = checksum == _digest(state)
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise UserError(
            f"checkpoint {path} is damaged: {_STATE} does not match its checksum; use another checkpoint"
        )
    if state["format"] != FORMAT:
        raise UserError(f"checkpoint {path} has format {state['format']}, this hvd-lb reads format {FORMAT}")
    for name in _TENSORS:
        file = path / f"{name}.safetensors"
        if not file.is_file() or _sha256(file) != state["checksums"][name]:
            raise UserError(
                f"checkpoint {path} is damaged: {file.name} is truncated or changed; use another checkpoint"
            )
    return Checkpoint(path.resolve(), state)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
