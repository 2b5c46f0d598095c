"""A hash chain over what a run records: nobody changes one record and leaves the others as they are.

The first link is over the run's beginning: recipe, data and plan. Each further one is SHA-256 of the link before and of
the next record of training, of an evaluation, of a change of k, or of digests. The latter tell it, and at its end a run
tells the last one (`seal`). Only what is mathematics is in a link, nothing of speed or of stops. So the links of a
reproducible run are the same on any number of processes, and whatever happened to it on the way. A chain has no secret:
who writes all later links anew leaves none that is wrong, but then the last one is another than it was, and the steps
are not those that are recorded (`hvd-lb verify`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# What of a record is in its link, by kind; records of other kinds are in none.
_SEALED = {
    "begin": ("step", "recipe", "data", "plan", "from"),
    "train": ("epoch", "step", "lr", "loss"),
    "eval": (
        *("epoch", "step", "top1_error", "top5_error", "loss", "images"),
        *("ema_top1_error", "ema_top5_error", "ema_loss"),
    ),
    "rescale": ("epoch", "step", "images", "workers"),
    "digest": ("epoch", "step", "weights", "velocities", "statistics", "left_out"),
}
# Kinds that tell the link as it is after them.
_TELL = ("digest", "seal")


def next_link(before: str, record: Mapping[str, Any]) -> str:
    """The link after a record, which has a `kind`; `before` itself where it is of a kind that is in none."""
    kind = str(record.get("kind"))
    if kind not in _SEALED:
        return before
    content = {name: _finite(record[name]) for name in ("kind", *_SEALED[kind]) if name in record}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(f"{'' if kind == 'begin' else before}\n{text}".encode()).hexdigest()


def _finite(value: Any) -> Any:
    """As it is written: numbers that are not finite are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Chain:
    """The chain of a run that goes on after `records`."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()):
        self.begun = False
        self._link, self._untold = "", dict[str, Any]()
        for record in records:
            self.sealed(record)
            # What was told before stands, right or wrong: it is for a reader to judge.
            if record.get("kind") in _TELL:
                self._link, self._untold = str(record.get("chain")), {}

    def sealed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record, which is the next one; one of digests with its link."""
        kind, self._link = record.get("kind"), next_link(self._link, record)
        self.begun |= kind == "begin"
        if kind in _TELL:
            self._untold = {}
            return {**record, "chain": self._link}
        if kind in _SEALED and kind != "begin":
            self._untold = {name: record[name] for name in ("epoch", "step")}
        return dict(record)

    def seal(self) -> dict[str, Any] | None:
        """The record that tells the last link, where there is one that no record tells."""
        return {"kind": "seal", **self._untold} if self.begun and self._untold else None


@dataclass(frozen=True)
class ChainReport:
    """What a chain tells. `broken` are (after, last): records of steps after the one, up to the other, were changed."""

    begin: dict[str, Any] | None = None  #: the record of the beginning; None: there is no chain
    digests: list[dict[str, Any]] = field(default_factory=list)
    broken: list[tuple[int, int]] = field(default_factory=list)
    last: str = ""  #: the last link: all records up to there, recipe, data and plan in 64 digits
    unsealed: int = (
        0  #: records of training and evaluations that no link which is told is over, if there is a chain
    )


def examine_chain(records: Iterable[dict[str, Any]]) -> ChainReport:
    """Follows the links of a run's records (`read_metrics`: without those that a rollback has taken back)."""
    begin, digests, broken = None, list[dict[str, Any]](), list[tuple[int, int]]()
    link, last, since, unsealed = "", "", -1, 0
    for record in records:
        kind = record.get("kind")
        link = next_link(link, record)
        if kind == "begin":
            begin, since = record, record["step"]
            digests.clear()
        elif kind in _TELL:
            if kind == "digest":
                digests.append(record)
            if record.get("chain") != link:
                broken.append((since, record["step"]))
                link = str(record.get("chain"))
            last, since, unsealed = link, record["step"], 0
        elif kind in _SEALED:
            unsealed += 1
    return ChainReport(begin, digests, broken if begin else [], last if begin else "", unsealed)
