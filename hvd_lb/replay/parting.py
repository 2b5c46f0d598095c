"""Where two runs part: both taken again on this process, step by step, from where they are still the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hvd_lb.exact.digest import tensor_digest
from hvd_lb.replay.again import Again, Difference
from hvd_lb.replay.recorded import RecordedRun
from hvd_lb.replay.verify import checkpoint_digests
from hvd_lb.training.checkpoint import Checkpoint, DamagedCheckpoint, open_checkpoint


@dataclass(frozen=True)
class Parting:
    """Both were taken from `start` steps done to `end`; after step `step` `tensors` differ, None: none ever did.

    `unlike` has for each run the first record that is not what its own steps gave here, if there is one.
    """

    start: int
    end: int
    step: int | None
    tensors: list[str]
    unlike: tuple[Difference | None, Difference | None]


def find_parting(
    a: RecordedRun,
    b: RecordedRun,
    device: torch.device,
    most_steps: int,
    on_step: Callable[[int, int, int], None] = lambda step, first, end: None,
) -> Parting:
    """Takes steps of both until a weight or velocity differs, one of them ends, or `most_steps` are taken.

    `on_step` hears of each. UserError where one of them cannot be taken from there.
    """
    start, checkpoints = _start(a, b)
    both = [
        Again(run, run.open_data(None, None), device, checkpoint)
        for run, checkpoint in zip((a, b), checkpoints, strict=True)
    ]
    end = min(start + most_steps, a.steps, b.steps)
    for step in range(start, end):
        for again in both:
            again.take(step + 1)
        on_step(step, start, end)
        if tensors := _differing(*both):
            return Parting(start, step + 1, step, tensors, (both[0].compared.first, both[1].compared.first))
    return Parting(start, end, None, [], (both[0].compared.first, both[1].compared.first))


def _start(a: RecordedRun, b: RecordedRun) -> tuple[int, tuple[Checkpoint, Checkpoint] | tuple[None, None]]:
    """The newest checkpoint that both have alike, or the seed."""
    for step in sorted(a.checkpoints.keys() & b.checkpoints.keys(), reverse=True):
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
