"""Checkpoints: `step-00001234/{model.safetensors, optimizer.safetensors, state.json}`, `last → …`, `best → …`; with
averaged weights there is a model-ema.safetensors, too.

The number is that of steps done. A checkpoint is written under a temporary name, synced and renamed, so a name is
either absent or whole; state.json carries the SHA-256 of the other two files and of itself, so one that was damaged
later is recognised. Nothing is ever unpickled. While a run goes on a thread writes (`BackgroundWriter`): training waits
only until the tensors are copied, and goes on when a disk is full or slow. A checkpoint comes before its evaluation,
which is noted down in state.json afterwards. Only folders of such names are ours; whatever else lies beside them stays.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from hvd_lb.data.files.journal import sync
from hvd_lb.errors import UserError
from hvd_lb.training import pointers
from hvd_lb.training.saved_state import AVERAGED, FORMAT, FORMATS, SavedState, counted_error

# One entry: safetensors writes several in another order each time, and the files of equal weights are equal.
METADATA = "hvd_lb"

_STATE = "state.json"
_TENSORS = ("model", "optimizer")
_EMA = "model-ema"
# What a file system without room says.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a write or a removal that was killed has left.
_LEFTOVERS = re.compile(r"\.(writing|removing)-(step-\d{8}|last|best)")


class DamagedCheckpoint(UserError):
    """A folder of a checkpoint's name that was truncated or changed, or never was one."""


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

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """That of these very weights; None where there was none, or where it was is not known."""
        return self.saved.evaluation if self.saved.evaluated_at == self.step else None

    def model(self) -> dict[str, Tensor]:
        """Tensors of the model's state dict, on the CPU."""
        return load_tensors(self.path / "model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        """Tensors of the optimizer's state, on the CPU (see `hvd_lb.optim.state_dict`), and the averaged weights."""
        averaged = load_tensors(self.averaged) if self.averaged else {}
        named = {f"{AVERAGED}{name}": tensor for name, tensor in averaged.items()}
        return {**load_tensors(self.path / "optimizer.safetensors"), **named}

    @property
    def averaged(self) -> Path | None:
        """The file with the network of averaged weights; None where the run has none."""
        return self.path / f"{_EMA}.safetensors" if _EMA in self.state["checksums"] else None

    def read(self) -> Snapshot:
        """All of it, in memory."""
        return Snapshot(self.step, self.model(), self.optimizer(), self.state)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, copied at one moment: tensors on the CPU that nobody else writes into."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    best: bool = False

    @property
    def saved(self) -> SavedState:
        """The state's fields, with defaults for what an older checkpoint lacks."""
        return SavedState.from_json(self.state)

    def to_bytes(self) -> bytes:
        """For another process: the length of a header in JSON, the header, and tensors as safetensors has them."""
        header = json.dumps({"step": self.step, "state": self.state}).encode()
        named = {"model": self.model, "optimizer": self.optimizer}
        tensors = {
            f"{of}/{name}": tensor for of, tensors in named.items() for name, tensor in tensors.items()
        }
        return len(header).to_bytes(8, "big") + header + save(tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """What `to_bytes` has made."""
        end = 8 + int.from_bytes(data[:8], "big")
        header = json.loads(data[8:end])
        found: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in load(data[end:]).items():
            of, _, name_there = name.partition("/")
            found[of][name_there] = tensor
        return cls(header["step"], found["model"], found["optimizer"], header["state"])


class CheckpointStore:
    """The checkpoints of one run; written by rank 0 only. `metadata` is written into each model.safetensors."""

    def __init__(self, folder: Path, keep: int = 3, metadata: Mapping[str, str] | None = None):
        self.folder = folder
        self._keep, self._metadata = keep, dict(metadata or {})

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
        return self.write(Snapshot(step, copied(model), copied(optimizer), dict(state), best))

    def write(self, snapshot: Snapshot) -> Path:
        """`save` for tensors that were copied already. OSError, with nothing of it left, when it cannot be written.

        On a full disk the checkpoints that would be too old afterwards make room first.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        final = self.folder / f"step-{snapshot.step:08d}"
        writing = self.folder / f".writing-{final.name}"
        try:
            self._write_files(snapshot, writing)
        except OSError as error:
            if error.errno not in _FULL or not self._remove_old(max(1, self._keep - 1)):
                raise
            self._write_files(snapshot, writing)
        if final.exists():
            self._remove(final)
        for name in pointers.NAMES if snapshot.best else ("last",):
            pointers.announce(self.folder, name, final.name)
        writing.rename(final)
        pointers.settle(self.folder)
        sync(self.folder)
        self._remove_old(self._keep)
        return final

    def _write_files(self, snapshot: Snapshot, folder: Path) -> None:
        """The checkpoint in `folder`, all of it on disk, or nothing."""
        try:
            folder.mkdir()
            checksums = {}
            files: dict[str, dict[str, Tensor]] = {"model": snapshot.model, "optimizer": {}}
            for name, tensor in snapshot.optimizer.items():
                of = _EMA if name.startswith(AVERAGED) else "optimizer"
                files.setdefault(of, {})[name.removeprefix(AVERAGED)] = tensor
            for name, tensors in files.items():
                file = folder / f"{name}.safetensors"
                save_tensors(tensors, file, {} if name == "optimizer" else self._metadata)
                checksums[name] = _sha256(file)
            _write_state(folder, {**snapshot.state, "step": snapshot.step, "checksums": checksums})
            sync(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def conclude(self, step: int, changes: Mapping[str, Any], *, best: bool) -> bool:
        """Note in the checkpoint of `step` what its evaluation has changed; whether it is the best.

        False when there is no such checkpoint.
        """
        folder = self.folder / f"step-{step:08d}"
        if not folder.is_dir():
            return False
        state = json.loads((folder / _STATE).read_text("utf-8"))
        del state["checksum"]
        if best:  # a kill from here on leaves an announcement that is settled when the run goes on
            pointers.announce(self.folder, "best", folder.name)
        _write_state(folder, {**state, **changes})
        sync(folder)
        pointers.settle(self.folder)
        sync(self.folder)
        self._remove_old(self._keep)
        return True

    def best_error(self) -> float | None:
        """`counted_error` of the checkpoint that `best` leads to, infinite where there is none; None if not known."""
        path = pointers.followed(self.folder / "best")
        if not path.is_dir():
            return math.inf
        try:
            state = read_state(path)
        except (UserError, OSError):
            return None
        evaluation = state.get("evaluation")
        return counted_error(evaluation) if evaluation and not state.get("evaluation_due") else None

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of more than `step` steps: the run goes on from there and writes them again."""
        for path in self.newest_first():
            if _step_of(path) > step:
                self._remove(path)
        self._remove_leftovers()
        pointers.settle(self.folder)
        pointers.drop_dangling(self.folder)

    def newest_first(self) -> list[Path]:
        """The folders that are checkpoints by their names."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if _is_checkpoint(path)), reverse=True)

    def newest_step(self) -> int:
        """Of the newest one by its name; 0 where there is none."""
        return max((_step_of(path) for path in self.newest_first()), default=0)

    def newest_intact(self) -> tuple[Checkpoint | None, dict[Path, str]]:
        """The newest checkpoint that can be trusted, and what is wrong with damaged ones that are newer.

        UserError for one that is no less intact but cannot be read: of another format, or without permission.
        """
        damaged: dict[Path, str] = {}
        for path in self.newest_first():
            try:
                return open_checkpoint(path), damaged
            except DamagedCheckpoint as error:
                damaged[path] = str(error)
        return None, damaged

    def set_aside(self, path: Path) -> Path:
        """Give a damaged checkpoint another name, under which it stays and is in nobody's way."""
        aside = path.with_name(f"damaged-{path.name}")
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"damaged-{path.name}-{number}")
        path.rename(aside)
        return aside

    def _remove_leftovers(self) -> None:
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if _LEFTOVERS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self, keep: int) -> bool:
        """Whether there were more than the newest `keep` and the best."""
        best = pointers.followed(self.folder / "best").resolve()
        old = [path for path in self.newest_first()[keep:] if path.resolve() != best]
        for path in old:
            with suppress(OSError):  # another user's, say: what was written is none the worse for it
                self._remove(path)
        return bool(old)

    def _remove(self, path: Path) -> None:
        """Also when this process is killed meanwhile, no part of it is left under its name.

        What cannot be removed now, as on NFS a file that somebody reads, the next write removes.
        """
        removing = path.with_name(f".removing-{path.name}")
        shutil.rmtree(removing, ignore_errors=True)
        path.rename(removing)
        shutil.rmtree(removing, ignore_errors=True)


class BackgroundWriter:
    """Writes checkpoints into a store in a thread of its own, one after the other.

    A disk that is full or slow does not stop the training: `warn` is told, and the checkpoints there are stay. Only
    `close` raises, UserError, when what was to be written last could not be. `before` is called in the thread before
    anything is written.
    """

    def __init__(
        self,
        store: CheckpointStore,
        warn: Callable[[str], None] = lambda message: None,
        before: Callable[[], None] = lambda: None,
    ):
        self._store, self._warn, self._before = store, warn, before
        self._thread = ThreadPoolExecutor(1, "hvd-lb checkpoint")
        self._writes: list[_Write] = []
        self._failure: OSError | None = None
        self._best_is_lost = False

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        best: bool = False,
        wait: bool = True,
    ) -> bool:
        """As `CheckpointStore.save`, but returns when everything is copied: True.

        While the one before is still being written, it is waited for, or with `wait=False` this one is left out: False.
        """
        if not wait and not all(write.future.done() for write in self._writes):
            self._warn(f"the checkpoint before is still being written, so that of step {step} is left out")
            return False
        self._settle()
        snapshot = Snapshot(step, copied(model), copied(optimizer), dict(state), best)
        future = self._submit(self._store.write, snapshot)
        self._writes.append(_Write(future, f"the checkpoint of step {step}", is_checkpoint=True, best=best))
        return True

    def conclude(self, step: int, changes: Mapping[str, Any], *, best: bool) -> None:
        """`CheckpointStore.conclude`, after what was to be written before."""
        future = self._submit(self._store.conclude, step, changes, best=best)
        what = f"the evaluation of step {step} (in its checkpoint)"
        self._writes.append(_Write(future, what, is_checkpoint=False, best=best))

    def _submit(self, write: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
        def work() -> Any:
            self._before()
            return write(*arguments, **options)

        return self._thread.submit(work)

    def best_after_loss(self) -> float | None:
        """When the best could not be written since this was last asked: `CheckpointStore.best_error`."""
        if not self._best_is_lost:
            return None
        self._best_is_lost = False
        return self._store.best_error()

    def flush(self) -> None:
        """Wait until everything is on disk that can be."""
        self._settle()

    def close(self) -> None:
        """`flush`, and the end; UserError when the last checkpoint could not be written."""
        self._settle()
        self._thread.shutdown()
        if self._failure is not None:
            newest = next((path.name for path in self._store.newest_first()), "none")
            raise UserError(
                f"the last checkpoint cannot be written into {self._store.folder} ({self._failure.strerror}; newest "
                f"there: {newest}): make room or put the disk right, and the same command goes on from there"
            ) from self._failure

    def _settle(self) -> None:
        while self._writes:
            write = self._writes.pop(0)
            failure: OSError | None = None
            try:
                self._best_is_lost |= not write.future.result() and write.best
            except OSError as error:
                failure = error
                self._best_is_lost |= write.best and write.is_checkpoint
                self._warn(f"{write.what} cannot be written: {error.strerror}; training goes on")
            if write.is_checkpoint:
                self._failure = failure


@dataclass(frozen=True)
class _Write:
    """Something the thread was told to write."""

    future: Future[Any]
    what: str
    is_checkpoint: bool
    best: bool


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file, on disk when this returns; OSError."""
    try:
        save_file(tensors, file, dict(metadata) or None)
    except SafetensorError as error:  # it hides the operating system's number in its text
        if match := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(file)) from error
        raise
    # safetensors lets nobody but the owner read it; whoever may read its folder shall.
    with suppress(OSError):
        file.chmod(file.parent.stat().st_mode & 0o666)
    sync(file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Those of a safetensors file, on the CPU."""
    with _readable(file) as path:
        return load_file(path)


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file, of which tensors and metadata are read one by one."""
    with _readable(file) as path, safe_open(path, "pt") as opened:
        yield opened


@contextmanager
def _readable(file: Path) -> Iterator[Path]:
    """Its path, or another one for it where that is not UTF-8, which safetensors writes to, and does not read from."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        with file.open("rb") as stream:
            yield Path(f"/proc/self/fd/{stream.fileno()}")
    else:
        yield file


def _write_state(folder: Path, content: Mapping[str, Any]) -> None:
    """state.json as a whole, old or new, with its checksum."""
    content = {**content, "format": FORMAT}
    writing = folder / f".{_STATE}.writing"
    writing.write_text(json.dumps({**content, "checksum": _digest(content)}, indent=1), "utf-8")
    sync(writing)
    os.replace(writing, folder / _STATE)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: views into buckets and channels-last tensors share or permute their memory."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        for name, tensor in tensors.items()
    }


def _is_checkpoint(path: Path) -> bool:
    return pointers.CHECKPOINT.fullmatch(path.name) is not None and path.is_dir()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def weights_file(path: Path) -> Path:
    """The model.safetensors that a run (its last checkpoint), a checkpoint or the file itself names; UserError."""
    if not path.exists():
        raise UserError(f"{path} is not there: expected a run, a checkpoint or a .safetensors file")
    if path.is_file() and not pointers.followed(path).is_dir():
        return path
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / "last"
        if not pointers.followed(path).is_dir():
            raise UserError(f"{path.parents[1]} has no checkpoint yet: nothing is trained in it")
    return open_checkpoint(path).path / "model.safetensors"


def weights_metadata(file: Path) -> dict[str, Any]:
    """What a model.safetensors says of itself (`hvd_lb.trained.weights.metadata_of`); empty for files of others.

    UserError for what is no safetensors file.
    """
    try:
        with open_tensors(file) as opened:
            told = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except SafetensorError as error:
        raise UserError(f"{file} is no safetensors file ({error})") from None
    except ValueError:
        told = None
    if not (
        isinstance(told, dict)
        and isinstance(told.get("classes", []), list)
        and isinstance(told.get("recipe", {}), dict)
    ):
        raise UserError(f"{file} has damaged metadata: restore it")
    return told


def classes_of(metadata: Mapping[str, Any]) -> list[str] | None:
    """Names of classes in the order of the outputs; None where nothing names them."""
    return [str(name) for name in metadata["classes"]] if "classes" in metadata else None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that `path` is or leads to, every byte verified.

    DamagedCheckpoint when it is missing or damaged, another UserError when it is of another format or cannot be read.
    """
    try:
        return _open(pointers.followed(path))
    except OSError as error:
        raise UserError(
            f"checkpoint {error.filename or path} cannot be read ({error.strerror}): let this user read it, and the "
            "same command goes on"
        ) from error


def _open(path: Path) -> Checkpoint:
    state = read_state(path)
    for name in (*_TENSORS, *({_EMA} & state["checksums"].keys())):
        file = path / f"{name}.safetensors"
        if not file.is_file() or _sha256(file) != state["checksums"][name]:
            raise DamagedCheckpoint(
                f"checkpoint {path} is damaged: {file.name} is truncated or changed; use another checkpoint"
            )
    return Checkpoint(path, state)


def read_state(path: Path) -> dict[str, Any]:
    """state.json alone of the checkpoint in this folder; errors as `open_checkpoint`, and OSError."""
    state_file = path / _STATE
    if not state_file.is_file():
        raise DamagedCheckpoint(
            f"{path} is no checkpoint: expected a folder with {_STATE}, such as RUN/checkpoints/last"
        )
    try:
        state = json.loads(state_file.read_text("utf-8"))
        checksum = state.pop("checksum")
        intact = checksum == _digest(state)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged: {_STATE} does not match its checksum; use another checkpoint"
        )
    if state["format"] not in FORMATS:
        raise UserError(
            f"checkpoint {path} has format {state['format']} and this hvd-lb reads formats up to {FORMAT}: go on with "
            "the version that wrote it, or choose another --output"
        )
    if pointers.CHECKPOINT.fullmatch(path.name) and _step_of(path) != state["step"]:
        raise DamagedCheckpoint(
            f"{path}: checkpoint {path.name} is that after {state['step']} steps under another name: rename it back"
        )
    return state


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
