"""Parameters that begin to learn on the way: nobody sees a process's own gradients of them, not even at first."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from test_distributed import difference
from together import Together, together
from torch import Tensor, nn

from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.optim import DistributedOptimizer
from hvd_lb.plan.hosting import hosted
from hvd_lb.world.solo import Solo

torch.manual_seed(0)
FRESH = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def network() -> nn.Sequential:
    return copy.deepcopy(FRESH)  # threads share torch's random numbers


def loss_of(model: nn.Module, rank: int, step: int, reduction: str = "mean") -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (4,), generator=generator)
    return F.cross_entropy(model(x), y, reduction=reduction)


def at_step(model: nn.Sequential, step: int, swap: bool) -> None:
    """The body begins to learn with step 2, beside the head or in its place."""
    model[0].requires_grad_(step >= 2)
    model[2].requires_grad_(not swap or step < 2)


def clip(opt: DistributedOptimizer, model: nn.Module, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    opt.step()


def scale(opt: DistributedOptimizer, model: nn.Module, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
    scaler.scale(loss).backward()
    scaler.step(opt)


def scale_and_clip(
    opt: DistributedOptimizer, model: nn.Module, loss: Tensor, scaler: torch.amp.GradScaler
) -> None:
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(opt)


def by_torch(processes: int, step_form: Callable, swap: bool) -> nn.Module:
    model = network()
    opt = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for step in range(5):
        at_step(model, step, swap)
        sum(loss_of(model, rank, step) / processes for rank in range(processes)).backward()
        if step_form is not scale:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        opt.zero_grad()
    return model


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("step_form", [clip, scale, scale_and_clip])
def test_what_looks_at_gradients_sees_means(step_form: Callable, processes: int, swap: bool) -> None:
    def run(world: Together) -> nn.Module:
        model = network()
        at_step(model, 0, swap)
        opt = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1, 0.9), model, world=world)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(5):
            at_step(model, step, swap)
            step_form(opt, model, loss_of(model, world.rank, step), scaler)
            scaler.update() if step_form is not clip else None
            opt.zero_grad()
        return model

    expected = by_torch(processes, step_form, swap)
    for found in together(processes, run):
        assert difference(found, expected) < 1e-12


@pytest.mark.parametrize("way", ["to the wrapped optimizer", "by hand"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_group_that_is_added_behind_its_back(processes: int, way: str) -> None:
    def run(world: Together) -> nn.Module:
        model = network()
        opt = DistributedOptimizer(torch.optim.SGD(model[2].parameters(), 0.1, 0.9), model, world=world)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(5):
            at_step(model, step, False)
            if step == 2 and way == "by hand":
                opt.param_groups[0]["params"][:0] = model[0].parameters()
            elif step == 2:
                opt.optimizer.add_param_group({"params": model[0].parameters()})
                opt.param_groups.reverse()  # they are looked at first
            scale(opt, model, loss_of(model, world.rank, step), scaler)
            scaler.update()
            opt.zero_grad()
        return model

    expected = by_torch(processes, scale, False)
    for found in together(processes, run):
        assert difference(found, expected) < 1e-12


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_backward_gave_to_an_added_group_counts_once(processes: int) -> None:
    """In the next step only the last process uses it, and nobody clears gradients."""

    def run(world: Together) -> nn.Module:
        model = network()
        opt = DistributedOptimizer(torch.optim.SGD(model[2].parameters(), 0.1, 0.9), model, world=world)
        for step in range(4):
            if step == 1:
                opt.optimizer.add_param_group({"params": model[0].parameters()})
            model[0].requires_grad_(step != 2 or world.rank == processes - 1)
            loss_of(model, world.rank, step).backward()
            model[0].requires_grad_()
            opt.step()
            if step == 0:
                model[0].zero_grad()  # not the optimizer's yet
        return model

    model = network()
    opt = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for step in range(4):
        model.zero_grad()
        for rank in range(processes):
            model[0].requires_grad_(step != 2 or rank == processes - 1)
            (loss_of(model, rank, step) / processes).backward()
            model[0].requires_grad_()
        if step == 0:
            model[0].zero_grad()
        opt.step()
    for found in together(processes, run):
        assert difference(found, model) < 1e-12


def exact(world: Together, backwards: int) -> nn.Module:
    """Processes may have none; a step that overflows is taken again."""
    model = network()
    at_step(model, 0, False)
    opt = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1, 0.9), model, world=world, reproducible_terms=backwards
    )
    mine = hosted(world.rank, world.size, backwards)
    for step in range(5):
        at_step(model, step, False)
        for _ in count():
            for number in mine:
                opt.backward(loss_of(model, number, step, "sum"), last=number == mine[-1])
            try:
                opt.step(images=4 * len(mine))
                break
            except FixedPointOverflow:
                continue
    return model


def test_bits_do_not_depend_on_processes() -> None:
    """In the first step, too, each backward is a term of its own; with 8 processes one has none."""
    (alone,) = together(1, lambda world: exact(world, 7))
    for processes in (2, 3, 8):
        for found in together(processes, lambda world: exact(world, 7)):
            assert difference(found, alone) == 0


def test_processes_that_disagree_are_told() -> None:
    def run(world: Together) -> str:
        model = network()
        model.requires_grad_(False)[2].bias.requires_grad_()
        opt = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world)
        model[2 * world.rank].weight.requires_grad_()
        loss_of(model, world.rank, 0).backward()
        with pytest.raises(RuntimeError, match="processes disagree on the parameters"):
            opt.step()
        return "told"

    assert together(2, run) == ["told", "told"]


def test_two_that_learn_in_turns_stay_apart() -> None:
    """Each has all parameters, and those of the other are frozen when it is made and when it steps."""
    model, reference = network(), network()
    wrapped = partial(DistributedOptimizer, world=Solo())
    steps = []
    for of, wrap in ((model, wrapped), (reference, lambda plain, _: plain)):
        optimizers = []
        for part in (0, 2):
            of.requires_grad_(False)[part].requires_grad_()
            optimizers.append(wrap(torch.optim.SGD(of.parameters(), 0.1, 0.9), of))
        steps.append(optimizers)
    for step in range(6):
        for of, optimizers in zip((model, reference), steps, strict=True):
            part = step % 2
            of.requires_grad_(False)[2 * part].requires_grad_()
            loss_of(of, 0, step).backward()
            optimizers[part].step()
            of.zero_grad()
    assert difference(model, reference) < 1e-14


def test_what_it_leaves_when_it_is_gone() -> None:
    model = network()
    at_step(model, 0, False)
    opt = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=Solo())
    assert not model[0].weight.requires_grad
    del opt
    model.requires_grad_()
    loss_of(model, 0, 0).backward()
    assert all(type(p) is nn.Parameter and p.grad is not None for p in model.parameters())
