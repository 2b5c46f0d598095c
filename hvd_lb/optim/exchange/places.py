"""Which parameters of a wrapped optimizer have a place in a bucket, and the hooks by which autograd tells of them.

Parameters come and go while training goes on: groups are added, layers unfrozen, models moved to another device, dtype
or memory format, and an optimizer may take over those of another one.
"""

from __future__ import annotations

import itertools
import json
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from hvd_lb.optim.exchange.buckets import (
    DTYPES,
    Bucket,
    FixedPointBucket,
    Held,
    Slot,
    gradient_dtype,
    plan_buckets,
)
from hvd_lb.optim.exchange.watched import set_gradient
from hvd_lb.optim.state_dict import broadcast_tensors
from hvd_lb.world import World

_owners = WeakTensorKeyDictionary()  # of each parameter: its newest places, weakly, and the hooks of these
# Weak references to a parameter's bucket and slot, if it has them, and what removes its hooks.
_Hooks = tuple[list[Any], list[Any]]


class Owner(Protocol):
    """A DistributedOptimizer, which is told of what autograd does."""

    def _before(self, bucket: Bucket, slot: Slot) -> None:
        """Before backward adds to a gradient."""

    def _after(self, bucket: Bucket, slot: Slot) -> None:
        """After it has."""

    def _awakes(self, parameter: Tensor | None) -> bool:
        """Whether a parameter that had no place, as it did not learn, has one now."""

    def _taken_from(self) -> None:
        """A newer optimizer has taken a parameter, and this one does nothing any more."""


class Places:
    """Those of the parameters in the groups of `optimizer`, the wrapped one, for its `owner`.

    `make` makes a bucket of parameters, a name and a number of riders; one bucket carries `riders`. `options` have to
    be the same on all processes. Raises as DistributedOptimizer does.
    """

    def __init__(
        self,
        owner: Owner,
        optimizer: Optimizer,
        model: nn.Module | None,
        world: World,
        name: str,
        *,
        make: Callable[[list[Tensor], str, int], Bucket],
        bucket_bytes: int,
        riders: int,
        options: list[Any],
    ) -> None:
        self._owner = weakref.ref(owner)
        self._optimizer, self._world, self._name = optimizer, world, name
        self._make, self._bucket_bytes, self._riders, self._options = make, bucket_bytes, riders, options
        self._order = {p: i for i, p in enumerate(model.parameters())} if model is not None else {}
        self._names: dict[Tensor, str] = (
            {p: name for name, p in model.named_parameters()} if model is not None else {}
        )
        self._buffers: dict[str, Tensor] = dict(model.named_buffers()) if model is not None else {}
        self.known: set[Tensor] = set()
        self.of: dict[Tensor, tuple[Bucket, Slot]] = {}
        self.buckets: list[Bucket] = []
        self.carrier: Bucket | None = None  #: of riders
        self.others: list[Tensor] = []  #: parameters in the groups that have no place
        self.weights: list[
            Tensor
        ] = []  #: those in the groups, and further ones of the model, in one order everywhere
        self.fresh: list[
            Bucket
        ] = []  #: made by a backward; on their parameters the processes have not agreed
        self.taken = ""  #: the name of a parameter that belongs to a newer optimizer
        self._numbers = itertools.count()  # of buckets
        # The parameters in the groups and whether they learn, when that was looked at last.
        self._adopted: list[tuple[Tensor, bool]] = []
        self._nodes: dict[Tensor, Any] = {}
        # The hooks of parameters that have no place, as they do not learn: should they do so once.
        self._asleep: dict[Tensor, _Hooks] = {}

    def slots(self) -> Iterator[Slot]:
        return (slot for bucket in self.buckets for slot in bucket.slots)

    def further(self) -> dict[str, Tensor]:
        """What the model has beside the parameters in the groups, by name."""
        return {**{name: p for p, name in self._names.items() if p not in self.known}, **self._buffers}

    def numbered(self) -> Iterator[tuple[int, tuple[Bucket, Slot]]]:
        """The places of parameters that have one, by their number in the groups."""
        parameters = (p for group in self._groups for p in group["params"])
        return ((number, self.of[p]) for number, p in enumerate(parameters) if p in self.of)

    @property
    def exponents(self) -> dict[int, int]:
        """Those of the gradients' next sums, by their parameter's number in the groups; with fixed point."""
        return {
            number: bucket.exponent(slot)
            for number, (bucket, slot) in self.numbered()
            if isinstance(bucket, FixedPointBucket)
        }

    @exponents.setter
    def exponents(self, exponents: Mapping[int, int]) -> None:
        for number, (bucket, slot) in self.numbered():
            if isinstance(bucket, FixedPointBucket) and number in exponents:
                bucket.set_exponent(slot, exponents[number])

    def adopt(self) -> list[Bucket]:
        """Makes room for parameters that are new, were unfrozen or moved to another device or dtype.

        Collective. Returns the buckets that were made.
        """
        now = [(p, p.requires_grad) for group in self._groups for p in group["params"]]
        if self._is_adopted(now):
            return []
        made = self._make_room()
        self._adopted = now
        weights = dict.fromkeys([*self._names, *(p for p, _ in now)])
        self.weights = [p for p in weights if p.is_floating_point() and type(p.data) is Tensor]
        self.others = [p for p, _ in now if p not in self.of]
        return made

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _is_adopted(self, now: list[tuple[Tensor, bool]]) -> bool:
        """Whether parameters, and whether they learn, are what they were."""
        if len(now) != len(self._adopted):
            return False
        for (p, learns), (before, learnt) in zip(now, self._adopted, strict=True):
            if p is not before or learns is not learnt:
                return False
        return all(bucket.fits() for bucket in self.buckets)

    def _make_room(self) -> list[Bucket]:
        self.check_owner()
        parameters = self._in_order()
        unknown = [p for p in parameters if p not in self.known]
        if unknown:
            self._check_kinds(unknown)
            # The same types on all processes: numpy's numbers, which a broadcast makes Python's, round otherwise.
            for group in self._groups:
                group.update({key: _plain(value) for key, value in group.items() if key != "params"})
        self.follow_moved()
        homeless = [p for p in parameters if p.requires_grad and p not in self.of]
        if not unknown and not homeless and not self.fresh:
            return []
        self._check_dtypes(homeless)
        self._check_agreement(parameters)
        if self._world.size > 1 and unknown:
            broadcast_tensors(self._world, {self.label(p): p for p in unknown}, f"{self._name}.weights")
        # Those that were known first: elsewhere a backward may have given them their places.
        self._give_places([p for p in homeless if p in self.known])
        self.known.update(unknown)
        made = self._give_places([p for p in homeless if p not in self.of])
        self.fresh.clear()
        for p in unknown:
            if p not in self.of and p.is_floating_point() and not p.is_inference():
                self._asleep[p] = self._hook(p)
        return made

    def _in_order(self) -> list[Tensor]:
        """The parameters in the groups, in the model's order if that is known."""
        mine = {p: None for group in self._groups for p in group["params"]}
        return sorted(mine, key=lambda p: self._order.get(p, len(self._order)))

    @torch.no_grad()
    def follow_moved(self) -> None:
        """New buckets for those of which a parameter was moved, without a word with the other processes.

        They do the same, but may come to it later, when they are at a backward of their own.
        """
        left = [bucket for bucket in self.buckets if not bucket.fits()]
        if not left:
            return
        slots = [slot for bucket in left for slot in bucket.slots]
        if any(bucket.started or bucket.adding for bucket in left):
            raise RuntimeError(
                f"{self.label(next(p for bucket in left for p in bucket.moved()))} was moved to other memory "
                "while its gradients were added up or exchanged; step() or zero_grad() first"
            )
        exponents = self.exponents
        for slot in slots:
            del self.of[slot.parameter]
            if slot.held() is Held.SPENT:
                set_gradient(slot.parameter, None)
        self.buckets = [bucket for bucket in self.buckets if bucket not in left]
        if self.carrier in left:
            self.carrier = None
        moved = {slot.parameter for slot in slots}
        again = [p for p in self._in_order() if p in moved]
        self._check_dtypes(again)
        self._give_places(again)
        self.exponents = exponents

    def _give_places(self, parameters: list[Tensor]) -> list[Bucket]:
        """Buckets for parameters that have none."""
        planned, made = plan_buckets(parameters, self._bucket_bytes), list[Bucket]()
        for members in planned:
            name = f"{self._name}.bucket.{next(self._numbers)}"
            # Riders go last, when they are newest; those of a process alone stay on the host.
            takes_riders = self.carrier is None and members is planned[-1] and self._world.size > 1
            bucket = self._make(members, name, self._riders if takes_riders else 0)
            if takes_riders:
                self.carrier = bucket
            self.buckets.append(bucket)
            made.append(bucket)
            for slot in bucket.slots:
                self.of[slot.parameter] = bucket, slot
                self.watch(slot.parameter)
        self.lay_out_state(parameters)
        return made

    @torch.no_grad()
    def lay_out_state(self, parameters: Iterable[Tensor]) -> None:
        """Gives an optimizer's tensors the strides of their parameters, as fused ones go through memory."""
        for parameter in parameters:
            state = self._optimizer.state.get(parameter, {})
            for name, of in state.items():
                if (
                    isinstance(of, Tensor)
                    and of.shape == parameter.shape
                    and of.stride() != parameter.stride()
                ):
                    state[name] = torch.empty_like(parameter, dtype=of.dtype, device=of.device).copy_(of)

    def label(self, parameter: Tensor) -> str:
        """A parameter's name in the model, else its place in the groups."""
        if parameter in self._names:
            return self._names[parameter]
        for number, group in enumerate(self._groups):
            for index, p in enumerate(group["params"]):
                if p is parameter:
                    names = group.get("param_names")
                    return names[index] if names else f"parameter {index} of group {number}"
        return "a parameter"

    def _check_kinds(self, unknown: list[Tensor]) -> None:
        """`TypeError` for what cannot be exchanged."""
        for name, tensor in ({self.label(p): p for p in unknown} | self.further()).items():
            if is_lazy(tensor):
                raise TypeError(
                    f"{name} has no shape yet (a lazy module): run one forward before the optimizer is wrapped"
                )
            kind = str(tensor.layout).removeprefix("torch.")
            kind = "quantized" if tensor.is_quantized else "on the meta device" if tensor.is_meta else kind
            kind = (
                "a DTensor or part of one" if type(tensor).__name__ in ("DTensor", "FlatParameter") else kind
            )
            if kind != "strided":
                raise TypeError(f"{name} is {kind}; expected a dense tensor with values")

    def _check_dtypes(self, parameters: list[Tensor]) -> None:
        for p in parameters:
            for what, dtype in (("a parameter", p.dtype), ("to have gradients", gradient_dtype(p))):
                if dtype not in DTYPES:
                    raise TypeError(f"{self.label(p)} is {what} of {dtype}; expected one of {DTYPES}")

    def _check_agreement(self, parameters: list[Tensor]) -> None:
        described: list[Any] = [
            self._options,
            *(
                [self.label(p), list(p.shape), str(p.dtype), str(gradient_dtype(p)), p.requires_grad]
                for p in parameters
            ),
            *([name, list(p.shape), str(p.dtype)] for p, name in self._names.items()),
            *([name, list(b.shape), str(b.dtype)] for name, b in self._buffers.items()),
        ]
        text = json.dumps(described).encode()
        digest = zlib.crc32(text)
        extremes = self._world.maximum_async(torch.tensor([digest, -digest]), f"{self._name}.layout").wait()
        if extremes.sum() == 0:
            return
        expected = json.loads(self._world.broadcast_bytes(text, f"{self._name}.layout"))
        pairs = itertools.zip_longest(described, expected)
        mine, rank_0 = next(((a, b) for a, b in pairs if a != b), ("the same as", "it"))
        raise RuntimeError(
            f"processes disagree on the parameters (rank {self._world.rank} has {len(parameters)}): all make the same "
            " optimizers in the same order, with the same model, shapes, dtypes, requires_grad and options. "
            f"Rank {self._world.rank} has {mine}, rank 0 {rank_0}"
        )

    def watch(self, parameter: Tensor) -> None:
        """Calls `_before` and `_after` with its place around autograd's addition to `parameter.grad`."""
        owner = _unhook(parameter)
        if owner is not None and owner is not self:
            owner._give_up(parameter)
        asleep = parameter in self._asleep
        place, hooks = self._asleep.pop(parameter) if asleep else self._hook(parameter)
        place[:] = map(weakref.ref, self.of[parameter])
        _owners[parameter] = weakref.ref(self), hooks

    def _hook(self, parameter: Tensor) -> _Hooks:
        """Hooks that keep none alive, and where they find the parameter's place, when there is one."""
        me, of, place = self._owner, weakref.ref(parameter), list[Any]()

        def before(_: Any) -> None:
            optimizer = me()
            if optimizer is not None and (place or optimizer._awakes(of())):
                bucket, slot = place[0](), place[1]()
                if bucket is not None and slot is not None:
                    optimizer._before(bucket, slot)

        def after(_: Any) -> None:
            optimizer = me()
            if optimizer is not None and (place or optimizer._awakes(of())):
                bucket, slot = place[0](), place[1]()
                if bucket is not None and slot is not None:
                    optimizer._after(bucket, slot)

        learns = parameter.requires_grad
        parameter.requires_grad_()  # else there are neither nodes nor hooks; they stay when it is frozen again
        # a hook on the node, not on the tensor: torch.autograd.grad() runs the latter without adding anything
        node = get_gradient_edge(parameter).node
        self._nodes[parameter] = node  # autograd keeps nodes of parameters only while somebody does
        hooks = [node.register_prehook(before), parameter.register_post_accumulate_grad_hook(after)]
        parameter.requires_grad_(learns)
        return place, hooks

    def awaken(self, parameter: Tensor | None) -> bool:
        """Gives places to parameters that did not learn before, as a backward comes to the first of them.

        Without a word with the other processes, which may come to it later; their bucket is not exchanged before.
        """
        owner, _ = _owners.get(parameter, (None, ())) if parameter is not None else (None, ())
        if parameter is None or self.taken or (owner and owner()):
            return False
        self.follow_moved()
        learning = [p for p in self._in_order() if p.requires_grad and p in self.known]
        homeless = [p for p in learning if p not in self.of]
        self._check_dtypes(homeless)
        self.fresh += self._give_places(homeless)
        return parameter in self.of

    def _give_up(self, parameter: Tensor) -> None:
        """A newer optimizer has taken this parameter: two would both exchange its gradient, and divide it."""
        self.taken = self.label(parameter)
        if owner := self._owner():
            owner._taken_from()
        for mine, (_, slot) in self.of.items():
            if slot.held() is Held.SPENT:  # the newer one would add to it
                set_gradient(mine, None)
            if mine is not parameter:
                _unhook(mine)
        for _, hooks in self._asleep.values():
            _remove(hooks)

    def check_owner(self) -> None:
        """RuntimeError where a newer optimizer has taken a parameter."""
        if self.taken:
            raise RuntimeError(
                f"{self.taken} belongs to another DistributedOptimizer, which was made with it after this one: give "
                "each parameter to one of them only, in groups of its own where rates differ, or make this one anew "
                "where it takes over"
            )

    def added(self) -> list[Tensor]:
        """Parameters of groups that were added to the wrapped optimizer since they were looked at last."""
        groups = self._groups
        if sum([len(group["params"]) for group in groups]) == len(self._adopted):
            return []
        return [p for group in groups for p in group["params"] if p not in self.known]


def _unhook(parameter: Tensor) -> Places | None:
    """Takes it from its places, which are returned if they are still there."""
    owner, hooks = _owners.pop(parameter, (None, ()))
    _remove(hooks)
    return owner and owner()


def _remove(hooks: Iterable[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _plain(value: Any) -> Any:
    """An option of a group with numpy's numbers as Python's."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value
