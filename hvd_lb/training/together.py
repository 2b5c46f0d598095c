"""Several virtual workers of a process computed together: one forward and backward of all their images.

A network computes each image by itself, with two exceptions: batch norm looks at all images of a virtual worker, and
dropout draws each worker's own random numbers. So in a group of workers these modules are called worker by worker, on
slices of the batch, and everything else once. Outputs, gradients and statistics are those of the workers apart, to
rounding. (Batch norm over slices is known as ghost batch norm: Hoffer et al. 2017, arXiv 1705.08741.)

`strange` finds by numbers whether that is all there is to a network. `GroupSize` finds out how many workers to take.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from hvd_lb.kernels.batch_norm import GroupBatchNorm
from hvd_lb.machine.limits import available_memory
from hvd_lb.training.models import batch_norms

# A batch of so many images keeps any device busy: groups that are found by trying are not larger.
MOST_IMAGES = 256
# Of each size: in the first runs of a new shape kernels are chosen, and graphs recorded; of the others, which are so
# many or take so many seconds together, the fastest counts.
_FIRST_RUNS, _RUNS, _SECONDS = 2, 8, 0.2
# A larger group has to be faster by so much.
_GAIN = 0.03
# What backward keeps is most of the memory that a forward takes, not all.
_MORE_MEMORY = 1.5
# Rounding is far below this, and what mixes workers far above.
_TOLERANCE = 1e-3
# Magnitudes below are rounding themselves, as of batch norm's outputs where all values are equal.
_NOTHING = 1e-7


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


@torch.no_grad()
def strange(model: nn.Module, group: Group, shape: Sequence[int], like: Tensor) -> str:
    """Why two workers together would not be the two apart; empty where they are.

    Each gets a few images of noise (`shape`: n, 3, S, S; dtype, device and memory order as of `like`), one darker than
    the other, and every module's outputs are compared. The model is in training mode; its buffers are left as they
    were. One that a forward changes, other than of batch norm, would be changed once for all workers, and not by each.
    """
    of_batch_norm = batch_norms(model)
    kept = [
        (f"{name}.{of}".lstrip("."), module, of, buffer, buffer.clone())
        for name, module in model.named_modules()
        if module not in of_batch_norm
        for of, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        found = _strange(model, group, shape, like)
        changed = [name for name, module, of, _, before in kept if not _equal(module._buffers[of], before)]
    finally:
        for _, module, of, buffer, before in kept:
            module._buffers[of] = buffer.copy_(before)
    return found or (f"its buffer {changed[0]} is changed by each forward" if changed else "")


def _equal(now: Tensor | None, before: Tensor) -> bool:
    return now is not None and torch.equal(now, before)


def _strange(model: nn.Module, group: Group, shape: Sequence[int], like: Tensor) -> str:
    found = _differs(model, model, group, shape, like)
    if found and like.dtype != torch.float64:
        # Of a few values that are nearly equal (small maps, few images) batch norm makes any rounding large: in fp64 it
        # is still small, and what mixes images is not.
        tensors = *model.named_parameters(), *model.named_buffers()
        wide = {name: of.double() for name, of in tensors if of.is_floating_point()}
        forward = partial(functional_call, model, wide)
        with suppress(RuntimeError):  # another dtype within it, or no memory: what was found counts
            found = _differs(model, forward, group, shape, like.double())
    return found


def _differs(
    model: nn.Module, forward: Callable[..., Any], group: Group, shape: Sequence[int], like: Tensor
) -> str:
    noise = torch.Generator().manual_seed(0)
    parts = [(torch.randn(*shape, generator=noise) * scale).to(like) for scale in (1.0, 3.0)]
    seeds = (1, 2)
    apart = []
    for part, seed in zip(parts, seeds, strict=True):
        group.begin([len(part)], [seed])
        apart.append(_magnitudes(model, forward, part))
    group.begin([len(part) for part in parts], seeds)
    try:
        together = _magnitudes(model, forward, torch.cat(parts))
    except (RuntimeError, ValueError) as error:
        return f"it fails on two at a time ({' '.join(str(error).split())})"
    for name, calls in together.items():
        each = [found.get(name, []) for found in apart]
        if not any(each):  # its output is as long as these are many, by chance
            continue
        if {len(calls), *map(len, each)} != {len(calls)}:
            return f"its module {name} is called more often for some images than for others"
        expected = [torch.cat(of) for of in zip(*each, strict=True)]
        for one, other in zip(calls, expected, strict=True):
            if not (one - other).abs().max() <= _TOLERANCE * (other.abs().max() + _NOTHING):
                return f"its module {name or 'as a whole'} mixes images, or draws random numbers of its own"
    return ""


def _magnitudes(model: nn.Module, forward: Callable[..., Any], x: Tensor) -> dict[str, list[Tensor]]:
    """Mean magnitude of each image in the outputs of every module, by its name, call by call."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, tuple):  # attention, and its weights
                output = output[0]
            if isinstance(output, Tensor) and output.dim() and len(output) == len(x):
                found.setdefault(name, []).append(output.double().abs().flatten(1).mean(1).cpu())

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        forward(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class GroupSize:
    """How many of a process's `workers`, of `images` each, are computed together.

    That is the number `given`; or the fastest of several that are tried in the first steps, as far as there is `room`
    for the bytes that backward keeps. `speeds` then has the images per second of each. `why` says why no group is made.

    On a CPU sizes take turns, so that what else a machine does meanwhile meets all of them. On a GPU, which is ours
    alone and where each size may record graphs of its own, they come one after the other.
    """

    def __init__(
        self,
        workers: range,
        given: int | None,
        *,
        images: int,
        device: torch.device,
        room: Callable[[], float] = lambda: math.inf,
        why: str = "",
    ):
        count = len(workers)
        self.size = max(1, min(given or 1, count))
        self.speeds: dict[int, float] = {}
        self.why = why
        self._first, self._images, self._device, self._room = workers.start, images, device, room
        halves = {-(-count // (1 << times)) for times in range(count.bit_length())}
        larger = sorted(size for size in halves if 1 < size <= MOST_IMAGES / images)
        # The seconds of each run, by the size that is tried.
        self._runs: dict[int, list[float]] = (
            {size: [] for size in [1, *larger]} if larger and not given else {}
        )
        self._kept = 0  # bytes of one worker

    @property
    def searching(self) -> bool:
        return bool(self._runs)

    @property
    def most(self) -> int:
        """The largest that may come."""
        return max([self.size, *self._runs])

    def groups(self, workers: Sequence[int]) -> Iterator[list[int]]:
        """The `workers` of a step (a short one has not all) in groups, each of the size that is the right one then.

        A group begins at a multiple of its size, counted from the process's first worker, once that is settled.
        """
        rest = list(workers)
        while rest:
            if self.searching:
                self._choose(len(rest))
                group = rest[: self.size]
            else:
                place = (rest[0] - self._first) // self.size
                group = [worker for worker in rest if (worker - self._first) // self.size == place]
            yield group
            del rest[: len(group)]

    def _choose(self, most: int) -> None:
        """Which size of at most so many workers is tried next: of those that are not known the one with the fewest
        runs, or the smallest.
        """
        sizes = [size for size in self._runs if size <= most]
        unknown = [size for size in sizes if not self._known(size)]
        in_turns = self._device.type == "cpu"
        self.size = min(
            unknown, key=lambda size: (in_turns and len(self._runs[size]), size), default=max(sizes)
        )
        if self.size > 1 and not self._runs[self.size] and not self._fits(self.size):
            self.drop(self.size)
            self._choose(most)

    def _known(self, size: int) -> bool:
        counted = self._runs[size][_FIRST_RUNS:]
        return len(counted) >= _RUNS and sum(counted) >= _SECONDS

    def drop(self, least: int) -> None:
        """There is no room for groups of so many workers or more, of several."""
        self._runs = {size: runs for size, runs in self._runs.items() if size < max(least, 2)}

    @contextmanager
    def timed(self, images: int) -> Iterator[None]:
        """Around forward and backward of a group with so many images."""
        if not self.searching or images != self.size * self._images:
            yield
            return
        self._wait()
        began = time.perf_counter()
        with self._kept_noted() if not self._kept else nullcontext():
            yield
        self._wait()
        if self.size in self._runs:
            self._runs[self.size].append(time.perf_counter() - began)
            if all(map(self._known, self._runs)):
                self._settle()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _settle(self) -> None:
        self.speeds = {
            size: size * self._images / min(runs[_FIRST_RUNS:]) for size, runs in self._runs.items()
        }
        fast = max(self.speeds.values()) * (1 - _GAIN)
        self.size = min(size for size, speed in self.speeds.items() if speed >= fast)
        self._runs = {}

    def _fits(self, size: int) -> bool:
        return size * self._kept * _MORE_MEMORY <= self._room()

    @contextmanager
    def _kept_noted(self) -> Iterator[None]:
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # itself would keep an output alive, which keeps it

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self._kept = sum(storages.values())


def room_for_groups(device: torch.device, processes_here: int) -> float:
    """Bytes that a process may take for what backward keeps of a group, as one of several on this machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what is kept then is in use, or belongs to recorded graphs
        return torch.cuda.mem_get_info(device)[0]
    try:
        return available_memory() / processes_here
    except OSError:  # no Linux
        return math.inf
