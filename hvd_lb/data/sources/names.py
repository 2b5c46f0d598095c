"""Names that look alike and are not the same: upper and lower case, and the two Unicode forms of accents."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

_NAMED = 3  # how many a message names


def some(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def look_alike(name: str, known: Iterable[str]) -> str:
    """ "; …" that explains why `name` is not the one of `known` that it looks like; else nothing."""
    for other in known:
        if other != name and _composed(other) == _composed(name):
            return (
                f"; {name!r} is there with its accents in another Unicode form (NFC and NFD; macOS writes the latter): "
                "rename one, as convmv does"
            )
    for other in known:
        if other != name and _composed(other).casefold() == _composed(name).casefold():
            return f"; {name!r} and {other!r} differ in upper and lower case only: rename one"
    return ""


def same_composed(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of `names` that are the same but for their Unicode form."""
    seen: dict[str, str] = {}
    for name in names:
        if name.isascii():
            continue
        other = seen.setdefault(_composed(name), name)
        if other != name:
            return other, name
    return None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
