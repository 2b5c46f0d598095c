"""`hvd-lb verify`: whether what a run claims is so, with a receipt."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.console import Console

from hvd_lb.report.run_directory import replace_text, strict_json
from hvd_lb.report.text import count
from hvd_lb_cli.options.kinds import Target
from hvd_lb_cli.output.files import new_file, status_1_is_a_verdict
from hvd_lb_cli.output.progress import long_progress
from hvd_lb_cli.output.show import print_rows
from hvd_lb_cli.output.terminal import plain_console
from hvd_lb_cli.replay.options import replay_options

if TYPE_CHECKING:
    from hvd_lb.replay.recorded import RecordedRun
    from hvd_lb.replay.verify import Examined, Executed, Stretch

_STATUS = {"holds": 0, "does not hold": 1, "cannot be told": 2}


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--segments",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="So many stretches between kept checkpoints, drawn at random, are taken again; 0: the records alone, which "
    "needs no data.",
)
@click.option(
    "--most-steps",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Of a longer stretch, so many steps from its beginning.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    help="Draws the same stretches again [default: another one each time, which is told]",
)
@click.option("--json", "figures", type=Target(), metavar="FILE", help="Write the receipt there.")
@replay_options
@status_1_is_a_verdict()
def verify(
    run: Path,
    segments: int,
    most_steps: int,
    seed: int | None,
    figures: Path | None,
    device: str,
    data: str | None,
    val: str | None,
) -> int:
    """Say whether a run was made as it claims: by its recipe, from its data, step by step; a training receipt.

    The chain of digests shows whether a record, the recipe or a checkpoint was changed afterwards. Stretches that are
    taken again show whether the recorded numbers are those of training. Exit code 0: it holds; 1: it does not, and
    where; 2: it cannot be told, and why. In float mode numbers are compared to rounding.

    \b
    hvd-lb verify runs/digits
    hvd-lb verify runs/imagenet --segments 1 --most-steps 200 --json receipt.json
    hvd-lb verify runs/digits --segments 0
    """
    import torch  # here: --help needs neither it nor what follows

    from hvd_lb.machine.placement import choose_device
    from hvd_lb.replay import verify as verifying
    from hvd_lb.replay.recorded import open_run

    console = plain_console()
    target = new_file(figures) if figures else None
    recorded = open_run(run.expanduser())
    on = torch.device(choose_device(device))
    drawn = random.SystemRandom().randrange(2**32) if seed is None else seed
    chosen = verifying.choose(verifying.stretches(recorded, most_steps), segments, drawn)
    dataset = recorded.open_data(data, val) if chosen or data or val else None
    print_rows(console, _before(recorded, chosen, drawn))
    with long_progress(console) as progress:

        def on_microbatch(stretch: Stretch, step: int, done: int, of: int) -> None:
            if done == of:
                progress(str(stretch), step + 1 - stretch.start, stretch.end - stretch.start)

        told = 0
        for number, found in enumerate(verifying.verify(recorded, dataset, on, chosen, on_microbatch)):
            if not number:
                _tell_records(console, recorded, found)
            for done in found.stretches[told:]:
                console.print(f"{done.stretch}: {_in_words(done)}", soft_wrap=True)
            told = len(found.stretches)
    click.echo(_verdict(recorded, found))
    if target:
        replace_text(target, strict_json(verifying.receipt(recorded, found, drawn), indent=1) + "\n")
    return _STATUS[found.verdict]


def _before(run: RecordedRun, chosen: list[Stretch], seed: int) -> list[tuple[str, str]]:
    recipe = run.recipe
    mode = "reproducible" if recipe.reproducible else "float mode"
    steps = sum(stretch.end - stretch.start for stretch in chosen)
    most = max([recipe.gpus, *(of["workers"] for of in run.of_kind("rescale").values())])
    microbatches = count(most, "microbatch") if most == recipe.gpus else f"up to {count(most, 'microbatch')}"
    cost = f"{count(steps, 'step')} of {microbatches}, on one process, and the evaluations there"
    return [
        ("run", f"{run.path} ({recipe.data}, {recipe.model}, {count(run.steps, 'step')}, {mode})"),
        ("stretches", ", ".join(map(str, chosen)) or "none"),
        ("to compute", f"{cost} (--seed {seed})" if chosen else "nothing"),
    ]


def _tell_records(console: Console, run: RecordedRun, found: Examined) -> None:
    chain = run.chain
    if chain.begin and not chain.broken:
        last = f", the last link {chain.last}" if chain.last else ""
        console.print(f"chain: {count(len(chain.digests), 'digest')} in order{last}", soft_wrap=True)
    if found.checkpoints:
        steps = ", ".join(map(str, found.checkpoints))
        console.print(f"checkpoints: {steps} are the states that were recorded", soft_wrap=True)
    if found.unmatched:
        steps = ", ".join(map(str, found.unmatched))
        console.print(f"checkpoints: of {steps} no digest was recorded", soft_wrap=True)
    for problem in found.problems:
        console.print(f"wrong: {problem}", soft_wrap=True)
    for why in found.notes:
        console.print(f"note: {why}", soft_wrap=True)


def _in_words(done: Executed) -> str:
    compared = done.compared
    what = f"{count(compared.records, 'record')} and {count(compared.digests, 'digest')}"
    if done.problem:
        return f"wrong: {done.problem}"
    if done.untold:
        return f"cannot be told: {done.untold}"
    if compared.first is None:
        return f"as recorded, to the bit: {what}"
    return f"as recorded, to rounding ({compared.largest:.1g}): {what}; bits are others: {done.expected.why}"


def _verdict(run: RecordedRun, found: Examined) -> str:
    verdict = found.verdict
    if verdict == "holds":
        if not found.stretches:
            return "holds as far as the records tell: no step was taken again"
        steps = sum(done.stretch.end - done.stretch.start for done in found.stretches)
        return f"holds: {count(steps, 'step')} of {run.steps:,} taken again, and all that was recorded of them is so"
    if verdict == "does not hold":
        wrong = found.all_problems
        return f"does not hold: {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else "")
    return f"cannot be told: {found.all_notes[-1]}"
