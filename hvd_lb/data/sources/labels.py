"""Labels as they are written in lists and shards, numbers or names, to classes and numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hvd_lb.data.remote.address import Place
from hvd_lb.data.sources.names import look_alike, same_composed
from hvd_lb.data.sources.places import read_if_there
from hvd_lb.errors import UserError, each_once

CLASSES_FILES = ("classes.json", "classes.txt")
_MOST_CLASSES = 1_000_000
_WHOLE = re.compile(r"\+?([0-9]+)(?:\.0*)?")
_LIKE_NUMBER = re.compile(
    r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:nan|inf)", re.IGNORECASE
)


class UnknownLabel(ValueError):
    """`label` cannot be a class; the message says why."""

    def __init__(self, label: str, why: str) -> None:
        super().__init__(f"label {label!r} {why}")
        self.label = label


@dataclass(frozen=True)
class Classes:
    """Class names. From a file, numbers are positions in it; those of the training split are only names.

    `order` is that of a file which comes with validation images, where training has its classes in another one.
    """

    names: list[str]
    from_file: bool
    order: list[str] | None = None

    def numbers(self, labels: Sequence[str]) -> np.ndarray:
        """int64 of `labels`. UnknownLabel."""
        known = self._known()
        numbers = np.zeros(len(labels), np.int64)
        for position, label in enumerate(labels):
            number = known.get(label, known.get(_plain(label)))
            if number is None:
                raise UnknownLabel(label, self._why_unknown(label, labels))
            numbers[position] = number
        return numbers

    def _known(self) -> dict[str, int | None]:
        """Labels to numbers; None for what is in the file of validation images, but not among the training classes."""
        known: dict[str, int | None] = {name: position for position, name in enumerate(self.names)}
        if not self.from_file:
            return known
        if self.order and self.names == [str(number) for number in range(len(self.names))]:  # never named
            for number, name in enumerate(self.order[: len(self.names)]):
                known.setdefault(name, number)
        places = {str(position): known.get(name) for position, name in enumerate(self.order or self.names)}
        if any(places.get(name, number) != number for name, number in known.items()):
            # Of names that are numbers some stand at other positions: read both ways, two classes would be one.
            known = {name: number for name, number in known.items() if not _is_number(name)}
        return known | places

    def _why_unknown(self, label: str, labels: Sequence[str]) -> str:
        where = "classes file" if self.from_file and not self.order else "training split"
        why = f"is no class; expected one of the {len(self.names)} of the {where}, such as {self.names[0]!r}"
        given = {_plain(of) for of in labels}
        if self.from_file and _plain(label) == str(len(self.names)) and "0" not in given:
            return f"{why}; do the labels begin at 1? Classes are counted from 0"
        return why + look_alike(label, self.names)


def find_classes(labels: Iterable[str]) -> Classes:
    """Of a training split without a file of classes: all numbers up to the largest, or all names, sorted.

    UnknownLabel for the first that is no whole number from 0 on where others are, or the reverse: what was meant cannot
    be told, and names are sorted as text, 10 before 2.
    """
    distinct = dict.fromkeys(labels)
    numbers = {_plain(label) for label in distinct if _is_number(_plain(label))}
    others = [label for label in distinct if not _is_number(_plain(label))]
    odd = next((label for label in others if numbers or _LIKE_NUMBER.fullmatch(label)), None)
    if odd is not None:
        given = f"others are numbers, such as {min(numbers)!r}" if numbers else "it looks like a number"
        raise UnknownLabel(
            odd,
            f"is no whole number from 0 on, but {given}; leave it out if it stands for no class, or name all classes "
            "in classes.txt, one a line",
        )
    if others:
        if twins := same_composed(others):
            raise UnknownLabel(twins[1], f"is not {twins[0]!r}{look_alike(twins[1], [twins[0]])}")
        return Classes(sorted(others), False)
    largest = max(numbers, key=lambda label: (len(label), label), default="")
    if len(largest) > 9 or int(largest or 0) >= _MOST_CLASSES:
        written = next(label for label in distinct if _plain(label) == largest)
        raise UnknownLabel(written, f"is no class; expected numbers below {_MOST_CLASSES}, or names")
    return Classes([str(number) for number in range(int(largest) + 1)] if numbers else [], False)


def classes_in(folder: Place, training: Classes | None) -> Classes | None:
    """Those of a file in `folder`, and for validation images always as the training split has them. UserError."""
    own = read_classes(folder)
    if own is None or training is None or own.names == training.names:
        return own or training
    return Classes(training.names, True, own.names)


def read_classes(folder: Place) -> Classes | None:
    """Those in classes.json, {"classes": [...]}, or classes.txt, one a line; None where neither is there. UserError."""
    found = ((folder / name, read_if_there(folder / name)) for name in CLASSES_FILES)
    path, content = next((of for of in found if of[1] is not None), (folder, None))
    if content is None:
        return None
    try:
        if b"\0" in content:
            raise ValueError("is it UTF-16? Save it as UTF-8")
        text = content.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
        if path.name.endswith(".json"):
            names = json.loads(text, object_pairs_hook=each_once)["classes"]
        else:
            names = text.rstrip("\n").split("\n")
        if (
            not isinstance(names, list)
            or not names
            or not all(isinstance(name, str) and name for name in names)
        ):
            raise ValueError("expected names of classes")
        if len(set(names)) < len(names):
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = "expected {'classes': [...]}" if isinstance(error, KeyError | TypeError) else error
        raise UserError(f"{path}: no list of classes ({reason})") from error
    return Classes(names, True)


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit()


def _plain(label: str) -> str:
    """Of whole numbers without leading zeros, and without a fraction of zeros, which spreadsheets and pandas add."""
    match = _WHOLE.fullmatch(label)
    return (match[1].lstrip("0") or "0") if match else label
