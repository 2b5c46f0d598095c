"""Parameter groups: no weight decay on batch norm, by module type."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from hvd_lb.optim import SGD, parameter_groups
from hvd_lb.optim.make import make_optimizer
from hvd_lb.recipe import Recipe
from hvd_lb.training.models import build_model


class Norm(nn.BatchNorm2d):
    """A subclass, under a name that does not say bn."""


def test_every_batch_norm_and_nothing_else_is_undecayed() -> None:
    model = resnet18(num_classes=3)
    decayed, plain = parameter_groups(model, 1e-4)
    named = dict(model.named_parameters())
    norms = {f"{name}.{kind}" for name, m in model.named_modules() for kind in ("weight", "bias")
             if isinstance(m, nn.BatchNorm2d)}  # fmt: skip
    assert [id(p) for p in plain["params"]] == [id(p) for name, p in named.items() if name in norms]
    assert [id(p) for p in decayed["params"]] == [id(p) for name, p in named.items() if name not in norms]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (1e-4, 0.0)


def test_types_not_names() -> None:
    model = nn.ModuleDict(
        {
            "bn": nn.Linear(2, 2),
            "linear": Norm(2),
            "sync": nn.SyncBatchNorm(2),
            "one": nn.BatchNorm1d(2),
            "layer": nn.LayerNorm(2),
        }
    )
    _, plain = parameter_groups(model)
    expected = [*model["linear"].parameters(), *model["sync"].parameters(), *model["one"].parameters()]
    assert [id(p) for p in plain["params"]] == [id(p) for p in expected]


def test_shared_frozen_and_affineless_parameters() -> None:
    linear = nn.Linear(2, 2)
    model = nn.Sequential(linear, nn.BatchNorm1d(2, affine=False), linear, nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    decayed, plain = parameter_groups(model)
    assert [id(p) for p in decayed["params"]] == [id(linear.weight), id(linear.bias)]
    assert len(plain["params"]) == 2


def test_a_model_without_batch_norm_makes_an_empty_group() -> None:
    model = nn.Linear(2, 2)
    optimizer = SGD(parameter_groups(model))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]


@pytest.mark.parametrize(
    ("name", "undecayed"),
    [
        ("resnet18", {"BatchNorm2d"}), ("densenet121", {"BatchNorm2d"}), ("googlenet", {"BatchNorm2d"}),
        ("efficientnet_b0", {"BatchNorm2d"}), ("mobilenet_v3_small", {"BatchNorm2d"}), ("resnet8", {"BatchNorm2d"}),
        ("vgg11", set()), ("vgg11_bn", {"BatchNorm2d"}), ("squeezenet1_1", set()),
        ("vit_b_16", set()), ("swin_t", set()), ("convnext_tiny", set()),
    ],
)  # fmt: skip
def test_of_every_architecture_batch_norm_alone_is_undecayed(name: str, undecayed: set[str]) -> None:
    """LayerNorm, biases, embeddings of positions and layer scales decay, as the recipe says; none is left out."""
    with torch.device("meta"):
        model = build_model(name, 3, seed=0)
    owner = {id(p): type(m).__name__ for m in model.modules() for p in m.parameters(recurse=False)}
    decayed, plain = parameter_groups(model, 0.01)
    assert {owner[id(p)] for p in plain["params"]} == undecayed
    assert not undecayed & {owner[id(p)] for p in decayed["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(owner)
    if name in ("vit_b_16", "swin_t"):
        assert "LayerNorm" in {owner[id(p)] for p in decayed["params"]}


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "swin_t", "convnext_tiny"])
def test_lars_and_lamb_leave_every_vector_alone(name: str, optimizer: str) -> None:
    """Biases, norms, and what torchvision keeps as (C, 1, 1) or (1, 1, C): neither decay nor a trust ratio."""
    with torch.device("meta"):
        model = build_model(name, 3, seed=0)
    made = make_optimizer(Recipe(model=name, optimizer=optimizer, weight_decay=0.01), model, 0.1)
    trusted, plain = made.param_groups
    assert (trusted["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    key = {"lars": "trust_coefficient", "lamb": "trust"}[optimizer]
    assert trusted[key]
    assert not plain[key]
    names = {id(p): full for full, p in model.named_parameters()}
    assert all(p.squeeze().ndim > 1 for p in trusted["params"])
    vectors = {names[id(p)] for p in plain["params"]}
    assert len(vectors) + len(trusted["params"]) == len(names)
    assert {
        full for full in names.values() if full.endswith(("bias", "layer_scale", "class_token"))
    } <= vectors
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    assert {f"{full}.weight" for full, m in model.named_modules() if isinstance(m, norms)} <= vectors


def test_without_gradients_a_step_shrinks_what_decays_and_nothing_else() -> None:
    """By η λ of itself: the recipe's numbers arrive in the optimizer."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.PReLU())
    for p in model.parameters():
        nn.init.constant_(p, 2.0)
        p.grad = torch.zeros_like(p)
    recipe = Recipe(model="resnet8", weight_decay=0.05, momentum=0.0, nesterov=False)
    make_optimizer(recipe, model, 0.5).step()
    for name, p in model.named_parameters():
        expected = torch.full_like(p, 2.0 if name.startswith("1.") else 2.0 - 0.5 * 0.05 * 2.0)
        torch.testing.assert_close(p.detach(), expected)
