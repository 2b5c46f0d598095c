"""Running statistics of batch norm: one update per step over the virtual workers (docs/design.md 7).

    r ← (1 − m) r + (m / k_t) Σ_j s_j        s_j: batch statistics of virtual worker j, k_t: workers with images

torch updates once per forward, which with several virtual workers on a process is another average. Here a forward
only leaves s_j in the layer's buffers (momentum 1); `after_forward` adds it up and puts back what was published last. A
layer that went forward more than once gives the mean of its forwards. One that did not train in a step (frozen by
`eval()`, or not used) keeps its r. `momentum=None` is torch's cumulative average: m = 1/t in the t-th update.

The update is linear. So in the float mode each process keeps its own share R_p, which sees only its own workers, and
r = Σ_p R_p is formed when somebody looks (`publish`). Rounding is not linear: in the reproducible mode Σ_j s_j is added
in fixed point at every step, and every process has the whole of r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from hvd_lb.exact.digest import integer_digest
from hvd_lb.exact.fixed_point import FixedPointOverflow, FixedPointSum, offsets_of
from hvd_lb.optim.exchange.buckets import gathering_dtype
from hvd_lb.training.models import batch_norms
from hvd_lb.training.together.group import Group, Replaced
from hvd_lb.world import World

T = TypeVar("T")

# How many forwards went through a layer, and the statistics of all but the last one, by forward; or by worker too.
_Noted = tuple[int, list[list[Tensor]], list[list[list[Tensor]]]]


def allow_single_values(model: nn.Module) -> None:
    """Lets batch norm train on one value per channel, where torch raises: one image, and a map of 1 × 1 pixel.

    The variance of one value is 0, so the layer gives β, nothing flows back through it, and its statistics are the
    value and 0.
    """
    for layer in batch_norms(model):
        layer.forward = MethodType(_forward_of_any_size, layer)  # type: ignore[method-assign]


def _forward_of_any_size(layer: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    if not layer.training or x.numel() > x.shape[1]:
        return type(layer).forward(layer, x)
    if layer.momentum:
        _note_single(x, layer.running_mean, layer.running_var)  # type: ignore[arg-type]
    return _of_single_values(layer, x)


@torch.no_grad()
def _note_single(x: Tensor, mean: Tensor, variance: Tensor) -> None:
    mean.copy_(x.flatten())
    variance.zero_()


def _of_single_values(layer: _BatchNorm, x: Tensor) -> Tensor:
    zeros, ones = torch.zeros_like(layer.running_mean), torch.ones_like(layer.running_var)  # type: ignore[arg-type]
    return nn.functional.batch_norm(x * 0.0, zeros, ones, layer.weight, layer.bias, training=False)


def running_statistics(
    model: nn.Module,
    world: World,
    reproducible_terms: int | None,
    group: Group | None = None,
    whole: bool = False,
) -> RunningStatistics:
    """Those of the float mode, or of the reproducible one with at most so many microbatches a sum.

    With `whole` every process has the whole of r after each step, and not a share: for one that may be lost.
    """
    if not batch_norms(model):
        return RunningStatistics(model, world, group)
    if reproducible_terms is None:
        return (WholeStatistics if whole else RunningStatistics)(model, world, group)
    return ReproducibleStatistics(model, world, reproducible_terms, group)


class _Forward(Replaced):
    """A layer's `forward`, which leaves the statistics of its batch in the buffers, and counts.

    Of several workers it is called for each by itself, and their statistics are kept here.
    """

    def __init__(self, layer: _BatchNorm, group: Group):
        super().__init__(layer)
        self.layer = layer
        self.count = 0
        self._group = group
        # By forward: those in the buffers alone are the last one's. With several workers by forward and worker.
        self._earlier: list[list[Tensor]] = []
        self._of_workers: list[list[list[Tensor]]] = []

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not (layer.training and layer.track_running_stats):
            return self.original(x)
        # Activation checkpointing goes forward again, in backward.
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if self._group.several:
            return self._worker_by_worker(x, again)
        momentum = layer.momentum
        # A module's own way to set something takes ten calls to find out that it is no parameter.
        put = setattr if torch.compiler.is_compiling() else object.__setattr__
        if again:
            put(layer, "momentum", 0.0)
        else:
            if self.count:
                self._earlier.append([buffer.clone() for buffer in self.buffers()])
            self.count += 1
            put(layer, "momentum", 1.0)
        try:
            return self.original(x)
        finally:
            put(layer, "momentum", momentum)

    def _worker_by_worker(self, x: Tensor, again: bool) -> Tensor:
        layer, outputs, statistics = self.layer, [], []
        sizes, kernels = self._group.sizes, self._group.batch_norm
        if len(set(sizes)) == 1 and x.numel() > len(sizes) * x.shape[1]:
            if torch.compiler.is_compiling():
                return self._at_once(x, again)
            if kernels:
                y, *found = kernels(x, len(sizes), layer.weight, layer.bias, layer.eps)
                self._keep(found, again)
                return y
        for part in self._group.split(x):
            mean, variance = (torch.zeros_like(buffer) for buffer in self.buffers())
            if part.numel() > part.shape[1]:
                outputs.append(
                    nn.functional.batch_norm(
                        part,
                        mean,
                        variance,
                        layer.weight,
                        layer.bias,
                        training=True,
                        momentum=1.0,
                        eps=layer.eps,
                    )
                )
            else:
                _note_single(part, mean, variance)
                outputs.append(_of_single_values(layer, part))
            statistics.append([mean, variance])
        self._keep(zip(*statistics, strict=True), again)
        return torch.cat(outputs)

    def _keep(self, found: Iterable[Iterable[Tensor]], again: bool) -> None:
        """The means, and the variances, by worker."""
        if not again:
            self._of_workers.append([list(of_worker) for of_worker in zip(*found, strict=True)])
            self.count += 1

    def _at_once(self, x: Tensor, again: bool) -> Tensor:
        """The same in a compiled graph, which makes a few loops of this, and of slices as many for each worker."""
        layer = self.layer
        parts = x.unflatten(0, (len(self._group.sizes), -1))
        of_channels = [1, 1, -1, *[1] * (parts.dim() - 3)]
        wide = parts.to(torch.promote_types(parts.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, [1, *range(3, parts.dim())], correction=0, keepdim=True)
        factor = torch.rsqrt(variance + layer.eps)
        if layer.weight is not None:
            factor = factor * layer.weight.view(of_channels)
        y = (wide - mean) * factor
        if layer.bias is not None:
            y = y + layer.bias.view(of_channels)
        values = x.numel() // mean.numel()
        unbiased = variance.detach() * (values / (values - 1))
        self._keep((mean.detach().flatten(1), unbiased.flatten(1)), again)
        return y.to(x.dtype).flatten(0, 1)

    def buffers(self) -> list[Tensor]:
        return [self.layer.running_mean, self.layer.running_var]  # type: ignore[list-item]

    def statistics(self) -> list[list[Tensor]]:
        """By worker, mean and variance of the forwards since `discard`: of one, or the mean of several."""
        by_forward = self._of_workers or [[forward] for forward in (*self._earlier, self.buffers())]
        return [_mean(forwards) for forwards in zip(*by_forward, strict=True)]

    def noted(self) -> _Noted:
        return self.count, [*self._earlier], [*self._of_workers]

    def note(self, noted: _Noted) -> None:
        self.count, self._earlier, self._of_workers = noted[0], [*noted[1]], [*noted[2]]

    def discard(self) -> None:
        self.count = 0
        self._earlier.clear()
        self._of_workers.clear()


class _Load(Replaced):
    """A layer's part of `load_state_dict`, which tells when it had the layer's statistics."""

    name = "_load_from_state_dict"

    def __init__(self, layer: _BatchNorm, loaded: Callable[[], None]):
        super().__init__(layer)
        self._loaded = loaded

    def __call__(self, state_dict: Mapping[str, Any], prefix: str, *more: Any) -> None:
        self.original(state_dict, prefix, *more)
        if f"{prefix}running_mean" in state_dict:
            self._loaded()


def _mean(forwards: Sequence[list[Tensor]]) -> list[Tensor]:
    if len(forwards) == 1:
        return forwards[0]
    wide = [[tensor.to(gathering_dtype(tensor)) for tensor in forward] for forward in forwards]
    return [torch.stack(tensors).mean(0) for tensors in zip(*wide, strict=True)]


class RunningStatistics:
    """Owns the running mean and variance of a model that trains under it; takes them over as they are now.

    `group` says whose images are in a forward; without it they are of one virtual worker.

    Statistics that `load_state_dict` of the model, or of a part of it, puts into a layer are r from there on. Whoever
    changes buffers in another way calls `adopt`. All processes do either alike.

    A layer takes part in a step with all of a process's microbatches or with none, alike on all processes; else
    `RuntimeError` names it. `TypeError` for SyncBatchNorm, which mixes virtual workers, and for lazy layers.
    """

    def __init__(self, model: nn.Module, world: World, group: Group | None = None):
        self._world = world
        group = group or Group()
        layers = batch_norms(model)
        self._names = [name for name, module in model.named_modules() if module in layers]
        for name, layer in zip(self._names, layers, strict=True):
            if isinstance(layer, nn.SyncBatchNorm):
                raise TypeError(
                    f"{name} is a SyncBatchNorm, whose statistics are of all processes; use BatchNorm"
                )
            if is_lazy(layer.running_mean):  # type: ignore[arg-type]
                raise TypeError(f"{name} has no shape yet (a lazy module): run one forward first")
        self._layers = layers
        self._forwards = [_Forward(layer, group) for layer in layers]
        # Of each layer: since it was taken over, and what its num_batches_tracked said then.
        self._updates, self._before = [0] * len(self._layers), [0] * len(self._layers)
        self._used = [True] * len(self._layers)  # when it could be told last
        self._added = [0] * len(self._layers)  # microbatches since the last update
        self._microbatches = 0
        self._started = False
        self._sums = [torch.zeros_like(buffer, dtype=gathering_dtype(buffer)) for buffer in self._buffers()]
        self._share = [torch.zeros_like(total) for total in self._sums]
        self._published = [buffer.clone() for buffer in self._buffers()]
        # Of r, divided among the processes as r is; none unless `keep_average` was called.
        self._averages: list[Tensor] = []
        self._published_averages: list[Tensor] = []
        for index, layer in enumerate(layers):
            _Load(layer, partial(self._adopt, [index]))
        self.adopt()

    def _buffers(self) -> list[Tensor]:
        return [buffer for forward in self._forwards for buffer in forward.buffers()]

    def adopt(self) -> None:
        """Take the layers' buffers (equal on all processes: fresh, loaded or just published) as r."""
        self._adopt(list(range(len(self._layers))))

    @torch.no_grad()
    def _adopt(self, layers: list[int]) -> None:
        """Those of these layers."""
        for index in layers:
            self._before[index] = int(self._layers[index].num_batches_tracked)  # type: ignore[arg-type]
            self._updates[index] = 0
            self._forwards[index].discard()
        if layers:
            buffers = [buffer for index in layers for buffer in self._forwards[index].buffers()]
            torch._foreach_copy_(_of(layers, self._published), buffers)
            self._divide(buffers, _of(layers, self._share))

    def _divide(self, whole: list[Tensor], shares: list[Tensor]) -> None:
        """Gives this process its share of what all processes have."""
        for share, of in zip(shares, whole, strict=True):
            if self._world.rank == 0:
                share.copy_(of)
            else:
                share.zero_()

    @torch.no_grad()
    def keep_average(self) -> None:
        """Keep an average of r from here on, which `average` moves; it begins as r is."""
        self._averages = [share.clone() for share in self._share]
        self._published_averages = [buffer.clone() for buffer in self._published]

    @torch.no_grad()
    def average(self, share: float) -> None:
        """Moves it by this share of the way to r: linear, and so each process moves its own share."""
        if self._averages:
            torch._foreach_lerp_(self._averages, self._share, share)

    def averaged(self) -> dict[str, Tensor]:
        """The average as it was published last, by the buffers' names in the model; not copied."""
        names = [f"{name}.{of}".lstrip(".") for name in self._names for of in ("running_mean", "running_var")]
        return dict(zip(names, self._published_averages, strict=bool(self._published_averages)))

    @torch.no_grad()
    def adopt_average(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this (equal on all processes) as the average."""
        for name, average in self.averaged().items():
            average.copy_(tensors[name])
        self._divide(self._published_averages, self._averages)

    @torch.no_grad()
    def after_forward(self, weight: float = 1.0) -> None:
        """Add the statistics, times `weight`, of the microbatches that just went forward in training mode."""
        trained = [index for index, forward in enumerate(self._forwards) if forward.count]
        self._microbatches += 1
        if not trained:
            return
        for index in trained:
            self._added[index] += 1
        for of_worker in zip(*(self._forwards[index].statistics() for index in trained), strict=True):
            self._add(trained, [part for of_layer in of_worker for part in of_layer], weight)
        self._put_back(trained)

    def digest(self) -> Tensor:
        """`integer_digest` of the statistics of the microbatches that just went forward, worker by worker."""
        trained = [forward for forward in self._forwards if forward.count]
        parts = [part for forward in trained for of_worker in forward.statistics() for part in of_worker]
        return integer_digest(parts).cpu()

    @torch.no_grad()
    def forget_forward(self) -> None:
        """Leave the microbatches that just went forward out of what is added up."""
        if trained := [index for index, forward in enumerate(self._forwards) if forward.count]:
            self._put_back(trained)

    def noted(self) -> list[_Noted]:
        """What the forwards since `forget_forward` have left behind besides the values of tensors, for `note`."""
        return [forward.noted() for forward in self._forwards]

    def note(self, noted: list[_Noted]) -> None:
        """The same kernels have run again, on the same tensors, without these forwards being called."""
        for forward, of in zip(self._forwards, noted, strict=True):
            forward.note(of)

    def _put_back(self, trained: list[int]) -> None:
        """The buffers as they were before the forwards since they were put back last."""
        # Backward does not use the buffers, but autograd would find them changed: .data has no version that it knows.
        buffers = [buffer.data for index in trained for buffer in self._forwards[index].buffers()]
        torch._foreach_copy_(buffers, _of(trained, self._published))
        for index in trained:
            self._forwards[index].discard()

    def _add(self, trained: list[int], statistics: list[Tensor], weight: float) -> None:
        torch._foreach_add_(_of(trained, self._sums), statistics, alpha=weight)

    def _trained(self) -> list[int]:
        """The layers that take part in this update.

        A process without microbatches in this step goes by the layers' mode, and by what it has seen of their use.
        """
        forgotten = [name for name, forward in zip(self._names, self._forwards, strict=True) if forward.count]
        if forgotten and not self._microbatches:
            raise RuntimeError(
                f"{forgotten[0]} went forward in training mode, and nothing was added in this step: call "
                "after_forward() after the forward of each microbatch, or forget_forward() where there is none"
            )
        for name, added in zip(self._names, self._added, strict=True):
            if 0 < added < self._microbatches:
                raise RuntimeError(
                    f"{name} went forward in {added} of the {self._microbatches} microbatches of this step: "
                    "RunningStatistics takes a layer that takes part in all of them or in none"
                )
        if self._microbatches:
            frozen = [not layer.training for layer in self._layers]
            self._used = [added > 0 or still for added, still in zip(self._added, frozen, strict=True)]
            return [index for index, added in enumerate(self._added) if added]
        return [index for index, layer in enumerate(self._layers) if self._used[index] and layer.training]

    def start(self) -> None:
        """Collective: begins what `synchronize` completes, so that the host waits once for this and for other sums."""
        if not self._started:
            self._begin()
            self._started = True

    def synchronize(self) -> None:
        """Collective, before `step` or `replace`. `FixedPointOverflow` where a sum has to be gathered again."""
        self.start()
        self._started = False
        self._complete()

    def _begin(self) -> None:
        """Adds up over the processes what every one has to know of a step."""

    def _complete(self) -> None:
        """Waits for it."""

    @torch.no_grad()
    def step(self, active_workers: int) -> None:
        """One update, over the `active_workers` (k_t) virtual workers of all processes that had images.

        `RuntimeError` where layers went forward in training mode and no `after_forward` followed in this step. A
        forward that comes after the last one of the step counts for nothing.
        """
        trained = self._trained()
        if trained:
            momenta = []
            for index in trained:
                self._updates[index] += 1
                momentum = self._layers[index].momentum
                updates = self._before[index] + self._updates[index]
                momenta += [1 / updates if momentum is None else momentum] * 2
            share, sums = _of(trained, self._share), _of(trained, self._sums)
            torch._foreach_mul_(share, [1.0 - m for m in momenta])
            torch._foreach_mul_(sums, [m / active_workers for m in momenta])
            torch._foreach_add_(share, sums)
        self.discard()

    @torch.no_grad()
    def replace(self, weight: float) -> None:
        """Makes r the mean of what was added, `weight` being the weights of all processes added up."""
        if trained := self._trained():
            share = _of(trained, self._share)
            torch._foreach_copy_(share, _of(trained, self._sums))
            torch._foreach_div_(share, weight)
        self.discard()

    @torch.no_grad()
    def discard(self) -> None:
        """Forget what was added since the last update, and forwards that were not."""
        self.forget_forward()
        self._added = [0] * len(self._layers)
        self._microbatches = 0
        self._started = False
        if self._layers:
            torch._foreach_zero_(self._sums)

    @torch.no_grad()
    def publish(self, steps: int | None = None) -> None:
        """Put r into the layers' buffers of every process, for evaluation and checkpoints; collective.

        `num_batches_tracked` becomes the number of a layer's updates: that of the steps in which it trained. (`steps`
        is not needed; older callers give it.)
        """
        if not self._layers:
            return
        self._agree()
        self._put(self._whole([*self._share, *self._averages]))
        torch._foreach_copy_(self._published, self._buffers())
        self._divide(self._buffers(), self._share)
        self._divide(self._published_averages, self._averages)

    def keep(self) -> None:
        """Put what this process has of r into the layers' buffers: all of it, where every process has that."""
        self._put([*self._share, *self._averages])

    def _put(self, whole: Sequence[Tensor]) -> None:
        """These are r, and its average if one is kept."""
        for buffer, of in zip([*self._buffers(), *self._published_averages], whole, strict=True):
            buffer.copy_(of)
        for layer, *updates in zip(self._layers, self._before, self._updates, strict=True):
            layer.num_batches_tracked.fill_(sum(updates))  # type: ignore[union-attr]

    def _agree(self) -> None:
        """Checks that all processes have counted the same updates, and takes over rank 0's count from before."""
        before = torch.tensor(self._before)
        mine = torch.tensor(self._updates)
        cumulative = torch.tensor([layer.momentum is None for layer in self._layers])
        counted = mine + before * cumulative
        sent = torch.stack([counted, -counted, before * (self._world.rank == 0)])
        most, minus_least, rank_0 = self._world.maximum_async(sent, "hvd_lb.batch_norm.updates").wait()
        for name, difference in zip(self._names, (most + minus_least).tolist(), strict=True):
            if difference:
                raise RuntimeError(
                    f"{name} took part in other steps on some processes than on others; all do the same"
                )
        self._before = rank_0.tolist()

    def _whole(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """r = Σ_p R_p."""
        flat = torch.cat([share.flatten() for share in shares])
        self._world.allreduce(flat, "hvd_lb.batch_norm")
        parts = flat.split([share.numel() for share in shares])
        return [part.view_as(share) for part, share in zip(parts, shares, strict=True)]


def _of(layers: list[int], items: Sequence[T]) -> list[T]:
    """Those of these layers, of which each has two."""
    return [items[number] for index in layers for number in (2 * index, 2 * index + 1)]


class WholeStatistics(RunningStatistics):
    """Added up over the processes at every step: each has the whole of r."""

    @torch.no_grad()
    def _begin(self) -> None:
        flat = torch.cat([total.flatten() for total in self._sums])
        self._world.allreduce(flat, "hvd_lb.batch_norm")
        parts = flat.split([total.numel() for total in self._sums])
        for part, total in zip(parts, self._sums, strict=True):
            total.copy_(part.view_as(total))

    def _divide(self, whole: list[Tensor], shares: list[Tensor]) -> None:
        if shares:
            torch._foreach_copy_(shares, whole)

    def _whole(self, shares: Sequence[Tensor]) -> list[Tensor]:
        return list(shares)


class ReproducibleStatistics(RunningStatistics):
    """The same bits for every division of virtual workers among processes."""

    def __init__(self, model: nn.Module, world: World, terms: int, group: Group | None = None):
        super().__init__(model, world, group)
        self._flat: Tensor | None = None
        if len({total.dtype for total in self._sums}) == 1:
            *offsets, end = offsets_of(self._sums)
            self._flat = flat = self._sums[0].new_zeros(end)
            self._sums = [
                flat[at : at + total.numel()].view_as(total)
                for at, total in zip(offsets, self._sums, strict=True)
            ]
        self._sum = FixedPointSum(self._sums, terms, "hvd_lb.batch_norm", world)

    @property
    def exponents(self) -> list[int]:
        """Of the next sum; part of a checkpoint."""
        return self._sum.exponents

    @exponents.setter
    def exponents(self, exponents: list[int]) -> None:
        self._sum.exponents = exponents

    def _divide(self, whole: list[Tensor], shares: list[Tensor]) -> None:
        if shares:
            torch._foreach_copy_(shares, whole)

    def _add(self, trained: list[int], statistics: list[Tensor], weight: float) -> None:
        numbers = _of(trained, range(len(self._sums)))
        wide = [part.to(self._sums[number].dtype) for number, part in zip(numbers, statistics, strict=True)]
        if weight != 1:
            wide = list(torch._foreach_mul(wide, weight))
        if len(wide) == len(self._sums):
            self._sum.add_to_each(wide)
        else:
            for number, part in zip(numbers, wide, strict=True):
                self._sum.add(number, part)

    def _begin(self) -> None:
        self._sum.start(self._world)
        self._sum.arrive()

    def _complete(self) -> None:
        _, overflowed = self._sum.finish(self._sums, self._flat)
        if overflowed:
            raise FixedPointOverflow(
                "batch norm's statistics grew too much since the last step: take it again"
            )

    def discard(self) -> None:
        super().discard()
        if not self._sum.empty:
            self._sum.discard()

    def _whole(self, shares: Sequence[Tensor]) -> list[Tensor]:
        return list(shares)
