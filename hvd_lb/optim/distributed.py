"""DistributedOptimizer: any torch optimizer, fed with the gradients of the global minibatch.

g_t = (1/B) Σ over all B images of a step of ∇l (sections 2.1 and 3, remark 3): each process adds up the
gradients of its microbatches, one sum per bucket adds the processes while backward still runs, the
division by B is done once, at the end.
"""

import enum
import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.checkpoint import CheckpointFunction

from hvd_lb.errors import one_of, whole
from hvd_lb.exact.digest import integer_digest
from hvd_lb.exact.fixed_point import GROWTH_BITS, FixedPointOverflow
from hvd_lb.machine.process import keep_memory
from hvd_lb.optim.exchange.buckets import (
    Bucket,
    FixedPointBucket,
    Half,
    Held,
    Riders,
    Slot,
    half,
    squared_norm,
)
from hvd_lb.optim.exchange.places import Places
from hvd_lb.optim.exchange.replicas import Replicas
from hvd_lb.optim.exchange.watched import Lookout, gradient, set_gradient
from hvd_lb.optim.state_dict import broadcast_optimizer, broadcast_tensors
from hvd_lb.world import Handle, World, current
from hvd_lb.world.arriving import Arriving

# Names agree between the processes of a world and differ between optimizers of a process. An optimizer of this process
# alone takes no number: the others know nothing of it.
_instances: WeakKeyDictionary[World, Iterator[int]] = WeakKeyDictionary()
_STEPS = "hvd_lb_steps"  # an option of groups
# Classes of torch, by name: to import some of them takes long.
_EXCHANGING = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
_ITS_OWN = ("param_groups", "state", "defaults")
_SHARED = [
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
]


class Phase(enum.Enum):
    """Where the gradients of this step are."""

    GATHERING = "local sums"
    EXCHANGING = "on their way"
    REDUCED = "global sums"
    NORMALISED = "divided by the minibatch"


class DistributedOptimizer(Optimizer):
    """Wraps `optimizer` for a loop like this one, in which every process calls `step` equally often:

        for microbatches in loader:  # of this process: any number, even none
            for i, (x, y) in enumerate(microbatches):
                loss = F.cross_entropy(model(x), y, reduction="sum")
                opt.backward(loss, last=i == len(microbatches) - 1)
            opt.step(images=sum(len(y) for _, y in microbatches))

    The plain form works too: `loss.backward(); opt.step()` averages the processes' gradients. Of several
    backwards all but the last go into `with opt.accumulate():`; the last one starts the exchange of each
    bucket as soon as it is full.

    - `step` consumes the gradients: they stay readable, and the next backward starts from zero, with or
      without zero_grad. One that was set by hand stays a gradient until it is cleared, or until that backward.
    - Whoever reads or sets `p.grad` after backward (`clip_grad_norm_`, `GradScaler.unscale_`) waits for the exchange
      and sees the mean of the processes. For sums call `opt.synchronize(images=n)` before; a count that comes after
      somebody has looked is an error, except in `scaler.step(opt, images=n)` without an `unscale_` of its own.
    - To read `p.grad` while backward is at work is an error, and to change a process's own sums after the last
      backward inside `accumulate()`.
    - What is done to gradients before `step` is done by all processes: that others clip and one does not is an error.
    - A process without a backward calls `synchronize` before it clips, and, as GradScaler wants to have scaled
      something, `scaler.scale(torch.zeros(()))` before its first step.
    - `opt.zero_grad()` gives up an exchange under way, on all processes or on none.
    - A parameter without a gradient on all processes is skipped; one without on some counts as zero there.
    - `schedule(steps)` is the learning rate of step `steps`, counted from 0; it is set in every group,
      times the group's "lr_scale" if there is one.
    - A parameter belongs to the newest DistributedOptimizer made with it. One that it was taken from does nothing any
      more, and its `backward`, `synchronize` and `step` are a `RuntimeError`.

    model: gives the order of the buckets, and buffers and further parameters to broadcast. Without it the
        buckets follow the groups, where a group of all batch norms delays its bucket to the end of backward.
        At construction rank 0's model and optimizer state overwrite those of the other processes.
    world: the processes; by default those of `hvd_lb.init()`.
    bucket_bytes: upper bound of a bucket, except for one with a single larger parameter.
    reproducible_terms: when given, gradients are added in fixed point, and the sum has the same bits however the
        backwards of a step are divided among processes and whatever their order. It is the largest number of
        backwards of a step, those of all processes counted together. `synchronize` and `step` may then raise
        `FixedPointOverflow`, on all processes alike and with the gradients cleared: the step's backwards have to be
        run again. Until the last backward gradients can neither be read nor set.
    compress: "fp16" or "bf16": between processes gradients are exchanged, and added up, in that type: half the bytes of
        fp32, with a rounding of its own (docs/performance.md). An element that is too large for it becomes infinite.
        Not with `reproducible_terms`; Horovod has no bf16.
    images: with `compress`, about how many images a step has on all processes, where losses are sums over images; by
        default losses are means over those of a process. It only keeps numbers in the range of fp16.
    skip_on_device: with GradScaler a step whose gradients are not finite is skipped by the wrapped optimizer's fused
        kernel, if it has one, and the host does not wait to know of it. So `steps` counts it, too.
    state: a state dict of this class, or of the wrapped optimizer, to go on from. That of rank 0 counts, for all
        processes, with "steps" and "exponents"; the wrapped optimizer's `load_state_dict` would drop these two.
    riders: integers that travel in the gradients' exchange; after `synchronize` their sums are in `carried`. With
        gradients on a GPU, to wait for them is to wait for the exchange, which `synchronize` does not.

    Methods that only the wrapped optimizer has are called through. Raises `TypeError` when `optimizer` is no plain
    torch optimizer, or names a parameter that is complex or has no shape yet (lazy modules), or `schedule` is no
    function, `UserError`, a `ValueError`, for another option that is none, `RuntimeError` when the processes disagree
    on the parameters, or made other optimizers than this one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        *,
        world: World | None = None,
        schedule: Callable[[int], float] | None = None,
        bucket_bytes: int = 25 * 2**20,
        reproducible_terms: int | None = None,
        riders: Riders | None = None,
        compress: Literal["none", "fp16", "bf16"] = "none",
        images: int | None = None,
        skip_on_device: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        _not_compiled()
        # Optimizer.__init__ is left out: groups, defaults, state and hooks are the wrapped optimizer's own,
        # and its step fires the hooks, once.
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, DistributedOptimizer):
            raise TypeError(f"expected a plain torch optimizer, got {type(optimizer).__name__}")
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"schedule is a {type(schedule).__name__}; expected a function from the step to a learning rate "
                "(torch's schedulers are made with this optimizer, later)"
            )
        one_of("compress", compress, ("none", "fp16", "bf16"))
        whole("bucket_bytes", bucket_bytes)
        if reproducible_terms is not None:
            whole("reproducible_terms", reproducible_terms, most=2**31)
        if images is not None:
            whole("images", images)
        if compress != "none" and reproducible_terms is not None:
            raise ValueError(f"compress={compress!r} with reproducible_terms: exact sums have no fewer bits")
        self.optimizer = optimizer
        self.world = current() if world is None else world
        if model is not None:
            _check_model(model, alone=self.world.size == 1)
        self._schedule = schedule
        self.steps = 0
        for name in _SHARED:
            setattr(self, name, getattr(optimizer, name, OrderedDict()))  # those around others may have none
        self._terms = reproducible_terms
        self._riders = riders
        self._skip_on_device = skip_on_device
        alone = compress == "none" or self.world.size == 1
        compressed = None if alone else half(compress, images or self.world.size)
        self.carried: Arriving[int] | None = None
        number = (
            next(_instances.setdefault(self.world, itertools.count())) if self.world.size > 1 else "alone"
        )
        self._name = f"hvd_lb.optimizer.{number}"
        wire = compressed and [str(compressed.dtype), compressed.scale]
        self._places = Places(
            self,
            optimizer,
            model,
            self.world,
            self._name,
            make=partial(_bucket, world=self.world, terms=reproducible_terms, compress=compressed),
            bucket_bytes=bucket_bytes,
            riders=Replicas.riders + (riders.count if riders else 0),
            options=[
                type(optimizer).__name__,
                bucket_bytes,
                reproducible_terms,
                riders and riders.count,
                wire,
            ],
        )
        # Buckets of parameters that came after this step's backward, which has given them their gradients.
        self._behind: list[Bucket] = []
        self._phase = Phase.GATHERING
        self._armed = True
        self._counted: tuple[int | None, int | None] = (None, None)
        self._divisor: int | None = None  # when it is known
        self._lookout = Lookout(self._look)
        self._own_norms: dict[Bucket, Tensor] | None = None  # while they are watched
        self._own_digests: dict[Bucket, Tensor] | None = None  # as well
        #: Called when a bucket's exchange begins, with its number and bytes: for whoever measures.
        self.on_exchange: Callable[[int, int], None] | None = None
        if compressed:  # an engine that does not add such numbers says so now
            self.world.allreduce(torch.zeros(1, dtype=compressed.dtype), f"{self._name}.compress")
        self._adopt()
        if not any(p.is_cuda for p in self._places.known):
            keep_memory()
        seed = torch.tensor([torch.initial_seed() % 2**32])
        self._seed = int(self.world.broadcast(seed, f"{self._name}.seed"))  # rank 0's
        self._replicas = Replicas(optimizer, self.world.rank, self.world.size, self._seed)
        if state is not None and self.world.rank == 0:
            self.load_state_dict(state)
        if self.world.size > 1:
            broadcast_tensors(self.world, self._places.further(), f"{self._name}.model")
            broadcast_optimizer(self.world, self, f"{self._name}.state")
        self._made = True

    # The gradients of a step

    @torch._disable_dynamo
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Adds the gradients of a loss, a sum over images; the `last` call of a step starts the exchange."""
        self._places.check_owner()
        if last:
            loss.backward()
        else:
            with self.accumulate():
                loss.backward()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, backward only adds to this process's gradients and exchanges nothing."""
        before, self._armed = self._armed, False
        try:
            yield
        finally:
            self._armed = before

    @torch._disable_dynamo
    def synchronize(self, *, images: int | None = None, global_images: int | None = None) -> None:
        """Completes the exchange and divides, once per step, by the number of images of all processes.

        That is `global_images` if given, else the sum over processes of `images` (this process's own, 0
        is fine), else the number of processes: the average. All processes give the same one of the two.
        Raises `ValueError` when there are no images at all, `RuntimeError` when the gradients were
        divided by another count before, or somebody looked at them before there was one.
        """
        self._places.check_owner()
        counted = (images, global_images)
        if images is not None and global_images is not None:
            raise ValueError("give images (of this process) or global_images (of all), not both")
        if self._divisor is not None:
            if counted not in ((None, None), self._counted):
                raise RuntimeError(
                    f"gradients are already divided by {self._divisor}; give the count once"
                    if any(count is not None for count in self._counted)
                    else f"gradients were read or changed before their number of images was known, as the mean of "
                    f"{self.world.size} processes: call opt.synchronize(images=...) first, right after backward"
                )
            return
        total: Handle | None = None
        if global_images is not None:
            whole("global_images", global_images, 0)
        if images is not None:
            count = torch.tensor([whole("images", images, 0)])
            total = self.world.allreduce_async(count, f"{self._name}.images")
        if self._phase is not Phase.REDUCED:
            try:
                self._finish()
            except FixedPointOverflow:  # on all processes; the next step needs the name of the count again
                if total is not None:
                    total.wait()
                raise
        if total is not None:
            divisor = int(total.wait().item())
        else:
            divisor = self.world.size if global_images is None else int(global_images)
        if divisor <= 0:
            raise ValueError(f"a step needs images, got {divisor} in all; zero_grad() gives it up")
        self._divisor, self._counted = divisor, counted
        if self._divides_itself():
            self._lookout.watch(self._places.of)  # whoever looks before the update sees the mean
        else:
            self._divide()

    @torch._disable_dynamo
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        images: int | None = None,
        global_images: int | None = None,
    ) -> Any:
        """One update: `synchronize` (unless done), this step's learning rate, the wrapped optimizer's step.

        A closure is evaluated where the wrapped optimizer wants it, each time followed by an exchange; it
        clears the gradients, runs backward and returns the loss. What the optimizer sees, and this
        returns, is the loss of all processes, divided like the gradients, so that all processes take the
        same decisions (LBFGS).
        """
        self._places.check_owner()
        if closure is not None and not callable(closure):
            raise TypeError(
                f"step({closure!r}): expected a closure; images are counted by name, step(images=...)"
            )
        if closure is None and images is global_images is None and self._only_makes_state():
            return self.optimizer.step()
        # A step may also be there for its riders alone.
        nothing_new = not self._riders and images is global_images is None and self._only_left()
        if closure is None or self._phase is Phase.EXCHANGING:
            self._synchronize_now(images, global_images)
        if nothing_new and closure is None and not any(slot.present for slot in self._places.slots()):
            self.zero_grad()
            raise RuntimeError(
                "step() without a backward on any process, and the gradients of the last step are still there: they do "
                "not count again, and what was written into them by p.grad.data tells nobody; give p.grad = ..., or "
                "call opt.zero_grad() before"
            )
        if self.world.size > 1 and closure is None:
            self._refuse_own()
        if self._schedule is not None:
            self._set_learning_rate(self._schedule(self.steps))
        if closure is None:
            result = self._update()
        else:
            result = self.optimizer.step(lambda: self._evaluate(closure, images, global_images))
        self._lookout.end()
        for bucket in self._buckets:
            bucket.consume()
        self._phase, self._divisor = Phase.GATHERING, None
        if self._places.carrier:
            self._replicas.note(self.steps, self._places.weights)
        self.steps += 1
        return result

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards all gradients; an exchange under way is completed first, for the other processes' sake."""
        if self._phase is Phase.EXCHANGING and not self._places.taken:
            with suppress(FixedPointOverflow):
                self._finish()
        self._reset()
        self.optimizer.zero_grad(set_to_none)

    def watch_norm(self) -> None:
        """Notes the norm of the next backward's gradients, which `own_norm` then tells. For `optim.noise_scale`."""
        self._own_norms = {}

    def own_norm(self) -> Tensor | None:
        """The squared norm of the gradients of the backward since `watch_norm`, the first of its step.

        None where not all parameters had one.
        """
        noted, self._own_norms = self._own_norms, None
        if not noted or len(noted) < len(self._buckets):
            return None
        return torch.stack(list(noted.values())).sum()

    def watch_digest(self) -> None:
        """Notes digests of the next backward's gradients, which `own_digest` then tells; with `reproducible_terms`."""
        self._own_digests = {}

    def own_digest(self) -> Tensor:
        """`integer_digest` of each parameter's gradient in the backward since `watch_digest`, in one vector.

        Zeros for the parameters of a bucket of which not all had one.
        """
        noted, self._own_digests = self._own_digests or {}, None
        zeros = [torch.zeros(2 * len(bucket.slots), dtype=torch.int64) for bucket in self._buckets]
        return torch.cat([noted.get(b, zero).cpu() for b, zero in zip(self._buckets, zeros, strict=True)])

    def digest(self, gradients: Mapping[Tensor, Tensor | None]) -> Tensor:
        """What `own_digest` is where a backward has these gradients, by parameter."""
        digests = []
        for bucket in self._buckets:
            found = [gradients.get(slot.parameter) for slot in bucket.slots]
            full = [gradient for gradient in found if gradient is not None]
            missing = torch.zeros(2 * len(found), dtype=torch.int64)
            digests.append(integer_digest(full).cpu() if len(full) == len(found) else missing)
        return torch.cat(digests)

    def sum_norm(self) -> Tensor:
        """After `synchronize`: the squared norm of the sum of all processes' gradients, before its division."""
        if self._phase not in (Phase.REDUCED, Phase.NORMALISED):
            raise RuntimeError("the norm of the sum is known after synchronize() and before step()")
        divided = (self._divisor or 1) if self._phase is Phase.NORMALISED else 1
        views: dict[torch.dtype, list[Tensor]] = {}
        for bucket in self._buckets:
            views.setdefault(bucket.flat.dtype, []).extend([slot.view for slot in bucket.slots])
        return torch.stack([squared_norm(of) for of in views.values()]).sum() * float(divided) ** 2

    @torch.no_grad()
    def mean_gradients(self) -> dict[str, Tensor]:
        """After `synchronize`: copies of the means of all processes' gradients, by parameter; nothing is changed."""
        if self._phase not in (Phase.REDUCED, Phase.NORMALISED):
            raise RuntimeError("the mean gradients are known after synchronize() and before step()")
        divisor = (self._divisor or 1) if self._phase is Phase.REDUCED else 1
        slots = [slot for bucket in self._buckets for slot in bucket.slots if slot.present]
        return {self._places.label(slot.parameter): slot.view.clone().div_(divisor) for slot in slots}

    def abandon(self) -> None:
        """Forgets all gradients where an exchange cannot be completed, as processes were lost: then this one only has
        a state that another can take over."""
        self._reset()

    @property
    def steps(self) -> int:
        """Steps taken: the position of the schedule."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = steps
        # For whoever keeps nothing of a state dict but state and groups, as torch's checkpoints do.
        if self._schedule:
            for group in self.optimizer.param_groups:
                group[_STEPS] = steps

    # What the wrapped optimizer has

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def __repr__(self) -> str:
        return f"DistributedOptimizer of {self.world.size} processes, {self.optimizer!r}"

    def __getattr__(self, name: str) -> Any:
        """What only the wrapped optimizer has: SAM's `first_step`, schedule-free's `train` and `eval`."""
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What only the wrapped optimizer has is set there, where it is read."""
        ours = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        made = "_made" in self.__dict__
        if made and (name in _ITS_OWN or not ours) and hasattr(self.optimizer, name):
            setattr(self.optimizer, name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a DistributedOptimizer cannot be copied or pickled: it belongs to its model's parameters and to this "
            "process; keep opt.state_dict(), or wrap a copy of opt.optimizer"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer, with rank 0's weights on all processes."""
        self.optimizer.add_param_group(param_group)
        self.steps = self.steps  # of the new group, too
        self._adopt()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, which it can load, and "steps".

        With `reproducible_terms` also "exponents", those of the gradients by their parameter's number in the groups.
        """
        state = {**self.optimizer.state_dict(), "steps": self.steps}
        return state if self._terms is None else {**state, "exponents": self.exponents}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads this process's state from `state_dict` of this class or of the wrapped optimizer."""
        own = ("steps", "exponents")
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key not in own})
        steps = [group[_STEPS] for group in self.optimizer.param_groups if _STEPS in group]
        self.steps = state_dict.get("steps", max(steps, default=self.steps))
        self._places.lay_out_state(self._places.of)
        self.exponents = state_dict.get("exponents", {})

    @property
    def exponents(self) -> dict[int, int]:
        """Those of the gradients' next sums, by their parameter's number in the groups; with `reproducible_terms`."""
        return self._places.exponents

    @exponents.setter
    def exponents(self, exponents: Mapping[int, int]) -> None:
        self._places.exponents = exponents

    # Inside

    @property
    def _buckets(self) -> list[Bucket]:
        return self._places.buckets

    def _adopt(self) -> None:
        """Makes room for parameters that are new, were unfrozen or moved to another device or dtype."""
        made = self._places.adopt()
        if self._phase is Phase.EXCHANGING:
            self._behind += made

    def _awakes(self, parameter: Tensor | None) -> bool:
        """Whether a parameter that had no place, as it did not learn, has one now that backward comes to it."""
        awake = self._places.awaken(parameter)
        if awake and self._phase is Phase.EXCHANGING:
            self._lookout.watch(self._places.of)
        return awake

    def _taken_from(self) -> None:
        self._lookout.end()

    def _before(self, bucket: Bucket, slot: Slot) -> None:
        """Before backward adds to a gradient."""
        if self._phase in (Phase.REDUCED, Phase.NORMALISED):
            self._forget_exchanged()
        if bucket.started or (self._phase is Phase.EXCHANGING and slot not in bucket.awaited):
            if _within(CheckpointFunction.backward):
                raise RuntimeError(
                    f"backward() came to {self._places.label(slot.parameter)} twice, by reentrant activation "
                    "checkpointing of a module that is used more than once: give torch.utils.checkpoint "
                    "use_reentrant=False"
                )
            raise RuntimeError(
                "backward() after the exchange of this step has started: put all backwards of a step but the "
                "last into `with opt.accumulate():`, or call step() or opt.zero_grad() first"
            )
        if self._armed and self._phase is Phase.GATHERING:
            self._phase = Phase.EXCHANGING
            for each in self._buckets:
                each.await_all()
            self._lookout.watch([*self._places.of, *self._places.added()])
        if not bucket.looked:
            bucket.looked = True
            if not bucket.fits():
                self._places.follow_moved()
                bucket, slot = self._places.of[slot.parameter]
        slot.opened = True
        if slot.gathered or slot.rounded or gradient(slot.parameter) is not None:
            bucket.before_accumulation(slot)

    def _open_late(self, slot: Slot) -> tuple[Bucket, Slot]:
        """Where torch has made a new node, without our hook, as the parameter came to another dtype or device."""
        parameter = slot.parameter
        if slot.spent and gradient(parameter) is slot.grad:
            raise RuntimeError(
                f"{self._places.label(parameter)} was moved to another dtype or device, and its gradient of the step "
                "before was still there: backward() has added to that. Call opt.zero_grad() after moving a model"
            )
        grad = gradient(parameter)
        set_gradient(parameter, None)
        self._places.follow_moved()
        self._places.watch(parameter)
        bucket, slot = self._places.of[parameter]
        self._before(bucket, slot)
        set_gradient(parameter, grad)
        return self._places.of[parameter]

    def _forget_exchanged(self) -> None:
        """When the step was skipped and the gradients were cleared behind our back; else it is an error."""
        grads = [grad for p in self._places.of if (grad := gradient(p)) is not None]
        if any(bool(grad.any()) for grad in grads):
            raise RuntimeError("backward() onto exchanged gradients: call step() or zero_grad() first")
        self._reset()

    def _after(self, bucket: Bucket, slot: Slot) -> None:
        """After it has: a bucket that is full is exchanged, or taken over where more is to come."""
        if not slot.opened:
            bucket, slot = self._open_late(slot)
        slot.opened = False
        bucket.after_accumulation(slot)
        if self._phase is Phase.EXCHANGING and not self._armed:
            return
        bucket.awaited.pop(slot, None)
        if not bucket.awaited:
            if self._own_norms is not None:
                self._own_norms.setdefault(bucket, bucket.own_norm())
            if self._own_digests is not None and isinstance(bucket, FixedPointBucket):
                self._own_digests.setdefault(bucket, bucket.own_digest())
            if not self._armed:
                bucket.gather()
                bucket.await_all()
            elif bucket not in self._places.fresh:
                self._start(bucket)

    @torch._disable_dynamo
    @torch.no_grad()
    def _start(self, bucket: Bucket) -> None:
        if bucket is self._places.carrier:
            self._replicas.say(bucket.riders, self._riders.ask() if self._riders else ())
        bucket.start(self.world)
        if self.on_exchange:
            self.on_exchange(self._buckets.index(bucket), bucket.exchanged_bytes)

    @torch._disable_dynamo
    def _look(self) -> None:
        """Before somebody reads or sets a gradient while backward and exchange are under way: completes the exchange.

        What is seen is the mean of the processes, unless GradScaler unscales within its own `step`: that may be done
        before the division, for which this class's `step` will have the count.
        """
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "p.grad was read or set while backward is at work, where it is neither this process's gradient nor the "
                "global one: do it after backward, or take this process's own from p.register_hook()"
            )
        if self._phase is not Phase.REDUCED:
            self._finish()
        self._lookout.end()
        if not _within(GradScaler.step):
            if self._divisor is None:
                self._divisor, self._counted = self.world.size, (None, None)
            self._divide()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves it to the kernel to unscale gradients and to skip a step; the word is torch's."""
        return self._skip_on_device and self._is_fused()

    def _is_fused(self) -> bool:
        """Whether the wrapped optimizer is one of those that divide all gradients while they update.

        torch's fused ones do, for GradScaler's sake. They write the quotients back.
        """
        return bool(
            getattr(self.optimizer, "_step_supports_amp_scaling", False)
            # A group may be updated otherwise: by its own word, or as that of a state that was loaded.
            and all(group.get("fused", True) for group in self.optimizer.param_groups)
            and not self._optimizer_step_pre_hooks  # which would see what is not divided
            and not _global_optimizer_pre_hooks
        )

    def _divides_itself(self) -> bool:
        """Whether it divides by the number of images."""
        return bool(
            self._is_fused()
            and self._buckets
            and not any(bucket.rounded for bucket in self._buckets)
            and all(gradient(p) is None for p in self._places.others)
        )

    def _update(self) -> Any:
        """The wrapped optimizer's step, by which it divides what is not divided."""
        if self._phase is Phase.REDUCED and not self._divides_itself():
            self._divide()
        self._lookout.end()
        scale, found_inf = map(self.__dict__.get, ("grad_scale", "found_inf"))  # GradScaler's
        if self._phase is Phase.REDUCED:
            # A fill, not a copy: on a GPU the host does not wait.
            divisor = torch.full(
                (), float(self._divisor or 1), dtype=torch.float32, device=self._buckets[0].flat.device
            )
            scale = divisor if scale is None else divisor * scale
        inner: Any = self.optimizer
        with self._drawing_alike():
            if scale is found_inf is None:
                return inner.step()
            inner.grad_scale, inner.found_inf = scale, found_inf
            try:
                return inner.step()
            finally:
                del inner.grad_scale, inner.found_inf

    @contextmanager
    def _drawing_alike(self) -> Iterator[None]:
        """Meanwhile torch's random numbers are the same on all processes: what an optimizer draws in its step, as to
        round, has to be so, or replicas drift apart."""
        if self.world.size == 1:
            yield
            return
        generators = [torch.default_generator]
        for index in {bucket.flat.device.index or 0 for bucket in self._buckets if bucket.flat.is_cuda}:
            generators.append(torch.cuda.default_generators[index])
        states = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(self._seed + self.steps)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    @torch.no_grad()
    def _divide(self) -> None:
        self._lookout.end()
        for bucket in self._buckets:
            bucket.divide(self._divisor or 1)
        self._phase = Phase.NORMALISED

    @torch.no_grad()
    def _finish(self) -> None:
        """Exchanges what backward has not, and waits: afterwards `.grad` are sums over all processes."""
        self._lookout.end()
        if self._phase is Phase.GATHERING and any(bucket.edited() for bucket in self._buckets):
            raise RuntimeError(
                "gradients were changed after the last backward in `with opt.accumulate():`, where they are this "
                "process's own: call opt.synchronize() first"
            )
        if self._phase is Phase.GATHERING and self.world.size > 1:
            slots = [slot for bucket in self._buckets for slot in bucket.slots]
            if any(slot.revived() for slot in slots) and not any(slot.gathered for slot in slots):
                raise RuntimeError(
                    "gradients of the last step were changed, as by clipping, and this process has had no backward "
                    "since: call opt.synchronize() before; where they are set by hand, opt.zero_grad() before that"
                )
        self._adopt()
        for bucket in self._buckets:
            if not bucket.started:
                self._start(bucket)
        for bucket in self._behind:  # their gradients count once, as those of others
            for slot in bucket.slots:
                slot.given = None
        self._behind = []
        touched = any(bucket.touched() for bucket in self._buckets)
        # All of them, before the host waits for what it has to know of the first.
        for bucket in self._buckets:
            bucket.arrive()
        overflowed = {parameter for bucket in self._buckets for parameter in bucket.finish()}
        if self._places.carrier:
            self._replicas.hear(self._places.carrier.riders)
        if self._riders:
            self.carried = Arriving(self._sums_of(self._riders), int)
        self._phase = Phase.REDUCED
        if touched:
            self.zero_grad()
            raise RuntimeError(
                "gradients were changed while they were exchanged, by a reference to them from before: take them "
                "from p.grad after backward (DistributedDataParallel has such references, too: leave it out)"
            )
        self._refuse_drift()
        if overflowed:
            self.zero_grad()
            names = sorted(self._places.label(p) for p in overflowed)
            raise FixedPointOverflow(
                f"gradients of {', '.join(names)} grew more than {2**GROWTH_BITS:,}-fold since the last step: "
                "take this step again"
            )

    def _synchronize_now(self, images: int | None, global_images: int | None) -> None:
        """`synchronize` right before the update. That a process comes to it first here is told to all.

        It cannot have seen the gradients that others have clipped or unscaled. On a GPU the next exchange tells it
        (`_refuse_drift`), as it has not changed its own.
        """
        replicas = self._replicas
        replicas.late = self._phase is Phase.GATHERING
        unscaled = "found_inf" in self.__dict__ or _within(GradScaler._maybe_opt_step)
        if replicas.late and self.world.size > 1 and unscaled:
            # Nothing else would tell: unscaling leaves no trace in a tensor's version.
            raise RuntimeError(
                "GradScaler.step() before this process has taken part in the exchange: it has unscaled gradients of "
                "its own, which are no sums. Call opt.synchronize() first, also where a process has no backward"
            )
        try:
            self.synchronize(images=images, global_images=global_images)
        finally:
            replicas.late = False
        normalised = self._places.carrier is not None and self._phase is Phase.NORMALISED
        replicas.changed = normalised and any(bucket.changed() for bucket in self._buckets)
        if replicas.changed and self._hears_at_once and (late := replicas.late_ones()):
            raise RuntimeError(
                f"gradients were changed before step(), as by clipping, and {late} of {self.world.size} processes "
                "without a backward came to step() at once and could not do the same: call opt.synchronize() there "
                "first, and then what all do with gradients"
            )

    def _refuse_drift(self) -> None:
        """RuntimeError where the processes' weights are no longer the same.

        On a GPU it is what the exchange before told: to wait for this one would have the host wait.
        """
        if error := self._replicas.parted(self._hears_at_once, self._places.label):
            self.zero_grad()
            raise error

    def _refuse_own(self) -> None:
        """RuntimeError where a gradient that was set by hand would be used as it is, without those of other processes.

        Parameters that never learnt have no place in the exchange; and what comes after it is not in it.
        """
        late = [slot.parameter for slot in self._places.slots() if not slot.present]
        for parameter, why in (
            *(
                (p, "which is not exchanged, as it does not learn: call its requires_grad_()")
                for p in self._places.others
            ),
            *((p, "after the exchange, in which no process had one: do it before backward") for p in late),
        ):
            grad = gradient(parameter)
            if grad is not None and bool(grad.any()):
                self.zero_grad()
                raise RuntimeError(
                    "this process has set a gradient of its own by hand, that of "
                    f"{self._places.label(parameter)}, {why}"
                )

    @property
    def _hears_at_once(self) -> bool:
        """Whether what others say is there with the sums; to have it from a GPU at once the host would wait."""
        return self._places.carrier is not None and not self._places.carrier.riders.is_cuda

    def _sums_of(self, riders: Riders) -> Tensor:
        if self._places.carrier:
            return self._places.carrier.riders[-riders.count :]
        return self.world.allreduce(torch.tensor(riders.ask()), f"{self._name}.riders")

    def _reset(self) -> None:
        self._lookout.end()
        for bucket in self._buckets:
            bucket.reset()
        self._phase, self._divisor = Phase.GATHERING, None

    def _only_makes_state(self) -> bool:
        """Whether this is no step of the loop's: torch's `get_optimizer_state_dict` and its like have an optimizer make
        the state that it has not by a step with gradients that they set to 0, and with learning rates of 0."""
        if self._phase is not Phase.GATHERING or self.optimizer.state:
            return False
        if any(group.get("lr", 0) for group in self.optimizer.param_groups):
            return False
        slots = [slot for bucket in self._buckets for slot in bucket.slots]
        set_by_hand = [slot for slot in slots if not slot.gathered and slot.held() is Held.CHANGED]
        grads = [gradient(slot.parameter) for slot in set_by_hand]
        return len(grads) == len(slots) and not any(grad is not None and bool(grad.any()) for grad in grads)

    def _only_left(self) -> bool:
        """Whether this process has no gradients but those that a step has left."""
        return (
            self._phase is Phase.GATHERING
            and any(slot.held() is Held.SPENT for slot in self._places.slots())
            and all(gradient(p) is None for p in self._places.others)
        )

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            scaled = float(learning_rate) * group.get("lr_scale", 1)
            if isinstance(group["lr"], Tensor):  # torch lets groups share one: do not write into it
                group["lr"] = torch.full_like(group["lr"], scaled)
            else:
                group["lr"] = scaled

    def _evaluate(self, closure: Callable[[], Any], images: int | None, global_images: int | None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self._synchronize_now(images, global_images)
        total = torch.as_tensor(loss).detach().to("cpu", torch.float64).reshape(1).clone()
        return self.world.allreduce(total, f"{self._name}.loss")[0] / (self._divisor or 1)


def _bucket(
    parameters: list[Tensor],
    name: str,
    riders: int,
    *,
    world: World,
    terms: int | None,
    compress: Half | None,
) -> Bucket:
    if terms is None:
        return Bucket(parameters, name, world, riders, compress)
    return FixedPointBucket(parameters, name, world, terms, riders)


def _check_model(model: nn.Module, *, alone: bool) -> None:
    """TypeError for a module that exchanges gradients itself, or changes weights by what one process has seen."""
    for name, module in model.named_modules():
        if wrapper := _EXCHANGING & {kind.__name__ for kind in type(module).__mro__}:
            raise TypeError(
                f"model is wrapped in {wrapper.pop()}, which exchanges gradients itself: give the network alone"
            )
        if not alone and isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise TypeError(
                f"{name or 'the model'} has max_norm {module.max_norm:g}: its forward shortens the rows that this "
                "process looks up, and replicas would drift apart; shorten rows after opt.step()"
            )


@cache
def _not_compiled() -> None:
    """Has torch.compile leave our hooks alone where somebody compiles a step as a whole: it mistakes what they do.

    By their files, as a decorator takes microseconds for each parameter. Torch's optimizers have imported this module.
    """
    from torch._dynamo import trace_rules

    for name in (
        "distributed",
        "exchange.buckets",
        "exchange.places",
        "exchange.replicas",
        "exchange.watched",
    ):
        trace_rules.add(f"{__package__}.{name}")


def _within(function: Any) -> bool:
    """Whether this function is at work in this thread."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None
