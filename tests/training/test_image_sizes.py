"""Images that grow: the size of each step, of a run in one piece, one that goes on, and of its evaluations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_trainer import make_trainer, run_steps, small_recipe

from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Erase
from hvd_lb.plan.sizes import ImageSizes
from hvd_lb.recipe import OPTIONS, merged_recipe


def test_sizes_by_epoch() -> None:
    sizes = ImageSizes((128, 160, 224), epochs=7, steps_per_epoch=2)
    by_epoch = [128, 128, 128, 160, 160, 224, 224]
    assert [sizes(step) for step in range(14)] == [by_epoch[step // 2] for step in range(14)]
    assert list(sizes.stretches(3, 13)) == [range(3, 6), range(6, 10), range(10, 13)]
    assert list(sizes.stretches(0, 2)) == [range(2)]
    assert not list(sizes.stretches(5, 5))


@pytest.mark.parametrize(("count", "epochs"), [(1, 1), (2, 5), (3, 3), (4, 90), (7, 100)])
def test_stretches_are_those_of_the_sizes(count: int, epochs: int) -> None:
    sizes = ImageSizes(tuple(range(8, 8 + count)), epochs, 3)
    for start in range(0, 3 * epochs, 5):
        parts = list(sizes.stretches(start, 3 * epochs))
        assert [step for part in parts for step in part] == list(range(start, 3 * epochs))
        assert all(len({sizes(step) for step in part}) == 1 for part in parts)
        assert len({sizes(part.start) for part in parts}) == len(parts)
    assert len({sizes(step) for step in range(3 * epochs)}) == count


@pytest.mark.parametrize("offset", [-3, 5])
def test_sizes_go_by_epochs_where_k_has_changed(offset: int) -> None:
    sizes, moved = (ImageSizes((8, 9, 10), 7, 4, of) for of in (0, offset))
    for start in range(6, 20):
        assert moved(start + offset) == sizes(start)
        expected = [range(part.start + offset, part.stop + offset) for part in sizes.stretches(start, 28)]
        assert list(moved.stretches(start + offset, 28 + offset)) == expected


def seen(trainer: Any) -> list[tuple[bool, int]]:
    """Sides of what goes through the network from here on, and whether in training."""
    found: list[tuple[bool, int]] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        found.append((module.training, inputs[0].shape[-1]))

    trainer.model.register_forward_pre_hook(note)
    return found


def test_the_network_sees_them() -> None:
    """4 steps an epoch with one forward each, and two batches in an evaluation."""
    recipe = small_recipe(
        gpus=1, per_gpu_batch=32, progressive_size=(4, 6), random_erasing=0.5, eval_every="1epoch", eval_size=9,
        precision="fp32",
    )  # fmt: skip
    trainer = make_trainer(recipe)
    assert trainer.forward.group_size.size == 1
    found = seen(trainer)
    trainer.fit()
    expected = []
    for side in (4, 6, 8):
        expected += [(True, side)] * 4 + [(False, 9)] * 2
    assert found == expected
    for step, side in ((0, 4), (4, 6), (11, 8)):
        (*_, erase) = trainer.windows_of(trainer.sizes(step)).augmentations
        assert isinstance(erase, Erase)
        assert erase.size == side


def test_a_step_by_itself_is_of_its_size() -> None:
    """As audits and replays load them."""
    trainer = make_trainer(small_recipe(progressive_size=(5,), epochs=2))
    run_steps(trainer, 3)
    for step, side in ((0, 5), (7, 8), (1, 5)):
        with trainer.loaders_at(step).open([trainer.microbatch(step, 1)]) as loader:
            assert next(loader)[0].shape == (8, 3, side, side)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"progressive_size": (128, 224)}, "training ends with the latter: expected smaller ones before it"),
        ({"progressive_size": (128, 160), "epochs": 2}, "each size has an epoch at least"),
        ({"progressive_size": (160, 128)}, "expected increasing whole numbers from 1 to 8192"),
        ({"progressive_size": (0, 128)}, "expected increasing whole numbers from 1 to 8192"),
    ],
)
def test_sizes_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        merged_recipe({OPTIONS: options})
