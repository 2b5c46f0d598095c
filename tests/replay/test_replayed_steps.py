"""`hvd-lb replay`: the very steps again, bit by bit; what is shown of one, and what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metrics_lines import lines, rewrite
from PIL import Image
from safetensors.torch import load_file

from hvd_lb.errors import UserError
from hvd_lb.recipe import Recipe
from hvd_lb.replay.again import Compared, Difference
from hvd_lb.replay.recorded import Jump, RecordedRun, open_run, worst_jump
from hvd_lb.report.run_directory import RunDirectory

pytestmark = pytest.mark.slow
Run = Callable[..., Any]


def shown(hvd_lb: Run, *arguments: object, status: int = 0) -> dict[str, Any]:
    said = hvd_lb("replay", *arguments, "--json")
    assert said.status == status, said
    return json.loads(said.out)


def train_losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in lines(run) if record["kind"] == "train"}


def test_losses_and_digests_come_again_to_the_bit(hvd_lb: Run, recorded: Path) -> None:
    """Step 13 is before a checkpoint, and the record of step 13 is of steps 12 and 13."""
    odd, even = shown(hvd_lb, recorded, "--step", 13), shown(hvd_lb, recorded, "--step", 12)
    assert (odd["loss"] + even["loss"]) / 2 == pytest.approx(train_losses(recorded)[13], rel=1e-14)
    assert odd["from_step"] == even["from_step"] == 8
    compared = odd["compared"]
    assert (compared["records"], compared["digests"], compared["same_digests"]) == (3, 1, 1)
    assert compared["largest_relative_difference"] == 0
    assert compared["first_difference"] is None
    assert odd["bits_expected"]
    whole = hvd_lb("replay", recorded, "--step", 29)
    assert whole.status == 0
    assert "from: step-00000024\nto compute: 6 steps: 12 microbatches of up to 32 images" in whole.out
    assert "as recorded: to the bit: 3 records and 2 digests compared" in whole.out
    assert whole.out.count("\nloss ") == 10
    assert "… and 54 more; --images 64 lists all" in whole.out


def test_from_the_seed_where_there_is_no_checkpoint_before(hvd_lb: Run, recorded: Path) -> None:
    early = shown(hvd_lb, recorded, "--step", 5, "--images", 0)
    assert (early["from_step"], early["compared"]["digests"], early["verdict"][:10]) == (0, 1, "to the bit")


def test_what_is_written_of_a_step(hvd_lb: Run, recorded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step"
    assert hvd_lb("replay", recorded, "--step", 9, "--output", folder).status == 0
    step = json.loads((folder / "step.json").read_text())
    images = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    tensors = load_file(folder / "microbatch.safetensors")
    assert tensors["images"].shape == (64, 3, 8, 8)
    assert math.fsum(image["loss"] for image in images) / 64 == pytest.approx(step["loss"], rel=1e-6)
    assert [image["loss"] for image in images] == sorted((i["loss"] for i in images), reverse=True)
    by_place = {(image["worker"], image["position"]): image for image in images}
    assert [by_place[w, p]["image"] for w in (0, 1) for p in range(32)] == tensors["image_ids"].tolist()
    assert [int(by_place[w, p]["label"]) for w in (0, 1) for p in range(32)] == tensors["labels"].tolist()
    pictures = sorted((folder / "pictures").iterdir())
    assert len(pictures) == 64
    levels = torch.from_numpy(np.asarray(Image.open(pictures[0])).copy()).permute(2, 0, 1)
    recipe = open_run(recorded).recipe
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (recipe.mean, recipe.std))
    assert (tensors["images"][0] - (levels / 255 - mean) / std).abs().max() < 0.51 / 255 / min(recipe.std)
    gradients = load_file(folder / "gradients.safetensors")
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert norm == pytest.approx(step["gradient_norm"], rel=1e-6)
    again = hvd_lb("replay", recorded, "--step", 9, "--output", folder)
    assert (again.status, again.out) == (2, "")
    assert "is there already: give a new or an empty folder" in again.err


def test_the_step_is_the_mean_of_its_workers(hvd_lb: Run, recorded: Path, tmp_path: Path) -> None:
    own = []
    for worker in (0, 1):
        seen = shown(hvd_lb, recorded, "--step", 9, "--worker", worker, "--output", tmp_path / str(worker))
        assert len(seen["images"]) == 32
        assert {image["worker"] for image in seen["images"]} == {worker}
        assert seen["compared"]["first_difference"] is None
        own.append((seen["own_loss"], load_file(tmp_path / f"{worker}/own-gradients.safetensors")))
    assert (own[0][0] + own[1][0]) / 2 == pytest.approx(seen["loss"], rel=1e-12)
    whole = load_file(tmp_path / "1/gradients.safetensors")
    for name, gradient in whole.items():
        mean = (own[0][1][name] + own[1][1][name]) / 2
        assert (mean - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_mixed_images_come_again_too(hvd_lb: Run, tmp_path: Path) -> None:
    """The loss of an image is then that of its mixed labels, and their mean is still the step's."""
    what = (
        "--data",
        "digits",
        "--device",
        "cpu",
        "--gpus",
        2,
        "--steps",
        6,
        "--model",
        "resnet8",
        "--log-every",
        1,
    )
    mixed = (
        "--reproducible",
        "--mixup",
        0.8,
        "--cutmix",
        1,
        "--auto-augment",
        "randaugment",
        "--clip-norm",
        0.5,
    )
    assert hvd_lb("simulate", *what, *mixed, "--run", "--output", tmp_path / "run").status == 0
    found = shown(hvd_lb, tmp_path / "run", "--step", 5, "--images", 64)
    assert found["verdict"].startswith("to the bit")
    assert len(found["images"]) == 64
    assert sum(image["loss"] for image in found["images"]) / 64 == pytest.approx(found["loss"], rel=1e-6)


def test_a_record_that_is_not_so_is_found(
    hvd_lb: Run, recorded: Path, copied: Callable[[Path], Path]
) -> None:
    run = copied(recorded)
    records = lines(run)
    wrong = next(record for record in records if record["kind"] == "train" and record["step"] == 11)
    wrong["loss"] = math.nextafter(wrong["loss"], 9)
    rewrite(run, records)
    found = shown(hvd_lb, run, "--step", 14, status=1)
    difference = found["compared"]["first_difference"]
    assert (difference["step"], difference["what"]) == (11, "loss")
    assert found["verdict"].startswith("no: step 11: loss recorded ")


def test_what_is_noted_of_a_comparison() -> None:
    """The largest difference, relative, and the first one; of digests also those that were not recorded."""
    one, other = Compared(), Compared()
    one.number(3, "loss", 200.0, 100.0)
    one.number(5, "loss", 1.0, 1.25)
    other.digest(4, {"weights": "x"}, {"weights": "x", "velocities": "y"})
    assert (other.digests, other.same_digests) == (1, 0)
    assert other.first == Difference(4, "digest of velocities", None, "y")
    one.add(other)
    assert (one.largest, one.digests) == (0.5, 1)
    assert one.first == Difference(3, "loss", 200.0, 100.0)


def test_a_record_without_all_that_it_tells_is_none(
    hvd_lb: Run, recorded: Path, copied: Callable[[Path], Path]
) -> None:
    run = copied(recorded)
    records = lines(run)
    for record in records:
        if (record["kind"], record["step"]) == ("train", 11):
            del record["loss"]
        if record["kind"] == "begin":
            del record["data"]
    rewrite(run, records)
    said = hvd_lb("replay", run, "--step", 11)
    assert said.status == 0
    assert "note: no whole record in 2 lines of metrics.jsonl" in said.out
    assert hvd_lb("replay", run, "--spike").status == 0


def test_float_mode_says_what_can_be_told(
    hvd_lb: Run, in_float_mode: Path, copied: Callable[[Path], Path]
) -> None:
    same = shown(hvd_lb, in_float_mode, "--step", 14)
    assert same["bits_expected"]
    assert same["verdict"].startswith("to the bit")
    run = copied(in_float_mode)  # one by one, sums round otherwise: as a run of two processes does
    recipe = (run / "recipe.yaml").read_text()
    assert "together: 2" in recipe
    (run / "recipe.yaml").write_text(recipe.replace("together: 2", "together: 1"))
    records = lines(run)
    for record in records:
        if record["kind"] == "environment":
            record |= {"processes": 2, "recipe": {**record["recipe"], "together": 1}}
    rewrite(run, records)
    other = shown(hvd_lb, run, "--step", 14)
    assert not other["bits_expected"]
    assert other["compared"]["largest_relative_difference"] < 1e-3
    assert other["compared"]["same_digests"] == 0
    assert other["verdict"].startswith("to rounding: losses ")
    assert "in float mode on 2 processes" in other["verdict"]
    # An older version told the processes of its last start alone.
    rewrite(run, [record for record in records if record["kind"] != "environment"])
    (run / "environment.json").write_text(json.dumps({"processes": 3}))
    assert "in float mode on 3 processes" in shown(hvd_lb, run, "--step", 14)["verdict"]


@pytest.mark.long
def test_a_spike_is_looked_for_step_by_step(
    hvd_lb: Run, recorded: Path, copied: Callable[[Path], Path]
) -> None:
    losses = train_losses(recorded)
    steps = sorted(losses)
    rises = {step: losses[step] - losses[before] for before, step in zip(steps, steps[1:], strict=False)}
    worst = max(rises, key=rises.__getitem__)
    assert rises[worst] > 0
    seen = shown(hvd_lb, recorded, "--spike")
    assert (seen["spike"]["first"], seen["spike"]["last"]) == (worst - 1, worst)
    each = {step: shown(hvd_lb, recorded, "--step", step)["loss"] for step in (worst - 1, worst)}
    assert (seen["step"], seen["loss"]) == max(each.items(), key=lambda of: of[1])
    assert seen["compared"]["first_difference"] is None


def a_run(*losses: float | None) -> RecordedRun:
    records = [{"kind": "train", "step": 10 * i + 9, "loss": loss} for i, loss in enumerate(losses)]
    return RecordedRun(RunDirectory(Path("run")), Recipe(), records)


def test_the_worst_jump() -> None:
    assert worst_jump(a_run(2.0, 1.0, 1.5, 1.4, 1.8)) == Jump(20, 29, 1.0, 1.5)
    assert worst_jump(a_run(2.0, 9.0, None)) == Jump(20, 29, 9.0, None)
    for losses, told in (((2.0,), "too few records"), ((), "too few"), ((2.0, 1.0, 1.0), "never rose")):
        with pytest.raises(UserError, match=told):
            worst_jump(a_run(*losses))


def test_bad_input(hvd_lb: Run, recorded: Path, tmp_path: Path) -> None:
    for arguments, told in (
        ((recorded,), "expected --step N or --spike"),
        ((recorded, "--step", 1, "--spike"), "expected --step N or --spike"),
        ((recorded, "--step", 30), "has taken 30 steps: expected --step 0 to 29"),
        ((recorded, "--step", 3, "--worker", 2), "has 2 virtual workers, 0 to 1"),
        ((tmp_path, "--step", 3), "holds no run: expected a run directory"),
        ((tmp_path / "nowhere", "--step", 3), "nowhere does not exist"),
        ((recorded, "--step", 3, "--data", "fashion-mnist"), ""),
    ):
        said = hvd_lb("replay", *arguments)
        assert (said.status, said.out) == (2, ""), said
        assert told in said.err
        assert said.err.count("\n") == 1
