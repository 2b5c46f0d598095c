"""What a run came to: the figures of summary.json, and in words."""

from __future__ import annotations

import statistics
from typing import Any

from hvd_lb.report.metrics import Epochs, read_metrics
from hvd_lb.report.run_directory import RunDirectory, read_json
from hvd_lb.report.text import count, duration, evaluation_line, speed
from hvd_lb.training.saved_state import counted_error

FINISHED, STOPPED = "finished", "stopped at --steps"
"""How a run ends that came to its end."""

# Others tell of steps that were given up.
_OF_STEPS_DONE = ("train", "eval", "checkpoint")


def ended_after(run: RunDirectory) -> int:
    """The steps of a run that came to its end by what summary.json says; else 0, and it will be made again."""
    summary = read_json(run.summary)
    return summary.get("steps") or 0 if summary.get("exit_reason") in (FINISHED, STOPPED) else 0


def told_by(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What of summary.json is the run's mathematics: no more than its records tell."""
    evaluations = [record for record in records if record.get("kind") == "eval"]
    errors = {error: of for of in reversed(evaluations) if (error := counted_error(of)) is not None}
    done = [record["step"] + 1 for record in records if record.get("kind") in _OF_STEPS_DONE]
    return {
        "steps": max(done, default=0),
        "final": evaluations[-1] if evaluations else None,
        "best": errors[min(errors)] if errors else None,
        "chain": next((record["chain"] for record in reversed(records) if "chain" in record), None),
    }


def summarise(
    run: RunDirectory, reason: str, seconds: float, *, total_steps: int, steps_per_epoch: int
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What summary.json says, and its figures in words."""
    records = read_metrics(run.metrics)
    rates = _numbers(records, "train", "images_per_second")
    waits = _numbers(records, "train", "data_wait")
    stalls = _numbers(records, "checkpoint", "stall_seconds")
    bad = read_metrics(run.bad_images)
    told = told_by(records)
    steps, last, best = told["steps"], told["final"], told["best"]
    after = Epochs(records, steps_per_epoch)
    total_steps = after.total_steps or total_steps
    summary: dict[str, Any] = {
        "exit_reason": reason,
        **told,
        "total_steps": total_steps,
        "epochs": after(steps),
        "wall_seconds": seconds,
        "images_per_second": statistics.median(rates) if rates else None,
        "data_wait": statistics.median(waits) if waits else None,
        "bad_images": len(bad),
        "checkpoints": len(stalls),
        "checkpoint_stall_seconds": statistics.median(stalls) if stalls else None,
    }
    figures = [("ended", reason), ("steps", f"{steps:,} of {total_steps:,}")]
    if last and best:
        figures.append(("last", evaluation_line(last)))
        of = " of averaged weights" if "ema_top1_error" in best else ""
        figures.append((f"best top-1 error{of}", f"{counted_error(best):.2f} % (epoch {best.get('epoch')})"))
    if rates:
        figures.append(("speed", f"{speed(statistics.median(rates))} (median)"))
    if bad:
        left_out = sum(record.get("of") == "eval" for record in bad)
        stood_in = [
            *([f"another one stood in {count(len(bad) - left_out, 'time')}"] if len(bad) > left_out else []),
            *([f"evaluations left one out {count(left_out, 'time')}"] if left_out else []),
        ]
        figures.append(("bad images", f"{', '.join(stood_in)}: {run.bad_images.name}"))
    if summary["chain"]:
        figures.append(("last link", f"{summary['chain']} (hvd-lb verify)"))
    figures.append(("wall time", duration(seconds)))
    return summary, figures


def _numbers(records: list[dict[str, Any]], kind: str, name: str) -> list[float]:
    """Those of a field that are finite."""
    of_kind = (record.get(name) for record in records if record.get("kind") == kind)
    return [value for value in of_kind if value is not None]
