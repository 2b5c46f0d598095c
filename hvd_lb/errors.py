"""The errors a user can cause and put right, and the one that another process has caused."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """Says in one line what was given, what was expected and what to do: no traceback, exit code 2."""


class HostError(UserError):
    """One of this host's files, memory or GPU, which others need not have: an elastic run goes on with them."""


class ExchangeError(RuntimeError):
    """The processes of a job could not exchange tensors: one of them, most likely not this one, has ended or hangs."""


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" for a misspelt name, or the beginning of one, else nothing."""
    names = list(known)
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.6) or [
        name for name in names if len(word) > 1 and name.startswith(word)
    ]
    return f"; did you mean {found[0]!r}?" if found else ""


def short_numbers(text: str) -> str:
    """With 1e+30 for a one and thirty zeros, as pydantic writes a limit."""
    return re.sub(r"\b10{9,}\b", lambda number: f"{float(number.group()):g}", text)


def one_of(name: str, value: Any, known: Collection[str]) -> None:
    """UserError for a value that is not one of the `known` words."""
    if value not in known:
        raise UserError(f"{name} {value!r}: expected one of {', '.join(known)}{nearest(str(value), known)}")


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """The value as an int; UserError for what is no whole number, or not from `least` to `most`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or (most is not None and number > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise UserError(f"{name} {value!r}: expected a whole number, {bounds}")
    return number


def each_once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """For json's `object_pairs_hook`: ValueError for a key with two values, of which the last would count."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise ValueError(f"{name!r} is there twice")
    return found


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """UserErrors in here say other words: a parameter of the library's is an option of a command's."""
    try:
        yield
    except UserError as error:
        words = re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], str(error))
        raise type(error)(words) from error.__cause__
