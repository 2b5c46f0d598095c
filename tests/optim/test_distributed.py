"""DistributedOptimizer in one process: what horovod.torch.DistributedOptimizer gets wrong, all ways to loop.

Every test runs with floating-point sums and with those in fixed point. Several real processes are in test_processes.py.
"""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.optim import SGD, DistributedOptimizer, parameter_groups
from hvd_lb.world.solo import Done, Solo


@pytest.fixture(autouse=True, params=[None, 64], ids=["float", "fixed point"])
def terms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """`reproducible_terms` of the optimizers that `wrap` makes."""
    monkeypatch.setitem(DEFAULTS, "reproducible_terms", request.param)
    return request.param


DEFAULTS: dict[str, object] = {}


@dataclass(frozen=True)
class Noted(Done):
    """A reduction whose name is free again when it was waited for, as in Horovod."""

    name: str
    under_way: set[str]

    def wait(self) -> Tensor:
        self.under_way.discard(self.name)
        return self.tensor


pytestmark = pytest.mark.usefixtures("equal_copies")


class Recorder(Solo):
    """A world that notes what is exchanged; its sums multiply by `size`, as equal processes would."""

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self.started: list[str] = []
        self.under_way: set[str] = set()

    def allreduce_async(self, tensor: Tensor, name: str) -> Done:
        self.started.append(name)
        return self._start(self.allreduce(tensor, name), name)

    def maximum_async(self, tensor: Tensor, name: str) -> Done:
        return self._start(tensor, name)

    def _start(self, tensor: Tensor, name: str) -> Noted:
        assert name not in self.under_way
        self.under_way.add(name)
        return Noted(tensor, name, self.under_way)

    def allreduce(self, tensor: Tensor, name: str) -> Tensor:
        return tensor.mul_(self.size)

    def buckets(self) -> list[str]:
        return [name for name in self.started if ".bucket." in name]


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 5),
    ]
    return nn.Sequential(*layers).double()


def batches(count: int, images: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(images, 3, 8, 8, dtype=torch.float64, generator=generator),
            torch.randint(0, 5, (images,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_sum(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def wrap(model: nn.Module, world: Solo | None = None, **options: object) -> DistributedOptimizer:
    optimizer = SGD(parameter_groups(model))
    return DistributedOptimizer(optimizer, model, world=world or Solo(), **{**DEFAULTS, **options})


def difference(a: nn.Module, b: nn.Module) -> float:
    return max(
        float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


NOTHING = {
    "optimizer, to none": lambda model, opt: opt.zero_grad(),
    "optimizer, to zero": lambda model, opt: opt.zero_grad(set_to_none=False),
    "model, to none": lambda model, opt: model.zero_grad(),
    "model, to zero": lambda model, opt: model.zero_grad(set_to_none=False),
    "by hand": lambda model, opt: [setattr(p, "grad", None) for p in model.parameters()],
    "never": lambda model, opt: None,
}


@pytest.mark.parametrize("clear", NOTHING)
@pytest.mark.parametrize("channels_last", [False, True])
def test_microbatches_add_up_to_one_minibatch(clear: str, channels_last: bool) -> None:
    model, reference = convnet(), convnet()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    opt = wrap(model, bucket_bytes=1000)
    plain = torch.optim.SGD(parameter_groups(reference), 0.1, 0.9, nesterov=True)
    for step in range(4):
        data = batches(3, images=2 + step)
        NOTHING[clear](model, opt)
        for i, batch in enumerate(data):
            opt.backward(loss_sum(model, batch), last=i == 2)
        opt.step(images=sum(len(y) for _, y in data))
        plain.zero_grad()
        (sum(loss_sum(reference, batch) for batch in data) / (3 * (2 + step))).backward()
        plain.step()
        assert all(p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters())
    assert difference(model, reference) < 1e-13


def test_gradients_that_were_set_to_zero_are_no_term_of_a_sum() -> None:
    w = nn.Parameter(torch.zeros(2))
    opt = DistributedOptimizer(torch.optim.SGD([w], 1.0), world=Solo(), reproducible_terms=1)
    for _ in range(2):
        opt.zero_grad(set_to_none=False)
        opt.backward(w.sum())
        opt.step(images=1)
    assert w.tolist() == [-2.0, -2.0]


def test_gradients_are_views_of_buckets_and_stay_so() -> None:
    model = convnet().to(memory_format=torch.channels_last)
    opt = wrap(model, bucket_bytes=3000)
    storages = {bucket.flat.untyped_storage().data_ptr() for bucket in opt._buckets}
    for set_to_none in (True, False, True):
        opt.zero_grad(set_to_none)
        loss_sum(model, batches(1)[0]).backward()
        opt.step(images=4)
        assert {p.grad.untyped_storage().data_ptr() for p in model.parameters()} == storages
    assert len(storages) > 1


def test_gradients_stay_readable_after_step() -> None:
    model = convnet()
    opt = wrap(model)
    loss = loss_sum(model, batches(1)[0])
    local = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    opt.step(images=4)
    assert all(torch.allclose(p.grad * 4, g) for p, g in zip(model.parameters(), local, strict=True))
    # Batch norm takes the first bias out: its gradient is 0, but for rounding.
    assert all(bool(p.grad.any()) for p in model.parameters() if p is not model[0].bias)


class TestOverlap:
    def test_exchange_starts_during_backward(self) -> None:
        model, world = convnet(), Recorder()
        opt = wrap(model, world, bucket_bytes=1000)
        seen: list[int] = []
        model[0].weight.register_hook(lambda _: seen.append(len(world.buckets())))  # the last gradient
        opt.backward(loss_sum(model, batches(1)[0]))
        assert seen[0] > 0
        assert len(world.buckets()) == len(opt._buckets)  # all before backward() returned
        opt.step(images=4)
        assert len(world.buckets()) == len(set(world.buckets())) == len(opt._buckets)

    def test_only_the_last_microbatch_starts_it_and_each_bucket_once(self) -> None:
        model, world = convnet(), Recorder()
        opt = wrap(model, world, bucket_bytes=1000)
        for step in range(2):
            world.started.clear()
            for batch in batches(3)[:-1]:
                with opt.accumulate():
                    loss_sum(model, batch).backward()
                assert world.started == []
            opt.backward(loss_sum(model, batches(3)[-1]))
            assert sorted(world.started) == sorted(bucket.name for bucket in opt._buckets)
            opt.step(images=12)
            assert len(world.buckets()) == len(opt._buckets), step

    def test_buckets_follow_the_model_not_the_groups(self) -> None:
        model = convnet()
        opt = wrap(model, bucket_bytes=1)
        order = [id(slot.parameter) for bucket in opt._buckets for slot in bucket.slots]
        assert order == [id(p) for p in reversed(list(model.parameters()))]


class TestMisuse:
    def test_second_armed_backward(self) -> None:
        model = convnet()
        opt = wrap(model)
        loss_sum(model, batches(1)[0]).backward()
        with pytest.raises(RuntimeError, match="accumulate"):
            loss_sum(model, batches(1)[0]).backward()
        opt.zero_grad()
        loss_sum(model, batches(1)[0]).backward()
        opt.step(images=4)

    def test_backward_onto_exchanged_gradients(self) -> None:
        model = convnet()
        opt = wrap(model)
        loss_sum(model, batches(1)[0]).backward()
        opt.synchronize(images=4)
        with pytest.raises(RuntimeError, match=r"step\(\) or zero_grad\(\)"):
            loss_sum(model, batches(1)[0]).backward()

    def test_gradients_changed_while_they_are_exchanged(self) -> None:
        """By a reference from before: by p.grad it cannot be done."""
        model = convnet()
        opt = wrap(model)
        loss_sum(model, batches(1)[0]).backward()
        opt.step(images=4)
        held = [p.grad for p in model.parameters()]
        loss_sum(model, batches(1)[0]).backward()
        held[0].mul_(0.5)
        with pytest.raises(RuntimeError, match="changed while they were exchanged"):
            opt.step(images=4)
        opt.zero_grad()
        loss_sum(model, batches(1)[0]).backward()
        opt.step(images=4)

    @pytest.mark.parametrize(
        "act", [copy.deepcopy, copy.copy, pickle.dumps, lambda opt: torch.save(opt, io.BytesIO())]
    )
    def test_copies(self, act: Callable[[object], object]) -> None:
        with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict\(\)"):
            act(wrap(convnet()))

    def test_replaced_gradients_of_a_step_that_was_not_taken(self) -> None:
        model = convnet()
        opt = wrap(model)
        loss_sum(model, batches(1)[0]).backward()
        for p in model.parameters():
            p.grad = p.grad * 2
        with pytest.raises(RuntimeError, match=r"step\(\) or zero_grad\(\)"):
            loss_sum(model, batches(1)[0]).backward()
        opt.zero_grad()

    def test_compression(self) -> None:
        for options, message in (
            ({"compress": "fp8"}, "compress 'fp8': expected one of none, fp16, bf16"),
            ({"compress": "fp16", "reproducible_terms": 4}, "exact sums have no fewer bits"),
            ({"compress": "fp16", "images": 0}, "images 0: expected a whole number, 1 or more"),
            ({"images": 2.5}, "images 2.5: expected a whole number"),
            ({"bucket_bytes": -5}, "bucket_bytes -5: expected a whole number, 1 or more"),
            ({"reproducible_terms": 2.5}, "reproducible_terms 2.5: expected a whole number"),
            ({"reproducible_terms": 2**70}, "expected a whole number, 1 to 2147483648"),
        ):
            with pytest.raises(ValueError, match=message):
                wrap(convnet(), **options)

    def test_counts(self) -> None:
        model = convnet()
        opt = wrap(model)
        with pytest.raises(ValueError, match="not both"):
            opt.step(images=1, global_images=1)
        for wrong in (-1, 2.5, "4"):
            for name in ("images", "global_images"):
                with pytest.raises(ValueError, match=f"{name} {wrong!r}: expected a whole number, 0 or more"):
                    opt.step(**{name: wrong})
        with pytest.raises(TypeError, match=r"step\(8\): expected a closure; .* step\(images=...\)"):
            opt.step(8)
        for zero in ({"images": 0}, {"global_images": 0}):
            with pytest.raises(ValueError, match="needs images"):
                opt.step(**zero)
        opt.zero_grad()
        loss_sum(model, batches(1)[0]).backward()
        opt.synchronize(images=4)
        opt.synchronize()
        opt.synchronize(images=4)
        with pytest.raises(RuntimeError, match="divided by 4"):
            opt.step(images=5)
        opt.step()
        assert opt.steps == 1

    def test_wrapping(self) -> None:
        opt = wrap(convnet())
        for wrong in (opt, convnet()):
            with pytest.raises(TypeError, match="plain torch optimizer"):
                DistributedOptimizer(wrong, world=Solo())
        for schedule in (0.1, lr_scheduler.ConstantLR(opt)):
            with pytest.raises(
                TypeError, match=f"schedule is a {type(schedule).__name__}; expected a function"
            ):
                wrap(convnet(), schedule=schedule)
        complex_ = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        with pytest.raises(TypeError, match="complex64"):
            DistributedOptimizer(torch.optim.SGD([complex_], 0.1), world=Solo())

    def test_sparse_gradients(self) -> None:
        embedding = nn.Embedding(5, 2, sparse=True)
        opt = DistributedOptimizer(torch.optim.SGD(embedding.parameters(), 0.1), embedding, world=Solo())
        with pytest.raises(RuntimeError, match="sparse=False"):
            opt.backward(embedding(torch.tensor([1])).sum())


class Branches(nn.Module):
    """`b` is used on demand, `shared` twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.shared = (nn.Linear(3, 3).double() for _ in range(3))

    def forward(self, x: Tensor, with_b: bool) -> Tensor:
        x = self.shared(self.a(x)).tanh()
        return self.shared(self.b(x) if with_b else x)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("explicit", [True, False])
def test_unused_and_shared_parameters(set_to_none: bool, explicit: bool, terms: int | None) -> None:
    model, reference = Branches(), Branches()
    opt = wrap(model)
    plain = torch.optim.SGD(reference.parameters(), 0.1, 0.9, nesterov=True, weight_decay=1e-4)
    x = torch.ones(2, 3, dtype=torch.float64)
    for with_b in (False, True, False, False, True):
        if explicit or not set_to_none:
            opt.zero_grad(set_to_none)
        plain.zero_grad(set_to_none)
        opt.backward(model(x, with_b).square().sum())
        opt.step(images=2)
        (reference(x, with_b).square().sum() / 2).backward()
        plain.step()
    assert difference(model, reference) < (1e-13 if terms else 1e-14)


@pytest.mark.parametrize("clear", NOTHING)
def test_microbatches_that_leave_a_parameter_out(clear: str, terms: int | None) -> None:
    """So their bucket is not full before the end of the step, however the gradients of the step before were cleared."""
    model, reference = Branches(), Branches()
    opt = wrap(model)
    plain = torch.optim.SGD(reference.parameters(), 0.1, 0.9, nesterov=True, weight_decay=1e-4)
    for step in range(4):
        NOTHING[clear](model, opt)
        plain.zero_grad()
        for number in range(3):
            x = torch.full((2, 3), 1.0 + number, dtype=torch.float64)
            with_b = step == 3 and number == 1
            opt.backward(model(x, with_b).square().sum(), last=number == 2)
            (reference(x, with_b).square().sum() / 6).backward()
        opt.step(images=6)
        plain.step()
    assert difference(model, reference) < (1e-13 if terms else 1e-14)


def test_parameters_unfrozen_and_frozen_later() -> None:
    model, reference = convnet(), convnet()
    world = Recorder()
    for m in (model, reference):
        m[0].requires_grad_(False)
    opt = wrap(model, world)
    plain = torch.optim.SGD(parameter_groups(reference), 0.1, 0.9, nesterov=True)
    for step, batch in enumerate(batches(6)):
        for m in (model, reference):
            m[0].requires_grad_(step >= 2)
            m[3].requires_grad_(step < 4)
        opt.backward(loss_sum(model, batch))
        opt.step(images=4)
        plain.zero_grad()
        (loss_sum(reference, batch) / 4).backward()
        plain.step()
    assert difference(model, reference) < 1e-13
    assert len(opt._buckets) == 2  # the unfrozen layer has got its own
    model[0].weight.grad = None
    world.started.clear()
    opt.backward(loss_sum(model, batch))
    assert opt._buckets[1].name in world.started  # and takes part in the overlap


@pytest.mark.parametrize("through", ["wrapper", "inner"])
def test_groups_added_later(through: str) -> None:
    model, reference = convnet(), convnet()
    opt = DistributedOptimizer(torch.optim.SGD(model[:4].parameters(), 0.1), world=Recorder(size=2))
    plain = torch.optim.SGD(reference[:4].parameters(), 0.1)
    for step, batch in enumerate(batches(5)):
        if step == 2:
            (opt if through == "wrapper" else opt.optimizer).add_param_group(
                {"params": list(model[5].parameters()), "lr": 0.05}
            )
            plain.add_param_group({"params": list(reference[5].parameters()), "lr": 0.05})
        opt.zero_grad()
        opt.backward(loss_sum(model, batch))
        opt.step()  # two equal processes, averaged
        reference.zero_grad()
        loss_sum(reference, batch).backward()
        plain.step()
        if step < 2:
            model[5].zero_grad()  # not the optimizer's yet
    assert difference(model, reference) < 1e-12
    assert opt.param_groups[1]["lr"] == 0.05


def test_a_process_without_backward_takes_part() -> None:
    model, world = convnet(), Recorder(size=3)
    opt = wrap(model, world)
    before = copy.deepcopy(model)
    opt.step(global_images=12)
    assert len(world.buckets()) == len(opt._buckets)
    assert difference(model, before) == 0  # no gradient on any process: skipped
    loss_sum(model, batches(1)[0]).backward()
    opt.step(images=4)
    after = copy.deepcopy(model)
    world.started.clear()
    opt.step(global_images=12)  # the consumed gradient is not exchanged again
    assert len(world.buckets()) == len(opt._buckets)
    assert difference(model, after) == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestHalfPrecision:
    def test_sums_do_not_round(self, dtype: torch.dtype) -> None:
        w = nn.Parameter(torch.zeros(3, dtype=dtype))
        opt = DistributedOptimizer(torch.optim.SGD([w], 1.0), world=Solo())
        for _ in range(2):
            for i in range(1001):  # 0.1 added a thousand times in bf16 stops at 32
                opt.backward((w * 0.1).sum(), last=i == 1000)
            opt.synchronize(images=1001)
            assert w.grad.dtype == dtype
            assert w.grad[0].item() == torch.tensor(0.1).to(dtype).item()
            opt.step()

    def test_each_step_begins_at_zero(self, dtype: torch.dtype) -> None:
        w, unused = (nn.Parameter(torch.zeros(1, dtype=dtype)) for _ in range(2))
        opt = DistributedOptimizer(torch.optim.SGD([w, unused], 1.0), world=Solo())
        for number in range(4):
            opt.backward((w * number).sum(), last=False)
            opt.backward((w * 2).sum(), last=False)
            assert w.grad.item() == number + 2
            opt.backward(w.sum())
            opt.synchronize()
            assert w.grad.item() == number + 3
            opt.step()
            if number % 2:
                opt.zero_grad()

    @pytest.mark.parametrize("terms", [None, 4])
    def test_gradients_of_a_dtype_of_their_own(self, dtype: torch.dtype, terms: int | None) -> None:
        """By `p.grad_dtype`: as exact as their sum is, or rounded though the weights are not."""
        narrow, wide = nn.Parameter(torch.zeros(3, dtype=dtype)), nn.Parameter(torch.zeros(3))
        narrow.grad_dtype, wide.grad_dtype = torch.float32, dtype
        opt = DistributedOptimizer(
            torch.optim.SGD([narrow, wide], 0.0, foreach=False), world=Solo(), reproducible_terms=terms
        )
        for _ in range(2):
            for last in (False, True):
                opt.backward((narrow * 0.1).sum() + (wide * 0.3).sum(), last=last)
            opt.synchronize(images=1)
            for p, factor, of in ((narrow, 0.1, torch.float32), (wide, 0.3, dtype)):
                assert p.grad.dtype == of
                assert p.grad[0].item() == 2 * torch.tensor(factor).to(dtype).item()
            opt.zero_grad()

    def test_sums_do_not_overflow(self, dtype: torch.dtype) -> None:
        w = nn.Parameter(torch.zeros(3, dtype=dtype))
        opt = DistributedOptimizer(torch.optim.SGD([w], 1.0), world=Recorder(size=16))
        opt.backward((w * 30000.0).sum())
        opt.step()
        assert w.grad[0].item() == torch.tensor(30000.0).to(dtype).item()

    def test_clearing_and_editing_is_seen(self, dtype: torch.dtype) -> None:
        w = nn.Parameter(torch.zeros(1, dtype=dtype))
        opt = DistributedOptimizer(torch.optim.SGD([w], 1.0), world=Solo())

        def add(value: float, last: bool = False) -> None:
            opt.backward((w * value).sum(), last=last)

        add(5)
        w.grad = None
        add(3)
        add(4)
        w.grad.zero_()
        add(2)
        w.grad.mul_(3)
        add(1, last=True)
        opt.synchronize()
        assert w.grad.item() == 7
        w.grad.mul_(2)  # clipping
        opt.step()
        assert w.item() == -14
        add(1, last=True)
        opt.synchronize()
        assert w.grad.item() == 1


class TestScaler:
    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10)

    @pytest.mark.parametrize("clip", [False, True])
    def test_equals_the_plain_loop(self, clip: bool) -> None:
        model, reference = convnet(), convnet()
        opt, scaler = wrap(model), self.scaler()
        plain = torch.optim.SGD(parameter_groups(reference), 0.1, 0.9, nesterov=True)
        for batch in batches(4):
            opt.zero_grad()
            scaler.scale(loss_sum(model, batch)).backward()
            if clip:
                opt.synchronize(images=4)
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(opt, images=4)
            scaler.update()
            plain.zero_grad()
            (loss_sum(reference, batch) / 4).backward()
            if clip:
                nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            plain.step()
        assert difference(model, reference) < 1e-13

    @pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW, SGD])
    def test_a_fused_kernel_skips(self, inner: Any) -> None:
        """Its step counts; there is no more of it than in torch, with sums that it divides, or means."""
        model, reference = convnet(), convnet()
        plain = inner(reference.parameters(), 0.1, fused=True)
        fused = inner(model.parameters(), 0.1, fused=True)
        opt = DistributedOptimizer(fused, model, world=Solo(), skip_on_device=True, **DEFAULTS)
        ours, theirs = self.scaler(), self.scaler()
        for number, batch in enumerate(batches(6)):
            factor = float("inf") if number in (0, 3) else 1.0
            before = [p.detach().clone() for p in model.parameters()]
            ours.scale(loss_sum(model, batch) * factor).backward()
            if number == 4:
                opt.synchronize(images=4)
                ours.unscale_(opt)
            ours.step(opt, images=4)
            plain.zero_grad()
            theirs.scale(loss_sum(reference, batch) / 4 * factor).backward()
            theirs.step(plain)
            for scaler in (ours, theirs):
                scaler.update()
            changed = [bool((p != q).any()) for p, q in zip(model.parameters(), before, strict=True)]
            assert any(changed) == (factor == 1)
        assert difference(model, reference) < 1e-7  # Adam makes much of gradients that are rounding
        assert ours.state_dict() == theirs.state_dict()
        assert opt.steps == 6
        assert not {"grad_scale", "found_inf"} & {*vars(opt), *vars(opt.optimizer)}

    @pytest.mark.parametrize("clear", [name for name in NOTHING if name != "never"])
    def test_skipped_step_leaves_no_trace(self, clear: str) -> None:
        model, twin = convnet(), convnet()
        opt, scaler = wrap(model), self.scaler()
        other = wrap(twin)
        bad, good = batches(2)
        scaler.scale(loss_sum(model, bad) * float("inf")).backward()
        scaler.step(opt, images=4)
        scaler.update()
        assert difference(model, twin) == 0
        assert opt.steps == 0
        model[1].load_state_dict(twin[1].state_dict())  # the running statistics
        NOTHING[clear](model, opt)
        scaler.scale(loss_sum(model, good)).backward()
        scaler.step(opt, images=4)
        loss_sum(twin, good).backward()
        other.step(images=4)
        assert opt.steps == 1
        assert difference(model, twin) < 1e-14


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05),
}


class TestAsAnOptimizer:
    def test_is_one(self) -> None:
        model = convnet()
        inner = torch.optim.Adam(model.parameters(), lr=0.3, betas=(0.8, 0.9))
        opt = DistributedOptimizer(inner, model, world=Solo())
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.defaults is inner.defaults
        assert opt.param_groups is inner.param_groups
        assert opt.state is inner.state
        assert "Adam" in repr(opt)

    def test_schedulers(self) -> None:
        model = convnet()
        opt = wrap(model)
        scheduler = lr_scheduler.OneCycleLR(opt, max_lr=0.5, total_steps=5)
        twin = lr_scheduler.OneCycleLR(SGD(convnet().parameters()), max_lr=0.5, total_steps=5)
        for batch in batches(3):
            loss_sum(model, batch).backward()
            opt.step(images=4)
            scheduler.step()
            twin.optimizer.step()
            twin.step()
            assert scheduler.get_last_lr()[0] == twin.get_last_lr()[0]
        assert opt.param_groups[0]["lr"] == twin.get_last_lr()[0]

    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_every_scheduler(self, name: str) -> None:
        w = nn.Parameter(torch.ones(2))
        opt = DistributedOptimizer(torch.optim.SGD([w], 0.1, 0.9), world=Solo())
        plain = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1, 0.9)
        schedulers = [SCHEDULERS[name](opt), SCHEDULERS[name](plain)]
        for _ in range(5):
            w.sum().backward()
            opt.step()
            plain.step()
            for scheduler in schedulers:
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            for option in ("lr", "momentum"):
                assert opt.param_groups[0][option] == plain.param_groups[0][option]

    @pytest.mark.parametrize("tensor_lr", [False, True])
    def test_schedule_argument(self, tensor_lr: bool) -> None:
        model = convnet()
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        groups = parameter_groups(model)
        groups[1]["lr_scale"] = 0.5
        opt = DistributedOptimizer(
            torch.optim.SGD(groups, lr=lr), model, world=Solo(), schedule=lambda step: 0.25 * (step + 1)
        )
        for step, batch in enumerate(batches(3)):
            opt.backward(loss_sum(model, batch))
            opt.step(images=4)
            assert float(opt.param_groups[0]["lr"]) == 0.25 * (step + 1)
            assert float(opt.param_groups[1]["lr"]) == 0.125 * (step + 1)
        assert opt.steps == 3

    def test_hooks_fire_once_and_see_reduced_gradients(self) -> None:
        model = convnet()
        opt = wrap(model, Recorder(size=2))
        fired: list[str] = []
        opt.register_step_pre_hook(
            lambda *_: fired.append(f"pre {float(model[5].bias.grad.abs().sum()):.3f}")
        )
        opt.register_step_post_hook(lambda *_: fired.append("post"))
        loss = loss_sum(model, batches(1)[0])
        (expected,) = torch.autograd.grad(loss, [model[5].bias], retain_graph=True)
        opt.backward(loss)
        opt.step(global_images=8)
        assert fired == [f"pre {float(expected.abs().sum()) * 2 / 8:.3f}", "post"]

    def test_state_dict(self) -> None:
        model = convnet()
        opt = wrap(model)
        for batch in batches(3):
            opt.backward(loss_sum(model, batch))
            opt.step(images=4)
        twin = copy.deepcopy(model)
        resumed = wrap(twin)
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert resumed.steps == 3
        plain_model = copy.deepcopy(model)
        plain = SGD(parameter_groups(plain_model))
        plain.load_state_dict(copy.deepcopy(opt.state_dict()))
        for o, m in ((opt, model), (resumed, twin)):
            o.backward(loss_sum(m, batches(1)[0]))
            o.step(images=4)
        (loss_sum(plain_model, batches(1)[0]) / 4).backward()
        plain.step()
        assert difference(model, twin) == 0
        assert difference(model, plain_model) < 1e-15
        resumed.load_state_dict(plain.state_dict())  # without "steps"
        assert resumed.steps == 4

    def test_reading_the_groups_completes_no_exchange(self) -> None:
        model, world = convnet(), Recorder(size=2)
        opt = wrap(model, world)
        loss_sum(model, batches(1)[0]).backward()
        assert opt.param_groups[0]["lr"] == 0.1
        opt.step(images=4)  # which is refused once somebody has looked at gradients

    def test_closures(self) -> None:
        def closure_for(model: nn.Module, opt: torch.optim.Optimizer, scale: float) -> Callable[[], Tensor]:
            def closure() -> Tensor:
                opt.zero_grad()
                loss = loss_sum(model, batches(1)[0]) * scale
                loss.backward()
                return loss

            return closure

        for make in (torch.optim.LBFGS, lambda p: torch.optim.SGD(p, 0.1)):
            model, reference = convnet().eval(), convnet().eval()
            opt = DistributedOptimizer(make(list(model.parameters())), model, world=Solo())
            plain = make(list(reference.parameters()))
            for _ in range(2):
                loss = opt.step(closure_for(model, opt, 1.0), images=4)
                expected = plain.step(closure_for(reference, plain, 0.25))
                assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-9)
            assert difference(model, reference) < 1e-9

    def test_any_torch_optimizer(self) -> None:
        for make in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam):
            model, reference = convnet(), convnet()
            opt = DistributedOptimizer(make(model.parameters(), lr=0.01), model, world=Solo())
            plain = make(reference.parameters(), lr=0.01)
            for batch in batches(3):
                opt.zero_grad()
                opt.backward(loss_sum(model, batch))
                opt.step(images=4)
                plain.zero_grad()
                (loss_sum(reference, batch) / 4).backward()
                plain.step()
            assert difference(model, reference) < 1e-9, make


class TestAutograd:
    def test_grad_of_a_function_leaves_gradients_alone(self) -> None:
        model = convnet()
        opt = wrap(model)
        loss_sum(model, batches(1)[0]).backward()
        opt.step(images=4)
        before = [p.grad.clone() for p in model.parameters()]
        torch.autograd.grad(loss_sum(model, batches(1)[0]), list(model.parameters()))
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
        opt.backward(loss_sum(model, batches(1)[0]))
        opt.step(images=4)

    @pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
    def test_create_graph(self) -> None:
        w = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
        opt = DistributedOptimizer(torch.optim.SGD([w], 1.0), world=Solo())
        with opt.accumulate():
            (w**3).sum().backward(create_graph=True)
            (w**3).sum().backward(create_graph=True)
        opt.backward((w**3).sum())
        opt.synchronize()
        assert w.grad.item() == 81.0

    def test_a_newer_optimizer_takes_over(self) -> None:
        model, first, second = convnet(), Recorder(), Recorder()
        old = wrap(model, first)
        lr_scheduler.StepLR(old, 1)  # makes a cycle: `del` alone does not free it
        new = wrap(model, second)
        new.backward(loss_sum(model, batches(1)[0]))
        new.step(images=4)
        assert first.buckets() == []
        assert len(second.buckets()) == len(new._buckets)

    def test_a_dropped_optimizer_leaves_the_model_alone(self) -> None:
        model, world = convnet(), Recorder()
        opt = wrap(model, world)
        del opt
        gc.collect()
        world.started.clear()
        for _ in range(2):
            loss_sum(model, batches(1)[0]).backward()
        assert world.started == []

    def test_moved_model(self) -> None:
        model, reference = convnet(), convnet()
        opt = wrap(model, Recorder(size=2))
        for m in (model, reference):
            m.float().to(memory_format=torch.channels_last)
        plain = torch.optim.SGD(parameter_groups(reference), 0.1, 0.9, nesterov=True)
        for x, y in batches(3):
            opt.backward(loss_sum(model, (x.float(), y)))
            opt.step(global_images=8)
            plain.zero_grad()
            (loss_sum(reference, (x.float(), y)) / 4).backward()
            plain.step()
        assert difference(model, reference) < 1e-5
        assert all(bucket.flat.dtype == torch.float32 for bucket in opt._buckets)

    @pytest.mark.slow
    def test_compiled_model(self) -> None:
        model, reference = convnet().eval(), convnet().eval()
        opt, plain = wrap(model), wrap(reference)
        compiled = torch.compile(model, backend="aot_eager")
        for batch in batches(3):
            opt.backward(loss_sum(compiled, batch))
            opt.step(images=4)
            plain.backward(loss_sum(reference, batch))
            plain.step(images=4)
        assert difference(model, reference) < 1e-12


class TestFixedPoint:
    def make(self, **options: object) -> tuple[nn.Sequential, DistributedOptimizer]:
        model = convnet().float()
        return model, wrap(model, Recorder(), bucket_bytes=1000, **{"reproducible_terms": 5, **options})

    def test_the_order_of_microbatches_changes_no_bit(self) -> None:
        data = [(x.float(), y) for x, y in batches(5)]
        (one, first), (two, second) = self.make(), self.make()
        for _ in range(3):
            for opt, model, order in ((first, one, data), (second, two, data[::-1])):
                for i, batch in enumerate(order):
                    opt.backward(loss_sum(model, batch), last=i == 4)
                opt.step(images=20)
        assert difference(one, two) == 0

    def test_floating_point_would_change_bits(self) -> None:
        data = [(x.float(), y) for x, y in batches(5)]
        (one, first), (two, second) = (self.make(reproducible_terms=None) for _ in range(2))
        for opt, model, order in ((first, one, data), (second, two, data[::-1])):
            for i, batch in enumerate(order):
                opt.backward(loss_sum(model, batch), last=i == 4)
            opt.step(images=20)
        assert difference(one, two) > 0

    def test_a_step_that_overflows_leaves_no_trace_and_can_be_taken_again(self) -> None:
        model, opt = self.make()
        twin, other = self.make()
        for batch in batches(2):
            x, y = batch[0].float(), batch[1]
            for m, o in ((model, opt), (twin, other)):
                loss_sum(m, (x, y)).backward()
                o.step(images=4)
        before = [p.detach().clone() for p in model.parameters()]
        (loss_sum(model, (x, y)) * 1e6).backward()
        with pytest.raises(FixedPointOverflow, match=r"3\.weight.*take this step again"):
            opt.step(images=4)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert all(p.grad is None for p in model.parameters())
        assert opt.steps == 2
        assert not opt.world.under_way
        for m, o in ((model, opt), (twin, other)):
            m[1].reset_running_stats()
            (loss_sum(m, (x, y)) * (1e6 if m is model else 1)).backward()
            o.step(images=4 * 10**6 if m is model else 4)
        assert difference(model, twin) < 1e-6

    def test_giving_up_a_step_gives_up_its_terms(self) -> None:
        (model, opt), (twin, other) = self.make(), self.make()
        bad, good = ((x.float(), y) for x, y in batches(2))
        loss_sum(model, bad).backward()
        opt.zero_grad()
        loss_sum(model, good).backward()
        opt.step(images=4)
        loss_sum(twin, bad)
        loss_sum(twin, good).backward()
        other.step(images=4)
        assert difference(model, twin) == 0

    def test_exponents_are_part_of_the_state(self) -> None:
        (model, opt), (twin, other) = self.make(), self.make()
        x, y = batches(1)[0][0].float() * 100, batches(1)[0][1]
        loss_sum(model, (x, y)).backward()
        opt.step(images=4)
        state = copy.deepcopy(opt.state_dict())
        assert len(set(state["exponents"].values())) > 1
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(state)
        assert other.state_dict()["exponents"] == state["exponents"]
        for m, o in ((model, opt), (twin, other)):
            loss_sum(m, (x, y)).backward()
            o.step(images=4)
        assert difference(model, twin) == 0

    def test_more_backwards_than_announced_are_an_error(self) -> None:
        model, opt = self.make()
        for i in range(6):
            opt.backward(loss_sum(model, (batches(1)[0][0].float(), batches(1)[0][1])), last=i == 5)
        with pytest.raises(RuntimeError, match="a sum of 6 terms, announced were 5"):
            opt.step(images=24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_fused_update_under_another_default_dtype(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    weight = nn.Parameter(torch.ones(3, dtype=torch.float32))
    opt = DistributedOptimizer(torch.optim.SGD([weight], lr=0.5, fused=True), world=Solo())
    torch.set_default_dtype(dtype)
    try:
        opt.backward((weight * 4).sum())
        opt.step(images=2)
    finally:
        torch.set_default_dtype(before)
    assert weight.tolist() == [0.0, 0.0, 0.0]
