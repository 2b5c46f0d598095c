"""A cache of decoded images: the same tensors, each image decoded once, whoever is killed; no room is one line."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_cases import CPU, KINDS, as_levels, random_batches

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.decoding.decode import BadImage
from hvd_lb.data.decoding.stand_in import StandIn
from hvd_lb.data.images import Dataset, Images
from hvd_lb.data.loading import shared_file
from hvd_lb.data.loading import shared_pixels as cache
from hvd_lb.data.loading.open import open_loader
from hvd_lb.data.loading.shared_pixels import CachedImages, cached, shared
from hvd_lb.errors import UserError
from hvd_lb.recipe import make_recipe

SIZE = 24

HELPERS = [str(folder) for folder in Path(__file__).parents[:2]]  # this module and those that it imports


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(cache, "MEMORY", folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(tmp_path / "data")


def tensors(kind: str, images: Images, count: int = 2) -> list[torch.Tensor]:
    batches = random_batches(images, count)
    with open_loader(
        kind, images, batches, as_levels(SIZE), batch_size=len(images), device=CPU, threads=2
    ) as loader:
        return [x.clone() for x, _ in loader]


def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each image that is decoded for the cache."""
    seen: list[str] = []
    decode = cache.decode_image

    def counted(images: Images, image_id: int, content: np.ndarray) -> np.ndarray:
        seen.append(images.name(image_id))
        return decode(images, image_id, content)

    monkeypatch.setattr(cache, "decode_image", counted)
    return seen


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_the_same_and_each_image_is_decoded_once(kind, where, folder, monkeypatch) -> None:
    dataset = open_dataset(str(folder))
    opened, _ = cached(dataset, where, "run")
    seen = decodes(monkeypatch)
    for plain, kept in ((dataset.train, opened.train), (dataset.val, opened.val)):
        expected = tensors(kind, plain, 3)
        for found in (tensors(kind, kept, 3), tensors(kind, kept, 3)):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(seen) == len(set(seen)) == len(dataset.train) + len(dataset.val)
    assert opened.fingerprint() == dataset.fingerprint()


def test_pixels_on_disk_outlast_the_run_and_those_of_changed_data_are_removed(folder, monkeypatch) -> None:
    def run() -> Path:
        opened, file = cached(open_dataset(str(folder)), "disk", "run")
        tensors("dali", opened.train)
        return file.path

    seen = decodes(monkeypatch)
    first = run()
    decoded = len(seen)
    assert run() == first
    assert len(seen) == decoded
    shutil.copy(folder / "train" / "ant" / "0.png", folder / "train" / "ant" / "10.png")
    second = run()
    assert second != first
    assert len(seen) == 2 * decoded + 1
    assert list(second.parent.iterdir()) == [second]


def test_pixels_on_disk_are_those_of_the_present_decoder(folder, monkeypatch) -> None:
    def run() -> Path:
        return cached(open_dataset(str(folder)), "disk", "run")[1].path

    first = run()
    version = cache.features.version
    monkeypatch.setattr(cache.features, "version", lambda name: f"{version(name)}.1")
    second = run()
    assert second != first
    monkeypatch.setattr(cache.inspect, "getsource", lambda module: "other rules")  # hvd-lb's own
    assert run() not in (first, second)


def _fill(folder: str, memory: str, share: int, of: int, kind: str) -> None:
    cache.MEMORY = Path(memory)
    opened, _ = cached(open_dataset(folder), kind, "run")
    for image_id in range(share, len(opened.train), of):
        opened.train.read(np.array([image_id]))


@pytest.mark.slow
def test_processes_share_what_each_has_decoded(folder, memory, monkeypatch) -> None:
    dataset = open_dataset(str(folder))
    opened, _ = cached(dataset, "memory", "run")
    spawn = multiprocessing.get_context("spawn")
    others = [
        spawn.Process(target=_fill, args=(str(folder), str(memory), share, 2, "memory")) for share in (0, 1)
    ]
    for other in others:
        other.start()
    for other in others:
        other.join()
        assert other.exitcode == 0
    seen = decodes(monkeypatch)
    expected = tensors("torchvision", dataset.train)
    found = tensors("torchvision", opened.train)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert seen == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_a_name_is_there_for_those_who_come_later(kind, folder, memory, monkeypatch) -> None:
    """As long as somebody holds it; all of it belongs to who comes first, and the next one decodes nothing."""
    dataset = open_dataset(str(folder))
    held = os.memfd_create("held")
    try:
        first = shared(dataset, "memory", "torchvision", "cpu", held)
        expected = tensors(kind, dataset.train)
        assert all(torch.equal(a, b) for a, b in zip(expected, tensors(kind, first.train), strict=True))
        size = os.fstat(held).st_size
        assert size
        del first  # as if killed
        seen = decodes(monkeypatch)
        second = shared(dataset, "memory", "torchvision", "cpu", held)
        assert all(torch.equal(a, b) for a, b in zip(expected, tensors(kind, second.train), strict=True))
        assert os.fstat(held).st_size == size
        assert not seen
        assert not list(memory.iterdir())
    finally:
        os.close(held)


def test_a_writer_that_was_killed_leaves_no_half_image(folder, memory, monkeypatch) -> None:
    """Images of noise, so that half of one is no checksum of the whole; the mark is written before the end of them."""
    dataset = open_dataset(str(folder))
    opened, _ = cached(dataset, "memory", "run")
    whole = dataset.train.read(np.array([0]))
    pixels = opened.train._pixels
    decoded = opened.train.read(np.array([0]))[0].copy()
    assert whole
    pixels._place(0)[decoded.shape[0] // 2 :] = 0  # the rest did not come
    pixels._checked[:] = False  # as another process sees it
    assert pixels.get(0) is None
    seen = decodes(monkeypatch)
    assert np.array_equal(opened.train.read(np.array([0]))[0], decoded)
    assert len(seen) == 1


@pytest.mark.slow
def test_fillers_that_are_killed_again_and_again(folder, tmp_path) -> None:
    """At any moment, also while the file is made; the next one goes on, and all pixels are right in the end."""
    code = (
        "import sys; sys.path[:0] = sys.argv[3:]; from test_shared_pixels import _fill\n"
        "print('ready', flush=True); _fill(sys.argv[1], sys.argv[2], 0, 1, 'disk')"
    )
    for pause in (0.0, 0.002, 0.01, 0.03):
        filler = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(tmp_path), *HELPERS],
            stdout=subprocess.PIPE,
        )
        assert filler.stdout
        filler.stdout.readline()
        time.sleep(pause)
        filler.send_signal(signal.SIGKILL)
        filler.communicate()
    dataset = open_dataset(str(folder))
    opened, _ = cached(dataset, "disk", "run")
    expected, found = tensors("torchvision", dataset.train), tensors("torchvision", opened.train)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_nothing_is_left_in_memory(folder, memory) -> None:
    """The name goes when all processes have come; a killed run's goes at the next start, a living one's does not."""
    recipe = make_recipe({"cache": "memory"})
    dataset = open_dataset(str(folder))
    first, file = cached(dataset, "memory", "another run")
    there: list[int] = []
    opened = shared(
        dataset, recipe.cache, recipe.loader, "cpu", "run", lambda: there.append(len(list(memory.iterdir())))
    )
    assert there == [2]
    assert list(memory.iterdir()) == [file.path]
    tensors("dali", opened.train)
    tensors("dali", first.train)
    del first, file  # without a word, as if killed
    shared(dataset, recipe.cache, recipe.loader, "cpu", "run", lambda: None)
    assert list(memory.iterdir()) == []


def test_no_room_is_one_line_before_anything_is_decoded(folder, memory, monkeypatch) -> None:
    dataset = open_dataset(str(folder))
    needed = 8 * (len(dataset.train) + len(dataset.val)) + sum(
        int(3 * (of.widths.astype(np.int64) * of.heights).sum()) for of in (dataset.train, dataset.val)
    )
    free = shutil.disk_usage(memory)._replace(free=5000)
    monkeypatch.setattr(shared_file.shutil, "disk_usage", lambda path: free)
    for where in ("memory", "disk"):
        with pytest.raises(
            UserError, match=rf"need {needed:,} bytes and there are 5,000; leave --cache out$"
        ):
            cached(dataset, where, "run")
    assert list(memory.iterdir()) == []
    monkeypatch.setattr(shared_file, "available_memory", lambda: 4000)
    held = os.memfd_create("held")
    with pytest.raises(UserError, match=rf"^memory: .* need {needed:,} bytes and there are 4,000; leave"):
        cached(dataset, "memory", held)
    assert os.fstat(held).st_size == 0
    os.close(held)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_small_dev_shm_refuses(folder, tmp_path, monkeypatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", small], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        monkeypatch.setattr(cache, "MEMORY", small)
        with pytest.raises(UserError, match="there are 8,192; leave --cache out"):
            cached(open_dataset(str(folder)), "memory", "run")
        # Whoever took the room after it was looked at.
        monkeypatch.setattr(shared_file.shutil, "disk_usage", lambda path: _Room(1 << 40))
        with pytest.raises(UserError, match="leave --cache out"):
            cached(open_dataset(str(folder)), "memory", "run")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


class _Room:
    def __init__(self, free: int) -> None:
        self.free = free


def test_what_a_cache_cannot_serve_is_refused(folder) -> None:
    recipe = make_recipe({"cache": "memory"})
    with pytest.raises(UserError, match="need no decoding; leave the option out"):
        shared(open_dataset("digits"), recipe.cache, recipe.loader, "cpu", "run", lambda: None)
    with pytest.raises(UserError, match="give --loader torchvision"):
        shared(open_dataset(str(folder)), recipe.cache, recipe.loader, "cuda", "run", lambda: None)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_images_stay_bad(kind, folder) -> None:
    broken = folder / "train" / "ant" / "1.JPEG"
    broken.write_bytes(broken.read_bytes()[:-40])
    dataset = open_dataset(str(folder))
    opened, _ = cached(dataset, "memory", "run")
    bad = next(i for i in range(len(dataset.train)) if dataset.train.name(i) == str(broken))
    for _ in range(2):
        with pytest.raises(BadImage, match=r"1\.JPEG"):
            opened.train.read(np.array([bad]))
        with pytest.raises(BadImage, match=r"1\.JPEG"):
            tensors(kind, opened.train)
    expected, found = ([*_with_stand_ins(kind, of.train)] for of in (dataset, opened))
    assert torch.equal(expected[0][0], found[0][0])
    assert [of.image for of in found[0][1]] == [of.image for of in expected[0][1]] == [bad]


def _with_stand_ins(kind: str, images: Images) -> Iterator[tuple[torch.Tensor, list[StandIn]]]:
    from dataclasses import replace

    from hvd_lb.plan.augment import RandomWindows

    def draw(ids: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> object:
        return RandomWindows(0).windows(0, ids, widths, heights)

    batches = [replace(batch, draw=draw) for batch in random_batches(images, 1)]
    told: list[StandIn] = []
    with open_loader(
        kind,
        images,
        batches,
        as_levels(SIZE),
        batch_size=len(images),
        device=CPU,
        threads=2,
        on_stand_ins=told.extend,
    ) as loader:
        for x, _ in loader:
            yield x.clone(), list(told)


def test_max_pixels_counts_for_what_was_cached_before(folder) -> None:
    opened, _ = cached(open_dataset(str(folder)), "memory", "run")
    assert isinstance(opened, Dataset)
    assert isinstance(opened.train, CachedImages)
    largest = int(np.argmax(opened.train.widths))
    assert opened.train.decoded(largest).shape[2] == 3
    with pytest.raises(BadImage, match="max-pixels"):
        opened.train.decoded(largest, max_pixels=600)
