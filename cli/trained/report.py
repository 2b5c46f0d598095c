"""`hvd-lb report`: runs on one page."""

from __future__ import annotations

import time
from pathlib import Path

import rich_click as click

from hvd_lb.errors import UserError
from hvd_lb.report.text import count, printable
from hvd_lb_cli.output.files import new_file
from hvd_lb_cli.watch.argument import RUN


@click.command()
@click.argument("runs", metavar="RUN…", nargs=-1, required=True, type=RUN)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="[default: report.html in the run; of several runs in the working directory]",
)
@click.option("--title", help="[default: the run's name]")
@click.option(
    "--watch", is_flag=True, help="Write it again while the runs go on; an open page loads itself again."
)
@click.option(
    "--every",
    type=click.IntRange(1, 3600),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="With --watch: how often.",
)
def report(runs: tuple[Path, ...], output: Path | None, title: str | None, watch: bool, every: int) -> None:
    """Write one HTML file that needs nothing else: curves that can be zoomed, events, figures, and in what runs differ.

    \b
    hvd-lb report runs/fashion
    hvd-lb report runs/small runs/large --output compared.html
    """
    from hvd_lb.report.page.runs import recipe_of, runs_page
    from hvd_lb.report.run_directory import RunDirectory, replace_text
    from hvd_lb.watch.state import AT_WORK, look

    file = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {file}: expected a name that ends in .html")
    new_file(file)
    for recipe in (RunDirectory(run).recipe for run in runs):
        if recipe.exists() and recipe_of(RunDirectory(recipe.parent)) is None:
            click.echo(f"warning: {printable(str(recipe))} cannot be read: the page is without it", err=True)
    told = False
    while True:
        going_on = watch and any(state.state in (*AT_WORK, "queued") for state in look(list(runs)))
        replace_text(file, runs_page(runs, title=title, refresh=every if going_on else None), sync=False)
        if not told or not going_on:
            click.echo(
                f"{count(len(runs), 'run')}: {file}" + (", and again until the end" if going_on else "")
            )
            told = True
        if not going_on:
            return
        time.sleep(every)
