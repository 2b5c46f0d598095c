"""`hvd-lb data verify`: find broken images before a run does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import rich_click as click

from hvd_lb.data.options import MAX_PIXELS, MOST_PIXELS, LoaderKind
from hvd_lb.report.text import count, printable
from hvd_lb_cli.options.kinds import THREADS
from hvd_lb_cli.options.splits import split_options
from hvd_lb_cli.output.files import new_file
from hvd_lb_cli.output.progress import long_progress
from hvd_lb_cli.output.terminal import plain_console


@click.command("verify")
@click.argument("source", metavar="PATH")
@click.option(
    "--loader",
    type=click.Choice(get_args(LoaderKind)),
    default="dali",
    show_default=True,
    help="What decodes the images in the run; there are files that only PIL (torchvision) can decode.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1, MOST_PIXELS),
    default=MAX_PIXELS,
    show_default=True,
    help="An image of more pixels is not decoded, and so bad.",
)
@split_options
@click.option("--threads", type=THREADS, help="Threads that read and decode [default: cores]")
@click.option(
    "--json", "report", type=click.Path(dir_okay=False, path_type=Path), help="Write what is found as JSON."
)
def verify_command(
    source: str,
    loader: LoaderKind,
    max_pixels: int,
    val: str | None,
    val_fraction: float | None,
    threads: int | None,
    report: Path | None,
) -> int:
    """Decode every image of the data set PATH (whatever --data takes) whole, and list those that fail.

    One line each: path and reason. The exit code is 1 when there are any, 0 when there are none.

    \b
    hvd-lb data verify /data/imagenet
    hvd-lb data verify /data/imagenet --json broken.json
    """
    from hvd_lb.data.dataset import open_dataset  # here: --help needs none of it
    from hvd_lb.data.prepare.verify import verify  # needs torch
    from hvd_lb.data.sources.folders import NoImages
    from hvd_lb.machine.cpu import usable_cores
    from hvd_lb.report.run_directory import write_json

    if report:
        new_file(report)
    console = plain_console(stderr=True)
    bad: list[dict[str, Any]] = []
    with long_progress(console) as on_progress:
        try:
            dataset = open_dataset(
                source, val=val, val_fraction=val_fraction, on_progress=on_progress, on_bad_image="skip"
            )
        except NoImages as error:
            for path in error.paths:
                click.echo(printable(f"{path}: no image file"))
            click.echo(
                f"nothing decoded: move {count(len(error.paths), 'file')} out of the class folders first"
            )
            return 1
        splits = {"train": dataset.train, "val": dataset.val}
        for split, images in splits.items():
            label = f"decoding {split}"

            def show(done: int, label: str = label, total: int = len(images)) -> None:
                on_progress(label, done, total)

            found = verify(
                images, loader, threads=threads or usable_cores(), max_pixels=max_pixels, on_progress=show
            )
            for failure in found:
                click.echo(printable(f"{failure.path}: {failure.reason}"))
                bad.append({"split": split, **asdict(failure)})
    total = sum(map(len, splits.values()))
    if report:
        write_json(report, {"images": total, "bad": bad})
    click.echo(
        f"{count(total, 'image')} decoded, {len(bad):,} failed"
        if bad
        else f"{count(total, 'image')}, all whole"
    )
    return 1 if bad else 0
