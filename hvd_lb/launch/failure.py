"""Why a job failed, in one line: which rank on which host was the first, and what it said."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_lb.launch.hosts import Host, host_of_rank
from hvd_lb.launch.launch_plan import UNTOLD
from hvd_lb.launch.options import START_TIMEOUT
from hvd_lb.launch.rank.names import OF_OTHERS, log_name
from hvd_lb.machine.process import signal_name

# How mpirun and srun tell which process ended, and how.
_ENDINGS = (
    re.compile(r"Process name: \[\[\d+,1\],(?P<rank>\d+)\]\s*\n\s*Exit code: +(?P<code>\d+)"),
    re.compile(r"process rank (?P<rank>\d+) with PID \d+ on node \S+ exited on signal (?P<signal>\d+)"),
    re.compile(r"srun: error: \S+: tasks? (?P<rank>\d+)[^:]*: Exited with exit code (?P<code>\d+)"),
    re.compile(
        r"srun: error: \S+: tasks? (?P<rank>\d+)[^:]*: (?P<said>Killed|Terminated|Aborted|Segmentation fault)"
    ),
)
# What srun says first, of what then ends the other ranks.
_NEVER_STARTED = re.compile(r"srun: error: task (?P<rank>\d+) launch failed: (?P<said>.*)")
_NODE_FAILURE = re.compile(r"srun: error: Node failure on (?P<host>[^\s,]+)")
# What Gloo says when a rank has not come to the rendezvous in time: the key is its number.
_WAITED = re.compile(r"Wait timeout after (?P<seconds>\d+) seconds for key\(s\): (?P<rank>\d+)")
_GOES_ON = "the same command goes on from the newest checkpoint, and --restarts has it do so by itself"
_SAID_SIGNALS = {"Killed": 9, "Terminated": 15, "Aborted": 6, "Segmentation fault": 11}


@dataclass(frozen=True)
class RankFailure:
    """The first failure of a job, for a person."""

    message: str
    rank: int | None
    host: str  #: empty where it is none of a process
    log: Path

    def __str__(self) -> str:
        if not self.host:
            return f"{self.message} (full log: {self.log})"
        who = "a process" if self.rank is None else f"rank {self.rank}"
        return f"{who} on {self.host} failed: {self.message} (full log: {self.log})"


def find_failure(
    logs: Path, launcher_log: Path, hosts: Sequence[Host], status: int, *, agents: bool = False
) -> RankFailure:
    """What the process said that failed first, else how it ended; `status` is the launcher's.

    What Slurm says is of tasks: each is a rank, or with `agents` a host.
    """
    errors = read_errors(logs)
    own = sorted((e for e in errors if e["kind"] not in OF_OTHERS), key=lambda error: error["time"])
    endings = [entry for line in _text(logs / "endings.jsonl").splitlines() if (entry := _entry(line))]
    if found := _of_elastic(endings, own, hosts, launcher_log):
        return found
    if own:
        return _from_error_file(own[0], logs, hosts)
    explained = {error["rank"] for error in errors}
    text = _text(launcher_log)
    if failed := _NODE_FAILURE.search(text):
        return RankFailure(
            "the node failed", _first_rank(failed["host"], hosts), failed["host"], launcher_log
        )
    if never := _NEVER_STARTED.search(text):
        task = int(never["rank"])
        host = hosts[task].name if agents else host_of_rank(hosts, task)
        rank = _first_rank(host, hosts) if agents else task
        return RankFailure(f"Slurm did not start it: {never['said']}", rank, host, launcher_log)
    # After Slurm's own words: when a node is lost it ends all others, too.
    if found := _in_record(endings, explained, logs, hosts, launcher_log):
        return found
    matches = [match for pattern in _ENDINGS for match in pattern.finditer(text)]
    silent = [match for match in matches if int(match["rank"]) not in explained]
    if silent:
        return _ended(int(silent[0]["rank"]), _status(silent[0]), logs, hosts, launcher_log)
    processes = sum(host.slots or 0 for host in hosts)
    lost = [rank for rank in range(processes) if rank not in explained]
    if errors and lost:
        others = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        host = host_of_rank(hosts, lost[0])
        message = f"it was lost{others}: killed, or its host or network went away"
        return RankFailure(message, lost[0], host, logs / log_name(lost[0], host))
    if errors:
        return _from_error_file(min(errors, key=lambda error: error["time"]), logs, hosts)
    host = host_of_rank(hosts, 0)
    of_rank_0 = status == UNTOLD or (processes == 1 and not _last_line(text))
    log = logs / log_name(0, host) if of_rank_0 else launcher_log
    return RankFailure(_how(status, log), 0 if processes == 1 else None, host, log)


def read_errors(logs: Path) -> list[dict[str, Any]]:
    """What ranks wrote that failed, the first one first."""
    errors = [error for path in logs.glob("error-*.json") if (error := _error(path))]
    return sorted(errors, key=lambda error: (error["time"], error["rank"]))


def _error(path: Path) -> dict[str, Any] | None:
    """What a rank wrote; None where it cannot be read: its log is there, too."""
    try:
        error = json.loads(_text(path))
    except ValueError:
        return None
    whole = isinstance(error, dict) and error.keys() >= {"rank", "kind", "message", "time"}
    return error if whole else None


def _entry(line: str) -> dict[str, Any] | None:
    """None where it is a part only, as the disk was full or the head was killed."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _text(path: Path) -> str:
    """Empty where it cannot be read."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _first_rank(name: str, hosts: Sequence[Host]) -> int | None:
    rank = 0
    for host in hosts:
        if host.name == name:
            return rank
        rank += host.slots or 0
    return None


def _of_elastic(
    endings: Sequence[dict[str, Any]],
    errors: Sequence[dict[str, Any]],
    hosts: Sequence[Host],
    launcher_log: Path,
) -> RankFailure | None:
    """Why an elastic job did not go on; other failures in it were overcome."""
    ended: dict[str, Any] | None = None
    for entry in endings:
        if "wrong" in entry and (found := [error for error in errors if error["rank"] == entry["wrong"]]):
            return _from_error_file(found[0], launcher_log.parent, hosts)
        if gave_up := entry.get("gave_up"):
            last = _last_words(ended, errors, launcher_log.parent)
            return RankFailure("; ".join(filter(None, [gave_up, last, _GOES_ON])), None, "", launcher_log)
        if "status" in entry and not entry["signalled"]:
            ended = entry
    return None


def _last_words(ended: dict[str, Any] | None, errors: Sequence[dict[str, Any]], logs: Path) -> str:
    """Of the process that ended last: what it said, else how it ended."""
    if said := [error for error in errors if not ended or error["rank"] == ended["rank"]]:
        return _said(said[-1])
    if not ended:
        return ""
    rank, host = ended["rank"], ended["host"]
    return f"rank {rank} on {host} {_how(ended['status'], logs / log_name(rank, host))}"


def _said(error: dict[str, Any]) -> str:
    plain = error["kind"] in ("UserError", "HostError", "Diverged", "Undecided")
    return error["message"] if plain else f"{error['kind']}: {error['message']}"


def _from_error_file(error: dict[str, Any], logs: Path, hosts: Sequence[Host]) -> RankFailure:
    first_ones = sum(host.slots or 0 for host in hosts)  # others have joined later
    host = host_of_rank(hosts, error["rank"]) if error["rank"] < first_ones else error["host"]
    return RankFailure(_said(error), error["rank"], host, logs / log_name(error["rank"], host))


def _in_record(
    endings: Sequence[dict[str, Any]],
    explained: Collection[int],
    logs: Path,
    hosts: Sequence[Host],
    launcher_log: Path,
) -> RankFailure | None:
    """By what the head of the job has heard: a lost host is a cause, ends of ranks may follow from it."""
    for entry in endings:
        if "lost" in entry:
            rank = entry["ranks"][0] if entry["ranks"] else None
            return RankFailure(entry["lost"], rank, entry["host"], launcher_log)
    for entry in endings:
        if late := entry.get("late"):
            return _late(late[0], len(late) - 1, f"{entry['seconds']:.0f}", logs, hosts)
        if entry.get("status") and not entry["signalled"] and entry["rank"] not in explained:
            return _ended(entry["rank"], entry["status"], logs, hosts, launcher_log)
    return None


def _status(match: re.Match[str]) -> int:
    """An exit code, or a signal as a negative number."""
    found = match.groupdict()
    if found.get("signal") or found.get("said"):
        return -int(found.get("signal") or _SAID_SIGNALS[found["said"]])
    return int(found["code"])


def _ended(rank: int, status: int, logs: Path, hosts: Sequence[Host], launcher_log: Path) -> RankFailure:
    """What can be said of a process that could not say anything itself."""
    host = host_of_rank(hosts, rank)
    log = logs / log_name(rank, host)
    if not os.path.exists(log):  # it never came so far
        log = launcher_log
    if waited := _WAITED.search(_text(log)):
        return _late(int(waited["rank"]), 0, waited["seconds"], logs, hosts)
    return RankFailure(_how(status, log), rank, host, log)


def _late(rank: int, others: int, seconds: str, logs: Path, hosts: Sequence[Host]) -> RankFailure:
    more = f" (nor did {others} more)" if others else ""
    message = (
        f"it did not meet the other ranks within {seconds} s{more}: is it still starting? see {START_TIMEOUT}"
    )
    host = host_of_rank(hosts, rank)
    return RankFailure(message, rank, host, logs / log_name(rank, host))


def _how(code: int, log: Path) -> str:
    if code == UNTOLD:
        return "it ended without a word: by whoever started it, by hand, or as the machine ran out of memory"
    # A shell reports a signal as 128 + its number, Python as its negative.
    number = -code if code < 0 else code - 128
    if code < 0 or number in {int(sign) for sign in signal.Signals}:
        message = f"ended by {signal_name(number)}"
        if number == signal.SIGKILL:
            message += " (killed by hand, or the machine ran out of memory)"
        return message
    last = _last_line(_text(log))
    return f"ended with exit code {code}" + (f"; last said: {last}" if last else "")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
