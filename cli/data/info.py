"""`hvd-lb data info`: what a data set is made of, in figures and as a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from hvd_lb.report.text import count, printable
from hvd_lb_cli.options.given import refuse_options
from hvd_lb_cli.options.splits import split_options
from hvd_lb_cli.output.picture_file import PICTURE, write_picture
from hvd_lb_cli.output.progress import long_progress
from hvd_lb_cli.output.terminal import plain_console

if TYPE_CHECKING:
    from hvd_lb.data.prepare.survey import Range, Survey

_BAR = 12


@click.command("info")
@click.argument("source", metavar="[DATA]", required=False)
@split_options
@click.option("--sheet", type=PICTURE, metavar="FILE.png", help="Write a contact sheet.")
@click.option(
    "--split",
    type=click.Choice(["train", "val"]),
    default="train",
    show_default=True,
    help="What is on the sheet.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Which images are on the sheet.",
)
@click.pass_context
def info(
    context: click.Context,
    source: str | None,
    val: str | None,
    val_fraction: float | None,
    sheet: Path | None,
    split: str,
    seed: int,
) -> None:
    """Count images and classes of DATA (whatever --data takes), and tell sizes, formats and bytes.

    Classes and sizes come from the index; formats, bytes and orientation from the files, of many of them from a random
    thousand.

    \b
    hvd-lb data info /data/imagenet --sheet imagenet.png
    """
    from hvd_lb.data.dataset import open_dataset  # here: --help needs none of it
    from hvd_lb.data.prepare.survey import survey
    from hvd_lb.data.remote.address import without_query
    from hvd_lb.data.spec import default_data
    from hvd_lb.machine.cpu import usable_cores

    if sheet is None:
        refuse_options(
            context, {"split", "seed"}, "says what is on the contact sheet: give --sheet FILE.png as well"
        )
    spec = source or default_data()
    with long_progress(plain_console()) as on_progress:
        dataset = open_dataset(
            spec, val=val, val_fraction=val_fraction, on_progress=on_progress, on_bad_image="skip"
        )
    splits = {"train": dataset.train, "val": dataset.val}
    found = [survey(images, 4 * usable_cores()) for images in splits.values()]
    rows = [(without_query(spec), *splits), *zip(_topics(), *map(_figures, found), strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for row in rows:
        if any(row[1:]):
            click.echo(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip())
    for name, of in zip(splits, found, strict=True):
        for looked, what in ((of.sized, "sizes"), (of.opened, "formats, bytes and orientation")):
            if looked < of.images:
                click.echo(f"{name}: {what} are those of {looked:,} random images of {of.images:,}")
    for note in dataset.notes:
        click.echo(printable(note))
    if sheet is not None:
        from hvd_lb.report.pictures.contact_sheet import contact_sheet

        images = splits[split]
        title = (
            f"{dataset.name} {split}: {count(len(images), 'image')}, {count(len(images.classes), 'class')}"
        )
        write_picture(contact_sheet(images, title, seed=seed), sheet)


def _topics() -> list[str]:
    from hvd_lb.data.prepare.survey import SIDE_EDGES

    return [
        *("images", "classes", "images in a class", "broken headers", "width", "height", "longer side"),
        *(f"  up to {high:,}" for high in SIDE_EDGES[1:]),
        f"  over {SIDE_EDGES[-1]:,}",
        *("formats", "bytes", "EXIF orientation"),
    ]


def _figures(of: Survey) -> list[str]:
    """One for each of `_topics`; empty where there is nothing to say."""
    total = sum(of.sides)
    about = "" if of.opened == of.images else "about "
    kind = " of pixels" if of.pixels_only else ""
    turned = of.opened - of.orientations[1]
    return [
        f"{of.images:,}",
        f"{of.classes:,}",
        _range(of.per_class),
        f"{of.broken:,}" if of.broken else "",
        _range(of.width),
        _range(of.height),
        "pixels" if total else "",
        *(_bar(sides, total) for sides in of.sides),
        ", ".join(f"{name} {_share(n, of.opened)}" for name, n in of.formats.most_common()),
        f"{about}{_size(of.mean_bytes * of.images)}{kind}, {_size(of.mean_bytes)} an image",
        f"{_share(turned, of.opened)} turned or mirrored, which is ignored" if turned else "all upright",
    ]


def _range(of: Range) -> str:
    return f"{of.least:,}" if of.least == of.most else f"{of.least:,} to {of.most:,}, median {of.median:,}"


def _bar(part: int, total: int) -> str:
    if not part:
        return ""
    eighths = max(1, round(8 * _BAR * part / total))
    bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return f"{bar:<{_BAR}} {_share(part, total)}"


def _share(part: int, total: int) -> str:
    percent = 100 * part / total
    return f"{percent:.0f} %" if percent >= 1 or not part else f"{percent:.1g} %"


def _size(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} bytes"
