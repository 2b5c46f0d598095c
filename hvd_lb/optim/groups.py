"""Parameter groups: weight decay on everything except γ and β of batch norm (section 5.1 of the paper).

LARS and LAMB leave all vectors out, and from their trust ratios too, as timm and MLPerf do: a bias that begins at 0 has
no length to trust, and a norm's γ and β are few numbers of another kind.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def parameter_groups(
    model: nn.Module, weight_decay: float = 1e-4, *, vectors: bool = False
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: parameters with `weight_decay`, and those of batch norm without.

    With `vectors` these are all parameters that have one dimension, not counting those of size 1: biases, γ and β of
    any norm, scales of layers, class tokens.

    Batch norm is found by module type (BatchNorm1d, 2d, 3d, SyncBatchNorm and their subclasses), not by
    name. Each parameter appears once, in the model's order; one that batch norm shares with another
    module is not decayed. Frozen parameters are included, so that they may be unfrozen later. A group may
    be empty.
    """
    parameters = list(model.parameters())
    plain = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for parameter in module.parameters(recurse=False)
    }
    if vectors:
        plain |= {id(p) for p in parameters if _is_vector(p)}
    return [
        {"params": [p for p in parameters if id(p) not in plain], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in plain], "weight_decay": 0.0},
    ]


def _is_vector(parameter: Tensor) -> bool:
    return sum(size != 1 for size in parameter.shape) <= 1
