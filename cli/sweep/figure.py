"""`hvd-lb sweep figure`: the paper's Figures 1 and 2 of a sweep."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from hvd_lb.errors import UserError
from hvd_lb_cli.output.files import new_file
from hvd_lb_cli.sweep.argument import FOLDER, check_only, last_epochs, only_fields


@click.command()
@FOLDER
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", required=True, help="Write .png or .html."
)
@click.option(
    "--curves",
    metavar="SETTING",
    multiple=True,
    help='Instead, lay the curves of such settings over each other: --curves gpus=8 --curves "gpus=256, warmup=none".',
)
@click.option(
    "--baseline", metavar="SETTING", help="Whose noise is the measure [default: the smallest minibatch]"
)
@only_fields
@last_epochs
def figure(
    folder: Path,
    output: Path,
    curves: tuple[str, ...],
    baseline: str | None,
    only: tuple[str, ...],
    last: int,
) -> None:
    """Draw error against minibatch with bars of two standard deviations, and tell the largest minibatch within noise.

    With --curves: validation error and training loss over epochs, the mean over the seeds and its range.

    \b
    hvd-lb sweep figure sweeps/fig1 --output figure1.png
    hvd-lb sweep figure sweeps/fig1 --output warmup.png --vary gpus --vary warmup
    hvd-lb sweep figure sweeps/fig1 --output figure2.html --curves gpus=8 --curves gpus=256
    """
    from hvd_lb.report.page.page import page
    from hvd_lb.report.run_directory import replace_bytes
    from hvd_lb.sweep.figure import as_png, curve_charts, minibatch_chart
    from hvd_lb.sweep.plan import open_sweep
    from hvd_lb.sweep.results import results

    if output.suffix.lower() not in (".png", ".html"):
        raise UserError(f"--output {output}: expected a name that ends in .png or .html")
    new_file(output)
    for option in [*(["--baseline"] if baseline else []), *(["--vary"] if only else [])]:
        if curves:
            raise UserError(
                f"{option} is for error against minibatch, and --curves ask for curves: give one of them"
            )
    sweep = open_sweep(folder.expanduser())
    if curves:
        charts = curve_charts(sweep, [sweep.setting(text) for text in curves])
        sentence = "Mean over the seeds, and the range from the least to the largest."
    else:
        found = results(sweep, last, check_only(only, sweep))
        named = sweep.setting(baseline) if baseline else None
        chosen = next((result for result in results(sweep, last) if result.setting == named), None)
        chart, sentence = minibatch_chart(sweep, found, chosen)
        charts = [chart]
    if not any(series.x for chart in charts for series in chart.series):
        raise UserError(
            f"{folder}: no run has come so far that there is something to draw: see `hvd-lb sweep status`"
        )
    if output.suffix.lower() == ".png":
        replace_bytes(output, as_png(charts, sentence))
    else:
        replace_bytes(output, page(sweep.folder.name, charts=charts, lead=sentence).encode())
    click.echo(sentence)
    click.echo(f"written: {output}")
