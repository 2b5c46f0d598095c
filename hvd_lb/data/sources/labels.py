"""Labels as they are written in lists and shards, numbers or names, to classes and numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvd_lb.errors import UserError

CLASSES_FILES = ("classes.json", "classes.txt")
_MOST_CLASSES = 1_000_000


class UnknownLabel(ValueError):
    """`label` is none of the classes; the message says so."""

    def __init__(self, label: str, expected: str) -> None:
        super().__init__(f"label {label!r} is no class; expected {expected}")
        self.label = label


@dataclass(frozen=True)
class Classes:
    """Class names. From a file, numbers are positions in it; those of the training split are only names."""

    names: list[str]
    from_file: bool

    def numbers(self, labels: Sequence[str]) -> np.ndarray:
        """int64 of `labels`. UnknownLabel."""
        known = {name: position for position, name in enumerate(self.names)}
        if self.from_file:
            known |= {str(position): position for position in range(len(self.names))}
        numbers = np.zeros(len(labels), np.int64)
        for position, label in enumerate(labels):
            number = known.get(_plain(label))
            if number is None:
                where = "classes file" if self.from_file else "training split"
                raise UnknownLabel(
                    label, f"one of the {len(self.names)} of the {where}, such as {self.names[0]!r}"
                )
            numbers[position] = number
        return numbers


def find_classes(labels: Iterable[str]) -> Classes:
    """Of a training split without a file of classes: all numbers up to the largest, or all names, sorted."""
    distinct = {_plain(label) for label in labels}
    if not all(_is_number(label) for label in distinct):
        return Classes(sorted(distinct), False)
    largest = max(distinct, key=lambda label: (len(label), label), default="")
    if len(largest) > 9 or int(largest or 0) >= _MOST_CLASSES:
        raise UnknownLabel(largest, f"numbers below {_MOST_CLASSES}, or names")
    return Classes([str(number) for number in range(int(largest) + 1)] if distinct else [], False)


def read_classes(folder: Path) -> Classes | None:
    """Those in classes.json, {"classes": [...]}, or classes.txt, one a line; None where neither is there. UserError."""
    path = next((folder / name for name in CLASSES_FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        text = path.read_text("utf-8", errors="surrogateescape")
        names = json.loads(text)["classes"] if path.suffix == ".json" else text.splitlines()
        if (
            not isinstance(names, list)
            or not names
            or not all(isinstance(name, str) and name for name in names)
        ):
            raise ValueError("expected names of classes")
        if len(set(names)) < len(names):
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "expected {'classes': [...]}" if isinstance(error, KeyError | TypeError) else error
        raise UserError(f"{path}: no list of classes ({reason})") from error
    return Classes(names, True)


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit()


def _plain(label: str) -> str:
    """Without the leading zeros of numbers."""
    return (label.lstrip("0") or "0") if _is_number(label) else label
