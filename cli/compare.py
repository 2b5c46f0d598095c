"""`hvd-lb compare`: are two runs the same, to the bit, and if not, where they part."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvd_lb.report.text import count
from hvd_lb_cli.options.given import refuse_options
from hvd_lb_cli.output.files import status_1_is_a_verdict
from hvd_lb_cli.output.progress import long_progress
from hvd_lb_cli.output.show import print_rows
from hvd_lb_cli.output.terminal import plain_console
from hvd_lb_cli.replay.options import replay_options

if TYPE_CHECKING:
    from hvd_lb.report.compare import Comparison, MetricDifference, MetricsComparison
    from hvd_lb.report.compare_tensors import CheckpointComparison, TensorComparison

_RUN = click.Path(path_type=Path)


@click.command()
@click.argument("run_a", type=_RUN)
@click.argument("run_b", type=_RUN)
@click.option(
    "--step",
    type=click.IntRange(min=0),
    help="Compare the checkpoints of this many steps [default: the newest that both have intact]",
)
@click.option(
    "--tensors",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Differing tensors that are listed, the worst first.",
)
@click.option(
    "--replay",
    "again",
    is_flag=True,
    help="Take steps of both runs again here, from where they are the same, and name the first tensor that differs.",
)
@click.option(
    "--most-steps",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="With --replay: at most so many steps of each.",
)
@replay_options
@click.pass_context
@status_1_is_a_verdict()
def compare(
    context: click.Context,
    run_a: Path,
    run_b: Path,
    step: int | None,
    tensors: int,
    again: bool,
    most_steps: int,
    device: str,
    data: str | None,
    val: str | None,
) -> int:
    """Compare two run directories, or two checkpoints; exit code 0 when they are bitwise identical, 1 when not.

    Recipe, metrics and every tensor of a checkpoint that both have; the last line is the verdict. What does not touch
    the mathematics, such as speed, environment and free fields of the recipe, is told but is no difference.

    \b
    hvd-lb compare runs/one-process runs/two-processes
    hvd-lb compare runs/a runs/b --step 440
    hvd-lb compare runs/a runs/b --replay
    hvd-lb compare runs/a/checkpoints/best runs/b/checkpoints/last
    """
    if not again:
        refuse_options(
            context,
            {"most_steps", "device", "data", "val"},
            "is for steps that are taken again: add --replay",
        )
    from hvd_lb.report.compare import compare_runs  # needs torch

    console = plain_console()
    with console.status(Text("comparing")):
        comparison = compare_runs(run_a, run_b, step)
    print_rows(console, [("A", str(run_a)), ("B", str(run_b)), *_rows(comparison)])
    if comparison.checkpoint:
        _print_tensors(console, comparison.checkpoint.differing, tensors)
    if again:
        _tell_parting(console, (run_a, run_b), comparison, most_steps, device, (data, val))
    click.echo("bitwise identical" if comparison.identical else _verdict(comparison))
    return 0 if comparison.identical else 1


def _tell_parting(
    console: Console,
    runs: tuple[Path, Path],
    comparison: Comparison,
    most_steps: int,
    device: str,
    data: tuple[str | None, str | None],
) -> None:
    import torch

    from hvd_lb.machine.placement import choose_device
    from hvd_lb.replay.parting import find_parting
    from hvd_lb.replay.recorded import open_run

    differing = [of.step for metrics in comparison.metrics for of in metrics.differing]
    recorded = min(differing, default=0 if comparison.mathematics else None)
    with long_progress(console) as progress:
        parting = find_parting(
            open_run(runs[0]),
            open_run(runs[1]),
            torch.device(choose_device(device)),
            most_steps,
            recorded,
            data,
            lambda step, first, end: progress("steps of both", step + 1 - first, end - first),
        )
    if parting.end == parting.start:
        alike = (
            f"after {count(parting.start, 'step')} both have the same checkpoint"
            if parting.start
            else "there are none"
        )
        print_rows(console, [("taken again", f"no step: {alike}, and no record of a step before differs")])
        return
    steps = f"steps {parting.start} to {parting.end - 1}"
    if parting.step is None:
        found = f"{steps}: both recipes give the same bits here"
        if recorded is not None and recorded >= parting.end:
            found += f"; the first different record is of step {recorded}: see --most-steps"
    else:
        tensors = count(len(parting.tensors), "tensor")
        found = f"they part in step {parting.step}: first in {parting.tensors[0]}, of {tensors} that differ"
    rows = [("taken again", found)]
    for name, compared, expected in zip("AB", parting.compared, parting.expected, strict=True):
        if compared.first and expected.bits:
            rows.append((f"{name} by itself", f"is not what its recipe gives here: {compared.first}"))
        elif compared.first:
            how = "to rounding" if compared.to_rounding else f"but for {compared.largest:.2g} of a loss"
            rows.append((f"{name} by itself", f"is as recorded {how}; bits are not expected: {expected.why}"))
    print_rows(console, rows)


def _rows(comparison: Comparison) -> list[tuple[str, str]]:
    rows = []
    if comparison.metrics:
        mathematics = "; ".join(comparison.mathematics)
        rows.append(("recipe", f"mathematics differ: {mathematics}" if mathematics else "same mathematics"))
    for topic, differing in (("free fields", comparison.free), ("environment", comparison.environment)):
        if differing:
            rows.append((topic, "; ".join(differing)))
    for metrics in comparison.metrics:
        rows.append((f"{metrics.kind} metrics", _records(metrics)))
        rows += [(f"{metrics.kind} {metric.field}", _metric(metric)) for metric in metrics.differing]
    if comparison.checkpoint:
        rows.append(("checkpoint", _checkpoint(comparison.checkpoint)))
    rows += [("note", note) for note in comparison.notes]
    return rows


def _records(metrics: MetricsComparison) -> str:
    sentence = f"{metrics.records[0]:,} and {metrics.records[1]:,} records, {metrics.compared:,} compared"
    fewer = [f"{field} in {n:,} of them" for field, n in metrics.fields.items() if n < metrics.compared]
    if fewer:
        sentence += f" ({', '.join(fewer)})"
    if not metrics.compared:
        return sentence
    differing = ", ".join(metric.field for metric in metrics.differing)
    return f"{sentence}: {f'{differing} differ' if differing else 'equal'}"


def _metric(metric: MetricDifference) -> str:
    sentence = f"first at step {metric.step}: {_value(metric.a)} → {_value(metric.b)}"
    if not math.isnan(metric.difference):
        sentence += f", by {metric.difference:.2g}"
    sentence += f"; in {count(metric.records, 'record')}"
    return sentence if math.isnan(metric.largest) else f"{sentence}, at most by {metric.largest:.2g}"


def _value(value: object) -> str:
    if isinstance(value, str) and len(value) > 16:  # a digest
        return f"{value[:8]}…"
    return f"{value:.9g}" if isinstance(value, float) else "null" if value is None else str(value)


def _checkpoint(checkpoint: CheckpointComparison) -> str:
    step, other = checkpoint.steps
    at = f"step {step}" if step == other else f"steps {step} and {other}"
    sentence = f"{at}: {len(checkpoint.differing):,} of {count(checkpoint.tensors, 'tensor')} differ"
    if checkpoint.state:
        sentence += f"; in state.json, not counted: {', '.join(checkpoint.state)}"
    return sentence


def _print_tensors(console: Console, differing: list[TensorComparison], most: int) -> None:
    shown, more = differing[:most], len(differing) - most
    if console.is_terminal and shown:
        table = Table("file", "tensor", "largest difference", "relative", "elements", box=box.SIMPLE_HEAD)
        for tensor in shown:
            table.add_row(*(Text(text) for text in (tensor.file, tensor.name, *_cells(tensor))))
        console.print(table)
    else:
        for tensor in shown:
            elements = "" if tensor.layout else f", {_cells(tensor)[2]} elements"
            click.echo(f"{tensor.file} {tensor.name}: {_largest(tensor)}{elements}")
    if more > 0:
        click.echo(f"… and {more:,} more")


def _cells(tensor: TensorComparison) -> tuple[str, str, str]:
    if tensor.layout:
        return tensor.layout, "", ""
    elements = f"{tensor.differing:,} of {tensor.elements:,}"
    if math.isnan(tensor.largest):
        return "NaN", "", elements
    return f"{tensor.largest:.3g}", f"{tensor.relative:.2g}", elements


def _largest(tensor: TensorComparison) -> str:
    largest, relative, _ = _cells(tensor)
    return f"{largest} (relative {relative})" if relative else largest


def _verdict(comparison: Comparison) -> str:
    """One line: in which respects they differ, and by how much the weights do."""
    respects = ["mathematics of the recipe"] if comparison.mathematics else []
    respects += [f"{metrics.kind} metrics" for metrics in comparison.metrics if metrics.differing]
    checkpoint = comparison.checkpoint
    if checkpoint is None:
        return f"different: {', '.join([*respects, 'weights not compared'])} (no checkpoint in common)"
    if checkpoint.differing:
        respects.append(f"{len(checkpoint.differing):,} of {count(checkpoint.tensors, 'tensor')}")
    verdict = f"different: {', '.join(respects)}"
    if worst := checkpoint.worst:
        noun = "weight difference" if worst.is_weight else "difference"
        verdict += f"; largest {noun}: {_largest(worst)} in {worst.file} {worst.name}"
    return verdict
