"""metrics.jsonl and TensorBoard: one JSON line per record, appended as it happens (docs/run-directory.md).

Nothing here ends a training: what cannot be written is told once and tried again, what cannot be read is left out.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvd_lb.exact.chain import Chain
from hvd_lb.report.ranks import RankTimes
from hvd_lb.report.run_directory import RunDirectory, replace_bytes, replace_text, strict_json

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

_HEARTBEAT_SECONDS = 0.5
_CATCH_UP_SECONDS = 5.0
# After an error of TensorBoard's writer, which then has to be made anew.
_BOARD_SECONDS = 60.0
# What records hold besides their kind and step: numbers, null where they are not finite.
_NUMBERS = {
    "train": (
        *("epoch", "lr", "loss", "images_per_second", "data_wait"),
        *("gradient_norm", "peak_memory_gb"),
    ),
    "eval": (
        *("epoch", "top1_error", "top5_error", "loss", "images"),
        *("ema_top1_error", "ema_top5_error", "ema_loss"),
    ),
    "checkpoint": ("epoch", "stall_seconds"),
    "ranks": ("epoch", "median", "slowest", "slower"),
    "noise": ("epoch", "noise_scale", "low", "high"),
    "recovered": ("epoch", "seconds"),
    "rescale": ("before", "global_batch", "lr", "full_lr"),
}
# What readers count with.
_WHOLE_NUMBERS = {
    "rollback": ("to",),
    "generation": ("to",),
    "rescale": ("epoch", "images", "workers", "steps_per_epoch", "offset", "total_steps"),
}


# Steps from `to` on are told of again after these; and what stays when others are told again.
_FROM_THERE = ("rollback", "generation")
# Whichever steps are told again, these stay.
_EVENTS = (*_FROM_THERE, "recovered", "audit", "begin", "environment")
# What comes after a step, and may have to be done when processes were lost meanwhile.
_AFTER_STEPS = ("digest", "checkpoint", "eval", "seal")


class JsonLines:
    """Appends records to a file, as whole lines of strict JSON. Those that it does not take wait for the next time."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting = b""

    def add(self, *records: dict[str, Any]) -> None:
        self._waiting += _lines(records)

    def forget(self, first_step: int, evaluation_due: bool = False) -> None:
        """The records of steps from there on, which will be added again."""
        self._waiting = _before(self._waiting, first_step, evaluation_due)
        truncate_metrics(self.path, first_step, evaluation_due=evaluation_due)

    def records(self) -> list[dict[str, Any]]:
        """All that count, those included that wait; OSError where the file cannot be read."""
        written = self.path.read_bytes() if self.path.exists() else b""
        return _that_count(parse_records(written + self._waiting)[0])

    def write(self, *, sync: bool = False) -> None:
        """OSError leaves the file with whole lines. It is opened each time: a handle may go stale."""
        if not self._waiting:
            return
        with self.path.open("a+b", buffering=0) as stream:
            end, done = _end_of_lines(stream), 0
            try:
                while done < len(self._waiting):  # a disk takes a part first, and then says that it is full
                    done += stream.write(self._waiting[done:])
            except OSError:
                done = self._waiting.rfind(b"\n", 0, done) + 1
                with suppress(OSError):
                    stream.truncate(end + done)
                raise
            finally:
                self._waiting = self._waiting[done:]
            if sync:
                os.fsync(stream.fileno())


def _end_of_lines(stream: FileIO) -> int:
    """Where the last whole line ends; what a crash or a full disk left after it is cut off."""
    size = stream.seek(0, os.SEEK_END)
    if size:
        stream.seek(size - 1)
        if stream.read(1) != b"\n":
            stream.seek(0)
            size = stream.readall().rfind(b"\n") + 1
            stream.truncate(size)
    return size


def _board_type() -> type[SummaryWriter]:
    """Imported only where an observer is, and in the thread that makes it.

    In the observer's own thread, beside another import, `six.moves` (of TensorBoard, and of DALI) may not be found: six
    is then in `sys.modules` before it is a package.
    """
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


class RunObserver:
    """Rank 0's observer: writes what the trainer says into the run directory, in a thread and in the order it was said.

    So a file system that is slow, or hangs, keeps no step waiting. What cannot be written, as on a full disk, is told
    once, in this rank's log and as a record. `ranks` says what is told of other ranks' times. With `begin`, a record,
    begins the chain of a new run (`hvd_lb.exact.chain`). `environment`, what rounding depends on from `first_step` on,
    is told where it is another than before.
    """

    def __init__(
        self,
        run: RunDirectory,
        first_step: int,
        ranks: RankTimes | None = None,
        begin: dict[str, Any] | None = None,
        environment: dict[str, Any] | None = None,
    ):
        self._run, self._ranks = run, ranks
        self._environment = environment
        self.numbers: Sequence[int] | None = None  #: of each rank in an elastic job, by which it is named
        self._chain, self._first_record = Chain(), begin
        self._lines, self._bad_images = JsonLines(run.metrics), JsonLines(run.bad_images)
        self._told: set[Path] = set()
        self._board: SummaryWriter | None = None
        self._board_due, self._beat = 0.0, 0.0
        self._step = first_step
        self._board_type = _board_type()
        self._thread = ThreadPoolExecutor(1, "hvd-lb metrics")
        self._failure: Exception | None = None
        self._last = self._record = self._later(self._begin)
        self._behind = False

    def train(self, record: dict[str, Any]) -> None:
        self._later(self._write, "train", record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self._later(self._write, "eval", record)

    def ranks(self, record: dict[str, Any]) -> None:
        if self._ranks and (told := self._ranks.add(record)):
            self._later(self._write, "ranks", told[0])
            for message in told[1]:
                self.warning({"epoch": record["epoch"], "step": record["step"], "message": message})

    def checkpoint(self, record: dict[str, Any]) -> None:
        self._later(self._write, "checkpoint", record)

    def together(self, record: dict[str, Any]) -> None:
        self._write("together", record)

    def repeat(self, record: dict[str, Any]) -> None:
        self._later(self._write, "repeat", record)

    def audit(self, record: dict[str, Any]) -> None:
        hosts = self._ranks.hosts if self._ranks else ()
        named = [hosts[rank] for rank in record["liars"] if rank < len(hosts)]
        numbered = {name: self._numbered(record[name]) for name in ("owner", "auditor", "third", "moved_to")}
        liars = [self._numbered(rank) for rank in record["liars"]]
        self._later(self._write, "audit", {**record, **numbered, "liars": liars, "hosts": named})

    def _numbered(self, rank: int | None) -> int | None:
        """The number in the job of who has that rank."""
        return rank if rank is None or self.numbers is None else self.numbers[rank]

    def rescale(self, record: dict[str, Any]) -> None:
        self._later(self._write, "rescale", record)

    def noise(self, record: dict[str, Any]) -> None:
        self._later(self._write, "noise", record)

    def digest(
        self, record: dict[str, Any], model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        self._later(self._write_digests, record, model, optimizer)

    def generation(self, record: dict[str, Any]) -> None:
        """Other processes go on from step `to`, as after a rollback; with `redone` they keep and evaluate once more
        what came of the step before."""
        self._later(self._write, "generation", record)
        self._later(self._take_up_chain)
        self._later(self._forget_bad_images, record["to"], record["redone"])

    def recovered(self, record: dict[str, Any]) -> None:
        """A generation has taken its first step."""
        self._later(self._write, "recovered", record)

    def rollback(self, record: dict[str, Any]) -> None:
        self._later(self._write, "rollback", record)
        self._later(self._take_up_chain)
        self._later(self._forget_bad_images, record["to"])
        self._later(self._take_back_drawn, record["to"])

    def warning(self, record: dict[str, Any]) -> None:
        self._later(self._write, "warning", record)

    def bad_images(self, records: Sequence[dict[str, Any]]) -> None:
        self._later(self._write_bad_images, records)

    def microbatch(self, step: int, done: int, of: int) -> None:
        self._tell(step, done, of, {})

    def evaluating(self, step: int, done: int, of: int, what: str = "evaluation") -> None:
        self._tell(step, done, of, {"doing": what})

    def _tell(self, step: int, done: int, of: int, doing: dict[str, str]) -> None:
        now = time.monotonic()
        if now - self._beat >= _HEARTBEAT_SECONDS and self._last.done():
            self._beat = now
            self._later(self._write_heartbeat, step, done, of, doing)

    def flush(self) -> None:
        """Waits until what was said is written, or could not be; any thread may ask."""
        self._last.result()

    def catch_up(self) -> None:
        """`flush` of records, but not for long, and for a file system that hangs only once until it has gone on."""
        with suppress(TimeoutError):
            self._record.result(0 if self._behind else _CATCH_UP_SECONDS)
        self._behind = not self._record.done()

    def close(self) -> None:
        """`flush`, and the end."""
        self._thread.submit(self._do, self._end)
        self._thread.shutdown()
        if self._failure:
            raise self._failure

    def _later(self, work: Callable[..., object], *arguments: Any) -> Future[None]:
        """Has the thread do this after all before; an error there that is none of the file system's is raised here."""
        if self._failure:
            raise self._failure
        self._last = self._thread.submit(self._do, work, *arguments)
        if work != self._write_heartbeat:
            self._record = self._last
        return self._last

    # In the thread

    def _do(self, work: Callable[..., object], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self._failure = error

    def _begin(self) -> None:
        with self._told_of(self._run.tensorboard):
            self._open_board()
        first, records = self._step, self._take_up_chain()
        if self._first_record and not self._chain.begun:
            self._write("begin", self._first_record)
        known = [record for record in records if record.get("kind") == "environment"]
        if self._environment and (not known or not self._environment.items() <= known[-1].items()):
            self._write("environment", {"step": first, **self._environment})

    def _take_up_chain(self) -> list[dict[str, Any]]:
        """The chain goes on after the records that count now."""
        records: list[dict[str, Any]] = []
        with self._told_of(self._run.metrics):
            records = self._lines.records()
            self._chain = Chain(records)
        return records

    def _write_digests(
        self, record: dict[str, Any], model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        from hvd_lb.exact.digest import state_digests  # needs torch, which who only reads records does not

        self._write("digest", {**record, **state_digests(model, optimizer)})

    def _take_back_drawn(self, first_step: int) -> None:
        """TensorBoard forgets the points from there on."""
        self._step = first_step
        with self._told_of(self._run.tensorboard):
            if self._board:
                self._board.close()
            self._open_board()

    def _forget_bad_images(self, first_step: int, evaluation_due: bool = False) -> None:
        with self._told_of(self._run.bad_images):
            self._bad_images.forget(first_step, evaluation_due)

    def _write_bad_images(self, records: Sequence[dict[str, Any]]) -> None:
        self._bad_images.add(*records)
        with self._told_of(self._run.bad_images):
            self._bad_images.write(sync=True)

    def _write_heartbeat(self, step: int, done: int, of: int, doing: dict[str, str]) -> None:
        self._step = step
        text = strict_json({"step": step, "microbatch": done, "microbatches": of, **doing})
        with self._told_of(self._run.heartbeat):
            replace_text(self._run.heartbeat, text, sync=False)

    def _end(self) -> None:
        with self._told_of(self._run.bad_images):
            self._bad_images.write(sync=True)
        with self._told_of(self._run.tensorboard):
            if self._board:
                self._board.close()
        if seal := self._chain.seal():
            self._lines.add(self._chain.sealed(seal))
        with self._told_of(self._run.metrics):
            self._lines.write()

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        self._step = record["step"]
        self._lines.add(self._chain.sealed({"kind": kind, **record}))
        with self._told_of(self._run.tensorboard):
            self._draw(kind, record)
        with self._told_of(self._run.metrics):
            self._lines.write()

    def _draw(self, kind: str, record: dict[str, Any]) -> None:
        if self._board is None and time.monotonic() >= self._board_due:
            self._open_board()
        try:
            for name, value in record.items():
                if self._board and isinstance(value, float):
                    self._board.add_scalar(f"{kind}/{name}", value, record["step"])
        except OSError:  # raised in its thread, which has ended by it
            self._board, self._board_due = None, time.monotonic() + _BOARD_SECONDS
            raise

    def _open_board(self) -> None:
        self._board_due = time.monotonic() + _BOARD_SECONDS
        self._board = self._board_type(str(self._run.tensorboard), purge_step=self._step)

    @contextmanager
    def _told_of(self, path: Path) -> Iterator[None]:
        """What is in here may fail by the file system; the first time for each path it is told."""
        try:
            yield
        except (OSError, UnicodeError) as error:  # the latter of TensorBoard, whose paths have to be UTF-8
            if path in self._told:
                return
            self._told.add(path)
            why = getattr(error, "strerror", None) or str(error)
            message = f"{path.name} cannot be written ({why}): training goes on, and it is tried again"
            self._lines.add({"kind": "warning", "step": self._step, "message": message})
            with suppress(OSError):
                print(f"hvd-lb: warning: {message}", file=sys.stderr, flush=True)


class SilentObserver:
    """The observer of every other rank."""

    def train(self, record: dict[str, Any]) -> None:
        pass

    def evaluation(self, record: dict[str, Any]) -> None:
        pass

    def ranks(self, record: dict[str, Any]) -> None:
        pass

    def checkpoint(self, record: dict[str, Any]) -> None:
        pass

    def together(self, record: dict[str, Any]) -> None:
        pass

    def repeat(self, record: dict[str, Any]) -> None:
        pass

    def audit(self, record: dict[str, Any]) -> None:
        pass

    def rescale(self, record: dict[str, Any]) -> None:
        pass

    def noise(self, record: dict[str, Any]) -> None:
        pass

    def digest(
        self, record: dict[str, Any], model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        pass

    def rollback(self, record: dict[str, Any]) -> None:
        pass

    def warning(self, record: dict[str, Any]) -> None:
        pass

    def bad_images(self, records: Sequence[dict[str, Any]]) -> None:
        pass

    def microbatch(self, step: int, done: int, of: int) -> None:
        pass

    def evaluating(self, step: int, done: int, of: int, what: str = "evaluation") -> None:
        pass

    def flush(self) -> None:
        pass

    def catch_up(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records that count: not those of steps that were taken again after a rollback, nor lines that are none."""
    return read_records(path)[0]


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """As `read_metrics`, and how many whole lines are no records."""
    found, foreign = parse_records(path.read_bytes()) if path.exists() else ([], 0)
    return _that_count(found), foreign


def _that_count(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those that a rollback, or a change of the processes, has taken back: one pass, from the newest on."""
    records: list[dict[str, Any]] = []
    first = first_after_steps = math.inf  # of the steps that a later record has taken back
    for record in reversed(list(found)):
        kind = record.get("kind")
        if kind not in _EVENTS and record["step"] >= (first_after_steps if kind in _AFTER_STEPS else first):
            continue
        records.append(record)
        if kind in _FROM_THERE:
            first = min(first, record["to"])
            # What comes after a step is told once more where that was not done yet.
            first_after_steps = min(first_after_steps, record["to"] - bool(record.get("redone")))
    return records[::-1]


class Epochs:
    """How many epochs so many steps are, by a run's records: `rescale` tells of another number of steps for each."""

    def __init__(self, records: Iterable[dict[str, Any]], steps_per_epoch: float):
        self._from = [(-math.inf, steps_per_epoch, 0)]
        self.total_steps: int | None = None  #: of the run, where k has changed
        for record in records:
            if record.get("kind") == "rescale":
                self._from.append((record["step"], record["steps_per_epoch"], record["offset"]))
                self.total_steps = record["total_steps"]

    def __call__(self, steps: float) -> float:
        # What is done is told by the step before.
        _, per_epoch, offset = next(one for one in reversed(self._from) if one[0] < steps)
        return (steps - offset) / per_epoch


def last_records(path: Path) -> list[dict[str, Any]]:
    """The newest that count, however large the file is: enough of them for an evaluation among them, or 16 MB."""
    records: list[dict[str, Any]] = []
    for size in (1 << 18, 1 << 24):
        try:
            with path.open("rb") as stream:
                end = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, end - size))
                text = stream.read(size)
        except OSError:
            break
        records = _that_count(parse_records(text)[0])
        if end <= size or any(record.get("kind") == "eval" for record in records):
            break
    return records


def parse_records(text: bytes) -> tuple[list[dict[str, Any]], int]:
    """Of whole lines."""
    lines = text.split(b"\n")[:-1]
    records = [record for record in map(_record, lines) if record is not None]
    return records, len(lines) - len(records)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=lambda _: None)  # NaN, in files of older versions
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind", ""), str):
        return None
    kind = str(record.get("kind"))
    steps, numbers = ("step", *_WHOLE_NUMBERS.get(kind, ())), _NUMBERS.get(kind, ())
    whole = all(isinstance(record.get(name), int) for name in steps) and all(
        isinstance(record.get(name), int | float | None) for name in numbers
    )
    return record if whole else None


def truncate_metrics(path: Path, first_step: int, *, evaluation_due: bool = False) -> None:
    """Remove the records of steps from `first_step` on, which will be written again, and what is no record.

    With `evaluation_due` the evaluation after the step before, too.
    """
    if not path.exists():
        return
    before = path.read_bytes()
    after = _before(before, first_step, evaluation_due)
    if after == before:
        return
    if before.startswith(after):  # which needs no room
        os.truncate(path, len(after))
    else:
        replace_bytes(path, after)


def _before(text: bytes, first_step: int, evaluation_due: bool = False) -> bytes:
    def counts(record: dict[str, Any]) -> bool:
        # A link that was told after it is of it, too.
        of_evaluation = "eval" in (record.get("kind"), record.get("of")) or record.get("kind") == "seal"
        return _begins(record) < first_step - (evaluation_due and of_evaluation)

    return _lines(filter(counts, parse_records(text)[0]))


def _begins(record: dict[str, Any]) -> int:
    """The first step that a record tells of: a rollback, whichever step was left out, of that which it goes on from."""
    step: int = record["to" if record.get("kind") in _FROM_THERE else "step"]
    return step


def _lines(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(f"{strict_json(record)}\n".encode("ascii") for record in records)


class MetricsFollower:
    """Reads the records of a growing metrics file as they come, from those of step `first_step` on."""

    def __init__(self, path: Path, first_step: int):
        self._path, self._first_step = path, first_step
        self._offset = 0

    def new_records(self) -> list[dict[str, Any]]:
        """None, while the file cannot be read."""
        try:
            with self._path.open("rb") as stream:
                if stream.seek(0, os.SEEK_END) < self._offset:  # records were taken back
                    self._offset = 0
                stream.seek(self._offset)
                text = stream.read()
        except OSError:
            return []
        self._offset += text.rfind(b"\n") + 1
        return [record for record in parse_records(text)[0] if _begins(record) >= self._first_step]
