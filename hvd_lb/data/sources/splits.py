"""Names that splits usually have, in either case."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from hvd_lb.errors import UserError

Split = Literal["train", "val", "test"]
_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_TRAIN = re.compile("train(ing)?", re.IGNORECASE)


def split_of(name: str) -> Split | None:
    """The split that is called so; None for a name of something else."""
    return _NAMES.get(name.lower())


def find_splits(names: Iterable[str], where: Path) -> dict[Split, str]:
    """Which of `names`, in the folder `where`, are splits. UserError where several could be the same one."""
    return _unique(((name, split_of(name)) for name in names), where)


def find_partners(name: str, names: Iterable[str], where: Path) -> dict[Split, str]:
    """Of `names` those that are `name` with another split in place of its last `train`. UserError as above."""
    mark = _mark(name)
    if mark is None:
        return {}
    before, after = name[: mark.start()].lower(), name[mark.end() :].lower()

    def split(other: str) -> Split | None:
        low = other.lower()
        if not (low.startswith(before) and low.endswith(after) and len(low) > len(before) + len(after)):
            return None
        return split_of(low[len(before) : len(low) - len(after)])

    return _unique(((other, split(other)) for other in sorted(names) if other != name), where)


def renamed(name: str, split: str) -> str | None:
    """`name` with `split` in place of its last `train`; None where it has none."""
    mark = _mark(name)
    return mark and name[: mark.start()] + split + name[mark.end() :]


def _mark(name: str) -> re.Match[str] | None:
    return next(reversed(list(_TRAIN.finditer(name))), None)


def _unique(pairs: Iterable[tuple[str, Split | None]], where: Path) -> dict[Split, str]:
    found: dict[Split, str] = {}
    for name, split in pairs:
        if split is not None and found.setdefault(split, name) != name:
            raise UserError(
                f"{where}: has both {found[split]} and {name}; name what to use with --data and --val, or move the "
                "other away"
            )
    return found
