"""`hvd-lb sweep table`: error of each setting, mean and deviation over its seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich import box
from rich.table import Table
from rich.text import Text

from hvd_lb.errors import UserError
from hvd_lb_cli.output.files import new_file
from hvd_lb_cli.output.terminal import plain_console
from hvd_lb_cli.sweep.argument import FOLDER, check_only, last_epochs, only_fields

if TYPE_CHECKING:
    from hvd_lb.sweep.plan import Sweep
    from hvd_lb.sweep.results import Result

_ENDINGS = {".md": "markdown", ".csv": "csv", ".html": "html"}


@click.command()
@FOLDER
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "csv", "html"]),
    help="[default: as --output ends; without it text]",
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write .md, .csv or .html.")
@only_fields
@last_epochs
def table(folder: Path, form: str | None, output: Path | None, only: tuple[str, ...], last: int) -> None:
    """Tell the error of each setting as the paper counts: of each run the median of its last 5 epochs, then mean and
    standard deviation over the seeds. Runs that have not come to their end are not counted.
    """
    from hvd_lb.report.run_directory import replace_text
    from hvd_lb.sweep.plan import open_sweep
    from hvd_lb.sweep.results import how, results

    if output is not None and form is None and output.suffix.lower() not in _ENDINGS:
        raise UserError(f"--output {output}: expected a name that ends in {', '.join(_ENDINGS)}, or --format")
    if output:
        new_file(output)
    form = form or (_ENDINGS[output.suffix.lower()] if output else "text")
    sweep = open_sweep(folder.expanduser())
    found = results(sweep, last, check_only(only, sweep))
    if form == "text" and output is None:
        _print(sweep, found)
        click.echo(how(sweep, last))
        return
    text = _text(sweep, found, form, how(sweep, last))
    if output is None:
        click.echo(text, nl=False)
    else:
        replace_text(output, text)
        click.echo(f"written: {output}")


def _text(sweep: Sweep, found: list[Result], form: str, how: str) -> str:
    from hvd_lb.report.page import page
    from hvd_lb.sweep.results import as_csv, as_markdown, table

    rows = table(sweep, found)
    if form == "csv":
        return as_csv(sweep, found)
    if form == "html":
        shown = page.table(rows[0], rows[1:], numbers=4)
        return page.page(sweep.folder.name, sections=[("Results", f"{shown}<p>{how}</p>")])
    return f"{as_markdown(rows)}\n{how}\n"


def _print(sweep: Sweep, found: list[Result]) -> None:
    from hvd_lb.sweep.results import table

    heads, *rows = table(sweep, found)
    shown = Table(box=box.SIMPLE_HEAD)
    for number, head in enumerate(heads):
        shown.add_column(head, justify="right" if number >= len(heads) - 4 else "left")
    for row in rows:
        shown.add_row(*map(Text, row))
    plain_console().print(shown)
