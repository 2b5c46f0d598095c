"""From what the user names (`--data`) to an open data set."""

from __future__ import annotations

from contextlib import suppress

from hvd_lb.data.builtin.named import open_digits, open_fashion_mnist
from hvd_lb.data.builtin.synthetic import open_synthetic
from hvd_lb.data.images import Dataset, Progress
from hvd_lb.data.index.dataset import IndexedDataset, open_path
from hvd_lb.data.index.index import Check
from hvd_lb.data.options import OnBadImage
from hvd_lb.errors import UserError

_FIXED_SPLITS = {"digits": open_digits, "fashion-mnist": open_fashion_mnist}


def open_dataset(
    spec: str,
    *,
    val: str | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
    on_bad_image: OnBadImage = "fail",
    expected: str | None = None,
) -> Dataset:
    """The data set `spec`: digits | fashion-mnist | synthetic[:N] | PATH.

    `val` names the validation split where it lies elsewhere; `val_fraction` and `seed` divide a source without one;
    `on_progress(label, done, total)` is told how far the reading of image headers has come. An image with a broken
    header is a UserError, or, with "skip", an image without a size. Where an index is known to have the fingerprint
    `expected`, no file is looked at. Raises UserError.
    """
    if spec in _FIXED_SPLITS:
        opened = _FIXED_SPLITS[spec]()
    elif spec == "synthetic" or spec.startswith("synthetic:"):
        opened = open_synthetic(spec.partition(":")[2] if ":" in spec else None)
    else:

        def open_it(check: Check) -> IndexedDataset:
            return open_path(
                spec,
                val=val,
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
    if val is not None or val_fraction is not None:
        given = f"--val-fraction {val_fraction}" if val is None else f"--val {val}"
        raise UserError(f"{given}: {spec} has its own validation set; leave the option out")
    return opened
