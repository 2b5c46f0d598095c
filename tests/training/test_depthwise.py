"""With bf16 on CPUs depthwise convolutions have their backward in fp32: the same gradients, by faster kernels."""

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import make_trainer, small_recipe
from torch import Tensor, nn

from hvd_lb import arithmetic

CPU = torch.device("cpu")
BF16: Any = SimpleNamespace(precision="bf16")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("entry", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(32, 32, 5, 2, 2, groups=32, bias=False),
        nn.Conv2d(48, 48, 7, padding=3, groups=48),
        nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False),
        nn.Conv2d(24, 24, 3, padding=2, dilation=2, groups=24),
        nn.Conv2d(20, 20, (1, 5), (2, 1), (0, 2), groups=20),
    ],
    ids=["5x5, stride 2", "7x7, bias", "3x3, stride 2", "dilated", "uneven"],
)
def test_gradients_are_exact_to_one_rounding(
    layer: nn.Conv2d, entry: torch.dtype, layout: torch.memory_format
) -> None:
    """As bf16 has them: exact sums of bf16's products, rounded to bf16. Its own kernels add some up in bf16."""
    plain = nn.Sequential(copy.deepcopy(layer)).to(memory_format=layout)
    wide = copy.deepcopy(plain)
    arithmetic.widen_depthwise(wide, BF16, CPU)
    assert type(wide[0]) is not nn.Conv2d
    torch.manual_seed(0)
    x = torch.randn(4, layer.in_channels, 12, 12).to(entry)
    (expected, before), (found, after) = _backward(plain, x), _backward(wide, x)
    assert torch.equal(found, expected)
    exact = copy.deepcopy(plain).to(torch.bfloat16).double()
    _, right = _backward(exact, x.bfloat16().double(), autocast=False)
    for ours, theirs, sums in zip(after, before, right, strict=True):
        assert ours.dtype == theirs.dtype
        rounding = 2**-8 * sums.abs() + 1e-5 * sums.abs().max()  # and what sums in fp32 are off by
        assert ((ours.double() - sums).abs() <= rounding).all()


def _backward(model: nn.Module, x: Tensor, autocast: bool = True) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    torch.manual_seed(1)
    y.backward(torch.randn_like(y, dtype=torch.bfloat16).to(y.dtype))
    return y.detach(), [g for g in (x.grad, *(p.grad for p in model.parameters())) if g is not None]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 16, 5, padding=2, groups=4),
        nn.Conv2d(16, 32, 5, padding=2, groups=16),
        nn.Conv2d(16, 16, 5, padding=2, groups=16, padding_mode="reflect"),
        nn.Conv2d(1, 1, 5),
    ],
    ids=["fast", "groups", "two of each", "reflect", "one channel"],
)
def test_other_layers_stay(layer: nn.Conv2d) -> None:
    arithmetic.widen_depthwise(nn.Sequential(layer), BF16, CPU)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize(
    ("precision", "device"), [("fp32", CPU), ("fp64", CPU), ("bf16", torch.device("cuda"))]
)
def test_only_bf16_on_cpus(precision: str, device: torch.device) -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 5, 2, 2, groups=32))
    arithmetic.widen_depthwise(model, SimpleNamespace(precision=precision), device)  # type: ignore[arg-type]
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("compiled", [False, True])
def test_a_trainer_has_them(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    network = {"model": "mobilenet_v3_small", "image_size": 32, "precision": "bf16", "compile": compiled}
    recipe = small_recipe(**network, epochs=1, steps=2)
    trainer = make_trainer(recipe)
    wide = [module for module in trainer.model.modules() if type(module).__name__ == "_Depthwise"]
    assert len(wide) == 10  # of 11 depthwise ones, all but the 3 × 3 of stride 1
    trainer.fit()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
