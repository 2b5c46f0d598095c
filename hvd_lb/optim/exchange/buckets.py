"""Flat gradient buckets: `.grad` of many parameters as views of one tensor, summed by one allreduce.

`p.grad` is always the truth: a bucket is brought up to date from it right before it is needed, so
gradients that were set to None, zeroed, replaced or edited by anybody are seen. A bucket ends in one flag
per parameter, 1 where this process has a gradient; summed along with the gradients, the flags tell on
every process whether any process had one. `Riders` may travel in one bucket, too.

In the reproducible mode a bucket adds in fixed point instead (`FixedPointBucket`): every backward's gradient on its
own, at once, so that nothing depends on the order of microbatches and processes.
"""

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from hvd_lb.exact.digest import integer_digest
from hvd_lb.exact.fixed_point import FixedPointSum, formed_in_place, offsets_of
from hvd_lb.optim.exchange.watched import gathering, gradient, set_gradient
from hvd_lb.world import Handle, World
from hvd_lb.world.arriving import Arriving
from hvd_lb.world.solo import Solo

HALF = (torch.float16, torch.bfloat16)
_SPARSE = "DistributedOptimizer was given a sparse gradient; make the embedding with sparse=False"
# An exchange of fewer bytes takes hardly less time.
_SMALL_BUCKET = 2**20
# A bucket holds at most this part of all gradients: by benchmarks/buckets.py.
_PART = 6
_KIND = attrgetter("dtype", "device", "shape")
DTYPES = (torch.float32, torch.float64, *HALF)


def gathering_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of its sums: its own, but fp32 for half precision, where sums lose bits or overflow."""
    return _of_sums(tensor.dtype)


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """That of `p.grad`: another than the parameter's own where somebody has set `p.grad_dtype`."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _of_sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def _dense(grad: Tensor | None) -> Tensor:
    if grad is None:
        raise RuntimeError("a gradient was set to None while backward was at work")
    if grad.is_sparse:
        raise RuntimeError(_SPARSE)
    return grad


@dataclass(frozen=True)
class Half:
    """Gradients are exchanged in half precision, times `scale`, a power of two."""

    dtype: torch.dtype
    scale: float


def half(name: str, images: int) -> Half:
    """For sums of gradients over so many images: what is exchanged is their mean, to a power of two.

    bf16 has the range of fp32. fp16 ends at 65,504 and has fewer bits below 6e-5. So in fp16 it is 256 times the mean,
    whose elements may be up to 255, far more than gradients have, and more of the small ones have all their bits.
    """
    mean = -(images - 1).bit_length()
    return Half(torch.bfloat16, 2.0**mean) if name == "bf16" else Half(torch.float16, 2.0 ** (mean + 8))


@dataclass(frozen=True)
class Riders:
    """What each process says to all in every step, without an exchange of its own: `count` integers from 0 on.

    `ask` is called in every step, when the exchange of the bucket begins that they travel in, or at its end. Their sums
    have to stay below 2^24, which fp32 still counts.
    """

    count: int
    ask: Callable[[], Sequence[int]]


class Held(enum.Enum):
    """What `p.grad` holds, seen from the parameter's slot."""

    NOTHING = "None"
    SPENT = "our tensor as a step left it: readable, but no gradient any more"
    # For half precision the view is the exact sum of which our tensor is the rounded copy: it is not copied back.
    OURS = "our tensor, with which the view is up to date"
    CHANGED = "somebody else's tensor, or a half-precision copy that was edited"


class Slot:
    """One parameter's place in a bucket.

    `view` is that place, with the parameter's own sizes and strides (channels_last stays channels_last).
    `grad` is what is put into `p.grad`: the view itself, or for half precision a rounded copy of it.
    `present` says whether there is a gradient: after `Bucket.collect` on this process, after the exchange on any.

    What `p.grad` holds (`Held`) changes so, whoever does it:

        SPENT     by `Bucket.consume`, after a step; by zero_grad() it becomes NOTHING
        OURS      by `Bucket.publish`; and a SPENT gradient that somebody writes into is one again
        CHANGED   by backward, where there was none; by an assignment to p.grad; by writing into a rounded copy

    What was `given` by hand, without a backward, is never SPENT. As with torch the very tensor stays a gradient until
    it is cleared: the next one may be written into it by p.grad.data, which tells nobody, or where it is a view of.
    """

    def __init__(self, parameter: Tensor, flat: Tensor, offset: int) -> None:
        self.parameter = parameter
        strides = torch.empty_like(parameter, device="meta").stride()
        # .data gives the view a version counter of its own instead of one shared by the whole bucket
        self.view = flat.as_strided(parameter.shape, strides, offset).data
        self.rounded = self.view.dtype != gradient_dtype(parameter)
        self.grad = (
            torch.empty_like(self.view, dtype=gradient_dtype(parameter)) if self.rounded else self.view
        )
        self.present = False
        self.opened = False  # autograd is about to add to it
        self.gathered = False  # a backward of this step has added to it
        self.spent = False
        self.given: Tensor | None = None
        # What `p.grad` was when it was seen last, and its version: by these it is known whether it was changed since.
        self.seen: Tensor | None = None
        self.version = 0

    def held(self) -> Held:
        """What `p.grad` holds now."""
        grad = gradient(self.parameter)
        if grad is None:
            return Held.NOTHING
        if grad is not self.grad:
            return Held.CHANGED
        # As in `left`, by fewer calls.
        left = self.spent and grad is self.seen and grad._version == self.version
        if left and self.given is None:
            return Held.SPENT
        written = left or grad is not self.seen or grad._version != self.version
        return Held.CHANGED if self.rounded and written else Held.OURS

    def left(self) -> bool:
        """Whether `p.grad` is what a step has left there: a backward, which replaces it, does not add to it."""
        grad = gradient(self.parameter) if self.spent else None
        return grad is not None and grad is self.seen and grad._version == self.version

    def drop_left(self) -> None:
        if self.left():
            set_gradient(self.parameter, None)

    def note_given(self) -> None:
        """When an exchange begins: what was set by hand."""
        by_hand = not self.gathered and self.held() in (Held.OURS, Held.CHANGED)
        self.given = gradient(self.parameter) if by_hand else None

    def consume(self) -> None:
        """After a step: no gradient is there for the next one but what was set by hand."""
        if self.held() is Held.CHANGED:
            self.bring_back()
        if self.given is not None:
            set_gradient(self.parameter, self.given)
        self.seen = left = self.grad if self.given is None else self.given
        self.version, self.spent = left._version, True

    def take(self) -> Tensor | None:
        """Takes the gradient, if there is one, out of `p.grad`, which is None afterwards."""
        grad = gradient(self.parameter) if self.held() in (Held.OURS, Held.CHANGED) else None
        self.spent = False
        set_gradient(self.parameter, None)
        return grad

    @torch.no_grad()
    def before_accumulation(self) -> None:
        """Before autograd adds to `p.grad`: drops a spent gradient, sets half precision's sum aside."""
        self.drop_left()
        if self.rounded:
            held = self.held()
            if held is Held.CHANGED:
                self.view.copy_(_dense(gradient(self.parameter)))
            elif held is not Held.OURS:
                self.view.zero_()
            set_gradient(self.parameter, None)
        self.spent = False

    @torch.no_grad()
    def add_rounded(self) -> None:
        """After it has, of a parameter in half precision: adds that to the sum set aside."""
        self.view.add_(_dense(gradient(self.parameter)))
        self.grad.copy_(self.view)
        set_gradient(self.parameter, self.grad)

    @torch.no_grad()
    def bring_back(self) -> None:
        """Puts our own tensor into `p.grad` again, with what is there."""
        self.view.copy_(_dense(gradient(self.parameter)))
        if self.rounded:
            self.grad.copy_(self.view)
        set_gradient(self.parameter, self.grad)

    def edited(self) -> bool:
        """Whether somebody has changed what this process's backwards have gathered, other than to clear it."""
        grad = gradient(self.parameter)
        if not self.gathered or grad is None or (grad is self.seen and grad._version == self.version):
            return False
        return bool(grad.any())

    def revived(self) -> bool:
        """Whether our tensor, as a step left it, was changed since, other than to clear it."""
        grad = gradient(self.parameter)
        if not self.spent or grad is None or grad is not self.grad or grad._version == self.version:
            return False
        return bool(grad.any())


class Bucket:
    """Parameters of one dtype and device whose gradients are exchanged together, and with them so many riders.

    With `compress` the gradients are exchanged in half precision, and flags and riders beside them.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        name: str,
        world: World,
        riders: int = 0,
        compress: Half | None = None,
    ) -> None:
        self.name, self._compress = name, compress
        *offsets, end = offsets_of(parameters)
        first, flags = parameters[0], len(parameters)
        # In half precision it is `_wire` that is summed.
        place: World = Solo() if compress else world
        self.flat = place.room(name, end + flags + riders, _of_sums(gradient_dtype(first)), first.device)
        self.gradients, self.flags, self.riders = self.flat.split([end, flags, riders])
        self._wire = world.room(f"{name}.wire", end, compress.dtype, first.device) if compress else None
        self.slots = [Slot(p, self.flat, offset) for p, offset in zip(parameters, offsets, strict=True)]
        self.rounded = [slot for slot in self.slots if slot.rounded]
        self.handles: list[Handle] = []
        self._told: Arriving[int] | None = None  # the flags
        self.started = False  # its exchange is under way
        self._versions: list[int] = []  # of the gradients, when it began
        self.awaited = dict.fromkeys(self.slots)  # those to which the present backward has not added
        self.looked = False  # whether it fits, in the present backward
        self._parameters, self._views = parameters, [slot.view for slot in self.slots]
        self._made = self._find()

    def _find(self) -> tuple[list[Any], ...]:
        """Where the views are, and what parameters are: by few calls, as each step asks."""
        return (
            list(map(Tensor.data_ptr, self._views)),
            list(map(Tensor.stride, self._parameters)),
            list(map(_KIND, self._parameters)),
        )

    def fits(self) -> bool:
        """False once a parameter or its gradient was moved, by model.cuda(), model.half(), channels_last and others.

        There and back is moved, too: whoever moves a model gives its gradients new memory, and the view is then in
        memory of its own, and not in the bucket any more.
        """
        return self._find() == self._made

    def moved(self) -> list[Tensor]:
        """The parameters for which it does not fit."""
        pairs = zip(zip(*self._find(), strict=True), zip(*self._made, strict=True), strict=True)
        return [p for p, (now, before) in zip(self._parameters, pairs, strict=True) if now != before]

    def before_accumulation(self, slot: Slot) -> None:
        """Before autograd adds to the gradient of one of its parameters, where there is something already."""
        if slot.spent or slot.rounded:
            slot.before_accumulation()

    def after_accumulation(self, slot: Slot) -> None:
        """After it has, in place or, where there was no gradient, by a tensor of its own."""
        if slot.rounded:
            slot.add_rounded()
        # Also where what a step had left was cleared before, so that nothing had to be done about it.
        slot.gathered, slot.spent = True, False
        slot.seen = grad = gradient(slot.parameter)
        slot.version = grad._version if grad is not None else 0

    @torch.no_grad()
    def own_norm(self) -> Tensor:
        """The squared norm of what the backwards of this process have added since the last step; all have one."""
        return squared_norm([_dense(gradient(slot.parameter)) for slot in self.slots])

    def await_all(self) -> None:
        """The next backward begins."""
        self.looked = False
        self.awaited = dict.fromkeys(self.slots)

    @torch.no_grad()
    def gather(self) -> None:
        """Takes over what a backward, which is not the last one, has added to all of its parameters."""
        self.collect()
        self.publish()

    def collect(self) -> None:
        """Brings the bucket up to date with `p.grad`; no gradient, or a spent one, counts as zero."""
        changed, zeros = [], []
        for slot in self.slots:
            held = slot.held()
            slot.present = held is Held.OURS or held is Held.CHANGED
            if not slot.present:
                zeros.append(slot.view)
            elif held is Held.CHANGED:
                changed.append(slot)
        if zeros:
            torch._foreach_zero_(zeros)
        if changed:
            grads: list[Any] = [gradient(slot.parameter) for slot in changed]
            if [grad for grad in grads if grad.is_sparse]:
                raise RuntimeError(_SPARSE)
            torch._foreach_copy_([slot.view for slot in changed], grads)

    def publish(self) -> None:
        """Puts the gradients into `p.grad`, in the parameter's dtype; None where there is none."""
        if self.rounded:
            torch._foreach_copy_([slot.grad for slot in self.rounded], [slot.view for slot in self.rounded])
        for slot in self.slots:
            grad = slot.grad if slot.present else None
            set_gradient(slot.parameter, grad)
            slot.seen, slot.version, slot.spent = grad, slot.grad._version, False

    def start(self, world: World) -> None:
        """Starts the exchange of what this process has, and of `riders`; until `finish`, the views are undefined."""
        self._note_given()
        self.collect()
        self.publish()
        if self.complete:
            self.flags.fill_(1)
        else:
            self.flags.copy_(torch.tensor([slot.present for slot in self.slots]), non_blocking=True)
        self._start(world)

    def _note_given(self) -> None:
        for slot in self.slots:
            if not slot.gathered or slot.given is not None:
                slot.note_given()

    def _start(self, world: World) -> None:
        self._versions = [slot.grad._version for slot in self.slots]
        self._exchange(world)
        self.started = True

    def _exchange(self, world: World) -> None:
        if self._wire is None or self._compress is None:
            self.handles = [world.allreduce_async(self.flat, self.name)]
            return
        torch.mul(self.gradients, self._compress.scale, out=self._wire)
        rest = self.flat[self.gradients.numel() :]
        self.handles = [
            world.allreduce_async(self._wire, self.name),
            world.allreduce_async(rest, f"{self.name}.rest"),
        ]

    @property
    def exchanged_bytes(self) -> int:
        """What is summed over the processes."""
        if self._wire is None:
            return self.flat.nbytes
        return self.flat.nbytes - self.gradients.nbytes + self._wire.nbytes

    @property
    def complete(self) -> bool:
        """Whether all of its parameters have a gradient."""
        return not [slot for slot in self.slots if not slot.present]

    @property
    def adding(self) -> bool:
        """Whether it holds sums that are not in `p.grad`."""
        return False

    def edited(self) -> bool:
        """Whether gradients were changed between the backwards of this process and the exchange."""
        return any(slot.edited() for slot in self.slots)

    def touched(self) -> bool:
        """Whether gradients were changed while they were exchanged, by a reference from before."""
        return self._versions != [slot.grad._version for slot in self.slots]

    def changed(self) -> bool:
        """Whether gradients were changed since they were put into `p.grad` last."""
        return any(
            gradient(slot.parameter) is not slot.seen or slot.grad._version != slot.version
            for slot in self.slots
        )

    def arrive(self) -> None:
        """Waits for the sums. What the host has to know of them is on its way then, and `finish` waits for that."""
        if not self.started:
            raise RuntimeError(f"bucket {self.name} was not started")
        for handle in self.handles:
            handle.wait()
        self.handles = []
        # Only where they tell more: the host would wait for the device.
        self._told = None if self.complete else Arriving(self.flags, int)

    def finish(self) -> list[Tensor]:
        """Completes what `arrive` begins, if it was called; parameters without a gradient on any process get none.

        Returns the parameters whose sum was given up on all processes and has to be gathered again: here, none.
        """
        if self.handles or not self.started:
            self.arrive()
        self.started = False
        if self._wire is not None and self._compress is not None:
            self.gradients.copy_(self._wire).mul_(1 / self._compress.scale)
        if self._told:
            for slot, flag in zip(self.slots, self._told.wait(), strict=True):
                slot.present = flag > 0
        if self.rounded or self._told:
            self.publish()
        return []

    def divide(self, divisor: int) -> None:
        """Divides the sums, with whatever was done to `p.grad` since they arrived."""
        if divisor != 1:
            if self._find()[0] != self._made[0]:
                raise RuntimeError("a model was moved between synchronize() and step(): do it after step()")
            self.collect()
            self.gradients.div_(divisor)
            self.publish()

    def consume(self) -> None:
        """After a step: makes the bucket ready for the next backward, its gradients still readable."""
        given = [slot.given for slot in self.slots]
        self.reset()
        for slot, by_hand in zip(self.slots, given, strict=True):
            # As in most steps; calls for each parameter take time.
            if by_hand is None and gradient(slot.parameter) is slot.grad and not slot.rounded:
                slot.seen, slot.version, slot.spent = slot.grad, slot.grad._version, True
            else:
                slot.given = by_hand
                slot.consume()

    def reset(self) -> None:
        """Makes the bucket ready for the next backward."""
        self.await_all()
        for slot in self.slots:
            slot.gathered = slot.spent = False
            slot.seen = slot.given = None


class FixedPointBucket(Bucket):
    """Adds up to `terms` gradients of each parameter, of all processes, in fixed point (see `exact.fixed_point`).

    Every backward's gradient is taken out of `p.grad`; until the exchange has finished something stands there that
    raises an error when it is used. Then the flat bucket and its views hold the sums, as in `Bucket`.
    """

    def __init__(
        self, parameters: list[Tensor], name: str, world: World, terms: int, riders: int = 0
    ) -> None:
        # Integers are exchanged in a room of their own.
        super().__init__(parameters, name, world if formed_in_place(terms) else Solo(), riders)
        self.sum = FixedPointSum([slot.view for slot in self.slots], terms, name, world, riders, self.flat)
        self.riders = self.sum.riders
        self._index = {slot: index for index, slot in enumerate(self.slots)}
        self._stand_ins = [gathering(parameter, gradient_dtype(parameter)) for parameter in parameters]
        self._terms: dict[Slot, Tensor] = {}  # that are not in the sum yet

    def before_accumulation(self, slot: Slot) -> None:
        slot.drop_left()
        self._take(slot, zeros=False)

    def after_accumulation(self, slot: Slot) -> None:
        if slot in self._terms:  # from a backward that has not filled the bucket
            self.gather()
        slot.version = slot.grad._version
        self._terms[slot] = _dense(gradient(slot.parameter))
        set_gradient(slot.parameter, self._stand_ins[self._index[slot]])
        slot.gathered = True

    def gather(self) -> None:
        if len(self._terms) == len(self.slots):
            self.sum.add_to_each([self._terms[slot] for slot in self.slots])
        else:
            for slot, term in self._terms.items():
                self.sum.add(self._index[slot], term)
        self._terms.clear()

    def own_norm(self) -> Tensor:
        return squared_norm(list(self._terms.values()))

    def own_digest(self) -> Tensor:
        """`integer_digest` of the terms of this backward, which has filled the bucket."""
        return integer_digest([self._terms[slot] for slot in self.slots])

    def edited(self) -> bool:
        """By a reference from before, as sums may be formed there; `_take` finds what was assigned."""
        return any(slot.gathered and slot.grad._version != slot.version for slot in self.slots)

    def start(self, world: World) -> None:
        self._note_given()
        for slot in self.awaited:
            self._take(slot, zeros=True)
        self.gather()
        self._start(world)

    @property
    def adding(self) -> bool:
        return bool(self._terms) or not self.sum.empty

    def _exchange(self, world: World) -> None:
        self.sum.start(world)

    @property
    def exchanged_bytes(self) -> int:
        return self.sum.exchanged_bytes

    def arrive(self) -> None:
        self.sum.arrive()

    def finish(self) -> list[Tensor]:
        counts, overflowed = self.sum.finish([slot.view for slot in self.slots], self.gradients)
        self.started = False
        for slot, count in zip(self.slots, counts, strict=True):
            slot.present = count > 0
        self.publish()
        return [self.slots[index].parameter for index in overflowed]

    def reset(self) -> None:
        for slot, stand_in in zip(self.slots, self._stand_ins, strict=True):
            if gradient(slot.parameter) is stand_in:
                set_gradient(slot.parameter, None)
        super().reset()
        self._terms.clear()
        if not self.sum.empty:
            self.sum.discard()

    def exponent(self, slot: Slot) -> int:
        """The exponent of a parameter's next sum; part of a checkpoint."""
        return self.sum.exponents[self._index[slot]]

    def set_exponent(self, slot: Slot, exponent: int) -> None:
        self.sum.exponents[self._index[slot]] = exponent

    def _take(self, slot: Slot, zeros: bool) -> None:
        """Moves the gradient in `p.grad`, unless it is a spent one or stands for terms, into the sum.

        One that was cleared to `zeros` is no term beside those of backward; alone it is, as it is a gradient.
        """
        if slot.gathered:
            if gradient(slot.parameter) is not self._stand_ins[self._index[slot]]:
                raise RuntimeError(
                    "a gradient was set while it was being added up in fixed point: call opt.zero_grad() to give a "
                    "step up, and opt.synchronize() before gradients are changed"
                )
            set_gradient(slot.parameter, None)
        elif (grad := slot.take()) is not None and (zeros or bool(grad.any())):
            self.sum.add(self._index[slot], _dense(grad))


@torch.no_grad()
def squared_norm(tensors: list[Tensor]) -> Tensor:
    """Of all tensors, which are of one dtype, together; float64."""
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()


def plan_buckets(parameters: Iterable[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Splits parameters, given in the order of the forward pass, into the buckets' lists.

    Backward produces gradients roughly in reverse, so reversed neighbours share a bucket and the first bucket fills
    first. A bucket holds one (dtype of the sums, device) and at most `bucket_bytes` and a sixth of all, or a single
    larger parameter. The first one is small, so that the exchange begins early, and each one at most half of what is
    left, so that little is left to be exchanged when backward ends.
    """
    parameters = list(parameters)
    total: Counter[tuple[torch.dtype, torch.device]] = Counter()
    for parameter in parameters:
        total[_of_sums(gradient_dtype(parameter)), parameter.device] += _bytes(parameter)
    left = total.copy()
    buckets: list[list[Tensor]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for parameter in reversed(parameters):
        key = _of_sums(gradient_dtype(parameter)), parameter.device
        bucket, room = filling.get(key, ([], 0))
        if not bucket or _bytes(parameter) > room:
            part = min(total[key] // _PART, left[key] // 2) if key in filling else 0
            bucket, room = [], min(bucket_bytes, max(_SMALL_BUCKET, part))
            buckets.append(bucket)
        bucket.append(parameter)
        filling[key] = bucket, room - _bytes(parameter)
        left[key] -= _bytes(parameter)
    return buckets


def _bytes(parameter: Tensor) -> int:
    """Of its sum."""
    return parameter.numel() * _of_sums(gradient_dtype(parameter)).itemsize
