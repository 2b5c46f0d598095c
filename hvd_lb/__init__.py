"""hvd-lb: large-minibatch training on Horovod. The recipe fixes the mathematics, the hardware only fixes the speed.

In a loop of your own:

    import hvd_lb as lb
    lb.init()
    opt = lb.DistributedOptimizer(lb.SGD(lb.parameter_groups(model), lr=0.1), model, schedule=lb.Schedule(...))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvd_lb.exact.fixed_point import FixedPointOverflow
    from hvd_lb.optim import SGD, DistributedOptimizer, parameter_groups
    from hvd_lb.schedule import Schedule, scaled_learning_rate
    from hvd_lb.world import current, init, shutdown

    __version__: str

__all__ = [
    "SGD",
    "DistributedOptimizer",
    "FixedPointOverflow",
    "Schedule",
    "current",
    "init",
    "parameter_groups",
    "scaled_learning_rate",
    "shutdown",
]

# Imported when first used: `hvd-lb --help` need not wait for torch.
_HOMES = {
    "SGD": "hvd_lb.optim",
    "DistributedOptimizer": "hvd_lb.optim",
    "FixedPointOverflow": "hvd_lb.exact.fixed_point",
    "parameter_groups": "hvd_lb.optim",
    "Schedule": "hvd_lb.schedule",
    "scaled_learning_rate": "hvd_lb.schedule",
    "current": "hvd_lb.world",
    "init": "hvd_lb.world",
    "shutdown": "hvd_lb.world",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("hvd-lb")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
