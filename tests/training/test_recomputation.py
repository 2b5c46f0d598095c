"""Which images batch norm's statistics are recomputed from: training images, each once, cut as in training."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from test_trainer import small_data, small_recipe
from together import together

from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.plan.augment import Microbatch
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.batchnorm import batch_norms
from hvd_lb.training.models import build_model
from hvd_lb.training.recomputation import Recomputation
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

IMAGES = 150


def microbatches(step: int = 4, images: int = 45, **changes: object) -> list[Microbatch]:
    recipe = small_recipe(recompute_bn=images, **changes)
    anew = Recomputation(recipe, small_data(IMAGES).train, recipe.random_windows())
    return list(anew.microbatches(0, step, range(anew.count)))


def ids_of(batches: list[Microbatch]) -> list[int]:
    return [int(image) for batch in batches for image in batch.image_ids]


@pytest.mark.parametrize(("images", "sizes"), [(1, [1]), (8, [8]), (9, [4, 5]), (45, [7, 8] * 3)])
def test_so_many_images_none_twice_in_microbatches_of_at_most_n(images: int, sizes: list[int]) -> None:
    batches = microbatches(images=images)
    ids = ids_of(batches)
    assert list(map(len, batches)) == sizes
    assert len(set(ids)) == images
    assert set(ids) <= set(range(IMAGES))


def test_as_many_as_there_are_are_all_of_them() -> None:
    assert sorted(ids_of(microbatches(images=IMAGES))) == list(range(IMAGES))


def test_every_recomputation_takes_others_and_so_does_every_seed() -> None:
    """45 of 150 at random: with the ones before they share some 13, in another order."""
    here = ids_of(microbatches())
    for others in (ids_of(microbatches(step=8)), ids_of(microbatches(seed=1))):
        assert 2 < len(set(here) & set(others)) < 27
    assert here == ids_of(microbatches())


def test_they_are_cut_as_in_training() -> None:
    """Of 1 to 4 fifths of the area of 8 × 8 pixels, mirrored or not, elsewhere in each recomputation."""
    windows = [batch.windows for batch in microbatches(images=IMAGES, crop_scale=(0.2, 0.8), flip=0.3)]
    area = np.concatenate([of.width * of.height for of in windows])
    assert 0.2 * 64 - 4 <= area.min() < 20
    assert 44 < area.max() <= 0.8 * 64 + 4
    (mirrored,) = zip(*(of.augmentations for of in windows), strict=True)
    assert 0.15 < np.concatenate([drawn.parameters for drawn in mirrored]).mean() < 0.45
    later = microbatches(step=8, images=IMAGES, crop_scale=(0.2, 0.8), flip=0.3)
    places = [
        {
            int(image): (x, y)
            for b in of
            for image, x, y in zip(b.image_ids, b.windows.x, b.windows.y, strict=True)
        }
        for of in (microbatches(images=IMAGES, crop_scale=(0.2, 0.8), flip=0.3), later)
    ]
    assert sum(places[0][image] == places[1][image] for image in range(IMAGES)) < IMAGES / 3


@pytest.mark.parametrize("images", [1, 9, 21])
def test_statistics_are_the_mean_over_images_of_those_of_a_plain_loop(images: int) -> None:
    """In microbatches of 4 and 5, the shorter one weighs less; at the size of evaluations, however small others are."""
    recipe = small_recipe(recompute_bn=images, progressive_size=(4,))
    trainer = Trainer(
        recipe, small_data(IMAGES), Solo(), device=torch.device("cpu"), threads=1, observer=SilentObserver()
    )
    trainer.model.train()
    plain = copy.deepcopy(trainer.model)
    for layer in batch_norms(plain):
        layer.momentum = 1.0
    trainer.state.step = 4
    trainer._recompute_statistics()
    trainer.state.statistics.publish(trainer.step)
    expected = [torch.zeros_like(of) for of in statistics(plain)]
    with trainer._loaders_of(8).open(microbatches(images=images)) as loader:
        for x, _ in loader:
            assert x.shape[2:] == (8, 8)
            plain(x.double())
            for total, of in zip(expected, statistics(plain), strict=True):
                total += of * len(x) / images
    for found, of in zip(statistics(trainer.model), expected, strict=True):
        assert torch.allclose(found, of, rtol=1e-12, atol=0)


def statistics(model: torch.nn.Module) -> list[torch.Tensor]:
    return [of for layer in batch_norms(model) for of in (layer.running_mean, layer.running_var)]  # type: ignore[misc]


class Watched(ArrayImages):
    """Tells which images are read."""

    def __init__(self, of: ArrayImages) -> None:
        self.__dict__.update(of.__dict__)
        self.seen: list[int] = []
        self._lock = threading.Lock()

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        with self._lock:
            self.seen += np.asarray(ids).tolist()
        return super().read(ids)


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_the_processes_share_them_and_all_get_the_same_statistics(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six microbatches on up to seven processes: the same bits, as it is a reproducible run."""
    recipe = small_recipe(recompute_bn=45, gpus=7, reproducible=True, precision="fp32")
    fresh = build_model("resnet8", 5, seed=0)
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))

    def run(world: World) -> tuple[list[int], list[int], list[torch.Tensor]]:
        data = small_data(IMAGES)
        train, val = Watched(data.train), Watched(data.val)  # type: ignore[arg-type]
        trainer = Trainer(
            recipe, Dataset("small", train, val), world, device=torch.device("cpu"), threads=1,
            observer=SilentObserver(),
        )  # fmt: skip
        trainer.model.train()
        trainer.state.step = 4
        trainer._recompute_statistics()
        trainer.state.statistics.publish(trainer.step)
        return train.seen, val.seen, statistics(trainer.model)

    images, validation, alone = run(Solo())
    assert (sorted(images), validation) == (sorted(ids_of(microbatches(gpus=7))), [])
    shared = together(processes, run)
    assert sorted(image for seen, _, _ in shared for image in seen) == sorted(images)
    for _, _, found in shared:
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
