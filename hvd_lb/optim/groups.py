"""Parameter groups: weight decay on everything except γ and β of batch norm (section 5.1 of the paper)."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def parameter_groups(model: nn.Module, weight_decay: float = 1e-4) -> list[dict[str, Any]]:
    """Two groups for an optimizer: parameters with `weight_decay`, and those of batch norm without.

    Batch norm is found by module type (BatchNorm1d, 2d, 3d, SyncBatchNorm and their subclasses), not by
    name. Each parameter appears once, in the model's order; one that batch norm shares with another
    module is not decayed. Frozen parameters are included, so that they may be unfrozen later. A group may
    be empty.
    """
    normalising = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for parameter in module.parameters(recurse=False)
    }
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in normalising], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in normalising], "weight_decay": 0.0},
    ]
