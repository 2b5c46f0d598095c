"""Flat gradient buckets: `.grad` of many parameters as views of one tensor, summed by one allreduce.

`p.grad` is always the truth: a bucket is brought up to date from it right before it is needed, so
gradients that were set to None, zeroed, replaced or edited by anybody are seen. A bucket ends in one flag
per parameter, 1 where this process has a gradient; summed along with the gradients, the flags tell on
every process whether any process had one. `Riders` may travel in one bucket, too.

In the reproducible mode a bucket adds in fixed point instead (`FixedPointBucket`): every backward's gradient on its
own, at once, so that nothing depends on the order of microbatches and processes.
"""

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_lb.exact.fixed_point import FixedPointSum, offsets_of
from hvd_lb.optim.watched import gathering, gradient, set_gradient
from hvd_lb.world import Handle, World

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF)


def gathering_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of its sums: its own, but fp32 for half precision, where sums lose bits or overflow."""
    return torch.float32 if parameter.dtype in HALF else parameter.dtype


def _dense(grad: Tensor) -> Tensor:
    if grad.is_sparse:
        raise RuntimeError(
            "DistributedOptimizer was given a sparse gradient; make the embedding with sparse=False"
        )
    return grad


@dataclass(frozen=True)
class Riders:
    """What each process says to all in every step, without an exchange of its own: `count` integers from 0 on.

    `ask` is called in every step, when the exchange of the bucket begins that they travel in, or at its end. Their sums
    have to stay below 2^24, which fp32 still counts.
    """

    count: int
    ask: Callable[[], Sequence[int]]


class Arriving:
    """A few integers on their way from a device, for which the host need not wait at once."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", copy=True, non_blocking=True)
        self._event = torch.cuda.current_stream().record_event() if numbers.is_cuda else None

    def wait(self) -> list[int]:
        if self._event:
            self._event.synchronize()
        return list(map(int, self._numbers.tolist()))


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
    `present` says whether there is a gradient: after `collect` on this process, after the exchange on any.

    What `p.grad` holds (`Held`) changes so, whoever does it:

        SPENT     by `spend`, after a step; by zero_grad() it becomes NOTHING
        OURS      by `publish`; and a SPENT gradient that somebody writes into is one again
        CHANGED   by an assignment to p.grad, or by writing into a rounded copy; `collect` takes it over
    """

    def __init__(self, parameter: Tensor, flat: Tensor, offset: int) -> None:
        self.parameter = parameter
        strides = torch.empty_like(parameter, device="meta").stride()
        # .data gives the view a version counter of its own instead of one shared by the whole bucket
        self.view = flat.as_strided(parameter.shape, strides, offset).data
        self.rounded = self.view.dtype != parameter.dtype
        self.grad = torch.empty_like(self.view, dtype=parameter.dtype) if self.rounded else self.view
        self.present = False
        self.gathered = False  # a backward of this step has added to it
        self._spent = False
        # By which it is known whether somebody has written into `grad` since.
        self._version = self._sent = self.grad._version

    def fits(self) -> bool:
        """False once the parameter has another device, dtype or shape (model.cuda(), model.half())."""
        p = self.parameter
        return p.dtype == self.grad.dtype and p.device == self.grad.device and p.shape == self.grad.shape

    def held(self) -> Held:
        """What `p.grad` holds now."""
        grad = gradient(self.parameter)
        if grad is None:
            return Held.NOTHING
        if grad is not self.grad:
            return Held.CHANGED
        written = self.grad._version != self._version
        if self._spent and not written:
            return Held.SPENT
        return Held.CHANGED if self.rounded and written else Held.OURS

    def collect(self) -> None:
        """Brings the view up to date with `p.grad`; no gradient, or a spent one, counts as zero."""
        held, self._spent = self.held(), False
        self.present = held in (Held.OURS, Held.CHANGED)
        if not self.present:
            self.view.zero_()
        elif held is Held.CHANGED and (grad := gradient(self.parameter)) is not None:
            self.view.copy_(_dense(grad))

    def take(self) -> Tensor | None:
        """Takes the gradient, if there is one, out of `p.grad`, which is None afterwards."""
        grad = gradient(self.parameter) if self.held() in (Held.OURS, Held.CHANGED) else None
        self._spent = False
        set_gradient(self.parameter, None)
        return grad

    def publish(self) -> None:
        """Puts the view into `p.grad`, in the parameter's dtype."""
        if self.rounded:
            self.grad.copy_(self.view)
        if gradient(self.parameter) is not self.grad:
            set_gradient(self.parameter, self.grad)
        self._version = self.grad._version

    def before_accumulation(self) -> None:
        """Before autograd adds to `p.grad`: drops a spent gradient, sets half precision's sum aside."""
        if self.rounded:
            self.collect()
            set_gradient(self.parameter, None)
        elif self.held() is Held.SPENT:
            set_gradient(self.parameter, None)
        self._spent = False

    def after_accumulation(self) -> None:
        """After autograd has added to `p.grad`, in place or, where there was none, by a tensor of its own."""
        grad = gradient(self.parameter)
        if self.rounded and grad is not None:
            self.view.add_(_dense(grad))
            self.present = True
        else:
            self.collect()
        self.publish()
        self.gathered = True

    def edited(self) -> bool:
        """Whether somebody has changed what this process's backwards have gathered, other than to clear it."""
        grad = gradient(self.parameter)
        if not self.gathered or grad is None or (grad is self.grad and grad._version == self._version):
            return False
        return bool(grad.any())

    def sent(self) -> None:
        """When its exchange starts: until it has finished nobody may write into the gradient."""
        self._sent = self.grad._version

    def touched(self) -> bool:
        """Whether somebody has, by a reference from before."""
        return self.grad._version != self._sent

    def spend(self) -> None:
        """After a step: the gradient stays readable, but the next accumulation starts from zero."""
        if self.held() is Held.CHANGED:
            self.collect()
            self.publish()
        self._spent = True
        self._version = self.grad._version


class Bucket:
    """Parameters of one dtype and device whose gradients are exchanged together, and with them so many riders."""

    def __init__(self, parameters: list[Tensor], name: str, riders: int = 0) -> None:
        self.name = name
        *offsets, end = offsets_of(parameters)
        first, flags = parameters[0], len(parameters)
        self.flat = torch.zeros(end + flags + riders, dtype=gathering_dtype(first), device=first.device)
        self.gradients, self.flags, self.riders = self.flat.split([end, flags, riders])
        self.slots = [Slot(p, self.flat, offset) for p, offset in zip(parameters, offsets, strict=True)]
        self.handle: Handle | None = None
        self.awaited = dict.fromkeys(self.slots)  # in order; those whose last gradient backward has not added

    @property
    def started(self) -> bool:
        """Whether its exchange is under way."""
        return self.handle is not None

    def before_accumulation(self, slot: Slot) -> None:
        """Before autograd adds to the gradient of one of its parameters."""
        slot.before_accumulation()

    def after_accumulation(self, slot: Slot) -> None:
        """After it has."""
        slot.after_accumulation()

    def gather(self, slot: Slot) -> bool:
        """Notes that the armed backward has added this gradient; True when the bucket is full."""
        del self.awaited[slot]
        return not self.awaited

    def start(self, world: World, riders: Sequence[int] = ()) -> None:
        """Starts the exchange of what this process has; until `finish`, the views are undefined."""
        self._set_riders(riders)
        for slot in self.awaited:
            slot.collect()
        if all(slot.present for slot in self.slots):
            self.flags.fill_(1)
        else:
            self.flags.copy_(torch.tensor([slot.present for slot in self.slots]))
        for slot in self.slots:
            slot.sent()
        self.handle = world.allreduce_async(self.flat, self.name)

    def _set_riders(self, riders: Sequence[int]) -> None:
        if riders:
            self.riders.copy_(torch.tensor(riders, dtype=self.riders.dtype), non_blocking=True)

    def edited(self) -> bool:
        """Whether gradients were changed between the backwards of this process and the exchange."""
        return any(slot.edited() for slot in self.slots)

    def touched(self) -> bool:
        """Whether gradients were changed while they were exchanged."""
        return any(slot.touched() for slot in self.slots)

    def finish(self) -> list[Tensor]:
        """Waits for the sums; parameters without a gradient on any process get none.

        Returns the parameters whose sum was given up on all processes and has to be gathered again: here, none.
        """
        if self.handle is None:
            raise RuntimeError(f"bucket {self.name} was not started")
        self.handle.wait()
        self.handle = None
        if not all(
            slot.present for slot in self.slots
        ):  # reading flags waits for the device: only where it tells more
            for slot, flag in zip(self.slots, self.flags.tolist(), strict=True):
                slot.present = flag > 0
        self.publish()
        return []

    def divide(self, divisor: int) -> None:
        """Divides the sums, with whatever was done to `p.grad` since they arrived."""
        if divisor != 1:
            for slot in self.slots:
                slot.collect()
            self.gradients.div_(divisor)
            self.publish()

    def publish(self) -> None:
        for slot in self.slots:
            if slot.present:
                slot.publish()
            else:
                set_gradient(slot.parameter, None)

    def consume(self) -> None:
        """After a step: makes the bucket ready for the next backward, its gradients still readable."""
        self.reset()
        for slot in self.slots:
            slot.spend()

    def reset(self) -> None:
        """Makes the bucket ready for the next backward."""
        self.awaited = dict.fromkeys(self.slots)
        for slot in self.slots:
            slot.gathered = False


class FixedPointBucket(Bucket):
    """Adds up to `terms` gradients of each parameter, of all processes, in fixed point (see `exact.fixed_point`).

    Every backward's gradient is taken out of `p.grad`; until the exchange has finished something stands there that
    raises an error when it is used. Then the flat bucket and its views hold the sums, as in `Bucket`.
    """

    def __init__(self, parameters: list[Tensor], name: str, terms: int, riders: int = 0) -> None:
        super().__init__(parameters, name)
        self.sum = FixedPointSum([slot.view for slot in self.slots], terms, name, riders)
        self.riders = self.sum.riders
        self._index = {slot: index for index, slot in enumerate(self.slots)}
        self._stand_ins = [gathering(parameter) for parameter in parameters]

    @property
    def started(self) -> bool:
        return self.sum.started

    def before_accumulation(self, slot: Slot) -> None:
        self._take(slot, zeros=False)

    def after_accumulation(self, slot: Slot) -> None:
        if (grad := slot.take()) is not None:
            self.sum.add(self._index[slot], _dense(grad))
        slot.gathered = True
        set_gradient(slot.parameter, self._stand_ins[self._index[slot]])

    def edited(self) -> bool:
        return False  # `_take` finds it

    def start(self, world: World, riders: Sequence[int] = ()) -> None:
        self._set_riders(riders)
        for slot in self.awaited:
            self._take(slot, zeros=True)
        for slot in self.slots:
            slot.sent()
        self.sum.start(world)

    def finish(self) -> list[Tensor]:
        counts, overflowed = self.sum.finish([slot.view for slot in self.slots])
        for slot, count in zip(self.slots, counts, strict=True):
            slot.present = count > 0
        self.publish()
        return [self.slots[index].parameter for index in overflowed]

    def reset(self) -> None:
        for slot, stand_in in zip(self.slots, self._stand_ins, strict=True):
            if gradient(slot.parameter) is stand_in:
                set_gradient(slot.parameter, None)
        super().reset()
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


def plan_buckets(parameters: Iterable[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Splits parameters, given in the order of the forward pass, into the buckets' lists.

    Backward produces gradients roughly in reverse, so reversed neighbours share a bucket and the first
    bucket fills first. A bucket holds one (dtype of the sums, device) and at most `bucket_bytes`, or a
    single larger parameter.
    """
    open_buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    buckets: list[list[Tensor]] = []
    for parameter in reversed(list(parameters)):
        dtype = gathering_dtype(parameter)
        key = (dtype, parameter.device)
        bucket = open_buckets.get(key)
        elements = parameter.numel() + (sum(p.numel() for p in bucket) if bucket else 0)
        if bucket is None or elements * dtype.itemsize > bucket_bytes:
            open_buckets[key] = bucket = []
            buckets.append(bucket)
        bucket.append(parameter)
    return buckets
