"""The errors a user can cause and put right, and the one that another process has caused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Says in one line what was given, what was expected and what to do: no traceback, exit code 2."""


class HostError(UserError):
    """One of this host's files, memory or GPU, which others need not have: an elastic run goes on with them."""


class ExchangeError(RuntimeError):
    """The processes of a job could not exchange tensors: one of them, most likely not this one, has ended or hangs."""


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" for a misspelt name, else nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
