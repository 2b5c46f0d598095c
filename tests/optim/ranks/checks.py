"""Run by test_processes.py in every process of a job: each function is a check, reported by rank 0.

Every process trains the reference, a plain loop over the whole minibatch in float64, by itself.
"""

import copy
import itertools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvd_lb.world
from hvd_lb.errors import UserError
from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.optim import SGD, DistributedOptimizer, parameter_groups
from hvd_lb.optim.exchange.buckets import Riders
from hvd_lb.optim.state_dict import flatten_state
from hvd_lb.plan.hosting import hosted
from hvd_lb.training.batchnorm import running_statistics
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

BY_HOROVOD = "HOROVOD_RANK" in os.environ  #: the engine
CHECKS: list[Callable[[World], None]] = []
ALONE: list[Callable[[World], None]] = []


def check(function: Callable[[World], None]) -> Callable[[World], None]:
    CHECKS.append(function)
    return function


def check_alone_too(function: Callable[[World], None]) -> Callable[[World], None]:
    """A check that also runs on one process: the same program does the same there."""
    ALONE.append(function)
    return check(function)


def convnet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 5),
    ]
    return nn.Sequential(*layers).double()


def batch(seed: int, images: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 5, (images,), generator=generator)


def loss_sum(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1], reduction="sum")


def wrap(model: nn.Module, world: World, **options: object) -> DistributedOptimizer:
    return DistributedOptimizer(
        SGD(parameter_groups(model)), model, world=world, bucket_bytes=2000, **options
    )


def torch_sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(parameter_groups(model), 0.1, 0.9, nesterov=True)


def difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def reference_step(model: nn.Module, opt: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    opt.zero_grad()
    (sum(loss_sum(model, d) for d in data) / sum(len(y) for _, y in data)).backward()
    opt.step()


@check
def uneven_microbatches_and_a_short_last_step(world: World) -> None:
    for channels_last in (False, True):
        model, reference = convnet(), convnet()
        if channels_last:
            model.to(memory_format=torch.channels_last)
        opt, plain = wrap(model, world), torch_sgd(reference)
        for step, sizes in enumerate([[4] * 7, [3] * 5, [4] * 7, [2, 1]]):  # 7, 5, 2 virtual workers
            data = [batch(100 * step + j, images) for j, images in enumerate(sizes)]
            k, p, r = len(data), world.size, world.rank
            mine = data[r * k // p : (r + 1) * k // p]
            for i, d in enumerate(mine):
                opt.backward(loss_sum(model, d), last=i == len(mine) - 1)
            opt.step(images=sum(len(y) for _, y in mine))
            reference_step(reference, plain, data)
            assert difference(model, reference) < 1e-12
            assert all(p.grad.stride() == p.stride() for p in model.parameters())


def channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


@check
def models_that_are_moved_between_steps(world: World) -> None:
    """By all processes alike; one of them finds it out later, as it has no backward in that step."""
    moves: list[Callable[[nn.Module], object]] = [
        channels_last,
        lambda model: model._apply(torch.clone),
        lambda model: model.float().double(),
        lambda model: model.float(),
    ]
    for move, terms in itertools.product(moves, (None, world.size)):
        model, reference = (
            convnet().eval(),
            convnet().eval(),
        )  # a bias before batch norm has a gradient of rounding
        opt, plain = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, reference))
        opt = DistributedOptimizer(opt, model, world=world, bucket_bytes=2000, reproducible_terms=terms)
        for step in range(5):
            if step == 2:
                move(model), move(reference)
            opt.zero_grad()
            ranks = range(world.size - (step == 2))
            data = [batch(10 * step + rank) for rank in ranks]
            data = [(x.to(model[0].weight.dtype), y) for x, y in data]
            if world.rank in ranks:
                opt.backward(loss_sum(model, data[world.rank]))
            opt.step(images=4 * (world.rank in ranks))
            reference_step(reference, plain, data)
        assert difference(model, reference) < 1e-5
        here = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        assert torch.equal(here, world.broadcast(here.clone(), "weights of rank 0")), "replicas drift apart"


@check
def a_process_without_images(world: World) -> None:
    model, reference = convnet(), convnet()
    opt, plain = wrap(model, world), torch_sgd(reference)
    for step in range(3):
        data = [batch(10 * step + r) for r in range(world.size - 1)]
        if world.rank < world.size - 1:
            opt.backward(loss_sum(model, data[world.rank]))
            opt.step(images=4)
        else:
            opt.step(images=0)
        reference_step(reference, plain, data)
    assert difference(model, reference) < 1e-12


@check
def global_count_and_average(world: World) -> None:
    for counts in ({"global_images": 4 * world.size}, {}):
        model, reference = convnet(), convnet()
        opt, plain = wrap(model, world, schedule=lambda step: 0.1), torch_sgd(reference)
        for step in range(3):
            data = [batch(10 * step + r) for r in range(world.size)]
            (loss_sum(model, data[world.rank]) / (1 if counts else 4)).backward()
            opt.step(**counts)
            reference_step(reference, plain, data)
        assert difference(model, reference) < 1e-12


@check
def no_images_at_all(world: World) -> None:
    model = convnet()
    opt = wrap(model, world)
    with pytest.raises(ValueError, match="needs images"):
        opt.step(images=0)
    opt.zero_grad()
    opt.backward(loss_sum(model, batch(world.rank)))
    opt.step(images=4)


@check
def rank_0_overwrites_the_others_at_the_start(world: World) -> None:
    for make in (
        lambda p: SGD(p, lr=0.1 * (1 + world.rank)),
        lambda p: torch.optim.Adam(p, betas=(0.8, 0.9)),
    ):
        model = convnet(seed=world.rank).to(memory_format=torch.channels_last)
        inner = make(parameter_groups(model))
        if world.rank == 0:  # the others have no optimizer state, and batch norm has seen nothing
            loss_sum(model, batch(5)).backward()
            inner.step()
        opt = DistributedOptimizer(inner, model, world=world)
        assert len(opt.state) == len(list(model.parameters()))
        values = [*model.state_dict().values(), *(v for state in opt.state.values() for v in state.values())]
        values += [group["lr"] for group in opt.param_groups]
        here = torch.stack([torch.as_tensor(v).detach().double().sum() for v in values])
        root = world.broadcast(here.clone(), "values of rank 0")
        assert torch.equal(here, root), (make, here - root)
        assert opt.param_groups[0].get("betas", (0.8, 0.9)) == (0.8, 0.9)
        opt.zero_grad()
        opt.backward(loss_sum(model, batch(world.rank)))
        opt.step(images=4)


class Noisy(torch.optim.SGD):
    """Draws in its step, as those that round stochastically."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn_like(p), alpha=0.01)


@check
def optimizers_that_draw_do_so_alike(world: World) -> None:
    model = convnet()
    opt = DistributedOptimizer(Noisy(model.parameters(), 0.1), model, world=world)
    torch.manual_seed(world.rank)
    for step in range(3):
        opt.backward(loss_sum(model, batch(10 * step + world.rank)))
        opt.step(images=4)
    drawn = torch.rand(1)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    ends = world.maximum_async(torch.stack([weights, -weights]), "weights").wait()
    assert not ends.sum(0).any()
    torch.manual_seed(world.rank)  # what is drawn elsewhere is each process's own, as before
    assert torch.equal(drawn, torch.rand(1))


@check_alone_too
def the_state_of_rank_0_is_gone_on_from(world: World) -> None:
    """With the position of its schedule and the exponents of its sums, though the others know of no state."""
    for terms in (None, 3):
        options = {"schedule": lambda step: 0.1 / (1 + step), "reproducible_terms": terms}
        model = convnet().float()
        opt = wrap(model, world, **options)

        def train(model: nn.Module, opt: DistributedOptimizer, seed: int) -> None:
            x, labels = batch(seed + world.rank)
            opt.backward(loss_sum(model, (100 * x.float(), labels)))
            opt.step(images=4)

        for step in range(2):
            train(model, opt, 10 * step)
        root = world.rank == 0
        later = copy.deepcopy(model) if root else convnet(seed=7).float()
        later[1].load_state_dict(model[1].state_dict())
        state = copy.deepcopy(opt.state_dict()) if root else None
        resumed = wrap(later, world, state=state, **options)
        assert resumed.steps == 2
        assert resumed.state_dict().get("exponents") == opt.state_dict().get("exponents")
        train(model, opt, 50)
        train(later, resumed, 50)
        assert difference(model, later) == 0, terms


@check
def parameters_without_gradient_on_some_or_all(world: World) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

        def forward(self, x: Tensor, with_b: bool) -> Tensor:
            x = self.a(x).tanh()
            return self.b(x).square().sum() if with_b else x.sum()

    model, reference = Branches(), Branches()
    opt, plain = wrap(model, world), torch_sgd(reference)
    for step in range(6):
        xs = torch.randn(world.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        used = [r == step % 3 for r in range(world.size)]  # by one of two or three, or by none
        opt.backward(model(xs[world.rank], used[world.rank]))
        opt.step()
        plain.zero_grad()
        (sum(reference(x, u) for x, u in zip(xs, used, strict=True)) / world.size).backward()
        plain.step()
        assert (model.b.weight.grad is None) == (not any(used))
    assert difference(model, reference) < 1e-12


@check
def groups_added_later_and_unfrozen_layers(world: World) -> None:
    for through_wrapper in (True, False):
        model, reference = convnet(), convnet()
        model[0].requires_grad_(False)
        reference[0].requires_grad_(False)
        opt = DistributedOptimizer(SGD(model[:4].parameters()), world=world)
        plain = torch_sgd(reference[:4])
        plain.param_groups[0]["weight_decay"] = 0
        if through_wrapper:
            model[5].weight.data.mul_(1 + world.rank)  # rank 0's counts
            opt.add_param_group({"params": list(model[5].parameters())})
        else:
            opt.optimizer.add_param_group({"params": list(model[5].parameters())})
        plain.add_param_group({"params": list(reference[5].parameters())})
        for step in range(4):
            for m in (model, reference):
                m[0].requires_grad_(step >= 2)
            data = [batch(10 * step + r) for r in range(world.size)]
            opt.backward(loss_sum(model, data[world.rank]))
            opt.step(images=4)
            reference_step(reference, plain, data)
        assert difference(model, reference) < 1e-12


@check
def clipping_after_the_exchange(world: World) -> None:
    model, reference = convnet(), convnet()
    opt, plain = wrap(model, world), torch_sgd(reference)
    for step in range(3):
        data = [batch(10 * step + r) for r in range(world.size)]
        opt.backward(loss_sum(model, data[world.rank]))
        opt.synchronize(images=4)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        opt.step()
        plain.zero_grad()
        (sum(loss_sum(reference, d) for d in data) / (4 * world.size)).backward()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        plain.step()
        assert norm > 0.3
        assert abs(float(norm) - float(expected)) < 1e-12
    assert difference(model, reference) < 1e-12


@check
def overflow_on_one_process_skips_on_all(world: World) -> None:
    for explicit in (True, False):
        model, reference = convnet(), convnet()
        opt, plain = wrap(model, world), torch_sgd(reference)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(4):
            data = [batch(10 * step + r) for r in range(world.size)]
            statistics = [b.clone() for b in model.buffers()]
            factor = float("inf") if step == 1 and world.rank == world.size - 1 else 1.0
            scaler.scale(loss_sum(model, data[world.rank]) * factor).backward()
            if explicit:
                opt.synchronize(images=4)
                scaler.unscale_(opt)
                scaler.step(opt)
            else:
                scaler.step(opt, images=4)
            scaler.update()
            model.zero_grad(set_to_none=step % 2 == 0)
            if step == 1:
                for b, before in zip(model.buffers(), statistics, strict=True):
                    b.copy_(before)
            else:
                reference_step(reference, plain, data)
        assert scaler.get_scale() == 128.0
        assert opt.steps == 3
        assert difference(model, reference) < 1e-12


@check
def gradscaler_without_a_backward(world: World) -> None:
    model, reference = convnet(), convnet()
    opt, plain = wrap(model, world), torch_sgd(reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.zeros(()))
    for step in range(2):
        data = [batch(10 * step + r) for r in range(world.size - 1)]
        if world.rank < world.size - 1:
            scaler.scale(loss_sum(model, data[world.rank])).backward()
        opt.synchronize(images=4 if world.rank < world.size - 1 else 0)
        scaler.step(opt)
        scaler.update()
        reference_step(reference, plain, data)
    assert difference(model, reference) < 1e-12


@check
def half_precision_parameters(world: World) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        mixed = nn.ParameterList(
            [nn.Parameter(torch.zeros(3, dtype=d)) for d in (dtype, torch.float32, dtype)]
        )
        opt = DistributedOptimizer(torch.optim.SGD(mixed, 1.0), mixed, world=world)
        for _ in range(2):
            opt.backward(sum((w.float() * 2.0**15).sum() for w in mixed))  # two of these overflow fp16
            opt.step(images=1)
            for w in mixed:
                assert w.grad.dtype == w.dtype
                assert torch.equal(w.grad, torch.full_like(w, 2.0**15))


@check
def zero_grad_gives_up_an_exchange(world: World) -> None:
    model, reference = convnet(), convnet()
    opt, plain = wrap(model, world), torch_sgd(reference)
    statistics = [b.clone() for b in model.buffers()]
    opt.backward(loss_sum(model, batch(world.rank)))
    opt.zero_grad()
    for b, before in zip(model.buffers(), statistics, strict=True):
        b.copy_(before)
    data = [batch(50 + r) for r in range(world.size)]
    opt.backward(loss_sum(model, data[world.rank]))
    opt.step(images=4)
    reference_step(reference, plain, data)
    assert difference(model, reference) < 1e-12


@check
def closures_see_the_loss_of_all(world: World) -> None:
    model, reference = convnet().eval(), convnet().eval()
    opt = DistributedOptimizer(torch.optim.LBFGS(model.parameters()), model, world=world)
    plain = torch.optim.LBFGS(reference.parameters())
    data = [batch(r) for r in range(world.size)]

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_sum(model, data[world.rank])
        loss.backward()
        return loss

    def plain_closure() -> Tensor:
        plain.zero_grad()
        loss = sum(loss_sum(reference, d) for d in data) / (4 * world.size)
        loss.backward()
        return loss

    for _ in range(2):
        loss, expected = opt.step(closure, images=4), plain.step(plain_closure)
        assert abs(float(loss) - float(expected.detach())) < 1e-9
    assert difference(model, reference) < 1e-7


@check
def disagreement_is_an_error_not_a_hang(world: World) -> None:
    model = nn.Linear(2, 2 + world.rank)
    with pytest.raises(RuntimeError, match="processes disagree"):
        wrap(model, world)
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(world.rank == 0)
    with pytest.raises(RuntimeError, match="requires_grad"):
        wrap(model, world)


@check
def two_optimizers_at_once(world: World) -> None:
    models, references = [convnet(0), convnet(1)], [convnet(0), convnet(1)]
    opts, plains = [wrap(m, world) for m in models], [torch_sgd(m) for m in references]
    data = [batch(r) for r in range(world.size)]
    for model, opt in zip(models, opts, strict=True):
        opt.backward(loss_sum(model, data[world.rank]))
    for opt in opts if world.rank else opts[::-1]:
        opt.synchronize(global_images=4 * world.size)
    for i in range(2):
        opts[i].step()
        reference_step(references[i], plains[i], data)
        assert difference(models[i], references[i]) < 1e-12


@check
def buckets_that_fill_in_another_order_on_each_process(world: World) -> None:
    """Backward goes through branches against the order in which forward took them, and leaves out those not taken."""
    torch.manual_seed(0)
    branches = nn.ModuleList(nn.Linear(4, 3).double() for _ in range(4))
    reference = copy.deepcopy(branches)
    filled: list[str] = []

    class Noting(DistributedOptimizer):
        def _after(self, bucket: Any, slot: Any) -> None:
            super()._after(bucket, slot)
            if bucket.started and bucket.name not in filled:
                filled.append(bucket.name)

    opt = Noting(SGD(parameter_groups(branches)), branches, world=world, bucket_bytes=1)
    plain = torch_sgd(reference)
    for step in range(8):
        taken = [[(i + rank) % 4 for i in range(2 + (step + rank) % 3)] for rank in range(world.size)]
        data = [torch.randn(4, dtype=torch.float64) for _ in range(world.size)]
        filled.clear()
        opt.backward(sum(branches[i](data[world.rank]).square().sum() for i in taken[world.rank]))
        counts = torch.tensor([1 << (16 * world.rank)])
        others = world.maximum_async(counts.clone(), "beside"), world.allreduce_async(counts, "beside too")
        opt.synchronize(images=1)
        assert [int(other.wait()) for other in others] == [
            1 << (16 * (world.size - 1)),
            sum(1 << (16 * r) for r in range(world.size)),
        ]
        opt.step()
        plain.zero_grad()
        for rank, indices in enumerate(taken):
            sum(reference[i](data[rank]).square().sum() for i in indices).div(world.size).backward()
        plain.step()
        assert difference(branches, reference) < 1e-12
        first = torch.tensor([int(name.rpartition(".")[2]) for name in filled[:1]] or [-1])
        spread = world.maximum_async(torch.stack([first[0], -first[0]]), "first").wait()
        assert spread.sum() > 0, "all processes filled their buckets in the same order"


@check
def fixed_point_sums_have_the_same_bits_on_any_number_of_processes(world: World) -> None:
    """Seven virtual workers, then five, or two and one: shared by all processes, or all on this one."""
    few_and_many = ((2, (2, 1, 2)), (7, (7, 5, 7)))
    for dtype, (terms, counts) in itertools.product((torch.float32, torch.float64), few_and_many):
        model, alone = convnet().to(dtype), convnet().to(dtype)
        opt = wrap(model, world, reproducible_terms=terms)
        single = wrap(alone, Solo(), reproducible_terms=terms)
        for step, workers in enumerate(counts):
            data = [(x.to(dtype), y) for x, y in (batch(100 * step + j) for j in range(workers))]
            mine = [data[j] for j in hosted(world.rank, world.size, workers)]
            for trained, o, own in ((model, opt, mine), (alone, single, data)):
                for i, d in enumerate(own):
                    o.backward(loss_sum(trained, d), last=i == len(own) - 1)
                o.step(images=4 * len(own))
            assert difference(model, alone) == 0, (dtype, step)
        assert opt.state_dict()["exponents"] == single.state_dict()["exponents"]


@check
def gradients_in_half_precision_on_the_wire(world: World) -> None:
    """Near those in fp64, with minibatches whose sums fp16 would not hold; riders and absent gradients stay exact."""
    images = 2**17  # of which each one here stands for many
    for compress, most in (("fp16", 2e-3), ("bf16", 2e-2)):
        model, reference = convnet().float(), convnet()
        riders = Riders(3, lambda: (1, 70_000 + world.rank, 0))
        if compress == "bf16" and BY_HOROVOD:
            with pytest.raises(UserError, match="Horovod adds up no bf16"):
                wrap(model, world, compress=compress)
            continue
        opt = wrap(model, world, compress=compress, images=images, riders=riders)
        data = [batch(10 + r) for r in range(world.size)]
        x, y = data[world.rank]
        (images / (4 * world.size) * loss_sum(model[1:], (model[0](x.float()), y))).backward()
        opt.synchronize(global_images=images)
        (sum(loss_sum(reference, d) for d in data) / (4 * world.size)).backward()
        ours, theirs = (
            torch.cat([p.grad.flatten().double() for p in of.parameters()]) for of in (model, reference)
        )
        error = (ours - theirs).norm() / theirs.norm()
        assert 1e-6 < error < most, error
        assert opt.carried is not None
        assert opt.carried.wait() == [world.size, 70_000 * world.size + sum(range(world.size)), 0]


@check
def what_half_precision_does_not_hold_is_infinite_on_all(world: World) -> None:
    bystander, large = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    opt = DistributedOptimizer(torch.optim.SGD([bystander, large], 1.0), world=world, compress="fp16")
    (large.sum() * (1e6 if world.rank == 0 else 1.0)).backward()
    opt.synchronize()
    assert bystander.grad is None
    assert large.grad is not None
    assert bool(large.grad.isinf().all())
    opt.zero_grad()


@check
def a_term_that_is_too_large_on_one_process_is_refused_on_all(world: World) -> None:
    model, untouched = convnet(), convnet()
    opt = wrap(model, world, reproducible_terms=world.size)
    for factor, refused in ((1e9, True), (1e9, False), (float("nan"), False)):
        loss = loss_sum(model, batch(world.rank)) * (factor if world.rank == world.size - 1 else 1.0)
        loss.backward()
        if refused:
            with pytest.raises(FixedPointOverflow):
                opt.step(images=4)
            assert difference(model, untouched) == 0
        else:
            opt.synchronize(images=4)
            assert all(bool(p.grad.isnan().all()) == (factor != factor) for p in model.parameters())
            opt.zero_grad()


@check
def stock_horovod_without_batch_norm(world: World) -> None:
    """k = p: horovod.torch.DistributedOptimizer averages what ours divides by the global count."""
    if not BY_HOROVOD:
        return
    import horovod.torch as hvd

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        for terms in (None, world.size):
            torch.manual_seed(1)
            layers = [
                nn.Conv2d(3, 8, 3),
                nn.ReLU(),
                nn.Conv2d(8, 8, 3),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(128, 5),
            ]
            model = nn.Sequential(*layers).to(dtype)
            twin = copy.deepcopy(model)
            opt = wrap(model, world, reproducible_terms=terms)
            stock = hvd.DistributedOptimizer(
                torch_sgd(twin),
                named_parameters=[(f"{dtype}.{terms}.{name}", p) for name, p in twin.named_parameters()],
            )
            for step in range(3):
                x, y = batch(10 * step + world.rank)
                opt.backward(loss_sum(model, (x.to(dtype), y)))
                opt.synchronize(images=4)
                stock.zero_grad()
                F.cross_entropy(twin(x.to(dtype)), y).backward()
                stock.synchronize()
                for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                    error = (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
                    assert error <= tolerance, (dtype, terms, step, float(error))
                opt.step()
                with stock.skip_synchronize():
                    stock.step()


CLIP = 0.02


def clip_by_hand(parameters: list[nn.Parameter]) -> None:
    """As in many training scripts: reads each gradient more than once, writes into `.data`."""
    total = 0.0
    for p in parameters:
        if p.grad is not None:
            total += p.grad.data.norm(2).item() ** 2
    for p in parameters:
        if p.grad is not None:
            p.grad.data.mul_(min(1.0, CLIP / (total**0.5 + 1e-6)))


def clip_out_of_place(parameters: list[nn.Parameter]) -> None:
    norm = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()
    for p in parameters:
        if p.grad is not None:
            p.grad = p.grad * min(1.0, CLIP / float(norm + 1e-6))


CLIPS: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, CLIP),
    "norm, one by one": lambda parameters: nn.utils.clip_grad_norm_(parameters, CLIP, foreach=False),
    "largest": lambda parameters: nn.utils.clip_grad_norm_(parameters, CLIP, norm_type=math.inf),
    "value": lambda parameters: nn.utils.clip_grad_value_(parameters, CLIP / 10),
    "by hand": clip_by_hand,
    "out of place": clip_out_of_place,
}


class Loop:
    """People's own loops: backward, clip, step; `loss` is this process's mean, halves of it add up to it."""

    def __init__(
        self, opt: DistributedOptimizer, model: nn.Module, clip: Callable[[list[nn.Parameter]], object]
    ):
        self.opt, self.model, self.clip = opt, model, clip
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)

    def plain(self, halves: list[Tensor]) -> None:
        sum(halves).backward()
        self.clip_and_step()

    def clip_and_step(self) -> None:
        self.clip(list(self.model.parameters()))
        self.opt.step()

    def by_its_backward(self, halves: list[Tensor]) -> None:
        for i, half in enumerate(halves):
            self.opt.backward(half, last=i == 1)
        self.clip([p for group in self.opt.param_groups for p in group["params"]])
        self.opt.step()

    def accumulating(self, halves: list[Tensor]) -> None:
        with self.opt.accumulate():
            halves[0].backward()
        halves[1].backward()
        self.clip_and_step()

    def scaled(self, halves: list[Tensor]) -> None:
        self.scaler.scale(sum(halves)).backward()
        self.scaler.unscale_(self.opt)
        self.clip(list(self.model.parameters()))
        self.scaler.step(self.opt)
        self.scaler.update()

    def inner_step(self, halves: list[Tensor]) -> None:
        sum(halves).backward()
        self.clip(list(self.model.parameters()))
        self.opt.optimizer.step()
        self.opt.zero_grad()


LOOPS = [Loop.plain, Loop.by_its_backward, Loop.accumulating, Loop.scaled, Loop.inner_step]


@check_alone_too
def clipping_in_everybodys_order(world: World) -> None:
    clears = [DistributedOptimizer.zero_grad, lambda opt: opt.zero_grad(set_to_none=False), lambda opt: None]
    for number, (loop, clip) in enumerate(itertools.product(LOOPS, CLIPS)):
        model, reference = convnet().eval(), convnet().eval()
        inner = torch.optim.SGD(model.parameters(), 1.0, 0.9)
        terms = 2 * world.size if number % 2 else None
        opt = DistributedOptimizer(inner, model, world=world, bucket_bytes=2000, reproducible_terms=terms)
        plain = torch.optim.SGD(reference.parameters(), 1.0, 0.9)
        mine = Loop(opt, model, CLIPS[clip])
        for step in range(3):
            data = [batch(10 * step + r) for r in range(world.size)]
            clears[number % 3](opt)
            halves = zip(*(part.split(2) for part in data[world.rank]), strict=True)
            loop(mine, [loss_sum(model, half) / 4 for half in halves])
            plain.zero_grad()
            (sum(loss_sum(reference, d) for d in data) / (4 * world.size)).backward()
            CLIPS[clip](list(reference.parameters()))
            plain.step()
        assert difference(model, reference) < 1e-9, (loop.__name__, clip, terms, difference(model, reference))


@check_alone_too
def autocast_in_pytorchs_order(world: World) -> None:
    """The same bits as with synchronize() right after backward."""
    for dtype, terms in itertools.product((torch.bfloat16, torch.float16), (None, world.size)):
        models, results = [], []
        for explicit in (True, False):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))
            opt = wrap(model, world, reproducible_terms=terms)
            scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=dtype is torch.float16)
            for step in range(3):
                x, y = batch(10 * step + world.rank)
                with torch.autocast("cpu", dtype=dtype):
                    loss = F.cross_entropy(model(x.float()), y)
                scaler.scale(loss).backward()
                if explicit:
                    opt.synchronize()
                scaler.unscale_(opt)
                results.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
            models.append(model)
        assert difference(*models) == 0
        assert results[:3] == results[3:]


@check_alone_too
def sums_that_were_looked_at_before_their_count(world: World) -> None:
    """Refused at the step, whoever looked and whatever for; with synchronize(images=) first it is right."""
    looks: dict[str, Callable[[nn.Module, DistributedOptimizer], object]] = {
        "clip": lambda model, opt: nn.utils.clip_grad_norm_(model.parameters(), CLIP),
        "read": lambda model, opt: [float(p.grad.norm()) for p in model.parameters()],
        "groups": lambda model, opt: [p.grad.sum() for g in opt.param_groups for p in g["params"]],
    }
    for terms, scaled, look in itertools.product((None, world.size), (False, True), looks):
        model, reference = convnet().eval(), convnet().eval()
        opt = wrap(model, world, reproducible_terms=terms)
        data = [batch(r) for r in range(world.size)]
        for refused in (True, False):
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
            scaler.scale(loss_sum(model, data[world.rank])).backward()
            if not refused:
                opt.synchronize(images=4)
            scaler.unscale_(opt)
            looks[look](model, opt)
            if refused:
                with pytest.raises(RuntimeError, match=r"call opt\.synchronize\(images=\.\.\.\) first"):
                    scaler.step(opt, images=4)
                assert difference(model, reference) == 0
                opt.zero_grad()
            else:
                scaler.step(opt)
        plain = torch_sgd(reference)
        (sum(loss_sum(reference, d) for d in data) / (4 * world.size)).backward()
        if look == "clip":
            nn.utils.clip_grad_norm_(reference.parameters(), CLIP)
        plain.step()
        assert difference(model, reference) < 1e-12, (terms, scaled, look)
    for count in ({"images": 4}, {"global_images": 4 * world.size}):  # an explicit unscale_ alone looks, too
        model = convnet()
        opt, scaler = wrap(model, world), torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(loss_sum(model, batch(0))).backward()
        scaler.unscale_(opt)
        with pytest.raises(RuntimeError, match="synchronize"):
            scaler.step(opt, **count)
        opt.zero_grad()


@check
def looking_on_one_process_alone(world: World) -> None:
    """Rank 0 logs a norm, or gives the step's gradients up by hand: the others need not wait for anything new."""
    model, reference = convnet().eval(), convnet().eval()
    opt, plain = wrap(model, world), torch_sgd(reference)
    for step in range(3):
        data = [batch(10 * step + r) for r in range(world.size)]
        (loss_sum(model, data[world.rank]) / 4).backward()
        if world.rank == 0:
            seen = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        opt.step()
        reference_step(reference, plain, data)
        if world.rank == 0:
            assert abs(seen - torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()) < 1e-12
    assert difference(model, reference) < 1e-12


@check
def parameters_without_gradient_on_some_are_seen_by_all(world: World) -> None:
    """Each process uses its own head; the norm that is clipped is over the gradients of all heads."""
    for terms in (None, world.size):
        heads, reference = (
            nn.ModuleList(nn.Linear(3, 2).double() for _ in range(world.size + 1)) for _ in range(2)
        )
        opt = wrap(heads, world, reproducible_terms=terms)
        reference.load_state_dict(heads.state_dict())
        plain = torch.optim.SGD(parameter_groups(reference), 0.1, 0.9, nesterov=True)
        x = torch.arange(3.0).double()
        for _ in range(2):
            heads[world.rank](x * (1 + world.rank)).sum().backward()
            norm = nn.utils.clip_grad_norm_(heads.parameters(), CLIP)
            opt.step()
            plain.zero_grad()
            (sum(reference[r](x * (1 + r)).sum() for r in range(world.size)) / world.size).backward()
            expected = nn.utils.clip_grad_norm_(reference.parameters(), CLIP)
            plain.step()
            assert abs(norm - expected) < 1e-12
        assert heads[-1].weight.grad is None
        assert difference(heads, reference) < 1e-12


@check_alone_too
def gradients_given_up_by_hand(world: World) -> None:
    clears: list[Callable[[nn.Module], object]] = [
        lambda model: model.zero_grad(),
        lambda model: model.zero_grad(set_to_none=False),
        lambda model: [setattr(p, "grad", None) for p in model.parameters()],
        lambda model: [delattr(p, "grad") for p in model.parameters()],
    ]
    for clear, terms in itertools.product(clears, (None, world.size)):
        model, reference = convnet().eval(), convnet().eval()
        opt = wrap(model, world, reproducible_terms=terms)
        plain = torch_sgd(reference)
        for step in range(2):
            loss_sum(model, batch(99 + world.rank)).backward()
            clear(model)
            assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
            data = [batch(10 * step + r) for r in range(world.size)]
            loss_sum(model, data[world.rank]).backward()
            opt.step(images=4)
            reference_step(reference, plain, data)
        assert difference(model, reference) < 1e-12
        loss_sum(model, batch(99)).backward()
        clear(model)
        before = copy.deepcopy(model)
        opt.step()
        assert clear is clears[1] or difference(model, before) == 0  # nothing is left to be done


@check_alone_too
def looking_in_the_midst_of_backward(world: World) -> None:
    model = convnet()
    opt = wrap(model, world)
    seen: list[Tensor] = []
    handle = model[5].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with pytest.raises(RuntimeError, match="while backward is at work"):
        loss_sum(model, batch(world.rank)).backward()
    opt.zero_grad()
    handle.remove()
    model[5].weight.register_hook(seen.append)  # this process's own, on its way
    loss_sum(model, batch(world.rank)).backward()
    assert len(seen) == 1
    opt.step(images=4)


@check_alone_too
def changed_where_they_are_only_this_processs_own(world: World) -> None:
    """After backwards that exchange nothing, a process's sums are changed: refused, not exchanged as they are."""
    for terms in (None, world.size):
        model = convnet()
        opt = wrap(model, world, reproducible_terms=terms)
        with opt.accumulate():
            loss_sum(model, batch(world.rank)).backward()
        mine = Loop(opt, model, CLIPS["norm"])
        with pytest.raises(RuntimeError, match=r"call opt\.synchronize\(\) "):
            mine.clip_and_step()
        opt.zero_grad()
        reference = copy.deepcopy(model)
        with opt.accumulate():
            (loss_sum(model, batch(world.rank)) / 4).backward()
        opt.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        (sum(loss_sum(reference, batch(r)) for r in range(world.size)) / (4 * world.size)).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), CLIP)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-13)
        opt.step()


@check
def optimizers_of_one_process_shift_no_names(world: World) -> None:
    for _ in range(world.rank):
        probe = nn.Linear(2, 2)
        alone = DistributedOptimizer(torch.optim.SGD(probe.parameters(), 0.1), probe, world=Solo())
        alone.backward(probe(torch.ones(1, 2)).sum())
        alone.step(images=1)
    model, reference = convnet(), convnet()
    opt, plain = wrap(model, world), torch_sgd(reference)
    data = [batch(r) for r in range(world.size)]
    opt.backward(loss_sum(model, data[world.rank]))
    opt.step(images=4)
    reference_step(reference, plain, data)
    assert difference(model, reference) < 1e-12


@check
def other_orders_models_and_options_are_errors_not_hangs(world: World) -> None:
    models = [nn.Linear(2, 3), nn.Linear(3, 2)]
    for model in models if world.rank else models[::-1]:
        with pytest.raises(RuntimeError, match="processes disagree"):
            wrap(model, world)
    buffers = nn.BatchNorm1d(2)
    buffers.register_buffer("mask", torch.zeros(3 + world.rank))
    with pytest.raises(RuntimeError, match="processes disagree") as error:
        wrap(buffers, world)
    assert world.rank == 0 or "'mask', [4]" in str(error.value) or "'mask', [5]" in str(error.value)
    for options in ({"bucket_bytes": 100 + world.rank}, {"reproducible_terms": 4 if world.rank else None}):
        with pytest.raises(RuntimeError, match="processes disagree"):
            DistributedOptimizer(SGD(models[0].parameters()), models[0], world=world, **options)
    with pytest.raises(RuntimeError, match="processes disagree"):
        DistributedOptimizer((SGD if world.rank else torch.optim.Adam)(models[0].parameters()), world=world)


@check_alone_too
def buffers_and_parameters_of_any_kind(world: World) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            r = world.rank + 1
            self.fc = nn.Linear(4, 4)
            self.tied = self.fc
            self.fixed = nn.Parameter(torch.full((2,), r, dtype=torch.int16), requires_grad=False)
            base = torch.arange(12.0).reshape(3, 4) * r
            for name, buffer in {
                "expanded": torch.full((1, 4), float(r)).expand(3, 4),
                "scalar_expanded": torch.tensor(r).expand(2, 2),
                "transposed": base.t(),
                "strided": base[:, ::2],
                "overlapping": base.flatten().unfold(0, 4, 2),
                "channels_last": torch.full((1, 2, 3, 3), float(r)).to(memory_format=torch.channels_last),
                "empty": torch.empty(0, 3),
                "scalar": torch.tensor(float(r)),
                "bool": torch.tensor([r == 1, True]),
                "int": torch.tensor([r]),
                "uint8": torch.tensor([r], dtype=torch.uint8),
                "half": torch.tensor([r], dtype=torch.float16),
                "bfloat": torch.tensor([r], dtype=torch.bfloat16),
                "float8": torch.tensor([r], dtype=torch.float32).to(torch.float8_e4m3fn),
                "complex": torch.tensor([r + 1j]),
                "conjugate": torch.tensor([r + 1j]).conj(),
                "imaginary": torch.tensor([r + 1j]).conj().imag,
            }.items():
                self.register_buffer(f"a_{name}", buffer, persistent=len(name) % 2 == 0)

    model = Model()
    opt = wrap(model, world)
    rank_0 = copy.deepcopy(model)
    for name, tensor in [*rank_0.named_buffers(), *rank_0.named_parameters()]:
        shared = world.broadcast_bytes(str(tensor.tolist()).encode(), f"kinds.{name}")
        assert str(tensor.tolist()).encode() == shared, name
    assert model.a_expanded.stride() == (0, 1)
    assert model.a_expanded.eq(1).all()
    opt.backward(model.tied(model.fc(model.a_expanded)).sum())
    opt.step(images=3)


@check_alone_too
def what_cannot_be_exchanged_is_named(world: World) -> None:
    class Model(nn.Module):
        def __init__(self, **more: object) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            for name, value in more.items():
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

    for more, words in (
        ({"head": nn.LazyLinear(3)}, r"head\.weight has no shape yet"),
        ({"norm": nn.LazyBatchNorm1d()}, r"norm\.weight has no shape yet"),
        (
            {"rotation": nn.Parameter(torch.ones(2, dtype=torch.complex64))},
            r"rotation is a parameter of .*complex64",
        ),
        ({"graph": torch.eye(3).to_sparse()}, r"graph is sparse_coo; expected a dense tensor"),
        ({"nowhere": nn.Parameter(torch.ones(2, device="meta"))}, r"nowhere is on the meta device"),
    ):
        model = Model(**more)
        with pytest.raises(TypeError, match=words):
            DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world)
    pair = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2, dtype=torch.complex64))]
    with pytest.raises(TypeError, match=r"parameter 1 of group 0 is a parameter of torch\.complex64"):
        DistributedOptimizer(torch.optim.SGD(pair, 0.1), world=world)


@check_alone_too
def numbers_of_numpy_and_tensors_as_options(world: World) -> None:
    for lr in (np.float32(0.1), np.float64(0.1), torch.tensor(0.1), 0.1):
        model, reference = convnet(), convnet()
        inner = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=np.float32(0.1))
        opt = DistributedOptimizer(inner, model, world=world)
        plain = torch.optim.AdamW(reference.parameters(), lr=float(lr), weight_decay=float(np.float32(0.1)))
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (opt, plain)]
        for step in range(3):
            data = [batch(10 * step + r) for r in range(world.size)]
            opt.backward(loss_sum(model, data[world.rank]))
            opt.step(images=4)
            reference_step(reference, plain, data)
            for schedule in schedules:
                schedule.step()
        assert difference(model, reference) < 1e-7
        rate = torch.tensor([float(opt.param_groups[0]["lr"])], dtype=torch.float64)
        assert world.broadcast(rate.clone(), "rate") == rate  # in every bit
        flatten_state(opt.state_dict())


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021) in the shape of its usual implementation.

    Without its division by the norm, which would hide a gradient that is wrong by a factor.
    """

    def __init__(self, params: Iterable[nn.Parameter], rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.detach().clone()
                    p.add_(p.grad * group["rho"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], object]) -> None:
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


@check_alone_too
def methods_that_only_the_wrapped_optimizer_has(world: World) -> None:
    for form, terms in itertools.product(("means", "sums", "closure", "closure of sums"), (None, world.size)):
        model, reference = convnet().eval(), convnet().eval()
        opt = DistributedOptimizer(SAM(model.parameters()), model, world=world, reproducible_terms=terms)
        plain = SAM(reference.parameters())
        for step in range(2):
            data = [batch(10 * step + r) for r in range(world.size)]

            def loss(
                m: nn.Module = model,
                d: tuple[Tensor, Tensor] = data[world.rank],
                count: int = 1 if "sums" in form else 4,
            ) -> Tensor:
                return loss_sum(m, d) / count

            def closure(
                loss: Callable[[], Tensor] = loss, clear: Callable[[], None] = opt.zero_grad
            ) -> Tensor:
                clear()
                result = loss()
                result.backward()
                return result

            loss().backward()
            if "closure" in form:
                opt.step(closure, images=4 if "sums" in form else None)
            else:
                for take in (opt.first_step, opt.second_step):
                    if form == "sums":
                        opt.synchronize(images=4)
                    take(zero_grad=True)
                    if take == opt.first_step:
                        loss().backward()
            for take in (plain.first_step, plain.second_step):
                plain.zero_grad()
                (sum(loss_sum(reference, d) for d in data) / (4 * world.size)).backward()
                take()
        assert difference(model, reference) < 1e-12, form
    assert opt.base_optimizer is opt.optimizer.base_optimizer
    with pytest.raises(AttributeError, match="no_such_method"):
        opt.no_such_method()


@check_alone_too
def running_statistics_of_unusual_layers(world: World) -> None:
    """Cumulative, used twice, frozen on the way, in bf16: the same r for any number of processes, by the formula."""
    for terms in (None, 64):
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {
                "usual": nn.BatchNorm1d(2),
                "cumulative": nn.BatchNorm1d(2, momentum=None),
                "twice": nn.BatchNorm1d(2),
                "late": nn.BatchNorm1d(2),
                "frozen": nn.BatchNorm1d(2),
                "still": nn.BatchNorm1d(2, momentum=0.0),
                "bf16": nn.BatchNorm1d(2, dtype=torch.bfloat16),
                "untracked": nn.BatchNorm1d(2, track_running_stats=False),
                "unused": nn.BatchNorm1d(2),
                "maps": nn.BatchNorm3d(2),
            }
        )
        model["frozen"].eval()
        model["usual"].num_batches_tracked.fill_(world.rank)  # other forwards before: rank 0's count
        statistics = running_statistics(model, world, terms)
        expected = {name: torch.zeros(2, dtype=torch.float64) for name in model if name != "untracked"}
        for step in range(6):
            if step == 3:
                model["late"].eval()
            workers = [3, 5, 1, 4, 2, 3][step]
            views = [
                torch.randn(8, 2, generator=torch.Generator().manual_seed(50 * step + j)) + 5
                for j in range(workers)
            ]
            for j in hosted(world.rank, world.size, workers):
                for name in set(model) - {"bf16", "unused", "maps"}:
                    model[name](views[j])
                model["twice"](3 * views[j])
                model["bf16"](views[j].bfloat16())
                model["maps"](views[j][:, :, None, None, None])
                statistics.after_forward()
            statistics.synchronize()
            statistics.step(workers)
            mean = sum(view.double().mean(0) for view in views) / workers
            for name, momentum in {
                "usual": 0.1,
                "bf16": 0.1,
                "maps": 0.1,
                "cumulative": 1 / (step + 1),
            }.items():
                expected[name] = (1 - momentum) * expected[name] + momentum * mean
            expected["twice"] = 0.9 * expected["twice"] + 0.1 * 2 * mean
            if step < 3:
                expected["late"] = 0.9 * expected["late"] + 0.1 * mean
        assert {name for name in expected if model[name].running_mean.any()} == set()  # not before publish
        twin = copy.deepcopy(model)
        statistics.publish()
        for name, mean in expected.items():
            error = (model[name].running_mean.double() - mean).abs().max()
            assert error < (2**-6 if name == "bf16" else 1e-5), (name, terms, model[name].running_mean, mean)
        tracked = {name: int(model[name].num_batches_tracked) for name in expected}
        assert tracked == dict.fromkeys(expected, 6) | {"late": 3, "frozen": 0, "unused": 0}
        assert twin["cumulative"].momentum is None
        assert twin["usual"].momentum == 0.1


@check
def the_world_itself(world: World) -> None:
    p = world.size
    assert os.environ.get("HOROVOD_FUSION_THRESHOLD") == ("0" if BY_HOROVOD else None)
    assert hvd_lb.world.init() is world is hvd_lb.world.current()
    assert (world.local_rank, world.local_size) == (world.rank, p)
    for dtype in (torch.float64, torch.float32, torch.int64):
        ours = torch.full((1000,), world.rank + 1, dtype=dtype)
        assert world.allreduce(ours, f"sum.{dtype}") is ours
        assert bool((ours == p * (p + 1) // 2).all())
    for dtype in (torch.float64, torch.float32, torch.int64):
        ours = torch.tensor([world.rank, -world.rank, 7], dtype=dtype)
        assert world.maximum_async(ours, f"maximum.{dtype}").wait() is ours
        assert ours.tolist() == [p - 1, 0, 7]
    assert world.maximum_async(
        torch.tensor([1.0, math.inf][:: 1 if world.rank else -1]), "inf"
    ).wait().tolist() == ([math.inf] * 2 if p > 1 else [math.inf, 1])
    handles = [
        world.allreduce_async(torch.ones(10_000), f"async.{i}") for i in range(20)
    ]  # alive by the handle only
    assert all(bool((handle.wait() == p).all()) and bool((handle.wait() == p).all()) for handle in handles)
    assert world.broadcast(torch.tensor([world.rank, 7]), "tensor").tolist() == [0, 7]
    assert world.broadcast(torch.tensor([world.rank == 0]).to(torch.uint8), "small").tolist() == [1]
    assert (
        world.allreduce(torch.zeros(0), "empty").numel()
        == world.broadcast(torch.zeros(0), "empty").numel()
        == 0
    )
    strange = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert str(world.allreduce(strange, "strange").tolist()) == str([math.nan, math.inf, -math.inf, float(p)])
    for dtype in (torch.bool, torch.uint8):
        with pytest.raises(ValueError, match="[Bb]ool|uint8|Byte"):
            world.allreduce(torch.ones(3, dtype=dtype), "bytes are not added")
    for data in (b"", b"x", bytes(range(256)) * 1000):
        assert world.broadcast_bytes(data if world.rank == 0 else b"something else", "bytes") == data
    with pytest.raises(ValueError, match="contiguous"):
        world.allreduce(torch.ones(3, 4).t(), "strided")
    world.barrier()


@check
def waiting_leaves_the_core_to_others(world: World) -> None:
    tensor = torch.ones(2)
    for wait in (
        lambda name: world.allreduce_async(tensor, name).wait(),
        lambda name: world.broadcast(tensor, name),
        lambda name: world.barrier(),
    ):
        if world.rank == 1:
            time.sleep(1)
        wall, cpu = time.perf_counter(), time.thread_time()
        wait("late")
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        # Rank 0 of torch.distributed does not wait for those that it sends to.
        assert world.rank == 1 or wall > 0.5 or not BY_HOROVOD
        assert cpu < 0.3 * max(wall, 0.5), f"{cpu:.2f} s of CPU in {wall:.2f} s"
        world.barrier()


def main() -> None:
    world = hvd_lb.world.init()
    for function in CHECKS if world.size > 1 else ALONE:
        error = ""
        try:
            function(world)
        except Exception:
            error = traceback.format_exc()
            print(error, file=sys.stderr, flush=True)
        failed = world.allreduce(torch.tensor([int(bool(error))]), f"failed.{function.__name__}")
        if world.rank == 0:
            print("CHECK", json.dumps([function.__name__, int(failed)]), flush=True)
    hvd_lb.world.shutdown()


if __name__ == "__main__":
    main()
