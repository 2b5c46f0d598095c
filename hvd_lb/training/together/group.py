"""Several virtual workers of a process computed together: one forward and backward of all their images.

A network computes each image by itself, with two exceptions: batch norm looks at all images of a virtual worker, and
dropout draws each worker's own random numbers. So in a group of workers these modules are called worker by worker, on
slices of the batch, and everything else once. Outputs, gradients and statistics are those of the workers apart, to
rounding. (Batch norm over slices is known as ghost batch norm: Hoffer et al. 2017, arXiv 1705.08741.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from hvd_lb.kernels.batch_norm import GroupBatchNorm


class Group:
    """The virtual workers whose images are in the forward under way: how many each has, and what it draws next."""

    def __init__(self, device: torch.device = torch.device("cpu")):  # noqa: B008 - it cannot be changed
        self.sizes: Sequence[int] = ()
        #: Of all workers at once, on a GPU that has it.
        self.batch_norm: GroupBatchNorm | None = None
        self._generator = (
            torch.cuda.default_generators[device.index or 0]
            if device.type == "cuda"
            else torch.default_generator
        )
        self._seeds: Sequence[int] = ()
        # The states of all workers, by the state of the first one, which is the generator's own between the modules.
        self._states: dict[bytes, list[Tensor | None]] = {}
        self._newest: list[Tensor | None] = []

    @property
    def several(self) -> bool:
        return len(self.sizes) > 1

    def begin(self, sizes: Sequence[int], seeds: Sequence[int]) -> None:
        """Before a forward of so many images of each worker; a worker's random numbers follow from its seed."""
        self.sizes, self._seeds = sizes, seeds
        self._states, self._newest = {}, [None] * len(sizes)
        for generator in {torch.default_generator, self._generator}:  # without a look at every kind of device
            generator.manual_seed(seeds[0])

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each worker's slice of a batch."""
        return x.split(list(self.sizes))

    def drawing(self, parts: Sequence[Tensor], draw: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """What `draw` makes of each worker's slice, with the next random numbers of that worker.

        Activation checkpointing draws again in backward. It puts the generator back to where it was, which is where the
        first worker was, and by that the others are found.
        """
        first = self._generator.get_state()
        before = self._states.get(_key(first))
        if before is None:
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "dropout is computed again in backward, with other random numbers: give torch.utils.checkpoint "
                    "preserve_rng_state=True"
                )
            before = self._states[_key(first)] = [first, *self._newest[1:]]
        outputs, after = [], list[Tensor | None]()
        for part, state, seed in zip(parts, before, self._seeds, strict=True):
            if state is None:
                self._generator.manual_seed(seed)
            else:
                self._generator.set_state(state)
            outputs.append(draw(part))
            after.append(self._generator.get_state())
        assert after[0] is not None
        self._generator.set_state(after[0])
        self._states[_key(after[0])] = self._newest = after
        return outputs


def _key(state: Tensor) -> bytes:
    return state.numpy().tobytes()


class Replaced:
    """Stands for a method of a module; copies and pickles of the module get the one that it had."""

    name = "forward"

    def __init__(self, module: nn.Module):
        self.module = module
        before: Any = getattr(module, self.name)
        self.original: Any = before.original if isinstance(before, Replaced) else before
        setattr(module, self.name, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, self.name)  # of its class: there is no other one yet when this is read


class _Drawing(Replaced):
    """The forward of a module that draws random numbers."""

    def __init__(self, module: nn.Module, group: Group):
        super().__init__(module)
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        if not (self.module.training and self._group.several):
            return self.original(x)
        parts = self._group.split(x)
        if getattr(self.module, "inplace", False):
            parts = tuple(part.clone() for part in parts)  # autograd refuses a slice
        return torch.cat(self._group.drawing(parts, self.original))


def draw_apart(model: nn.Module, group: Group) -> bool:
    """Lets the model's dropout draw for each worker of the group by itself; whether there is any."""
    drawing = [
        module
        for module in model.modules()
        if isinstance(module, _DropoutNd | StochasticDepth) and module.p and module is not model
    ]
    for module in drawing:
        _Drawing(module, group)
    return bool(drawing)
