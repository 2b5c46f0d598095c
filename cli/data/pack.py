"""`hvd-lb data pack`: a data set as WebDataset tar shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import rich_click as click

from hvd_lb.errors import UserError
from hvd_lb.report.text import count
from hvd_lb_cli.options.given import refuse_options
from hvd_lb_cli.options.kinds import THREADS, Target
from hvd_lb_cli.options.splits import split_options
from hvd_lb_cli.output.progress import long_progress
from hvd_lb_cli.output.terminal import plain_console

_UNITS = {"B": 1, **{f"{unit}B": 1000**n for n, unit in enumerate("kMGT", start=1)}}
_UNITS |= {f"{unit}iB": 1024**n for n, unit in enumerate("KMGT", start=1)}


class Size(click.ParamType[int]):
    """500MB, 1GB or 256MiB, as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([kKMGT]?i?B)", str(value), re.ASCII)
        unit = match[2].replace("KB", "kB").replace("kiB", "KiB") if match else ""
        if match is None or unit not in _UNITS or float(match[1]) * _UNITS[unit] < 1:
            self.fail(f"{value!r} is not a size such as 500MB, 1GB or 256MiB", param, ctx)
        return int(float(match[1]) * _UNITS[unit])


@click.command("pack")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=Target())
@click.option(
    "--shard-size",
    type=Size(),
    default="500MB",
    show_default=True,
    help="Largest size of a shard; an image that is larger has one of its own.",
)
@click.option(
    "--max-side",
    type=click.IntRange(1, 65535),
    metavar="PIXELS",
    help="Shrink images whose longer side is longer than this, and store them as JPEG.",
)
@click.option(
    "--quality",
    type=click.IntRange(1, 100),
    default=90,
    show_default=True,
    help="JPEG quality of shrunk images.",
)
@split_options
@click.option(
    "--threads",
    type=THREADS,
    help="Images read and encoded at once [default: 4 a core, at most 32]",
)
@click.pass_context
def pack_command(
    context: click.Context,
    source: str,
    target: Path,
    shard_size: int,
    max_side: int | None,
    quality: int,
    val: str | None,
    val_fraction: float | None,
    threads: int | None,
) -> None:
    """Write the data set SRC (whatever --data takes) to the folder DST as WebDataset tar shards.

    Files are copied byte for byte, in the order of the data set; only what --max-side shrinks is encoded anew. Typed
    again after an interruption the command goes on where it was; of a finished DST it checks the checksums.

    \b
    hvd-lb data pack /data/imagenet /fast/imagenet-shards
    hvd-lb data pack /data/imagenet /fast/imagenet-500 --max-side 500
    """
    from hvd_lb.data.dataset import open_dataset  # here: --help needs none of it
    from hvd_lb.data.prepare.encode import Encoding
    from hvd_lb.data.prepare.pack import pack
    from hvd_lb.data.spec import absolute_spec, is_named, spec_of
    from hvd_lb.machine.cpu import usable_cores

    console = plain_console()
    if max_side is None:
        refuse_options(
            context, {"quality"}, "is that of images which --max-side shrinks: give --max-side as well"
        )
    path = Path(source).expanduser()
    from_path = not is_named(source) and path.exists()
    if from_path and target.resolve().is_relative_to(path.resolve()):
        raise UserError(f"{target}: lies in {source}; give a folder outside of what is packed")
    with long_progress(console) as on_progress:
        dataset = open_dataset(
            source, val=val, val_fraction=val_fraction, on_progress=on_progress, on_bad_image="skip"
        )
        packed = pack(
            dataset,
            target,
            source=str(path.resolve()) if from_path else absolute_spec(source),
            shard_bytes=shard_size,
            encoding=Encoding(max_side, quality),
            threads=threads or min(32, 4 * usable_cores()),
            on_progress=on_progress,
        )
    kept = f", {packed.kept:,} of them kept from before" if packed.kept else ""
    click.echo(
        f"{target}: {count(packed.images, 'image')} in {count(len(packed.shards), 'shard')}, "
        f"{packed.bytes / 1e6:,.1f} MB{kept}; train with --data {spec_of(target)}"
    )
    broken = sum(int((split.widths[:] == 0).sum()) for split in (dataset.train, dataset.val))
    if broken + packed.undecodable:
        click.echo(
            f"{count(broken + packed.undecodable, 'image')} cannot be decoded and stayed as they were; "
            f"hvd-lb data verify {target} lists them"
        )
