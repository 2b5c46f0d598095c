"""`hvd-lb replay`: any step of the past, on one device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from hvd_lb.errors import UserError
from hvd_lb.report.run_directory import strict_json
from hvd_lb.report.text import count
from hvd_lb_cli.options.kinds import Target
from hvd_lb_cli.output.files import status_1_is_a_verdict
from hvd_lb_cli.output.show import print_rows
from hvd_lb_cli.output.terminal import plain_console
from hvd_lb_cli.replay.options import replay_options, steps_progress

if TYPE_CHECKING:
    from hvd_lb.replay.again import Again, Expectation
    from hvd_lb.replay.recorded import Jump, RecordedRun
    from hvd_lb.replay.watched_step import StepSeen
    from hvd_lb.training.checkpoint import Checkpoint


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--step", type=click.IntRange(min=0), help="The step, by its number in metrics.jsonl: counted from 0."
)
@click.option("--spike", is_flag=True, help="The step of the steepest rise of the recorded training loss.")
@click.option(
    "--worker",
    type=click.IntRange(min=0),
    help="Show and write this virtual worker's images only, and its own gradient, too.",
)
@click.option(
    "--images",
    "shown",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="So many images are listed, those with the largest loss first.",
)
@click.option(
    "--output",
    type=Target(),
    metavar="FOLDER",
    help="Write the step there: pictures, tensors, gradients (safetensors), the loss of each image (JSON lines).",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for scripts: one object.")
@replay_options
@status_1_is_a_verdict()
def replay(
    run: Path,
    step: int | None,
    spike: bool,
    worker: int | None,
    shown: int,
    output: Path | None,
    as_json: bool,
    device: str,
    data: str | None,
    val: str | None,
) -> int:
    """Take a step of a run again, on this one process, and show what happened in it; nothing of RUN is changed.

    From the nearest checkpoint before it, or from the seed, the very steps are taken. It shows the loss of the step,
    the norm of its gradient and the loss of each image; on the way all recorded losses and digests are compared. Exit
    code 0 when they are as recorded (in float mode: to rounding), 1 when not.

    \b
    hvd-lb replay runs/digits --step 451
    hvd-lb replay runs/digits --step 451 --worker 1 --output step-451
    hvd-lb replay runs/imagenet --spike --images 30
    """
    if (step is None) is not spike:
        raise click.UsageError("expected --step N or --spike, one of the two")
    import torch  # here: --help needs neither it nor what follows

    from hvd_lb.machine.placement import choose_device
    from hvd_lb.replay.again import Again, expectation
    from hvd_lb.replay.recorded import open_run, worst_jump
    from hvd_lb.replay.watched_step import WatchedSteps
    from hvd_lb.replay.written import check_folder, write_step

    console = plain_console(stderr=as_json)
    recorded = open_run(run.expanduser())
    jump = worst_jump(recorded) if spike else None
    first, last = (jump.first, jump.last) if jump else (step or 0, step or 0)
    _check(recorded, first, last)
    if output:
        check_folder(output.expanduser())
    checkpoint, damaged = recorded.start_before(first)
    on = choose_device(device)
    expected = expectation(recorded, checkpoint, on, last + 1)
    dataset = recorded.open_data(data, val)
    begun = checkpoint.step if checkpoint else 0
    with steps_progress(console, begun, last + 1) as progress:
        again = Again(recorded, dataset, torch.device(on), checkpoint, on_microbatch=progress)
        _check_worker(again, first, last, worker)
        watched = WatchedSteps(again, first, last, worker, gradients=output is not None)
        print_rows(console, _before(recorded, again, checkpoint, damaged, last, jump))
        seen = watched.take()
    good, verdict = _verdict(again, expected)
    figures = _figures(recorded, again, begun, expected, jump)
    if as_json:
        click.echo(strict_json({**figures, **_as_json(seen), "holds": good, "verdict": verdict}))
    else:
        print_rows(console, _rows(seen, again, verdict))
        _list_images(seen, shown)
    if output:
        write_step(output.expanduser(), again.trainer, seen, figures)
        if not as_json:
            console.print(f"written to {output}", soft_wrap=True)
    return 0 if good else 1


def _check(run: RecordedRun, first: int, last: int) -> None:
    if last >= run.steps:
        done = f"has taken {count(run.steps, 'step')}: expected --step 0 to {run.steps - 1}"
        raise UserError(f"{run.path} {done if run.steps else 'has taken no step yet'}")
    if first == last and first in run.left_out:
        raise UserError(
            f"step {first} of {run.path} was left out by --on-nan rollback: nothing was computed in it"
        )


def _check_worker(again: Again, first: int, last: int, worker: int | None) -> None:
    for step in range(first, last + 1):
        planned = again.run_plan.at(step)
        if worker is not None and worker >= (workers := planned.plan.workers):
            raise UserError(
                f"--worker {worker}: {again.run.path} has {count(workers, 'virtual worker')}, 0 to {workers - 1}, "
                f"in step {step}"
            )
        if worker is not None and not planned.with_images([worker]):
            raise UserError(
                f"virtual worker {worker} has no images in step {step}, the short end of an epoch"
            )


def _before(
    run: RecordedRun,
    again: Again,
    checkpoint: Checkpoint | None,
    damaged: list[str],
    last: int,
    jump: Jump | None,
) -> list[tuple[str, str]]:
    """Told before anything is computed: from where, and what it will cost."""
    recipe = run.recipe
    mode = "reproducible" if recipe.reproducible else "float mode"
    rows = [
        (
            "run",
            f"{run.path} ({recipe.data}, {recipe.model}, {recipe.gpus} × {recipe.per_gpu_batch} images, {mode})",
        )
    ]
    if jump:
        rose = "to no number" if jump.after is None else f"to {jump.after:.6g}"
        which = f"step {jump.last}" if jump.first == jump.last else f"steps {jump.first} to {jump.last}"
        rows.append(("spike", f"the loss went from {jump.before:.6g} {rose} in {which}"))
    if run.foreign:
        rows.append(("note", f"no whole record in {count(run.foreign, 'line')} of metrics.jsonl"))
    rows += [("note", problem) for problem in damaged]
    start = checkpoint.step if checkpoint else 0
    microbatches = sum(len(again.run_plan.at(step).with_images()) for step in range(start, last + 1))
    rows.append(("from", f"{checkpoint.path.name}" if checkpoint else "the seed, at step 0"))
    rows.append(
        (
            "to compute",
            f"{count(last + 1 - start, 'step')}: {count(microbatches, 'microbatch')} of up to {recipe.per_gpu_batch} "
            f"images, on one process",
        )
    )
    return rows


def _rows(seen: StepSeen, again: Again, verdict: str) -> list[tuple[str, str]]:
    clipping = "clipping and " if again.run.recipe.clip_norm else ""
    rows = [
        (f"step {seen.step}", f"epoch {seen.epoch}, learning rate {seen.learning_rate:.6g}"),
        ("loss", f"{seen.loss:.9g}, the mean of {count(_images_of(again, seen.step), 'image')}"),
        ("gradient norm", f"{seen.gradient_norm:.6g}, of the mean gradient before {clipping}weight decay"),
    ]
    if seen.worker is not None:
        rows.append(
            (
                f"worker {seen.worker}",
                f"loss {seen.own_loss:.9g}, gradient norm {seen.own_gradient_norm:.6g} by itself",
            )
        )
    return [*rows, ("as recorded", verdict)]


def _images_of(again: Again, step: int) -> int:
    return again.run_plan.at(step).images


def _list_images(seen: StepSeen, most: int) -> None:
    worst_first = sorted(seen.images, key=lambda image: -image.loss)
    for image in worst_first[:most]:
        taken_for = "" if image.predicted == image.label else f", taken for {image.predicted}"
        click.echo(
            f"loss {image.loss:<9.4g} worker {image.worker} position {image.position}: {image.name}, "
            f"{image.label}{taken_for}"
        )
    if most and len(worst_first) > most:
        click.echo(f"… and {len(worst_first) - most:,} more; --images {len(worst_first)} lists all")


def _verdict(again: Again, expected: Expectation) -> tuple[bool, str]:
    compared = again.compared
    if not compared.records + compared.digests:
        return True, "nothing was recorded of these steps that could be compared"
    what = f"{count(compared.records, 'record')} and {count(compared.digests, 'digest')} compared"
    if compared.first is None:
        return True, f"to the bit: {what}"
    if expected.bits:
        return False, f"no: {compared.first} ({what})"
    if compared.to_rounding:
        same = f"{compared.same_digests:,} of {count(compared.digests, 'digest')} the same"
        losses = (
            f"differ by {compared.largest:.1g} of their size at most" if compared.largest else "are the same"
        )
        return True, f"to rounding: losses {losses}, {same}; {expected.why}"
    return False, (
        f"no: {compared.first}; losses differ by {compared.largest:.2g} of their size, more than rounding does in "
        f"a few steps. Bits cannot be compared: {expected.why}"
    )


def _figures(
    run: RecordedRun, again: Again, begun: int, expected: Expectation, jump: Jump | None
) -> dict[str, Any]:
    compared = again.compared
    return {
        "run": str(run.path),
        "from_step": begun,
        "spike": asdict(jump) if jump else None,
        "compared": {
            "records": compared.records,
            "digests": compared.digests,
            "same_digests": compared.same_digests,
            "largest_relative_difference": compared.largest,
            "first_difference": asdict(compared.first) if compared.first else None,
        },
        "bits_expected": expected.bits,
        "why_not": expected.why,
    }


def _as_json(seen: StepSeen) -> dict[str, Any]:
    apart = ("gradients", "own_gradients", "images")
    fields = {name: value for name, value in vars(seen).items() if name not in apart}
    return {**fields, "images": [asdict(image) for image in seen.images]}
