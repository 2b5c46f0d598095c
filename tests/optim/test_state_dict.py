"""State dicts through tensors and JSON."""

import copy
import json
from collections import deque
from collections.abc import Callable
from enum import IntEnum

import pytest
import torch
from together import Together, together
from torch import Tensor, nn

from hvd_lb.optim import SGD, DistributedOptimizer
from hvd_lb.optim.state_dict import flatten_state, restore_state


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.3),
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.RMSprop(p, momentum=0.5),
    ],
)
def test_round_trip_through_json(make) -> None:
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    state = optimizer.state_dict()
    tensors, skeleton = flatten_state(state)
    assert all(isinstance(tensor, torch.Tensor) and not tensor.requires_grad for tensor in tensors.values())
    assert same(restore_state(tensors, json.loads(json.dumps(skeleton))), state)


def test_two_tensors_of_one_path_are_refused() -> None:
    one = torch.ones(1)
    for state, path in (
        ({"a/b": one, "a": {"b": one}}, "a/b"),
        ({1: one, "1": one}, "1"),
        ({"/a": one, "a": one}, "a"),
    ):
        with pytest.raises(ValueError, match=f"two tensors at '{path}'"):
            flatten_state(state)


def test_paths_and_scalars() -> None:
    odd = [None, True, 0.1, "x", (1, [torch.zeros(())]), torch.bfloat16, {0.9: 1, 0: 2}]
    state = {"state": {0: {"velocity": torch.ones(2)}}, "odd": odd}
    tensors, skeleton = flatten_state(state)
    assert list(tensors) == ["state/0/velocity", "odd/4/1/0"]
    assert same(restore_state(tensors, json.loads(json.dumps(skeleton))), state)


@pytest.mark.parametrize(
    ("state", "words"),
    [({"a": {"b": object()}}, "'a/b' is a object"), ({(1, 2): 3}, "expected strings and numbers")],
)
def test_what_json_cannot_hold_is_named(state: object, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        flatten_state(state)


# What processes are given of rank 0's optimizer


class InFloat(torch.optim.Optimizer):
    """Keeps its state in fp32, whatever the parameters are."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for p in self.param_groups[0]["params"]:
            average = self.state[p].setdefault("average", torch.zeros_like(p, dtype=torch.float32))
            average.lerp_(p.grad.float(), 0.1)
            p.sub_(average.to(p.dtype), alpha=self.param_groups[0]["lr"])


class Around(torch.optim.Optimizer):
    """Has the groups of another optimizer, which makes the steps."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure: object = None) -> None:
        self.base.step()


class Norm(IntEnum):
    SIGN = 2


class WithNorm(torch.optim.SGD):
    """Has an option that is a word."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, 0.1, 0.9)
        self.defaults["norm"] = self.param_groups[0]["norm"] = Norm.SIGN

    def step(self, closure: object = None) -> None:
        assert self.param_groups[0]["norm"] is Norm.SIGN
        super().step()


class Outside(torch.optim.Optimizer):
    """Has nothing of its own, not even what torch gives an optimizer when it is made."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.base = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    param_groups = property(lambda self: self.base.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.base.state)  # type: ignore[assignment]
    defaults = property(lambda self: self.base.defaults)  # type: ignore[assignment]

    def state_dict(self) -> dict[str, object]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.base.load_state_dict(state_dict)

    def step(self, closure: object = None) -> None:
        self.base.step()


@pytest.mark.parametrize("make", [InFloat, lambda p: torch.optim.NAdam(p, 0.01), Around, Outside])
def test_replicas_stay_the_same_when_an_optimizer_is_wrapped_again(make: Callable) -> None:
    begin = nn.Linear(8, 4).bfloat16()

    def train(world: Together) -> list[Tensor]:
        model = copy.deepcopy(begin)
        inner = make(list(model.parameters()))
        for again in range(2):
            opt = DistributedOptimizer(inner, model, world=world, schedule=lambda step: 0.1 / (1 + step))
            for step in range(6):
                seed = 100 * again + 10 * step + world.rank
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
                opt.backward(model(x).square().mean())
                opt.step()
        return [p.detach() for p in model.parameters()]

    one, other = together(2, train)
    assert all(map(torch.equal, one, other))


def test_options_that_are_words_stay_so_where_a_state_is_gone_on_from() -> None:
    def train(world: Together) -> None:
        model = nn.Linear(8, 4)
        opt = DistributedOptimizer(WithNorm(list(model.parameters())), model, world=world)
        opt.backward(model(torch.ones(2, 8)).sum())
        opt.step()
        state = opt.state_dict() if world.rank == 0 else None
        opt = DistributedOptimizer(WithNorm(list(model.parameters())), model, world=world, state=state)
        for _ in range(3):
            opt.backward(model(torch.ones(2, 8)).sum())
            opt.step()

    together(2, train)


def test_all_processes_hear_of_a_state_that_cannot_be_sent() -> None:
    """Those that have none yet would wait for rank 0."""

    def wrap(world: Together) -> str:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], 0.1)
        if world.rank == 0:
            optimizer.state[weight]["last"] = deque([torch.ones(2)])
        with pytest.raises(TypeError, match=r"cannot be given to other processes: .*state/0/last.*deque"):
            DistributedOptimizer(optimizer, world=world)
        return "heard"

    assert together(2, wrap) == ["heard"] * 2


def test_a_forward_that_changes_weights_is_refused_on_several_processes() -> None:
    def wrap(world: Together) -> None:
        model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5))
        DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world)

    together(1, wrap)
    with pytest.raises(TypeError, match="0 has max_norm 0.5"):
        together(2, wrap)
