"""Microbatches that are replayed as graphs: the same steps to the bit, in all modes.

On the CPU a recorder stands in for CUDA's that keeps the operators and runs them again, each into the tensors that it
made the first time: as in a graph, whatever Python would have done in between is not done.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from devices import DEVICES
from test_trainer import CPU, Records, largest_difference, make_trainer, run_steps, small_data, small_recipe
from together import Together, together
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvd_lb.errors import HostError, UserError
from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.machine.graphs import GraphRecorder, Recorder, Trial
from hvd_lb.training.models import SmallResNet, build_model
from hvd_lb.training.trainer import Trainer


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def again(self) -> None:
        for function, args, kwargs, made in self._calls:
            for before, now in zip(tree_leaves(made), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(before, Tensor) and before.data_ptr() != now.data_ptr():
                    before.data.copy_(now)


class OnTheCPU:
    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], None]]:
        with Operators() as operators:
            made = work()
        return made, operators.again


class Counting:
    """A recorder that counts what it records, and replays of each."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.replays = recorder, list[int]()

    def aside(self) -> AbstractContextManager[None]:
        return self.recorder.aside()

    def __call__(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], None]]:
        made, replay = self.recorder(work)
        number = len(self.replays)
        self.replays.append(0)

        def counted() -> None:
            self.replays[number] += 1
            replay()

        return made, counted


def counting_recorder(device: torch.device) -> Counting:
    return Counting(GraphRecorder(device) if device.type == "cuda" else OnTheCPU())


def trained(device: torch.device, steps: int, recorder: Recorder | None, **changes: Any) -> Trainer:
    trainer = make_trainer(small_recipe(**changes), device=device)
    trainer.forward.recorder = recorder
    while trainer.step < steps:
        try:
            with trainer.kernels():
                run_steps(trainer, steps - trainer.step)
        except FixedPointOverflow:
            continue
    return trainer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"together": 2, "channels_last": True},
        {"precision": "bf16"},
        {"last_batch": "keep"},
        {"model": "mobilenet_v3_small", "image_size": 32, "learning_rate": 0.02},
        {"precision": "fp16", "learning_rate": 0.1},
        {"audit": 0.5},
        {"recompute_bn": 32, "eval_every": "2steps"},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_the_same_bits(device: torch.device, changes: dict[str, Any]) -> None:
    """Dropout, batch norm's statistics, groups, half precision, short last steps, audits."""
    steps, recorder = 7, counting_recorder(device)
    found = trained(device, steps, recorder, reproducible=True, **changes)
    expected = trained(device, steps, None, reproducible=True, **changes)
    assert largest_difference(found.model, expected.model) == 0.0
    assert torch.equal(found.state.losses, expected.state.losses)
    forward, backward = recorder.replays
    assert forward >= backward >= 5
    assert not found.observer.warnings  # type: ignore[attr-defined]


@pytest.mark.parametrize("device", DEVICES)
def test_in_float_mode_to_rounding(device: torch.device) -> None:
    changes: dict[str, Any] = {"momentum_form": 9, "optimizer": "lars", "clip_norm": 1.0}
    found = trained(device, 5, counting_recorder(device), **changes)
    assert largest_difference(found.model, trained(device, 5, None, **changes).model) < 1e-10


def test_sizes_that_change_are_recorded_anew() -> None:
    recorder = counting_recorder(CPU)
    changes: dict[str, Any] = {"progressive_size": (4, 6), "reproducible": True}
    found, expected = [trained(CPU, 12, of, **changes) for of in (recorder, None)]
    assert largest_difference(found.model, expected.model) == 0.0
    assert len(recorder.replays) == 6


class Unused(SmallResNet):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(1, 10)
        self.spare = nn.Linear(1, 1)


def test_what_cannot_be_recorded_is_told_and_trained_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *_, **__: Unused())
    found, expected = (trained(CPU, 3, of) for of in (counting_recorder(CPU), None))
    assert largest_difference(found.model, expected.model) == 0.0
    (warning,) = found.observer.warnings  # type: ignore[attr-defined]
    assert "without CUDA graphs, as resnet8 cannot be recorded: " in warning
    trainer = make_trainer(small_recipe())
    trainer.forward.recipe = trainer.recipe.model_copy(update={"cuda_graphs": "on"})
    trainer.forward.recorder = counting_recorder(CPU)
    with pytest.raises(UserError, match="--cuda-graphs on: resnet8 cannot be recorded"):
        run_steps(trainer, 2)


class Full(Counting):
    """There is no memory for the first recording."""

    def __call__(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], None]]:
        if not self.replays:
            self.replays.append(0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(work)


def test_a_shape_without_memory_is_launched_and_others_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers together at first, then apart."""
    trainer = make_trainer(small_recipe(together=2))
    trainer.forward.recorder = recorder = Full(OnTheCPU())
    run_steps(trainer, 3)
    trainer.forward.group_size.size = 1
    run_steps(trainer, 3)
    assert largest_difference(trainer.model, trained(CPU, 6, None, together=1).model) < 1e-10
    assert recorder.replays[0] == 0
    assert recorder.replays[1] > 0
    (warning,) = trainer.observer.warnings  # type: ignore[attr-defined]
    assert warning == "no memory for a CUDA graph of 2 × 8 images: they do without"
    trainer = make_trainer(small_recipe())
    trainer.forward.recipe = trainer.recipe.model_copy(update={"cuda_graphs": "on"})
    trainer.forward.recorder = Full(OnTheCPU())
    with pytest.raises(HostError, match="--cuda-graphs on: there is no memory to record"):
        run_steps(trainer, 2)


def test_recordings_of_other_groups_go_when_a_size_is_found() -> None:
    trainer = trained(CPU, 3, counting_recorder(CPU), together=2)
    kept = dict(trainer.forward.recordings._made)
    assert [size for size, _ in kept] == [2]
    trainer.forward.recordings.keep(lambda key: key[0] == 1)
    assert trainer.forward.recordings._made == kept  # there is none of it yet
    trainer.forward.recordings._made[1, torch.Size()] = None
    trainer.forward.recordings.keep(lambda key: key[0] == 2)
    assert trainer.forward.recordings._made == kept


def test_backward_after_the_next_forward_is_refused() -> None:
    trainer = trained(CPU, 1, counting_recorder(CPU), reproducible=True)
    (recording,) = trainer.forward.recordings._made.values()
    assert recording
    trainer.state.statistics.discard()
    first = recording()
    recording()
    with pytest.raises(RuntimeError, match="after the next one"):
        first.sum().backward()


def trained_with_others(world: Together, faster: str) -> tuple[list[Tensor], list[int]]:
    """Weights, and replays of forward and backward; one way seems to take no time."""
    seconds = {"replaying": 0.0, "launching": 0.0}
    trainer = Trainer(
        small_recipe(reproducible=True),
        small_data(),
        world,
        device=CPU,
        threads=1,
        observer=Records(),
    )
    trainer.forward.recorder = recorder = counting_recorder(CPU)
    trainer.forward.trial = trial = Trial(CPU, clock=lambda: sum(seconds.values()))

    def synchronize(global_images: int) -> None:
        way = "replaying" if trial.replays else "launching"
        seconds[way] += way != faster
        Trainer._synchronize(trainer, global_images)

    trainer._synchronize = synchronize  # type: ignore[method-assign]
    run_steps(trainer, 12)
    return [p.detach().clone() for p in trainer.model.parameters()], recorder.replays


@pytest.mark.parametrize(("faster", "replays"), [("replaying", 11 + 9), ("launching", 11 + 5)])
def test_where_gradients_are_exchanged_the_faster_way_is_found_out(
    faster: str, replays: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two microbatches the first is replayed from the second step on; the last is tried."""
    fresh = build_model("resnet8", 5, seed=0)  # not in threads, which share torch's generator
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *_, **__: copy.deepcopy(fresh))
    for parameters, (forward, backward) in together(2, lambda world: trained_with_others(world, faster)):
        assert forward == backward == replays
        expected = trained(CPU, 12, None, reproducible=True).model.parameters()
        assert all(map(torch.equal, parameters, expected))
