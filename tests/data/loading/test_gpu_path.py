"""What loaders do on GPUs: the same pixels in the network's layout; on the CPU as far as it can be tried there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from broken import good_file
from devices import DEVICES
from loader_cases import CPU, KINDS, BlobImages, as_levels, load, random_batches

from hvd_lb.data.decoding.stand_in import sizes
from hvd_lb.data.loading import dali
from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.device import loading_stream
from hvd_lb.data.loading.open import Loaders
from hvd_lb.data.loading.torchvision import on_device
from hvd_lb.plan.augment import Microbatch, Origin, RandomWindows

SIZES = [(500, 375), (333, 499), (64, 64), (97, 61), (301, 299), (128, 512)]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def photos(make_photo: Callable[..., Any], encode: Callable[..., Any]) -> BlobImages:
    files = [encode(make_photo(*size, number), "JPEG") for number, size in enumerate(SIZES)]
    return BlobImages(files, SIZES)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_pipeline_of_gpus_gives_the_pixels_of_cpus(
    photos: BlobImages, memory_format: torch.memory_format
) -> None:
    """Run on the CPU: its resizing has other arithmetic (mean 0.12 levels, most 7 when this was written)."""
    (batch,) = random_batches(photos, 1)
    pixels = Preprocessing(64, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), True)
    levels = torch.tensor(pixels.std).view(3, 1, 1) * 255
    (expected,) = load("torchvision", photos, [batch], pixels)
    windows = batch.windows
    inputs = (
        photos.blobs,
        np.stack([windows.x, windows.y], axis=1),
        np.stack([windows.width, windows.height], axis=1),
    )
    with dali.Pipeline(len(SIZES), 1, None, exec_dynamic=True) as pipeline:
        data, anchor, shape = dali.fn.external_source(source=lambda: inputs, num_outputs=3, batch=True)
        pipeline.set_outputs(dali._finished(dali._windows(data, anchor, shape, True, False), pixels))
    x = windows.augmented_batch(dali._own(pipeline.run()[0], memory_format))
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=memory_format)
    difference = (x - expected).abs() * levels
    assert difference.mean() < 0.5
    assert difference.max() < 24


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("device", DEVICES)
def test_normalising_on_the_device_is_normalising_on_the_cpu(
    device: torch.device, memory_format: torch.memory_format, photos: BlobImages
) -> None:
    (batch,) = random_batches(photos, 1)
    pixels = Preprocessing(48, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), True)
    (expected,) = load("torchvision", photos, [batch], pixels)
    windows = batch.windows
    decoded = load_windows(photos, batch)
    with ThreadPoolExecutor(2) as pool:
        x = on_device(pixels, device, pool, memory_format)(decoded, windows)
    assert x.device == device
    assert x.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=1e-6)


def load_windows(images: BlobImages, batch: Microbatch) -> list[np.ndarray]:
    from hvd_lb.data.decoding.decode import decode_image

    found = []
    for position, image_id in enumerate(batch.image_ids.tolist()):
        whole = decode_image(images, image_id, images.blobs[image_id])
        windows = batch.windows
        x, y = int(windows.x[position]), int(windows.y[position])
        found.append(whole[y : y + int(windows.height[position]), x : x + int(windows.width[position])])
    return found


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_broken_images_are_replaced_in_loaders_one_after_another(
    device: torch.device, kind: Any, memory_format: torch.memory_format
) -> None:
    """Cut short, without content, and refused late by what decodes; in several microbatches, so that one is ahead."""
    broken = {1: good_file("JPEG", 1)[:300], 4: b"", 7: good_file("PNG", 7)[:-30]}
    blobs = [
        np.frombuffer(broken.get(n, good_file("JPEG" if n % 2 else "PNG", n)), np.uint8) for n in range(10)
    ]
    images = BlobImages(blobs, [(40 + n % 7, 40 - n % 5) for n in range(10)])
    drawn = RandomWindows(seed=3)

    def draw(ids: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> Any:
        return drawn.windows(5, ids, widths, heights)

    def batch(*ids: int) -> Microbatch:
        chosen = np.array(ids)
        return Microbatch(chosen, draw(chosen, *sizes(images, chosen)), Origin("train", 5, 0, 0), draw)

    batches = [batch(0, 2), batch(3, 1, 4), batch(5, 6), batch(7), batch(8, 9)]
    replaced = [batch(0, 2), batch(3, 2, 5), batch(5, 6), batch(8), batch(8, 9)]
    expected = load("torchvision", images, replaced, as_levels(24))
    told: list[Any] = []
    loaders = Loaders(
        kind, images, as_levels(24), batch_size=3, device=device, threads=2, memory_format=memory_format,
        on_stand_ins=told.extend,
    )  # fmt: skip
    for _ in range(2):
        with loaders.open(batches) as loader:
            for (x, y), right, of in zip(loader, expected, replaced, strict=True):
                assert y.tolist() == of.image_ids.tolist()
                assert x.is_contiguous(memory_format=memory_format) or device == CPU
                assert (x.cpu() - right).abs().mean() < (1 if device.type == "cuda" else 1e-6)
    assert [of.image for of in told] == [1, 4, 7] * 2


@pytest.mark.parametrize("device", [device for device in DEVICES if device.id == "cuda"])
def test_loaders_of_a_device_share_a_stream(device: torch.device) -> None:
    assert loading_stream(device) is loading_stream(torch.device("cuda", 0))
    assert loading_stream(device) != torch.cuda.default_stream(device)
