"""Whether what a run claims is so: its chain, its checkpoints, and stretches of its steps that are taken again.

What is found without computing a step: a record, a recipe or a plan that was changed after the fact (the chain), a
checkpoint that was damaged (its checksums) or exchanged (the digests); records, checkpoints and a summary that are not
of the same run (`agreement`). A chain that was written anew as a whole, and numbers that no training made, are found by
taking steps again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from hvd_lb.data.images import Dataset
from hvd_lb.errors import UserError
from hvd_lb.exact.digest import PARTS, STATISTICS, state_digests
from hvd_lb.plan.run_plan import Scale
from hvd_lb.recipe import differing_fields
from hvd_lb.replay.again import ROUNDING, Again, Compared, Expectation, expectation
from hvd_lb.replay.agreement import beyond_the_end, unlike_records, unlike_summary
from hvd_lb.replay.beginning import plan_of
from hvd_lb.replay.recorded import RecordedRun
from hvd_lb.report.text import count
from hvd_lb.training.checkpoint import Checkpoint, DamagedCheckpoint, open_checkpoint
from hvd_lb.training.saved_state import AVERAGED, LOSSES

Verdict = Literal["holds", "does not hold", "cannot be told"]

# In float mode on other hardware or processes: losses that are `FAR` so soon after a checkpoint are no rounding.
_SOON = 20


@dataclass(frozen=True)
class Stretch:
    """Steps `start` to `end` − 1, from a kept checkpoint (or the seed) on; `whole`: up to the next one."""

    start: int
    end: int
    whole: bool

    def __str__(self) -> str:
        return f"steps {self.start} to {self.end - 1}"


@dataclass
class Executed:
    """A stretch that was taken again; `bits` is what was expected of it. `problem` is empty where it is as recorded."""

    stretch: Stretch
    compared: Compared
    expected: Expectation
    problem: str = ""
    untold: str = ""


@dataclass
class Examined:
    """What was found so far: `problems` speak against the run; `notes` say what could not be looked at, and why.

    `chosen` is how many stretches are to be taken again: none, and the verdict is about the records alone.
    """

    chosen: int
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recipe_differs: bool = False
    chained: bool = True  #: whether there are digests
    checkpoints: list[int] = field(default_factory=list)  #: that have the digests of the chain
    unmatched: list[int] = field(default_factory=list)  #: of which the chain has no digests
    stretches: list[Executed] = field(default_factory=list)

    @property
    def all_problems(self) -> list[str]:
        """Those of stretches, too."""
        return self.problems + [f"{done.stretch}: {done.problem}" for done in self.stretches if done.problem]

    @property
    def all_notes(self) -> list[str]:
        return self.notes + [f"{done.stretch}: {done.untold}" for done in self.stretches if done.untold]

    @property
    def verdict(self) -> Verdict:
        if self.all_problems:
            return "does not hold"
        told = all(not done.untold for done in self.stretches) and len(self.stretches) == self.chosen
        return "holds" if told and (self.chained or self.stretches) else "cannot be told"


def examine_records(run: RecordedRun, found: Examined) -> None:
    """The chain, and whether recipe, checkpoints and summary are those of it; computes no step."""
    chain, recipe = run.chain, run.recipe.mathematics()
    if run.foreign:
        found.problems.append(f"metrics.jsonl is damaged: no whole record in {count(run.foreign, 'line')}")
    if chain.begin is None:
        found.chained = False
        if any("chain" in record for record in run.records):
            found.problems.append("metrics.jsonl: a chain without its beginning, which was removed")
        else:
            found.notes.append(
                "there are no digests: --digest-every never, an older version, or they were removed"
            )
    elif differing := differing_fields(chain.begin.get("recipe", {}), recipe):
        found.recipe_differs = True
        found.problems.append(
            f"recipe.yaml is not the recipe that the run began with: {'; '.join(differing)}"
        )
    for after, last in chain.broken:
        first = "the run's beginning" if after < run.first_step else f"step {after}"
        found.problems.append(
            f"metrics.jsonl: something after {first} and up to step {last} is not as it was recorded: the chain is "
            "broken there"
        )
    if chain.begin and chain.unsealed:
        found.notes.append(
            f"{count(chain.unsealed, 'record')} after the last link: only steps taken again can show whether they are "
            "as they were"
        )
    digests = run.of_kind("digest")
    for step, path in run.checkpoints.items():
        try:
            checkpoint = open_checkpoint(path)
        except UserError as error:
            if path.exists():  # else the run goes on, and keeps newer ones
                if not isinstance(error, DamagedCheckpoint):
                    raise
                found.problems.append(str(error))
            continue
        if step not in run.saved:  # newer than the records that were read: the run goes on
            continue
        if checkpoint.step != step:
            found.problems.append(f"checkpoint {path.name} is that after {count(checkpoint.step, 'step')}")
            continue
        if differing := differing_fields(checkpoint.saved.recipe, recipe):
            found.recipe_differs = True
            found.problems.append(f"checkpoint {path.name} is of another recipe: {'; '.join(differing)}")
        if not _scales_as_recorded(run, checkpoint):
            found.problems.append(
                f"checkpoint {path.name} has other numbers of virtual workers in the steps before than were recorded"
            )
        found.problems += unlike_records(run, step)
        if step - 1 not in digests:
            found.unmatched.append(step)
        elif parts := _differing_parts(checkpoint, digests[step - 1]):
            found.problems.append(
                f"checkpoint {path.name} is not the state that was recorded after step {step - 1}: its "
                f"{' and '.join(parts)} have other digests"
            )
        else:
            found.checkpoints.append(step)
    problems, notes = unlike_summary(run)
    found.problems += [*beyond_the_end(run), *problems]
    found.notes += notes


def _scales_as_recorded(run: RecordedRun, checkpoint: Checkpoint) -> bool:
    """In the steps that the run itself has taken."""
    steps = range(run.first_step, checkpoint.step)
    told = [scale for scale in run.scales(None) if scale.step in steps]
    known = checkpoint.saved.scales or (Scale(0, 0, 0, run.recipe.gpus),)
    return told == [scale for scale in known if scale.step in steps]


def _differing_parts(checkpoint: Checkpoint, recorded: dict[str, Any]) -> list[str]:
    digests = checkpoint_digests(checkpoint)
    return [part for part in PARTS if part in recorded and recorded[part] != digests.get(part)]


def checkpoint_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Those of the state that it was taken from."""
    whole = checkpoint.saved.recipe.get("reproducible", False)
    optimizer = {
        name: tensor
        for name, tensor in checkpoint.optimizer().items()
        if name != LOSSES and (whole or not (name.startswith(AVERAGED) and name.endswith(STATISTICS)))
    }
    return state_digests(checkpoint.model(), optimizer)


def examine_plan(run: RecordedRun, dataset: Dataset | None, found: Examined) -> None:
    """Whether recipe and data give the plan that the run began with; None: the data are not opened for that alone."""
    if run.chain.begin is None:
        return
    if dataset is None:
        found.notes.append("data and plan were not looked at, as no step is taken again (--data opens them)")
        return
    plan = run.recipe.sample_plan(len(dataset.train), dataset.train.labels)
    known, here = run.chain.begin.get("plan", {}), plan_of(plan)
    if differing := differing_fields(known, here):
        found.problems.append(
            f"the plan of who sees which images is not the one the run began with: {'; '.join(differing)}"
        )


def stretches(run: RecordedRun, most_steps: int) -> list[Stretch]:
    """From each resume point that is there to the next, or `most_steps` of it; what follows the last one, too."""
    starts = [run.first_step] if run.first_step == 0 else []
    starts += [step for step in run.checkpoints if step > 0]
    found = []
    for start, end in zip(starts, [*starts[1:], run.steps], strict=False):
        until = min(end, start + most_steps, run.steps)
        if until > start:
            found.append(Stretch(start, until, whole=until == end))
    return found


def choose(of: list[Stretch], count: int, seed: int) -> list[Stretch]:
    """So many of them at random, by step; `seed` chooses the same again."""
    return sorted(random.Random(seed).sample(of, min(count, len(of))), key=lambda stretch: stretch.start)


def execute(
    run: RecordedRun,
    dataset: Dataset,
    device: torch.device,
    stretch: Stretch,
    on_microbatch: Callable[[int, int, int], None],
) -> Executed:
    """Takes a stretch again, evaluations included, and judges it."""
    checkpoint = open_checkpoint(run.checkpoints[stretch.start]) if stretch.start else None
    expected = expectation(run, checkpoint, device.type, stretch.end)
    again = Again(run, dataset, device, checkpoint, evaluations=True, on_microbatch=on_microbatch)
    again.take(stretch.end)
    compared = again.compared
    if stretch.whole and stretch.end in run.checkpoints:
        _compare_with_checkpoint(again, open_checkpoint(run.checkpoints[stretch.end]), compared)
    done = Executed(stretch, compared, expected)
    if compared.first is None:
        if not compared.records + compared.digests:
            done.untold = "nothing was recorded of these steps"
    elif expected.bits:
        done.problem = str(compared.first)
    elif not compared.to_rounding:
        if expected.half:
            done.untold = f"losses differ by up to {compared.largest:.2g} of their size: {expected.why}"
        elif compared.far and compared.far.step - stretch.start < _SOON:
            done.problem = f"{compared.far}, far more than rounding does in {_SOON} steps"
        else:
            done.untold = (
                f"losses differ by up to {compared.largest:.2g} of their size; rounding alone does {ROUNDING:g} at "
                f"most in a short stretch and grows in a long one, and bits cannot be compared: {expected.why}"
            )
    return done


def _compare_with_checkpoint(again: Again, checkpoint: Checkpoint, compared: Compared) -> None:
    """The state after a stretch with what was saved then."""
    if again.step - 1 in again.run.of_kind("digest"):
        return  # it was compared with the chain, and the chain with the checkpoint
    compared.digest(again.step - 1, checkpoint_digests(checkpoint), again.digests())


def verify(
    run: RecordedRun,
    dataset: Dataset | None,
    device: torch.device,
    chosen: list[Stretch],
    on_microbatch: Callable[[Stretch, int, int, int], None],
) -> Iterator[Examined]:
    """Everything, one stretch after the other: what is found so far, each time something is.

    With another recipe than the run's no step can be taken again; where none is to be, it needs no `dataset`.
    """
    found = Examined(len(chosen))
    examine_records(run, found)
    examine_plan(run, dataset, found)
    yield found
    if found.recipe_differs or dataset is None:
        return
    for stretch in chosen:
        try:
            done = execute(
                run,
                dataset,
                device,
                stretch,
                partial(on_microbatch, stretch),
            )
        except UserError as error:  # a damaged checkpoint, or images that cannot be read
            done = Executed(stretch, Compared(), Expectation(False), untold=str(error))
        found.stretches.append(done)
        yield found


def receipt(run: RecordedRun, found: Examined, seed: int) -> dict[str, Any]:
    """All that was found, as JSON values: who has the run can make it again with the same `seed`."""
    chain = run.chain
    return {
        "run": str(run.path),
        "verdict": found.verdict,
        "problems": found.all_problems,
        "notes": found.all_notes,
        "recipe": run.recipe.mathematics(),
        "data": chain.begin["data"] if chain.begin else None,
        "steps": run.steps,
        "chain": {
            "digests": len(chain.digests),
            "last_step": chain.digests[-1]["step"] if chain.digests else None,
            "last_link": chain.last or None,
            "records_after_it": chain.unsealed,
        },
        "checkpoints": {"as_recorded": found.checkpoints, "without_digest": found.unmatched},
        "seed": seed,
        "stretches": [
            {
                "first_step": done.stretch.start,
                "last_step": done.stretch.end - 1,
                "records": done.compared.records,
                "digests": done.compared.digests,
                "same_digests": done.compared.same_digests,
                "largest_relative_difference": done.compared.largest,
                "bits_expected": done.expected.bits,
                "as_recorded": not (done.problem or done.untold),
            }
            for done in found.stretches
        ],
    }
