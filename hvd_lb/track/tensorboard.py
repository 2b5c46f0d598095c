"""TensorBoard, in a folder with other runs, where their recipes can be compared (HPARAMS).

RUN/tensorboard, which rank 0 writes in any case, has the curves of one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from hvd_lb.track.tracker import Ending, Point, TrackedRun

# What the table of recipes can be sorted by.
_RESULTS = ("eval/top1_error_percent", "eval/loss")


class TensorBoardTracker:
    """A run of its own in `folder`."""

    def __init__(self, folder: Path):
        self._folder = folder

    def open(self, run: TrackedRun, identity: str | None) -> str:
        self._board = SummaryWriter(str(self._folder / run.name))
        writer = self._board._get_file_writer()
        for part in hparams(run.parameters, dict.fromkeys(_RESULTS, 0.0)):
            writer.add_summary(part)
        return run.name

    def numbers(self, points: Sequence[Point]) -> None:
        for step, numbers in points:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def text(self, name: str, text: str) -> None:
        shown = text if name.endswith(".md") else f"```\n{text}\n```"
        self._board.add_text(name, shown)

    def close(self, ending: Ending) -> None:
        self._board.close()
