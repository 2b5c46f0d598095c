"""`hvd-lb data index`: read the headers of all images before the first run does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import rich_click as click

from hvd_lb.errors import UserError
from hvd_lb.report.text import count, printable
from hvd_lb_cli.options.splits import split_options
from hvd_lb_cli.output.progress import long_progress
from hvd_lb_cli.output.terminal import plain_console

if TYPE_CHECKING:
    from hvd_lb.data.index.index import Index


@click.command("index")
@click.argument("source", metavar="DATA")
@click.option(
    "--beside",
    is_flag=True,
    help="Keep the index in .hvd-lb-index beside the data, where all who share them find it.",
)
@click.option("--check", is_flag=True, help="Look at every file, and at its first bytes, anew.")
@split_options
def index_command(
    source: str, beside: bool, check: bool, val: str | None, val_fraction: float | None
) -> None:
    """Index DATA, a folder, list or shards: location, size, label, width, height and orientation of every image.

    `train` does it on first use. An index that is there is made anew when files came, went or changed their names; with
    --check also when any file has other first bytes or another size.

    \b
    hvd-lb data index /data/imagenet --beside
    hvd-lb data index /data/imagenet --check
    """
    from hvd_lb.data.index.dataset import index_splits  # here: --help needs none of it
    from hvd_lb.data.spec import is_named

    if is_named(source):
        raise UserError(f"{source}: needs no index; expected a folder, a list or shards")
    began = time.monotonic()
    read_labels: list[str] = []
    with long_progress(plain_console()) as on_progress:

        def show(label: str, done: int, total: int) -> None:
            read_labels[:] = [label]
            on_progress(label, done, total)

        indexes, notes = index_splits(
            source,
            val=val,
            val_fraction=val_fraction,
            on_progress=show,
            check="full" if check else "quick",
            write_beside=beside,
        )
    for split, index in indexes.items():
        click.echo(f"{split}: {_figures(index)}")
        if index.facts.first_broken is not None:
            position, reason = index.facts.first_broken
            click.echo(
                f"{split}: {count(index.facts.broken, 'image')} with a broken header, the first: "
                f"{index.path(position)} ({reason})"
            )
    for note in notes:
        click.echo(printable(note))
    if beside and not all(index.keep for index in indexes.values()):
        raise UserError(
            f"{source}: the index could not be written beside it (is it read-only, or the disk full?), so it is kept "
            "nowhere; leave --beside out"
        )
    folders = sorted({str(index.keep[0].parent) for index in indexes.values() if index.keep})
    seconds = time.monotonic() - began
    state = f"read in {seconds:,.1f} s" if read_labels else f"up to date ({seconds:,.1f} s)"
    click.echo(
        f"index {state}: {', '.join(folders) or 'kept nowhere, as the cache folder cannot be written, or is full'}"
    )


def _figures(index: Index) -> str:
    facts = index.facts
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in facts.kinds.items())
    classes = count(len(facts.classes), "class")
    return f"{count(facts.images, 'image')} in {classes}, {facts.bytes / 1e6:,.1f} MB ({kinds})"
