"""Whether a job hangs, and which ranks keep the others waiting: from what ranks report that do not go on.

Those that wait for others are not to blame. Those are that do something else, and those that report nothing. For how
long a report asks for patience is counted from when it is first seen here: clocks of other hosts tell another time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from hvd_lb.launch.rank.names import log_name
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.world.stages import Stage

_LOOK_SECONDS = 1.0
# Ranks come to a wait one after the other: for those that have not reported yet this share of the timeout is waited.
_GRACE = 0.25
_MOST_NAMED = 3


class HangReports:
    """The reports of a job's ranks, looked at now and then.

    `ranks` are given with their hosts; `late` are those for which the others wait, where `look` has found any, and
    `lasted` the seconds since it has first found so.
    """

    def __init__(self, run: RunDirectory, ranks: Mapping[int, str], timeout: float):
        self._run, self.ranks, self._timeout = run, ranks, timeout
        self._looked = 0.0
        self._first: float | None = None  # when a report of a rank that waits for others was there first
        self._since: float | None = None
        self._seen: dict[str, tuple[bytes, float]] = {}  # the present reports, by name, and since when
        self.late: list[int] = []
        self.lasted = 0.0

    def look(self) -> str | None:
        """What hangs, in one line; None while all goes on, or may still do so."""
        now = time.monotonic()
        if not self._timeout or now - self._looked < _LOOK_SECONDS:
            return None
        self._looked = now
        found = self._find(now)
        self._since = (self._since or now) if found else None
        self.lasted = now - (self._since or now)
        return found

    def _find(self, now: float) -> str | None:
        reports = {rank: report for rank, report in self._reports(now).items() if rank in self.ranks}
        waiting = [of for of in reports.values() if of["stage"] == Stage.NETWORK]
        self._first = (self._first or now) if waiting else None
        if not reports or any(of["until"] > now for of in reports.values()):
            return None
        graceful = self._first is not None and now - self._first >= _GRACE * self._timeout
        if len(reports) < len(self.ranks) and not graceful:
            return None
        self.late = late = [rank for rank in self.ranks if reports.get(rank) not in waiting]
        step = max(of["step"] for of in waiting or reports.values())
        if late:
            names = [
                self._late(rank, self.ranks[rank], reports.get(rank), step, bool(waiting)) for rank in late
            ]
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            who = ", ".join(names[:_MOST_NAMED]) + more
        else:
            who = f"all ranks wait for each other in step {step}, as the network is cut or they wait for other things"
        return f"no step for {self._timeout:g} s: {who}; stacks in {self._run.logs}"

    def begin_again(self) -> None:
        """Those that were late are being ended, and so do the waits for them: as if nobody had reported."""
        self._first = None
        for rank in self.ranks:
            self._run.hang(rank).unlink(missing_ok=True)

    def _reports(self, now: float) -> dict[int, dict[str, Any]]:
        found, seen = {}, {}
        for path in self._run.logs.glob("hang-*.json"):
            try:
                text = path.read_bytes()
                before, since = self._seen.get(path.name, (text, now))
                seen[path.name] = text, (since if text == before else now)
                report = json.loads(text)
                found[int(report["rank"])] = {**report, "until": seen[path.name][1] + report["patience"]}
            except (OSError, ValueError, LookupError, TypeError):  # it goes on just now
                continue
        self._seen = seen
        return found

    def _late(self, rank: int, host: str, report: dict[str, Any] | None, step: int, awaited: bool) -> str:
        if report:
            why = report["stage"]
        elif b"\nTimeout (" in self._log(rank, host):
            why = "within a library"
        else:
            why = "stopped or unreachable"
        where = f"has not arrived in step {step}" if awaited else f"does not go on in step {step}"
        return f"rank {rank} on {host} {where} ({why})"

    def _log(self, rank: int, host: str) -> bytes:
        try:
            return b"\n" + (self._run.logs / log_name(rank, host)).read_bytes()
        except OSError:
            return b""
