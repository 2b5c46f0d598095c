"""Where two runs part: both taken again on this process, step by step, from where they are still the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hvd_lb.exact.digest import tensor_digest
from hvd_lb.replay.again import Again, Compared, Expectation, expectation
from hvd_lb.replay.recorded import RecordedRun
from hvd_lb.replay.verify import checkpoint_digests
from hvd_lb.training.checkpoint import Checkpoint, DamagedCheckpoint, open_checkpoint


@dataclass(frozen=True)
class Parting:
    """Both were taken from `start` steps done to `end`; after step `step` `tensors` differ, None: none ever did.

    `compared` and `expected` are of each with its own records. Where `end` is `start` nothing was taken.
    """

    start: int
    end: int
    step: int | None
    tensors: list[str]
    compared: tuple[Compared, Compared]
    expected: tuple[Expectation, Expectation]


def find_parting(
    a: RecordedRun,
    b: RecordedRun,
    device: torch.device,
    most_steps: int,
    recorded: int | None = None,
    data: tuple[str | None, str | None] = (None, None),
    on_step: Callable[[int, int, int], None] = lambda step, first, end: None,
) -> Parting:
    """Takes steps of both until a weight or velocity differs, one of them ends, or `most_steps` are taken.

    `recorded` is the first step of which they have recorded different things, None: of none. `data`: where training and
    validation images of both lie now. `on_step` hears of each step. UserError where one cannot be taken from there.
    """
    start, checkpoints = _start(a, b, recorded)
    end = min(start + most_steps, a.steps, b.steps)
    runs = list(zip((a, b), checkpoints, strict=True))
    both = (
        [Again(run, run.open_data(*data), device, checkpoint, evaluations=True) for run, checkpoint in runs]
        if end > start
        else []
    )
    tensors, step = list[str](), start
    while step < end and not tensors:
        for again in both:
            again.take(step + 1)
        on_step(step, start, end)
        step += 1
        tensors = _differing(*both)
    one, other = (again.compared for again in both) if both else (Compared(), Compared())
    first, second = (expectation(run, checkpoint, device.type, step) for run, checkpoint in runs)
    return Parting(start, step, step - 1 if tensors else None, tensors, (one, other), (first, second))


def _start(
    a: RecordedRun, b: RecordedRun, recorded: int | None
) -> tuple[int, tuple[Checkpoint, Checkpoint] | tuple[None, None]]:
    """The newest checkpoint that both have alike, not after step `recorded`, or the seed."""
    for step in sorted(a.checkpoints.keys() & b.checkpoints.keys(), reverse=True):
        if recorded is not None and step > recorded:
            continue
        try:
            found = open_checkpoint(a.checkpoints[step]), open_checkpoint(b.checkpoints[step])
        except DamagedCheckpoint:
            continue
        if checkpoint_digests(found[0]) == checkpoint_digests(found[1]):
            return step, found
    for run in (a, b):
        run.start_before(0)  # UserError where it did not begin with its seed
    return 0, (None, None)


def _differing(a: Again, b: Again) -> list[str]:
    """Names in the order of the network; a velocity has that of its place in the optimizer's state."""
    states = [{**model, **optimizer} for model, optimizer in (of.learnt() for of in (a, b))]
    names = dict.fromkeys([*states[0], *states[1]])
    one, other = states
    return [
        name
        for name in names
        if name not in one
        or name not in other
        or tensor_digest({name: one[name]}) != tensor_digest({name: other[name]})
    ]
