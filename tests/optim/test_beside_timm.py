"""LARS and LAMB beside timm's, which share nothing with ours: `pip install timm`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hvd_lb.optim import parameter_groups
from hvd_lb.optim.make import make_optimizer
from hvd_lb.recipe import Recipe
from hvd_lb.training.models import build_model

pytestmark = pytest.mark.long
timm_optim = pytest.importorskip("timm.optim")
RATES = (0.5, 0.02, 2.0, 2.0, 0.3)


@pytest.mark.parametrize(
    ("fields", "theirs", "options"),
    [
        (
            {"optimizer": "lars"},
            "Lars",
            {"momentum": 0.9, "nesterov": True, "trust_coeff": 0.001, "eps": 0.0},
        ),
        (
            {"optimizer": "lars", "nesterov": False, "momentum_form": 9, "trust_coefficient": 0.02},
            "Lars",
            {"momentum": 0.9, "trust_coeff": 0.02, "eps": 0.0},
        ),
        (
            {"optimizer": "lamb", "momentum": 0.8, "beta2": 0.95, "epsilon": 1e-4},
            "Lamb",
            {"betas": (0.8, 0.95), "eps": 1e-4, "max_grad_norm": None},
        ),
    ],
)
@pytest.mark.parametrize("name", ["resnet8", "vit_b_16"])
def test_the_same_weights_after_every_step(
    fields: dict[str, Any], theirs: str, options: dict[str, Any], name: str
) -> None:
    """A whole recipe's optimizer on a whole network, γ of some norms and biases 0 at first, against timm's groups."""
    model = build_model("resnet8", 3, seed=0) if name == "resnet8" else small_vit()
    model = model.double()
    twin = copy.deepcopy(model)
    ours = make_optimizer(Recipe(model=name, weight_decay=0.01, **fields), model, RATES[0])
    groups = timm_optim.param_groups_weight_decay(twin, 0.01, no_weight_decay_list=["class_token"])
    timms = getattr(timm_optim, theirs)(groups, lr=RATES[0], **options)
    for step, rate in enumerate(RATES):
        torch.manual_seed(step)
        for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        for optimizer in (ours, timms):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        for (of, mine), its in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(
                mine, its, rtol=1e-9, atol=1e-12, msg=lambda text, of=of: f"{of}: {text}"
            )


def small_vit() -> torch.nn.Module:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
    )


def test_the_same_parameters_are_left_alone() -> None:
    for model in (build_model("resnet8", 3, seed=0), small_vit()):
        names = {id(p): name for name, p in model.named_parameters()}
        of_ours, of_timm = (
            {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
            for groups in (
                parameter_groups(model, 0.01, vectors=True),
                timm_optim.param_groups_weight_decay(model, 0.01, no_weight_decay_list=["class_token"]),
            )
        )
        assert of_ours == of_timm
