"""Initialisation as in section 5.1 of the paper, and names."""

import pytest
import torch
from torch import nn

from hvd_lb.errors import UserError
from hvd_lb.training.models import (
    _without_memory,
    build_model,
    check_input,
    last_weight,
    model_names,
    parameter_count,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "resnet18", "resnet20"])
def test_the_papers_initialisation(name: str) -> None:
    model = build_model(name, 100, seed=0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)  # type: ignore[union-attr, operator]
    assert not model.fc.bias.any()  # type: ignore[union-attr, operator]
    last = "bn3" if name == "resnet50" else "bn2"
    gammas = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(bool(gamma.any()) != n.endswith(last) for n, gamma in gammas.items())
    assert all(g.all() for g in gammas.values() if g.any())
    one = build_model(name, 100, seed=0, zero_gamma=False)
    assert all(m.weight.all() for m in one.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_stride_is_on_the_3x3_convolution() -> None:
    assert build_model("resnet50", 10, seed=0).layer2[0].conv2.stride == (2, 2)  # type: ignore[index, union-attr]


def test_small_resnets_have_the_published_sizes() -> None:
    """He et al. 2016, table 6: 0.27 M and 0.85 M parameters."""
    assert parameter_count("resnet20", 10) / 1e6 == pytest.approx(0.27, abs=0.005)
    assert parameter_count("resnet56", 10) / 1e6 == pytest.approx(0.855, abs=0.01)
    assert parameter_count("resnet50", 1000) == 25_557_032


@pytest.mark.parametrize("name", ["vit_b_16", "googlenet", "inception_v3", "efficientnet_b0", "mobilenet_v2"])
def test_other_architectures_return_logits(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, 7, seed=0).train()
        size = 299 if name == "inception_v3" else 224
        assert model(torch.empty(2, 3, size, size)).shape == (2, 7)


def test_batch_norm_momentum_is_the_recipes() -> None:
    model = build_model("resnet20", 10, seed=0, bn_momentum=0.03)
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.03}


def test_an_unknown_model_names_the_nearest() -> None:
    assert "resnet152" in model_names()
    with pytest.raises(UserError, match="did you mean 'resnet50'"):
        build_model("resnet-50", 10, seed=0)


@pytest.mark.parametrize(
    ("name", "size", "images", "reason"),
    [
        ("resnet18", 32, 1, "more than 1 value per channel"),
        ("vit_b_16", 32, 2, "Expected 224"),
        ("googlenet", 8, 2, "too small"),
        ("regnet_y_400mf", 32, 1, "more than 1 value per channel"),
    ],
)
def test_input_a_network_cannot_take(name: str, size: int, images: int, reason: str) -> None:
    with pytest.raises(UserError, match=rf"{name}.*{size}×{size}.*microbatches of {images}.*{reason}"):
        check_input(name, 10, size, images)


@pytest.mark.parametrize(("name", "size", "images"), [("resnet8", 8, 1), ("regnet_y_400mf", 32, 2)])
def test_input_a_network_can_take(name: str, size: int, images: int) -> None:
    check_input(name, 10, size, images)


@pytest.mark.long
def test_the_last_layer_has_a_row_for_each_output() -> None:
    for name in model_names():
        assert len(_without_memory(name, 7).state_dict()[last_weight(name)]) == 7, name
