"""The optimizer of a recipe. A further one begins here: a recipe field names it, and this makes it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from hvd_lb.optim.groups import parameter_groups
from hvd_lb.optim.lamb import LAMB
from hvd_lb.optim.lars import LARS
from hvd_lb.optim.sgd import SGD
from hvd_lb.optim.state_dict import group_sizes
from hvd_lb.recipe import Recipe


def make_optimizer(recipe: Recipe, model: nn.Module, learning_rate: float, saved: Any = None) -> Optimizer:
    """On the parameters of `model`, as the recipe says; `learning_rate` is that of the first step.

    `saved` is the skeleton of the state that it is to load, if any.
    """
    vectors = recipe.optimizer != "sgd"
    groups = parameter_groups(model, recipe.weight_decay, vectors=vectors)
    if vectors and saved and group_sizes(saved) != [len(group["params"]) for group in groups]:
        groups = parameter_groups(model, recipe.weight_decay)  # a run of an older version goes on as it began
    _, plain = groups
    if recipe.optimizer == "lamb":
        plain["trust"] = False  # as below
        betas = recipe.momentum, recipe.beta2
        return LAMB(groups, learning_rate, betas, recipe.epsilon)
    options: dict[str, Any] = {
        "lr": learning_rate,
        "momentum": recipe.momentum,
        "nesterov": recipe.nesterov,
        "form": recipe.momentum_form,
        "momentum_correction": recipe.momentum_correction,
    }
    if recipe.optimizer == "lars":  # biases and norms are left alone, as in MLPerf
        plain["trust_coefficient"] = 0.0
        return LARS(groups, trust_coefficient=recipe.trust_coefficient, **options)
    # The plain form where bits are promised, and where numbers are compared with the paper's formula (fp64).
    fused = recipe.momentum_correction and not recipe.reproducible and recipe.precision != "fp64"
    return SGD(groups, **options, fused=fused)
