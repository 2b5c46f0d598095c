"""`hvd-lb verify`: a run that is as it claims holds; what was tampered with is found and named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from metrics_lines import lines, rewrite, sealed_anew

from hvd_lb.replay.again import Compared, Difference, expectation
from hvd_lb.replay.recorded import RecordedRun, open_run
from hvd_lb.replay.verify import Stretch, choose, stretches
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint

pytestmark = pytest.mark.slow
Run = Callable[..., Any]
Copied = Callable[[Path], Path]
ALL = ("--segments", 9)


def forge(run: Path, step: int, change: Callable[[float], float]) -> None:
    """Changes the loss that was recorded of a step, and writes all links anew."""
    records = lines(run)
    for record in records:
        if record["kind"] == "train" and record["step"] == step:
            record["loss"] = change(record["loss"])
    rewrite(run, sealed_anew(records))
    (run / "summary.json").unlink(missing_ok=True)


def resave(run: Path, step: int, *, weight: float = 0.0, **state: Any) -> None:
    """Writes a checkpoint anew, with checksums that are right."""
    checkpoint = open_checkpoint(run / f"checkpoints/step-{step:08d}")
    model = checkpoint.model()
    if weight:
        name = next(name for name in model if name.endswith("conv1.weight"))
        model[name].view(-1)[0] = torch.nextafter(model[name].view(-1)[0], torch.tensor(weight))
    content = {name: value for name, value in checkpoint.state.items() if name not in ("step", "checksums")}
    CheckpointStore(run / "checkpoints", keep=9).save(
        step, model, checkpoint.optimizer(), {**content, **state}
    )


def test_a_run_that_is_as_it_claims(hvd_lb: Run, recorded: Path, tmp_path: Path) -> None:
    file = tmp_path / "receipt.json"
    said = hvd_lb("verify", recorded, *ALL, "--json", file)
    assert (said.status, said.err) == (0, "")
    last = lines(recorded)[-1]
    assert last["kind"] == "seal"
    told = said.out.splitlines()
    assert "stretches: steps 0 to 7, steps 8 to 15, steps 16 to 21, steps 22 to 23, steps 24 to 29" in told
    assert f"chain: 8 digests in order, the last link {last['chain']}" in told
    assert "checkpoints: 8, 16, 24, 30 are the states that were recorded" in told
    assert "checkpoints: of 22 no digest was recorded" in told  # the best, after an evaluation
    assert "steps 16 to 21: as recorded, to the bit: 4 records and 2 digests" in told
    assert told[-1] == "holds: 30 steps of 30 taken again, and all that was recorded of them is so"
    receipt = json.loads(file.read_text())
    assert (receipt["verdict"], receipt["problems"], receipt["notes"]) == ("holds", [], [])
    assert receipt["chain"] == {
        "digests": 8,
        "last_step": 29,
        "last_link": last["chain"],
        "records_after_it": 0,
    }
    assert all(of["as_recorded"] and of["bits_expected"] for of in receipt["stretches"])
    assert json.loads((recorded / "summary.json").read_text())["chain"] == last["chain"]


def wrong(said: Any) -> str:
    """The verdict of a run that does not hold."""
    assert said.status == 1, said
    verdict = said.out.splitlines()[-1]
    assert verdict.startswith("does not hold: ")
    return verdict.removeprefix("does not hold: ")


def test_a_changed_record(hvd_lb: Run, recorded: Path, copied: Copied) -> None:
    run = copied(recorded)
    records = lines(run)
    evaluation = next(record for record in records if record["kind"] == "eval" and record["step"] == 29)
    evaluation["top1_error"] /= 2
    rewrite(run, records)
    told = wrong(hvd_lb("verify", run, "--segments", 0))
    assert told.startswith(
        "metrics.jsonl: something after step 29 and up to step 29 is not as it was recorded"
    )


def test_a_changed_record_under_a_chain_that_was_written_anew(
    hvd_lb: Run, recorded: Path, copied: Copied
) -> None:
    run = copied(recorded)
    forge(run, 11, lambda loss: math.nextafter(loss, 0))
    assert hvd_lb("verify", run, "--segments", 0).status == 0
    assert wrong(hvd_lb("verify", run, *ALL)).startswith("steps 8 to 15: step 11: loss recorded ")


def test_an_exchanged_checkpoint(hvd_lb: Run, recorded: Path, copied: Copied) -> None:
    run = copied(recorded)
    resave(run, 16, weight=9.0)
    told = wrong(hvd_lb("verify", run, "--segments", 0))
    assert told == (
        "checkpoint step-00000016 is not the state that was recorded after step 15: its weights have other digests"
    )


@pytest.mark.long
def test_an_exchanged_checkpoint_of_which_no_digest_was_recorded(
    hvd_lb: Run, recorded: Path, copied: Copied
) -> None:
    run = copied(recorded)
    resave(run, 16, weight=9.0)
    rewrite(run, [record for record in lines(run) if "chain" not in record and record["kind"] != "begin"])
    (run / "summary.json").unlink()
    said = hvd_lb("verify", run, *ALL)
    assert wrong(said).startswith("steps 8 to 15: step 15: digest of weights recorded ")
    assert "note: there are no digests" in said.out
    assert "steps 0 to 7: as recorded, to the bit" in said.out
    assert hvd_lb("verify", run, "--segments", 0).status == 2


@pytest.mark.long
def test_a_damaged_checkpoint(hvd_lb: Run, recorded: Path, copied: Copied) -> None:
    run = copied(recorded)
    file = run / "checkpoints/step-00000024/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "optimizer.safetensors is truncated or changed" in wrong(hvd_lb("verify", run, "--segments", 0))


def test_a_changed_recipe(hvd_lb: Run, recorded: Path, copied: Copied) -> None:
    run = copied(recorded)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("momentum: 0.9", "momentum: 0.8"))
    said = hvd_lb("verify", run, *ALL)
    assert wrong(said).startswith(
        "recipe.yaml is not the recipe that the run began with: momentum: 0.9 → 0.8 (and 5 more)"
    )
    assert "as recorded, to the bit" not in said.out  # nothing was computed


@pytest.mark.long
@pytest.mark.parametrize("older", [False, True])
def test_it_cannot_be_told_on_other_hardware(
    hvd_lb: Run, recorded: Path, copied: Copied, older: bool
) -> None:
    """A loss that is a little off: with the same libraries it would be wrong, here it may be theirs.

    An older version told of them in checkpoints alone: of the steps to 8 that after them counts.
    """
    run = copied(recorded)
    for step in (8, 16, 22, 24, 30) if older else ():
        environment = open_checkpoint(run / f"checkpoints/step-{step:08d}").saved.environment
        resave(run, step, environment={**environment, "torch": "1.0"})
    records = lines(run)
    for record in records:
        if record["kind"] == "environment":
            record["rounding"]["torch"] = "1.0"
    rewrite(run, [record for record in records if not older or record["kind"] != "environment"])
    assert hvd_lb("verify", run, *ALL).status == 0  # the same bits are proof enough
    forge(run, 11, lambda loss: 1.01 * loss)
    said = hvd_lb("verify", run, *ALL)
    assert said.status == 2
    assert said.out.splitlines()[-1].startswith(
        "cannot be told: steps 8 to 15: losses differ by up to 0.0099 of"
    )
    assert "torch: 1.0 → " in said.out.splitlines()[-1]
    forge(run, 11, lambda loss: 2 * loss)
    assert "far more than rounding does" in wrong(hvd_lb("verify", run, *ALL))


def test_rounding_that_grows_in_a_long_stretch_is_not_taken_for_wrong() -> None:
    """The first bit that differs comes soon; what counts is a loss that is far off soon."""
    compared = Compared()
    compared.number(2, "loss", 2.0, 2.0000001)
    compared.number(3, "evaluation's top1 error", 2.7, 5.4)
    assert compared.far is None
    compared.number(25, "loss", 2.0, 2.2)
    compared.number(30, "evaluation's loss", 2.0, 3.0)
    assert (compared.first, compared.far) == (
        Difference(2, "loss", 2.0, 2.0000001),
        Difference(25, "loss", 2.0, 2.2),
    )


def test_a_loss_that_is_far_off_late_cannot_be_told(
    hvd_lb: Run, recorded: Path, copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other hardware, where something else is a little off from the beginning on."""
    monkeypatch.setattr("hvd_lb.replay.verify._SOON", 4)
    run = copied(recorded)
    records = lines(run)
    for record in records:
        if record["kind"] == "environment":
            record["rounding"]["torch"] = "1.0"
    rewrite(run, records)
    forge(run, 9, lambda loss: 1.00001 * loss)
    forge(run, 15, lambda loss: 2 * loss)
    said = hvd_lb("verify", run, *ALL)
    assert said.status == 2
    assert said.out.splitlines()[-1].startswith(
        "cannot be told: steps 8 to 15: losses differ by up to 0.5 of"
    )
    forge(run, 11, lambda loss: 2 * loss)
    assert "step 11: loss recorded" in wrong(hvd_lb("verify", run, *ALL))


def test_sums_in_half_precision_are_not_taken_for_wrong(recorded: Path) -> None:
    """One process does not round what several have exchanged in fp16; alone, there was nothing to exchange."""
    run = open_run(recorded)
    compressed = replace(
        run, recipe=run.recipe.model_copy(update={"compress": "fp16", "reproducible": False})
    )
    for processes, half in ((1, False), (2, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(run), "processes", processes)
            found = expectation(compressed, None, "cpu", 30)
        assert found.half == half
        assert ("gradients in fp16" in found.why) == half


def test_stretches(recorded: Path) -> None:
    run = open_run(recorded)
    whole = [
        Stretch(0, 8, True),
        Stretch(8, 16, True),
        Stretch(16, 22, True),
        Stretch(22, 24, True),
        Stretch(24, 30, True),
    ]
    assert stretches(run, 1000) == whole
    cut = [Stretch(of.start, min(of.end, of.start + 6), of.end - of.start <= 6) for of in whole]
    assert stretches(run, 6) == cut
    every = whole[:4]
    assert choose(every, 9, seed=1) == every
    drawn = {tuple(of.start for of in choose(every, 2, seed)) for seed in range(40)}
    assert len(drawn) == 6
    assert choose(every, 2, seed=7) == choose(every, 2, seed=7)


def test_a_run_from_another_ones_checkpoint_has_no_beginning_here(recorded: Path) -> None:
    run = open_run(recorded)
    begun = [{**record, "step": 15} if record["kind"] == "begin" else record for record in run.records]
    elsewhere = replace(run, records=begun)
    assert [of.start for of in stretches(elsewhere, 99)] == [8, 16, 22, 24]


def test_the_records_alone_need_no_data(hvd_lb: Run, recorded: Path, copied: Copied, tmp_path: Path) -> None:
    run = copied(recorded)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("data: digits", f"data: {tmp_path / 'moved'}", 1))
    said = hvd_lb("verify", run, "--segments", 0)
    assert (said.status, said.err) == (0, "")
    assert "note: data and plan were not looked at" in said.out
    for more in (("--segments", 1), ("--segments", 0, "--data", tmp_path / "nowhere")):
        said = hvd_lb("verify", run, *more)
        assert (said.status, said.err.count("\n")) == (2, 1)
    assert "not looked at" not in hvd_lb("verify", run, "--segments", 0, "--data", "digits").out


def test_what_cannot_be_written_or_read_is_no_verdict(
    hvd_lb: Run, recorded: Path, copied: Copied, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "missing/receipt.json", tmp_path / "file/receipt.json", tmp_path):
        said = hvd_lb("verify", recorded, "--segments", 0, "--json", target)
        assert (said.status, said.out, said.err.count("\n")) == (2, "", 1)
        assert "cannot be written: expected the name of a file in a folder that is there" in said.err
    said = hvd_lb("replay", recorded, "--step", 1, "--output", tmp_path / "file/step")
    assert (said.status, said.out) == (2, "")
    assert f"cannot be written ({tmp_path / 'file'} is a file)" in said.err
    # What only writing shows: the verdict is there, and the exit code is not its.
    said = hvd_lb("verify", recorded, "--segments", 0, "--json", tmp_path / ("r" * 250))
    assert (said.status, said.err.count("\n")) == (2, 1)
    assert said.out.splitlines()[-1] == "holds as far as the records tell: no step was taken again"
    run = copied(recorded)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    for command in (("verify", run), ("replay", run, "--step", 1), ("compare", run, recorded)):
        said = hvd_lb(*command)
        assert (said.status, said.out, said.err.count("\n")) == (2, "", 1)
        assert "metrics.jsonl cannot be read" in said.err


def test_a_run_that_goes_on_elsewhere(
    hvd_lb: Run, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first eight steps were taken here, others by other kernels, and no checkpoint tells of the last ones."""
    run = tmp_path / "run"
    make(run, "--reproducible", "--steps", 8)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    make(run, "--reproducible", "--steps", 14)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    moved = [record for record in lines(run) if record["kind"] == "environment"]
    assert [record["step"] for record in moved] == [0, 8]
    assert {record["rounding"]["cpu_capability"] for record in moved} >= {"DEFAULT"}
    shutil.rmtree(run / "checkpoints/step-00000014")
    (run / "summary.json").unlink()
    said = hvd_lb("verify", run, *ALL)
    assert said.status in (0, 2), said  # as far as these kernels round otherwise
    first, second = (line for line in said.out.splitlines() if line.startswith("steps "))
    assert first.startswith("steps 0 to 7: as recorded, to the bit")
    assert second.startswith(("steps 8 to 13: as recorded, to rounding (", "steps 8 to 13: cannot be told: "))
    assert "other software or hardware than is here (" in second
    assert "cpu_capability: DEFAULT → " in second
    recorded = open_run(run)
    for start, end, places in ((0, 8, [0]), (8, 14, [1]), (7, 9, [0, 1]), (0, 14, [0, 1])):
        assert recorded.environments(start, end) == [moved[place] for place in places]


def test_kernels_chosen_by_a_variable_are_no_wrong_record(
    hvd_lb: Run, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN's variable shows in no capability of torch; its kernels round otherwise."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    make(tmp_path / "run", "--reproducible", "--steps", 8)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    said = hvd_lb("verify", tmp_path / "run", *ALL)
    assert "does not hold" not in said.out
    assert "wrong" not in said.out
    assert "(ONEDNN_MAX_CPU_ISA: SSE41 → not set)" in said.out


def test_what_rounding_depended_on(recorded: Path) -> None:
    """Where a run goes back, it takes the steps from there on as it is now; what was before the first is not known."""
    run = open_run(recorded)

    def told(*records: tuple[str, int]) -> RecordedRun:
        kinds = (
            {"kind": kind, "step": at, ("to" if kind != "environment" else "of"): at} for kind, at in records
        )
        return replace(run, records=list(kinds))

    assert told(("environment", 5)).environments(4, 9) is None
    assert told().environments(0, 9) is None
    there = told(("environment", 0), ("environment", 8), ("rollback", 4), ("environment", 12))
    for start, end, known in ((0, 4, [0]), (0, 5, [0, 8]), (4, 12, [8]), (5, 13, [8, 12]), (12, 99, [12])):
        assert [of["of"] for of in there.environments(start, end) or ()] == known
    again = told(("environment", 0), ("environment", 8), ("environment", 4))
    assert [of["of"] for of in again.environments(0, 99) or ()] == [0, 4]


def test_float_mode_that_went_on_otherwise(in_float_mode: Path) -> None:
    """What the last start was given, environment.json and recipe.yaml tell; earlier steps may have had others."""
    run = open_run(in_float_mode)
    assert expectation(run, None, "cpu", 30).bits
    (first,) = run.environments(0, 30) or ()
    for changes, why in (
        ({"processes": 2}, "float mode on 2 processes"),
        ({"recipe": {**first["recipe"], "together": 1}}, "went on otherwise (together: 1 → 2)"),
    ):
        earlier = [{**first, **changes}, {**first, "step": 8}]
        others = [record for record in run.records if record["kind"] != "environment"]
        moved = replace(run, records=[*earlier, *others])
        assert why in expectation(moved, None, "cpu", 30).why
        assert expectation(moved, open_checkpoint(run.checkpoints[8]), "cpu", 30).bits
