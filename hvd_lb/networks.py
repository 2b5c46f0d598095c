"""What a start asks of a network before there are ranks: whether it exists, and can be trained so.

`training/models` answers, for which torchvision is loaded, and that takes longer than all else that the launching
process does. An answer depends on nothing but versions, so a check that has passed leaves an empty file in the cache
folder, and the next start finds that. What does not pass is looked at each time, and told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.machine.cache_folder import cache_folder
from hvd_lb.machine.packages import version


def check_model_name(name: str) -> None:
    """UserError for a network that there is not."""

    def look() -> None:
        from hvd_lb.training.models import check_model_name

        check_model_name(name)

    _once("exists", name, look)


def check_input(name: str, num_classes: int, image_size: int, images: int) -> None:
    """UserError when the network cannot train on a microbatch of so many images of this size."""

    def look() -> None:
        from hvd_lb.training.models import check_input

        check_input(name, num_classes, image_size, images)

    _once(f"trains {num_classes} {image_size} {images}", name, look)


def _once(what: str, name: str, look: Callable[[], None]) -> None:
    passed = None
    with suppress(UserError):  # no cache folder: told by those who need it
        passed = cache_folder() / f"networks-{_versions()}" / f"{name} {what}"
    if passed is not None and name.isidentifier() and passed.exists():
        return
    look()
    if passed is not None:
        with suppress(OSError):
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()


@cache
def _versions() -> str:
    """What answers depend on, in short."""
    models = Path(__file__).with_name("training") / "models.py"
    known = [*map(version, ("torch", "torchvision")), hashlib.sha256(models.read_bytes()).hexdigest()]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]
