"""Both loaders execute the same microbatches: same pixels, order, errors and ends."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from loader_cases import CPU, KINDS, BlobImages, as_levels, load, one_window, random_batches

from hvd_lb.data.images import ArrayImages
from hvd_lb.data.loading.contract import Loader, Preprocessing
from hvd_lb.data.loading.open import open_loader
from hvd_lb.errors import UserError
from hvd_lb.machine.placement import loader_threads
from hvd_lb.plan.augment import Microbatch
from hvd_lb.recipe import make_recipe
from hvd_lb.training.clock import StepClock


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flip", [False, True])
def test_a_window_of_the_tensor_size_is_cut_out_unchanged(kind, flip, make_photo, encode) -> None:
    picture = make_photo(60, 50)
    expected = np.asarray(picture)[7 : 7 + 32, 11 : 11 + 32].transpose(2, 0, 1)
    if flip:
        expected = expected[:, :, ::-1]
    decoded = ArrayImages(np.asarray(picture)[None], np.zeros(1), ["any"], "array")
    for images in (decoded, BlobImages([encode(picture, "PNG")], [(60, 50)])):
        (x,) = load(kind, images, [one_window([0], 11, 7, 32, flip)], as_levels(32))
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        np.testing.assert_allclose(x[0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_colours_are_normalised_per_channel(kind: str) -> None:
    level = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(1, 4, 4, 3)
    pixels = Preprocessing(4, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True)
    (x,) = load(
        kind, ArrayImages(level, np.zeros(1), ["any"], "array"), [one_window([0], 0, 0, 4, False)], pixels
    )
    expected = (level[0] / 255 - np.array(pixels.mean)) / np.array(pixels.std)
    np.testing.assert_allclose(x[0].numpy(), expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", ["PNG", "JPEG"])
def test_resized_pixels_are_those_of_torchvision(codec: str, make_photo, encode) -> None:
    sizes = [(500, 375), (333, 499), (64, 64), (30, 40), (900, 600), (20, 300)]
    images = BlobImages([encode(make_photo(*size), codec) for size in sizes], sizes)
    batches = random_batches(images, 3)
    for antialias in (False, True):
        for pixels in (
            as_levels(64, antialias),
            Preprocessing(48, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), antialias),
        ):
            ours, theirs = (torch.stack(load(kind, images, batches, pixels)) for kind in KINDS)
            assert torch.equal(ours, theirs)


def test_small_decoded_images_are_enlarged_alike() -> None:
    rng = np.random.default_rng(0)
    images = ArrayImages(rng.integers(0, 256, (16, 8, 8), dtype=np.uint8), np.zeros(16), ["any"], "grey")
    ours, theirs = (
        torch.stack(load(kind, images, random_batches(images, 4), as_levels(32))) for kind in KINDS
    )
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[:, :, 0], ours[:, :, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_order_labels_and_varying_sizes(kind: str) -> None:
    images = ArrayImages(
        np.arange(50, dtype=np.uint8).repeat(16).reshape(50, 4, 4), np.arange(50), ["any"] * 50, "n"
    )
    rng = np.random.default_rng(1)
    chosen = [rng.permutation(50)[: rng.integers(1, 9)].tolist() for _ in range(20)]
    batches = (one_window(ids, 0, 0, 4, False) for ids in chosen)
    with open_loader(kind, images, batches, as_levels(4), batch_size=8, device=CPU, threads=2) as loader:
        for ids, (x, y) in zip(chosen, loader, strict=True):
            assert y.dtype == torch.int64
            assert y.tolist() == ids
            assert x[:, 0, 0, 0].round().tolist() == ids
        with pytest.raises(StopIteration):
            next(loader)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_stay_valid_while_later_ones_are_made(kind: str) -> None:
    images = ArrayImages(
        np.arange(40, dtype=np.uint8).repeat(64).reshape(40, 8, 8), np.arange(40), ["any"] * 40, "n"
    )
    batches = [one_window([i], 0, 0, 8, False) for i in range(40)]
    with open_loader(kind, images, batches, as_levels(8), batch_size=1, device=CPU, threads=1) as loader:
        kept = list(loader)
    assert [int(x.mean().round()) for x, _ in kept] == list(range(40))


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_neither_on_the_start_nor_on_the_neighbours(kind: str, make_photo, encode) -> None:
    sizes = [(60, 40), (50, 70), (33, 44)]
    images = BlobImages([encode(make_photo(*size), "JPEG") for size in sizes], sizes)
    batches = random_batches(images, 6)
    whole, rest = load(kind, images, batches, as_levels(32)), load(kind, images, batches[4:], as_levels(32))
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    alone = Microbatch(np.array([1]), batches[-1].windows.single(1))
    assert torch.equal(load(kind, images, [alone], as_levels(32))[0][0], rest[-1][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"no image at all" * 9, b"\xff\xd8\xff\xe0" + bytes(3000), "cut off"])
def test_a_broken_image_is_named_after_the_good_batches(kind, content, make_photo, encode) -> None:
    sizes = [(60, 50)] * 4
    blobs = [encode(make_photo(*size, seed), "JPEG") for seed, size in enumerate(sizes)]
    broken = blobs[2][:700].tobytes() if content == "cut off" else content
    blobs[2] = np.frombuffer(broken, np.uint8)
    batches = [
        *(one_window([0, 1], 0, 0, 50, False) for _ in range(5)),
        one_window([3, 2, 1], 0, 0, 50, False),
    ]
    with open_loader(
        kind, BlobImages(blobs, sizes), batches, as_levels(16), batch_size=3, device=CPU, threads=2
    ) as loader:
        for _ in range(5):
            next(loader)
        with pytest.raises(UserError, match="^blob 2: cannot be decoded .*; repair or remove it$"):
            next(loader)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_changed_its_size_is_named(kind: str, make_photo, encode) -> None:
    images = BlobImages([encode(make_photo(20, 20), "PNG")], [(60, 50)])
    with pytest.raises(UserError, match="blob 0: is 20 x 20 pixels now, but was 60 x 50"):
        load(kind, images, [one_window([0], 0, 0, 50, False)], as_levels(16))


@pytest.mark.parametrize("kind", KINDS)
def test_reading_and_planning_errors_reach_the_consumer(kind: str) -> None:
    images = ArrayImages(np.zeros((4, 8, 8), np.uint8), np.zeros(4), ["any"], "array")

    def failing() -> Iterator[Microbatch]:
        yield one_window([0], 0, 0, 8, False)
        raise RuntimeError("the plan failed")

    def run(batches: Iterator[Microbatch]) -> Loader:
        return open_loader(kind, images, batches, as_levels(8), batch_size=2, device=CPU, threads=1)

    with run(failing()) as loader:
        next(loader)
        with pytest.raises(RuntimeError, match="the plan failed"):
            next(loader)
    for ids in ([], [0, 1, 2]):
        with (
            run(iter([one_window(ids, 0, 0, 8, False)])) as loader,
            pytest.raises(ValueError, match="expected 1 to 2"),
        ):
            next(loader)


@pytest.mark.parametrize("kind", KINDS)
def test_an_endless_stream_is_read_a_bounded_way_ahead_and_closed(kind: str) -> None:
    images = ArrayImages(np.zeros((4, 8, 8), np.uint8), np.zeros(4), ["any"], "array")
    taken = itertools.count()
    last = 0

    def endless() -> Iterator[Microbatch]:
        nonlocal last
        while True:
            last = next(taken)
            yield one_window([0], 0, 0, 8, False)

    before = threading.active_count()
    loader = open_loader(kind, images, endless(), as_levels(8), batch_size=1, device=CPU, threads=1)
    for _ in range(10):
        next(loader)
    time.sleep(0.2)
    assert last < 1000
    assert loader.wait_seconds > 0
    loader.close()
    loader.close()
    assert threading.active_count() <= before
    with pytest.raises(StopIteration):
        next(loader)


def test_a_dropped_loader_ends_its_threads() -> None:
    images = ArrayImages(np.zeros((4, 8, 8), np.uint8), np.zeros(4), ["any"], "array")
    before = threading.active_count()
    loader = open_loader(
        "torchvision",
        images,
        itertools.repeat(one_window([0], 0, 0, 8, False)),
        as_levels(8),
        batch_size=1,
        device=CPU,
        threads=1,
    )
    next(loader)
    del loader
    assert threading.active_count() <= before


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_may_end_with_its_loader_open(kind: str) -> None:
    program = f"""if True:
        import itertools, numpy as np, torch
        from hvd_lb.data.images import ArrayImages
        from hvd_lb.data.loading.open import Preprocessing, open_loader
        from hvd_lb.plan.augment import Microbatch, RandomWindows
        images = ArrayImages(np.zeros((4, 8, 8), np.uint8), np.zeros(4), ["any"], "array")
        windows = RandomWindows(0).windows(0, np.arange(4), images.widths, images.heights)
        loader = open_loader("{kind}", images, itertools.repeat(Microbatch(np.arange(4), windows)),
                             Preprocessing(8, (0, 0, 0), (1, 1, 1), True), batch_size=4, threads=1,
                             device=torch.device("cpu"))
        next(loader)
        raise SystemExit("the program's own end")
    """
    ended = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert (ended.returncode, ended.stderr) == (1, "the program's own end\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_on_a_gpu_are_those_of_the_cpu(kind: str, make_photo: Callable, encode: Callable) -> None:
    sizes = [(500, 375), (333, 499), (64, 64)]
    images = BlobImages([encode(make_photo(*size), "JPEG") for size in sizes], sizes)
    batches = random_batches(images, 8)
    cpu = load(kind, images, batches, as_levels(64))
    device = torch.device("cuda", 0)
    with open_loader(kind, images, batches, as_levels(64), batch_size=3, device=device, threads=2) as loader:
        for expected, (x, y) in zip(cpu, loader, strict=True):
            assert x.device == y.device == device
            difference = (x.cpu() - expected).abs()
            assert difference.mean() < 1
            assert y.tolist() == [0, 1, 2]


def test_threads_for_loading_are_the_recipes_else_a_share_of_the_cores() -> None:
    for values, threads in (
        ({}, 3),
        ({"reproducible": True}, 4),
        ({"loader_threads": 7}, 7),
        ({"loader_threads": 1, "reproducible": True}, 1),
    ):
        recipe = make_recipe(values)
        found = loader_threads(recipe.loader_threads, 3, 4, reproducible=recipe.reproducible)
        assert found == threads


class Counted:
    """Labels, each of which is 7; `asked` says how many microbatches' were asked for."""

    asked = 0

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        self.asked += 1
        return np.full(len(ids), 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefetch", [1, 5])
def test_so_many_microbatches_are_kept_ready(kind: str, prefetch: int) -> None:
    images = ArrayImages(np.zeros((1, 4, 4), np.uint8), np.zeros(1), ["any"], "black")
    images.labels = labels = Counted()
    batches = itertools.repeat(one_window([0], 0, 0, 4, False))
    with open_loader(
        kind, images, batches, as_levels(4), batch_size=1, device=CPU, threads=1, prefetch=prefetch
    ) as loader:
        next(loader)
        # One is out, and the thread that decodes holds one that has no place yet.
        expected, patience = 1 + prefetch + 1, time.monotonic() + 30
        while labels.asked < expected and time.monotonic() < patience:
            time.sleep(0.01)
        time.sleep(0.1)
        assert labels.asked == expected


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_threads_read_as_are_asked_for(kind: str, make_photo, encode) -> None:
    class Slow(BlobImages):
        readers: ClassVar[set[int]] = set()

        def read(self, ids: np.ndarray) -> list[np.ndarray]:
            self.readers.add(threading.get_ident())
            time.sleep(0.01)
            return super().read(ids)

    images = Slow([encode(make_photo(20, 20), "PNG")], [(20, 20)])
    batches = [one_window([0], 0, 0, 20, False)] * 100
    more = {"batch_size": 1, "device": CPU, "threads": 2}
    for read_threads in (1, 3, None):
        images.readers.clear()
        with open_loader(kind, images, batches, as_levels(8), read_threads=read_threads, **more) as loader:
            assert len(list(loader)) == 100
        assert len(images.readers) == read_threads or (read_threads is None and len(images.readers) > 3)
    with pytest.raises(ValueError, match="read_threads=0"):
        open_loader(kind, images, batches, as_levels(8), read_threads=0, **more)


@pytest.mark.slow
def test_the_share_of_waiting_is_that_of_the_slower_side() -> None:
    images = ArrayImages(np.zeros((1, 4, 4), np.uint8), np.zeros(1), ["any"], "black")

    def share(read_seconds: float, step_seconds: float) -> float:
        def batches() -> Iterator[Microbatch]:
            for _ in range(12):
                time.sleep(read_seconds)
                yield one_window([0], 0, 0, 4, False)

        with open_loader(
            "torchvision", images, batches(), as_levels(4), batch_size=1, device=CPU, threads=1
        ) as loader:
            next(loader)
            clock = StepClock(loader)
            for _ in loader:
                time.sleep(step_seconds)
            seconds, waited = clock.lap()
        return waited / seconds

    assert share(read_seconds=0.1, step_seconds=0) > 0.8
    assert share(read_seconds=0, step_seconds=0.1) < 0.2
    assert share(read_seconds=0.2, step_seconds=0.1) == pytest.approx(0.5, abs=0.2)


def test_the_clock_of_steps_leaves_out_what_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 3.0, 10.0, 12.0])
    monkeypatch.setattr("hvd_lb.training.clock.time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = StepClock(SimpleNamespace(wait_seconds=0.0))
    with clock.paused():
        pass
    assert clock.lap() == (5.0, 0.0)
