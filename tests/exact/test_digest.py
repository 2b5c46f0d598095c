"""Digests of tensors: the same for the same names, shapes and bits, wherever these lie, and for nothing else."""

from pathlib import Path

import pytest
import torch

from hvd_lb.exact import digest
from hvd_lb.exact.digest import state_digests, tensor_digest
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint

WEIGHTS = {"a": torch.arange(24.0).reshape(2, 3, 2, 2), "b": torch.tensor(5), "c": torch.zeros(0)}


def test_neither_memory_order_nor_the_order_of_names_counts() -> None:
    other = {name: WEIGHTS[name] for name in ("c", "b", "a")}
    other["a"] = other["a"].contiguous(memory_format=torch.channels_last)
    assert tensor_digest(other) == tensor_digest(WEIGHTS)
    assert len(tensor_digest({})) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"b": torch.tensor(5.0)},
        {"b": torch.tensor([5])},
        {"a": WEIGHTS["a"].reshape(2, 3, 4)},
        {"a": torch.nextafter(WEIGHTS["a"], torch.tensor(100.0))},
        {"c": -torch.zeros(1)},
        {"d": torch.zeros(0)},
    ],
)
def test_everything_else_does(change: dict[str, torch.Tensor]) -> None:
    assert tensor_digest({**WEIGHTS, **change}) != tensor_digest(WEIGHTS)


def test_a_zero_has_a_sign() -> None:
    assert tensor_digest({"a": torch.zeros(1)}) != tensor_digest({"a": -torch.zeros(1)})


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64])
def test_integer_digests_are_sums_of_bits_and_of_bits_times_places(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modulo 2⁶⁴, places from 1 on, whatever is done at once."""
    monkeypatch.setattr(digest, "_CHUNK", chunk)
    tensors = [
        (torch.randn(3, 7) * 100).to(dtype),
        torch.zeros(0, dtype=dtype),
        torch.full((2,), 3).to(dtype),
    ]
    expected = []
    for tensor in tensors:
        size = tensor.element_size()
        data = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        bits = [
            int.from_bytes(data[at : at + size], "little", signed=True) for at in range(0, len(data), size)
        ]
        for total in (sum(bits), sum(of * place for place, of in enumerate(bits, 1))):
            expected.append((total + 2**63) % 2**64 - 2**63)
    assert digest.integer_digest(tensors).tolist() == expected


def test_a_checkpoint_has_the_digests_of_its_state(tmp_path: Path) -> None:
    model = {"fc.weight": torch.randn(3, 2).t(), "bn.running_mean": torch.randn(4)}
    optimizer = {"state/0/velocity": torch.randn(2, 3).bfloat16()}
    CheckpointStore(tmp_path).save(3, model, optimizer, {})
    saved = open_checkpoint(tmp_path / "step-00000003")
    found = state_digests(model, optimizer)
    assert found.keys() == {"weights", "velocities", "statistics"}
    assert found == state_digests(saved.model(), saved.optimizer())
    del model["bn.running_mean"]
    assert state_digests(model, optimizer) == {name: found[name] for name in ("weights", "velocities")}
