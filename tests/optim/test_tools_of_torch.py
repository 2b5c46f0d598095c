"""What torch's own tools do with a DistributedOptimizer and its model is what they do with a plain one, or an error."""

import copy
from collections.abc import Callable

import pytest
import torch
from test_distributed import Recorder
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hvd_lb.optim import SGD, DistributedOptimizer
from hvd_lb.world.solo import Solo


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(torch.randn(5, 3, generator=torch.Generator().manual_seed(step))).square().sum()


def difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def wrap(model: nn.Module, make: Callable = lambda p: SGD(p, 0.1), **options: object) -> DistributedOptimizer:
    return DistributedOptimizer(make(model.parameters()), model, world=Solo(), **options)  # type: ignore[arg-type]


def train(model: nn.Module, opt: DistributedOptimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        opt.backward(loss_of(model, step))
        opt.step(images=5)


# Checkpoints that torch makes of an optimizer: they have it make its state by a step with rates of 0.

OPTIMIZERS: dict[str, Callable] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9),
    "form 10": lambda p: SGD(p, 0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "a tensor as rate": lambda p: torch.optim.AdamW(p, torch.tensor(0.1)),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("terms", [None, 4])
def test_torchs_checkpoint_changes_nothing_and_is_gone_on_from(
    make: Callable, flat: bool, terms: int | None
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    settings = {"schedule": lambda step: 0.1 / (1 + step), "reproducible_terms": terms}
    model, other = network(), network()
    opt = wrap(model, make, **settings)
    get_optimizer_state_dict(model, opt, options=options)
    assert (difference(model, other), opt.steps) == (0, 0)
    train(model, opt, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    other.load_state_dict(model.state_dict())
    resumed = wrap(other, make, **settings)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert (difference(model, other), resumed.steps) == (0, 3)
    for m, o in ((model, opt), (other, resumed)):
        train(m, o, range(3, 5))
    assert difference(model, other) < 1e-6


def test_a_step_at_a_rate_of_0_is_one() -> None:
    """As a warmup begins with: it counts, and momentum gathers."""
    model, reference = network(), network()
    opt, plain = (torch.optim.SGD(m.parameters(), 0.0, 0.9) for m in (model, reference))
    wrapped = DistributedOptimizer(opt, model, world=Solo())
    for rate in (0.0, 0.1):
        wrapped.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = rate
        wrapped.zero_grad()
        loss_of(model, 0).backward()
        wrapped.step()
        plain.zero_grad()
        loss_of(reference, 0).backward()
        plain.step()
    assert wrapped.steps == 2
    assert difference(model, reference) == 0


# Forwards and backwards


@pytest.mark.slow
@pytest.mark.parametrize("terms", [None, 4])
def test_a_compiled_forward_between_backward_and_step(terms: int | None) -> None:
    """As of the accuracy in training: torch.compile looks at gradients, and no number comes of it."""
    model, reference = network(), network()
    opt, plain = wrap(model, reproducible_terms=terms), wrap(reference, reproducible_terms=terms)
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(4):
        opt.backward(loss_of(compiled, step))
        with torch.no_grad():
            loss_of(compiled, step)
        opt.step(images=5)
        train(reference, plain, range(step, step + 1))
    assert difference(model, reference) < 1e-6
    opt.backward(loss_of(compiled, 0))
    with pytest.raises(RuntimeError, match="number of images was known"):
        opt.step(images=int(model[0].weight.grad.numel()))


@pytest.mark.slow
def test_microbatches_of_several_sizes_are_compiled_while_sums_are_formed() -> None:
    model, reference = network(), network()
    opt, plain = (wrap(m, reproducible_terms=4) for m in (model, reference))
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    for forward, o in ((compiled, opt), (reference, plain)):
        for images in (5, 4, 3):
            o.backward(forward(torch.ones(images, 3)).square().sum(), last=images == 3)
        o.step(images=12)
    assert difference(model, reference) < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("equal_copies")
@pytest.mark.parametrize("terms", [None, 4])
@pytest.mark.parametrize("what", ["clipping", "the whole step"])
def test_what_reads_gradients_may_be_compiled(what: str, terms: int | None) -> None:
    def train(compiled: bool) -> nn.Module:
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        opt = DistributedOptimizer(sgd, model, world=Recorder(size=2), reproducible_terms=terms)

        def clip() -> None:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)

        def step(x: Tensor) -> None:
            model(x).square().mean().backward()
            clip()
            opt.step()
            opt.zero_grad()

        if compiled:
            torch._dynamo.reset()
            if what == "clipping":
                clip = torch.compile(clip, backend="eager")
            else:
                step = torch.compile(step, backend="eager")
        for seed in range(3):
            step(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)))
        return model

    assert difference(train(compiled=True), train(compiled=False)) < 1e-6


@pytest.mark.parametrize("terms", [None, 4])
def test_checkpointing_of_a_module_that_is_used_twice(terms: int | None) -> None:
    def loss(model: nn.Module, reentrant: bool | None) -> Tensor:
        hidden = torch.ones(2, 3, requires_grad=True)
        for _ in range(2):
            hidden = (
                model(hidden) if reentrant is None else checkpoint(model, hidden, use_reentrant=reentrant)
            )
        return hidden.square().sum()

    models = [nn.Linear(3, 3)]
    models.append(copy.deepcopy(models[0]))
    opts = [wrap(model, reproducible_terms=terms) for model in models]
    for model, opt, reentrant in zip(models, opts, (False, None), strict=True):
        opt.backward(loss(model, reentrant))
        opt.step(images=2)
    assert difference(*models) == 0
    with pytest.raises(RuntimeError, match=r"(bias|weight) twice, by reentrant .* use_reentrant=False"):
        opts[0].backward(loss(models[0], True))


def test_a_model_that_exchanges_by_itself() -> None:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(network())
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(TypeError, match="model is wrapped in DistributedDataParallel.* the network alone"):
        wrap(model)
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        wrap(nn.ModuleDict({"inside": model}))
