"""Whether checkpoints and summary.json tell of the run that metrics.jsonl tells of; no step is taken for it.

What a run tells is written before the checkpoint that follows it, and summary.json when all has been told. So whatever
a run is ended by, stopped, killed or gone back, no checkpoint knows of anything that its records lack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hvd_lb.replay.recorded import RecordedRun
from hvd_lb.report.summary import FINISHED, STOPPED, told_by
from hvd_lb.report.text import count


def unlike_records(run: RecordedRun, step: int) -> list[str]:
    """What the records lack, or have too much, of what the checkpoint after `step` steps knows."""
    name = f"checkpoint step-{step:08d}"
    found = [_losses(run, step), _evaluation(run, step)]
    return [f"{name} {what}: records before it were removed, added or changed" for what in found if what]


def _losses(run: RecordedRun, step: int) -> str:
    """A checkpoint counts the images since the last record of training."""
    saved = run.saved[step]
    last = max((told for told in run.of_kind("train") if told < step), default=None)
    plan = run.plan(saved.scales)
    if plan is None or (last is None and run.first_step):  # another run may have told some
        return ""
    if step > plan.end:
        return f"is of more than the {count(plan.end, 'step')} of the recipe"
    since = range(0 if last is None else last + 1, step)
    try:
        untold = sum(plan.at(of).images for of in since if of not in saved.left_out)
    except ValueError:
        return "has numbers of virtual workers that no run has"
    if untold == saved.loss_images:
        return ""
    after = "no step" if last is None else f"step {last}"
    return (
        f"was taken when the losses of {count(saved.loss_images, 'image')} were still to be told, and with {after} as "
        f"the last one that is recorded before it there were {untold:,}"
    )


def _evaluation(run: RecordedRun, step: int) -> str:
    """A checkpoint knows the last evaluation; that of its own step comes after it, until which it says so."""
    saved = run.saved[step]
    told = run.of_kind("eval")
    last = max((of for of in told if of < step - saved.evaluation_due), default=None)
    if last is None and (run.chain.begin is None or run.first_step):  # it may be another run's
        return ""
    known = saved.evaluation or {}
    recorded = {of: value for of, value in told[last].items() if of in known} if last is not None else {}
    if recorded == {of: _finite(value) for of, value in known.items()}:
        return ""
    return f"knows the evaluation {_errors(known)} as the last one, and recorded before it is {_errors(recorded)}"


def _errors(evaluation: Mapping[str, Any]) -> str:
    return f"with a top-1 error of {evaluation['top1_error']} %" if "top1_error" in evaluation else "none"


def _finite(value: Any) -> Any:
    """As it is in a record."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def beyond_the_end(run: RecordedRun) -> list[str]:
    """Where more steps are recorded than the recipe has."""
    plan = None if run.first_step else run.plan(run.scales(None))
    if plan is None or run.steps <= plan.end:
        return []
    return [f"metrics.jsonl tells of {count(run.steps, 'step')}, and the recipe has {plan.end:,}"]


def unlike_summary(run: RecordedRun) -> tuple[list[str], list[str]]:
    """In what summary.json is not what the records come to; and what it does not tell."""
    summary = run.summary
    if summary is None:
        return [], ["summary.json is not there: the run goes on, or it was killed; how it ended nobody tells"]
    if not summary:
        return ["summary.json is damaged"], []
    told, reason = told_by(run.records), summary.get("exit_reason")
    differing = [
        f"{name} {_short(summary[name])}, by the records {_short(told[name])}"
        for name in told
        if name in summary and summary[name] != told[name]
    ]
    wrong = [f"summary.json is not what the records come to: {'; '.join(differing)}"] if differing else []
    if reason not in (
        FINISHED,
        STOPPED,
    ):  # on a host that was cut off a rank may have gone on for some seconds
        return [], wrong
    plan, asked = run.plan(run.scales(None)), run.recipe.steps
    end = min(plan.end, asked or plan.end) if plan and not run.first_step else 0
    if run.steps < end:
        wrong.append(f"summary.json says {reason!r}, and of {count(end, 'step')} {run.steps:,} are recorded")
    elif plan and end and len(plan.scales) == 1 and (reason == STOPPED) != (end < plan.end):
        wrong.append(
            f"summary.json says {reason!r}, and by the recipe the run ends after {end:,} of {plan.end:,} steps"
        )
    return wrong, []


def _short(value: Any) -> str:
    """A link, an evaluation, a number."""
    if isinstance(value, dict):
        return f"top-1 error {value.get('top1_error')} after step {value.get('step')}"
    return f"{value[:8]}…" if isinstance(value, str) and len(value) > 8 else str(value)
