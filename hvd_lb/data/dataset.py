"""From what the user names (`--data`) to an open data set."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from hvd_lb.data.images import Dataset, OnBadImage, Progress
from hvd_lb.data.index import Check
from hvd_lb.data.indexed_dataset import IndexedDataset, open_path
from hvd_lb.data.named import open_digits, open_fashion_mnist
from hvd_lb.data.synthetic import open_synthetic
from hvd_lb.errors import UserError

CHOICES = (
    "digits, fashion-mnist, synthetic[:N], or a folder with train/ and val/, a list or shards: docs/data.md"
)
_USUAL_FOLDER = Path("/data")
_FIXED_SPLITS = {"digits": open_digits, "fashion-mnist": open_fashion_mnist}


def open_dataset(
    spec: str,
    *,
    val_fraction: float | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
    on_bad_image: OnBadImage = "fail",
    expected: str | None = None,
) -> Dataset:
    """The data set `spec`: digits | fashion-mnist | synthetic[:N] | PATH.

    `val_fraction` and `seed` divide a source without a validation split; `on_progress(label, done, total)` is told
    how far the reading of image headers has come. An image with a broken header is a UserError, or, with "skip", an
    image without a size. Where an index is known to have the fingerprint `expected`, no file is looked at. Raises
    UserError.
    """
    if spec in _FIXED_SPLITS:
        opened = _FIXED_SPLITS[spec]()
    elif spec == "synthetic" or spec.startswith("synthetic:"):
        opened = open_synthetic(spec.partition(":")[2])
    else:

        def open_it(check: Check) -> IndexedDataset:
            return open_path(
                spec,
                val_fraction=val_fraction,
                seed=seed,
                on_progress=on_progress,
                on_bad_image=on_bad_image,
                check=check,
            )

        if expected is not None:
            with suppress(UserError):
                present = open_it("none")
                if present.known_fingerprint() == expected:
                    return present
        return open_it("quick")
    if val_fraction is not None:
        raise UserError(
            f"--val-fraction {val_fraction}: {spec} has its own validation set; leave the option out"
        )
    return opened


def default_data() -> str:
    """What to train on when nothing is named: $HVD_LB_DATA, then /data if it is there."""
    if named := os.environ.get("HVD_LB_DATA"):
        return named
    if _USUAL_FOLDER.is_dir():
        return str(_USUAL_FOLDER)
    raise UserError(f"no data: give --data ({CHOICES}), or set HVD_LB_DATA")
