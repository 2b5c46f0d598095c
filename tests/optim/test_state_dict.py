"""State dicts through tensors and JSON."""

import json

import pytest
import torch
from torch import nn

from hvd_lb.optim import SGD
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
    state = {"state": {0: {"velocity": torch.ones(2)}}, "odd": [None, True, 0.1, "x", (1, [torch.zeros(())])]}
    tensors, skeleton = flatten_state(state)
    assert list(tensors) == ["state/0/velocity", "odd/4/1/0"]
    assert same(restore_state(tensors, json.loads(json.dumps(skeleton))), state)


@pytest.mark.parametrize(
    ("state", "words"),
    [({"a": {"b": object()}}, "'a/b' is a object"), ({(1, 2): 3}, "expected strings and integers")],
)
def test_what_json_cannot_hold_is_named(state: object, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        flatten_state(state)
