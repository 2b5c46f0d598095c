"""Parameter groups: no weight decay on batch norm, by module type."""

import torch
from torch import nn
from torchvision.models import resnet18

from hvd_lb.optim import SGD, parameter_groups


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
