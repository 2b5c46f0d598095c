"""Comparing runs: to the bit, over the same steps only; what is damaged or foreign does not pass as a difference."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_lb.errors import UserError
from hvd_lb.machine.environment import describe_environment
from hvd_lb.machine.placement import Placement
from hvd_lb.recipe import Recipe
from hvd_lb.report.compare import Comparison, compare_runs
from hvd_lb.report.compare_tensors import compare_tensors
from hvd_lb.report.page.runs import runs_page
from hvd_lb.training.checkpoint import CheckpointStore

RECIPE = Recipe(data="digits", model="resnet8", num_classes=10)
MODEL = {
    "fc.weight": torch.arange(6.0).reshape(2, 3),
    "bn.running_var": torch.tensor([4000.0, math.nan]),
    "bn.num_batches_tracked": torch.tensor(44),
    "empty": torch.zeros(0),
}
OPTIMIZER = {"state/0/velocity": torch.full((2, 3), 0.5)}


def train(step: int, loss: float = 2.0, lr: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "epoch": 0, "step": step, "lr": lr, "loss": loss, "data_wait": 0.5, **more}


def evaluation(step: int, error: float = 9.0, **more: Any) -> dict[str, Any]:
    return {"kind": "eval", "epoch": 0, "step": step, "top1_error": error, "images": 359, **more}


METRICS = [train(9), train(19, 1.5), evaluation(21), train(29, 1.0)]


def make_run(
    path: Path,
    *,
    recipe: Recipe = RECIPE,
    metrics: list[dict[str, Any]] | None = METRICS,
    steps: tuple[int, ...] = (22,),
    model: Mapping[str, Tensor] = MODEL,
    optimizer: Mapping[str, Tensor] = OPTIMIZER,
    environment: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Path:
    path.mkdir()
    (path / "recipe.yaml").write_text(recipe.to_yaml())
    if metrics is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    (path / "environment.json").write_text(json.dumps(environment or {"processes": 1}))
    for step in steps:
        CheckpointStore(path / "checkpoints").save(step, model, optimizer, state or {"data": "84550e"})
    return path


def compare(tmp_path: Path, step: int | None = None, **changes: Any) -> Comparison:
    """The plain run and one that differs from it in `changes`."""
    return compare_runs(make_run(tmp_path / "a"), make_run(tmp_path / "b", **changes), step)


def changed(tensors: Mapping[str, Tensor], name: str, index: Any, value: float) -> dict[str, Tensor]:
    copy = {key: tensor.clone() for key, tensor in tensors.items()}
    copy[name][index] = value
    return copy


def flip_lowest_bit(tensor: Tensor) -> Tensor:
    bits = tensor.clone().view(torch.int32)
    bits.view(-1)[-1] ^= 1
    return bits.view(torch.float32)


def damage(run: Path, step: int) -> None:
    file = run / f"checkpoints/step-{step:08d}/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_identical_runs(tmp_path: Path) -> None:
    comparison = compare(tmp_path)
    assert comparison.identical
    assert comparison.checkpoint is not None
    assert (comparison.checkpoint.tensors, comparison.checkpoint.steps) == (5, (22, 22))
    assert [metrics.fields for metrics in comparison.metrics] == [
        {"lr": 3, "loss": 3},
        {"images": 1, "top1_error": 1},
    ]
    assert [comparison.free, comparison.environment, comparison.notes, comparison.checkpoint.state] == [
        []
    ] * 4


def digest(step: int, weights: str = "w", **more: str) -> dict[str, Any]:
    return {"kind": "digest", "epoch": 0, "step": step, "weights": weights, "velocities": "v", **more}


def test_digests_tell_where_two_runs_part(tmp_path: Path) -> None:
    """Between two evaluations, and although the links of other records differ; statistics only where both have them."""
    digests = [digest(9, chain="1", statistics="s"), digest(19, chain="2"), digest(29, chain="3")]
    others = [digest(9, chain="a"), digest(19, "x", chain="b"), digest(29, "y", chain="c")]
    a = make_run(tmp_path / "a", metrics=[*METRICS, *digests])
    compared = compare_runs(a, make_run(tmp_path / "b", metrics=[*METRICS, *others]))
    assert not compared.identical
    (found,) = (metrics for metrics in compared.metrics if metrics.kind == "digest")
    assert (found.records, found.compared) == ((3, 3), 3)
    ((field, count, step),) = ((of.field, of.records, of.step) for of in found.differing)
    assert (field, count, step) == ("weights", 2, 19)
    assert compare_runs(a, make_run(tmp_path / "c", metrics=[*METRICS, *digests])).identical


def test_speed_hardware_free_fields_and_other_records_are_no_difference(tmp_path: Path) -> None:
    records = [{**record, "epoch": 7, "images_per_second": 1.0, "data_wait": 0.1} for record in METRICS]
    comparison = compare(
        tmp_path,
        recipe=RECIPE.model_copy(update={"log_every": 10, "threads": 3}),
        metrics=[*records, {"kind": "checkpoint", "seconds": 3.0}, {"kind": "repeat", "step": 3}],
        environment={
            "command": ["hvd-lb"],
            "processes": 2,
            "devices": ["cpu", "cpu"],
            "versions": {"torch": "2"},
        },
        state={"data": "84550e", "loss_images": 64},
    )
    assert comparison.identical
    assert comparison.free == ["log_every: None → 10", "threads: None → 3"]
    assert comparison.environment == ["devices: absent → cpu, cpu", "processes: 1 → 2", "torch: absent → 2"]
    assert comparison.checkpoint is not None
    assert comparison.checkpoint.state == ["loss_images"]


def test_a_field_of_the_recipe(tmp_path: Path) -> None:
    comparison = compare(tmp_path, recipe=RECIPE.model_copy(update={"seed": 4}))
    assert not comparison.identical
    assert (comparison.mathematics, comparison.free) == (["seed: 0 → 4"], [])


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_one_bit_of_one_tensor(file: str, tmp_path: Path) -> None:
    tensors = MODEL if file == "model" else OPTIMIZER
    name = "fc.weight" if file == "model" else "state/0/velocity"
    other = {**tensors, name: flip_lowest_bit(tensors[name])}
    comparison = compare(tmp_path, **{file: other})
    assert not comparison.identical
    assert comparison.checkpoint is not None
    (tensor,) = comparison.checkpoint.differing
    assert comparison.checkpoint.worst is tensor
    assert (tensor.file, tensor.name, tensor.differing, tensor.elements) == (file, name, 1, 6)
    value = tensors[name].view(-1)[-1].item()
    assert 0 < tensor.largest <= value * 2.0**-23
    assert tensor.scale == pytest.approx(value)


def test_differences_are_ordered_and_a_weight_is_named(tmp_path: Path) -> None:
    model = changed(MODEL, "bn.running_var", 0, 4001.0)
    model = changed(model, "fc.weight", (1, 2), 4.0)
    model["bn.num_batches_tracked"] += 5000
    comparison = compare(tmp_path, model=model, optimizer=changed(OPTIMIZER, "state/0/velocity", 0, -4.5))
    found = comparison.checkpoint
    assert found is not None
    assert [(tensor.name, tensor.largest, tensor.scale) for tensor in found.differing] == [
        ("state/0/velocity", 5.0, 4.5),
        ("bn.running_var", 1.0, 4001.0),
        ("fc.weight", 1.0, 5.0),
        ("bn.num_batches_tracked", 5000.0, 5044.0),
    ]
    assert found.worst is not None
    assert (found.worst.name, found.worst.relative) == ("fc.weight", 0.2)


def test_tensors_that_only_one_has_or_of_another_layout(tmp_path: Path) -> None:
    model = {name: tensor for name, tensor in MODEL.items() if name != "empty"}
    model["fc.weight"] = MODEL["fc.weight"].reshape(3, 2)
    model["bn.running_var"] = MODEL["bn.running_var"].double()
    comparison = compare(tmp_path, model=model, optimizer={**OPTIMIZER, "state/1/velocity": torch.ones(1)})
    assert not comparison.identical
    assert comparison.checkpoint is not None
    assert {tensor.name: tensor.layout for tensor in comparison.checkpoint.differing} == {
        "empty": "only in A",
        "fc.weight": "F32 [2, 3] → F32 [3, 2]",
        "bn.running_var": "F32 [2] → F64 [2]",
        "state/1/velocity": "only in B",
    }
    assert comparison.checkpoint.worst is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_special_values(dtype: torch.dtype) -> None:
    def compared(a: list[float], b: list[float]) -> tuple[int, float, float]:
        result = compare_tensors("model", "w", torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
        return result.differing, result.largest, result.scale

    inf, nan = math.inf, math.nan
    assert compared([nan, inf, -inf, 1.0], [nan, inf, -inf, 1.0])[0] == 0
    assert compared([nan, inf, 1.0], [nan, inf, 1.5]) == (1, 0.5, 1.5)
    assert compared([0.0, 1.0], [-0.0, 1.0]) == (1, 0.0, 1.0)
    assert compared([inf, 1.0], [-inf, 1.0]) == (1, inf, 1.0)
    differing, largest, scale = compared([nan, 1.0, 9.0], [2.0, 1.0, 3.0])
    assert (differing, scale) == (2, 9.0)
    assert math.isnan(largest)


def test_nan_payloads_and_whole_numbers_are_bits_too() -> None:
    quiet = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert not compare_tensors("model", "w", quiet, other).equal
    large = torch.tensor(1 << 62)
    assert not compare_tensors("model", "n", large, large + 1).equal
    flags = torch.tensor([True, False])
    assert compare_tensors("model", "f", flags, ~flags).differing == 2


def test_one_metric(tmp_path: Path) -> None:
    metrics = [METRICS[0], train(19, 1.5 + 2**-40), evaluation(21, 10.0), train(29, 1.25)]
    comparison = compare(tmp_path, metrics=metrics)
    assert not comparison.identical
    (loss,), (error,) = (kind.differing for kind in comparison.metrics)
    assert (loss.field, loss.records, loss.step, loss.a, loss.b) == ("loss", 2, 19, 1.5, 1.5 + 2**-40)
    assert (loss.difference, loss.largest) == (2**-40, 0.25)
    assert (error.field, error.step, error.difference) == ("top1_error", 21, 1.0)


def test_metrics_that_are_nan_or_absent(tmp_path: Path) -> None:
    def differing(name: str, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[str]:
        runs = [make_run(tmp_path / f"{name}-{i}", metrics=records) for i, records in enumerate((a, b))]
        return [metric.field for kind in compare_runs(*runs).metrics for metric in kind.differing]

    assert differing("same", [train(0, math.nan)], [train(0, math.nan)]) == []
    assert differing("one", [train(0, math.nan)], [train(0, 1.0)]) == ["loss"]
    assert differing("absent", [evaluation(0, loss=1.0)], [evaluation(0)]) == ["loss"]


def test_other_log_periods_compare_losses_over_the_same_steps_only(tmp_path: Path) -> None:
    """The mean over 10 to 19 and the one over 0 to 19 are different numbers of the same run."""
    comparison = compare(tmp_path, metrics=[train(19, 1.75), evaluation(21), train(29, 1.0)])
    assert comparison.identical
    metrics = comparison.metrics[0]
    assert (metrics.records, metrics.compared, metrics.fields) == ((3, 2), 2, {"lr": 2, "loss": 1})
    shifted = make_run(tmp_path / "c", metrics=[train(19, 1.75, lr=0.2), evaluation(21), train(29, 1.5)])
    found = compare_runs(tmp_path / "a", shifted).metrics[0].differing
    assert [(metric.field, metric.step) for metric in found] == [("lr", 19), ("loss", 29)]


def test_no_records_in_common_are_no_difference_and_told(tmp_path: Path) -> None:
    comparison = compare(tmp_path, metrics=None)
    assert comparison.identical
    assert [kind.records for kind in comparison.metrics] == [(3, 0), (1, 0)]
    assert [kind.compared for kind in comparison.metrics] == [0, 0]


def test_the_newest_checkpoint_that_both_have_intact_is_compared(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", steps=(22, 44, 66))
    b = make_run(tmp_path / "b", steps=(22, 44, 88))
    found = compare_runs(a, b)
    assert found.checkpoint is not None
    assert (found.checkpoint.steps, found.notes) == ((44, 44), [])
    damage(b, 44)
    found = compare_runs(a, b)
    assert found.checkpoint is not None
    assert found.checkpoint.steps == (22, 22)
    assert "step-00000044 is damaged" in found.notes[0]
    with pytest.raises(UserError, match="step-00000044 is damaged"):
        compare_runs(a, b, step=44)
    with pytest.raises(UserError, match="b has no checkpoint of step 66: it has step 22, 44, 88"):
        compare_runs(a, b, step=66)


def test_all_common_checkpoints_damaged(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    damage(a, 22)
    with pytest.raises(UserError, match="step-00000022 is damaged"):
        compare_runs(a, b)


@pytest.mark.parametrize("steps", [(), (44,)])
def test_no_checkpoint_in_common_is_a_difference_as_nothing_shows_equality(
    steps: tuple[int, ...], tmp_path: Path
) -> None:
    comparison = compare(tmp_path, steps=steps)
    assert comparison.checkpoint is None
    assert not comparison.identical
    assert "no checkpoint in common" in comparison.notes[0]


def test_single_checkpoints(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", steps=(22, 44))
    b = make_run(tmp_path / "b", steps=(22,), model=changed(MODEL, "fc.weight", 0, 9.0), metrics=[])
    last, first = a / "checkpoints/last", a / "checkpoints/step-00000022"
    two = compare_runs(first, last)
    assert two.identical
    assert two.checkpoint is not None
    assert (two.checkpoint.steps, two.metrics) == ((22, 44), [])
    mixed = compare_runs(first, b)
    assert mixed.checkpoint is not None
    assert [tensor.name for tensor in mixed.checkpoint.differing] == ["fc.weight"]
    with pytest.raises(UserError, match="no checkpoint in common"):
        compare_runs(last, b)
    with pytest.raises(UserError, match="last has no checkpoint of step 22: it has step 44"):
        compare_runs(first, last, step=22)


def test_only_reads(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert compare_runs(run, run).identical
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_bad_input(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")

    def refused(path: Path, told: str) -> None:
        for pair in ((run, path), (path, run)):
            with pytest.raises(UserError, match=told):
                compare_runs(*pair)

    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused(tmp_path, "is neither a run nor a checkpoint")
    refused(run / "recipe.yaml", "is neither a run nor a checkpoint")
    broken_files = (
        ("recipe.yaml", "seed: [", "line 1, column 8: expected the node content"),
        ("recipe.yaml", "sed: 1\n", "unknown field 'sed'"),
        ("metrics.jsonl", '{"kind": "train"}\n', "is damaged"),
        ("metrics.jsonl", "not JSON\n", "is damaged"),
        ("metrics.jsonl", "[1]\n", "is damaged"),
    )
    for i, (name, content, told) in enumerate(broken_files):
        broken = make_run(tmp_path / f"broken-{i}")
        (broken / name).write_text(content)
        refused(broken, told)
    damage(run, 22)
    refused(run / "checkpoints/last", "is damaged")


def test_a_missing_environment_is_told_and_hinders_nothing(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (b / "environment.json").write_text("{")
    comparison = compare_runs(a, b)
    assert comparison.identical
    assert "environment.json" in comparison.notes[0]


def test_variables_by_which_libraries_take_other_kernels_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = []
    for isa in ("", "AVX2"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        environments.append(describe_environment(Placement("cpu", 1, 1), []))
    a, b = (make_run(tmp_path / f"{n}", environment=made) for n, made in enumerate(environments))
    assert compare_runs(a, b).environment == ["ONEDNN_MAX_CPU_ISA: absent → AVX2"]
    assert "environment: variables ONEDNN_MAX_CPU_ISA" in runs_page([a, b])
