"""What `--data` may say, before anything is opened: names of data sets, else a path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from hvd_lb.data.options import NAMED
from hvd_lb.data.remote.address import Address, is_address
from hvd_lb.data.sources.find import folder_of, refuse_remote
from hvd_lb.errors import UserError

CHOICES = (
    "digits, fashion-mnist, synthetic[:N], or a folder with train/ and val/, a list or shards, these also at "
    "s3://, gs:// or https://: docs/data.md"
)
_USUAL_FOLDER = Path("/data")


def data_spec(options: Mapping[str, Any], given: Mapping[str, Any], fallback: str | None = None) -> str:
    """The data that a command line and its recipe name, else `fallback`, else $HVD_LB_DATA or /data."""
    return str(options.get("data") or given.get("data") or fallback or default_data())


def default_data() -> str:
    """What to train on when nothing is named: $HVD_LB_DATA, then /data if it is there."""
    if named := os.environ.get("HVD_LB_DATA"):
        return named
    if _USUAL_FOLDER.is_dir():
        return str(_USUAL_FOLDER)
    raise UserError(f"no data: give --data ({CHOICES}), or set HVD_LB_DATA")


def absolute_spec(spec: str) -> str:
    """The same data, named so that it is found from any working directory; of a signed URL without its query.

    Links stay as they are: on other hosts they may lead elsewhere. UserError for an address that is not read.
    """
    if is_named(spec):
        return spec
    refuse_remote(spec)
    if is_address(spec):
        return str(Address.of(spec))
    return str(Path(spec).expanduser().absolute())


def data_folder(spec: str) -> Path | None:
    """The folder in which the data that `--data` names lie; None where they lie in none of a file system."""
    return None if is_named(spec) or is_address(spec) else folder_of(absolute_spec(spec))


def spec_of(path: Path) -> str:
    """What is typed after `--data` for a path, also for one that is called as a built-in data set."""
    return quote(f"./{path}" if is_named(str(path)) else str(path))


def is_named(spec: str) -> bool:
    """Whether these are data that come by a name rather than from a path."""
    *fixed, counted = NAMED
    return spec in fixed or spec.split(":")[0] == counted
