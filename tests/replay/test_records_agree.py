"""`hvd-lb verify --segments 0`: records, checkpoints and summary.json are of one run, or it says where they differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from metrics_lines import Record, lines, rewrite, sealed_anew

from hvd_lb.replay.agreement import unlike_records, unlike_summary
from hvd_lb.replay.recorded import open_run
from hvd_lb.replay.verify import Examined, examine_records

pytestmark = pytest.mark.slow
Run = Callable[..., Any]
Copied = Callable[[Path], Path]


def verified(hvd_lb: Run, run: Path) -> tuple[int, str]:
    said = hvd_lb("verify", run, "--segments", 0)
    assert said.err == ""
    return said.status, said.out


def change(run: Path, **changes: Any) -> None:
    """Fields of summary.json; None: it is removed."""
    file = run / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def halved(records: list[Record]) -> list[Record]:
    """The last evaluation with half of its errors."""
    last = next(record for record in reversed(records) if record["kind"] == "eval")
    return [{**of, "top1_error": of["top1_error"] / 2} if of is last else of for of in records]


def without(records: list[Record], *kinds: str) -> list[Record]:
    return [record for record in records if record["kind"] not in kinds]


@pytest.mark.parametrize("summary", [True, False])
@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        # Under no link any more, or under links that were written anew.
        (lambda records: halved(without(records, "seal")), "knows the evaluation with a top-1 error of"),
        (lambda records: sealed_anew(halved(records)), "knows the evaluation with a top-1 error of"),
        (
            lambda records: [of for of in records if of["step"] < 22],
            "were still to be told, and with step 21",
        ),
        (
            lambda records: [*records, {"kind": "generation", "epoch": 0, "step": 15, "to": 15}],
            "were still to be told, and with step 13 as the last one that is recorded before it there were 128",
        ),
        (
            lambda records: [*records, {"kind": "rollback", "epoch": 0, "step": 9, "to": 0}],
            "still to be told, and with no step as the last one",
        ),
        (
            lambda records: sealed_anew([of for of in records if (of["kind"], of["step"]) != ("train", 15)]),
            "checkpoint step-00000016 was taken when the losses of 0 images were still to be told",
        ),
        (
            lambda records: sealed_anew(
                [*records, {"kind": "train", "epoch": 30, "step": 660, "lr": 0.1, "loss": 0.1}]
            ),
            "metrics.jsonl tells of 661 steps, and the recipe has 660",
        ),
        (
            lambda records: sealed_anew(
                [{**of, "step": 8} if (of["kind"], of["step"]) == ("train", 7) else of for of in records]
            ),
            "with step 5 as the last one that is recorded before it there were 128",
        ),
        (lambda records: without(records, "begin"), "a chain without its beginning"),
        (
            lambda records: [{**of, "data": None} if of["kind"] == "begin" else of for of in records],
            "no whole record in 1 line",
        ),
        (
            lambda records: [
                {name: value for name, value in of.items() if name != "loss"} if of["step"] == 11 else of
                for of in records
            ],
            "no whole record in 1 line",
        ),
    ],
)
def test_what_is_changed_removed_or_added(
    hvd_lb: Run, recorded: Path, copied: Copied, tamper: Callable[..., Any], told: str, summary: bool
) -> None:
    run = copied(recorded)
    rewrite(run, tamper(lines(run)))
    if not summary:
        (run / "summary.json").unlink()
    status, out = verified(hvd_lb, run)
    assert (status, told in out) == (1, True), out
    assert ("summary.json is not there" in out) is not summary


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"final": {"kind": "eval", "step": 29, "top1_error": 1.0}},
            "final top-1 error 1.0 after step 29, by the",
        ),
        (
            {"best": {"kind": "eval", "step": 21, "top1_error": 1.0}},
            "best top-1 error 1.0 after step 21, by the",
        ),
        ({"steps": 31}, "steps 31, by the records 30"),
        ({"chain": "0" * 64}, "chain 00000000…, by the records "),
        ({"exit_reason": "finished"}, "summary.json says 'finished', and of 30 steps 20 are recorded"),
    ],
)
def test_another_summary(
    hvd_lb: Run, recorded: Path, copied: Copied, changes: dict[str, Any], told: str
) -> None:
    run = copied(recorded)
    change(run, **changes)
    if "exit_reason" in changes:  # of a run that was cut off where nothing else tells of it
        shutil.rmtree(run / "checkpoints")
        records = [record for record in lines(run) if record["step"] < 20]
        rewrite(run, records)
        change(run, steps=20, final=None, best=None, chain=records[-1]["chain"])
    status, out = verified(hvd_lb, run)
    assert (status, told in out) == (1, True), out


def test_an_evaluation_is_told_before_its_checkpoint_knows_it(recorded: Path) -> None:
    """And the run may be killed in between."""
    run = open_run(recorded)
    due = replace(run.saved[30], evaluation=run.saved[22].evaluation, evaluation_due=True)
    assert unlike_records(replace(run, saved={30: due}), 30) == []


def test_a_last_step_that_is_not_recorded(recorded: Path) -> None:
    run = open_run(recorded)
    last = next(of for of in run.records if (of["kind"], of["step"]) == ("train", 29))
    shorter = [*(of for of in run.records if of["step"] < 28), {**last, "step": 28}]
    assert "of 30 steps 29 are recorded" in unlike_summary(replace(run, records=shorter))[0][-1]


def test_a_run_that_was_stopped_is_not_called_finished(hvd_lb: Run, recorded: Path, copied: Copied) -> None:
    run = copied(recorded)
    change(run, exit_reason="finished")
    status, out = verified(hvd_lb, run)
    assert (status, "'finished', and by the recipe the run ends after 30 of 660 steps" in out) == (1, True), (
        out
    )


def test_a_summary_that_is_none(hvd_lb: Run, recorded: Path, copied: Copied) -> None:
    run = copied(recorded)
    (run / "summary.json").write_text("{")
    assert "wrong: summary.json is damaged" in verified(hvd_lb, run)[1]


def test_a_checkpoint_under_another_name(hvd_lb: Run, recorded: Path, copied: Copied) -> None:
    run = copied(recorded)
    (run / "checkpoints/step-00000024").rename(run / "checkpoints/step-00000026")
    status, out = verified(hvd_lb, run)
    assert (status, "checkpoint step-00000026 is that after 24 steps" in out) == (1, True), out


def test_a_chain_that_was_removed(hvd_lb: Run, recorded: Path, copied: Copied) -> None:
    """Without a summary, which tells a link, that looks like a run that had none."""
    run = copied(recorded)
    rewrite(run, without(lines(run), "begin", "digest", "seal"))
    status, out = verified(hvd_lb, run)
    assert (status, ", by the records None" in out) == (1, True), out
    (run / "summary.json").unlink()
    assert verified(hvd_lb, run)[0] == 2


def test_whatever_a_run_is_killed_after(hvd_lb: Run, recorded: Path, copied: Copied) -> None:
    """Each beginning of its records, with those checkpoints before which no more was told, is that of an honest run."""
    run = copied(recorded)
    records = lines(run)
    saved = {of["step"] + 1: place for place, of in enumerate(records) if of["kind"] == "checkpoint"}
    assert sorted(saved) == [8, 16, 22, 24, 30]
    (run / "summary.json").unlink()
    for end in range(len(records), 0, -1):
        rewrite(run, records[:end])
        for step, place in saved.items():
            # The last one knows its evaluation as soon as that is recorded.
            if end < place + (step == 30) * 2:
                shutil.rmtree(run / f"checkpoints/step-{step:08d}", ignore_errors=True)
        status, out = verified(hvd_lb, run)
        assert status == 0, (end, out)
        told = [record for record in records[:end] if record["kind"] in ("train", "eval", "digest", "seal")]
        untold = next((n for n, of in enumerate(reversed(told)) if "chain" in of), len(told))
        assert (f"note: {untold} record" in out) is (untold > 0), (end, out)


def test_a_run_that_goes_on(recorded: Path, copied: Copied) -> None:
    """Checkpoints and a summary that come, and go, after its records were read are not held against it."""
    run, later = copied(recorded), ("checkpoints/step-00000024", "checkpoints/step-00000030", "summary.json")
    for name in later:
        (run / name).rename(run / f"later-{Path(name).name}")
    shutil.rmtree(run / "checkpoints/step-00000022")
    rewrite(run, [record for record in lines(run) if record["step"] < 17])
    opened = open_run(run)
    assert opened.checkpoints.keys() == {8, 16}
    for name in later:
        (run / f"later-{Path(name).name}").rename(run / name)
    shutil.rmtree(run / "checkpoints/step-00000008")
    for present in (opened, replace(opened)):  # as it lists checkpoints before they come, and after
        found = Examined(0)
        examine_records(present, found)
        assert (found.problems, found.checkpoints) == ([], [16])
