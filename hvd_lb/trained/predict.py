"""What a trained network sees in images that lie in files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hvd_lb import arithmetic
from hvd_lb.data.decoding.decode import check_header
from hvd_lb.data.decoding.stand_in import sizes
from hvd_lb.data.files.header import NO_HEADER, header_or_reason
from hvd_lb.data.files.kinds import EXTENSIONS, NOT_READ, is_ignored, why_not_read
from hvd_lb.data.files.reading import read_file
from hvd_lb.data.files.section import Section
from hvd_lb.data.images import Images
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Microbatch
from hvd_lb.report.text import printable
from hvd_lb.trained.weights import Trained
from hvd_lb.training.bad_images import BadImages
from hvd_lb.training.evaluation import open_loaders
from hvd_lb.world.solo import Solo


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, the first one first: (label, probability)."""

    image: str
    top: list[tuple[int, float]]


class ImageFiles:
    """Images in files, in this order; nothing is known of their classes. UserError for what is no image."""

    encoded = True

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self.classes = ["unknown"]
        self.labels = np.zeros(len(paths), np.int64)
        found = [header_or_reason(Section.of_bytes(read_file(str(path)).data)) for path in paths]
        headers = [NO_HEADER if isinstance(header, str) else header for header in found]
        self.widths = np.array([header.width for header in headers], np.int32)
        self.heights = np.array([header.height for header in headers], np.int32)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        return [read_file(str(self._paths[image_id])) for image_id in ids.tolist()]

    def name(self, image_id: int) -> str:
        return str(self._paths[image_id])

    def evidence(self, start: int, stop: int) -> tuple[bytes, bytes]:
        return b"", b""


def find_images(named: Sequence[Path]) -> list[Path]:
    """The files that are named, and those in folders that are, in order of their names. UserError for what is none."""
    found: list[Path] = []
    for path in named:
        if path.is_dir():
            inside = sorted(_inside(path, frozenset()))
            if not inside:
                raise UserError(f"{printable(str(path))}: holds no image files ({', '.join(EXTENSIONS)})")
            found += inside
        elif not path.exists():
            raise UserError(
                f"{printable(str(path))}: is not there; expected an image file, or a folder of them"
            )
        elif path.suffix.lower() not in EXTENSIONS:
            raise _not_read(path)
        else:
            found.append(path)
    return found


def _inside(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """Images at any depth, as a class folder has them: links are followed, but not into a folder around them; names
    that are hidden or of systems are left out. UserError for images that are not read.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{printable(str(folder))}: cannot be listed ({error.strerror})") from error
    for path in entries:
        if is_ignored(path.name):
            continue
        if path.is_dir():
            yield from _inside(path, above | {real})
        elif path.suffix.lower() in EXTENSIONS:
            if not path.exists():
                raise UserError(f"{printable(str(path))}: leads to nothing; remove the link")
            yield path
        elif path.suffix.lower() in NOT_READ:
            raise _not_read(path)


def _not_read(path: Path) -> UserError:
    return UserError(f"{printable(str(path))}: {why_not_read(path.name)} ({', '.join(EXTENSIONS)} are read)")


def predict(
    trained: Trained, images: Images, top: int, *, device: torch.device, threads: int
) -> Iterator[Prediction]:
    """The `top` likeliest classes of each image, cut and scaled as in evaluations. UserError for one that is broken."""
    recipe = trained.recipe
    for position in range(len(images)):
        if not images.widths[position]:  # told before any work
            check_header(images, position, images.read(np.array([position]))[0], recipe.max_pixels)
    # One broken file is an error here, whatever the run did with those of its data.
    strict = BadImages(Solo(), False, 0.0, lambda records: None)
    loaders = open_loaders(recipe, images, recipe.evaluation_size, device, threads, strict)
    windows, size = recipe.centre_windows(), recipe.per_gpu_batch
    batches = (np.arange(start, min(start + size, len(images))) for start in range(0, len(images), size))
    model, dtype, layout = trained.network(device), arithmetic.dtype(recipe), arithmetic.memory_format(recipe)
    done = 0
    with (
        torch.no_grad(),
        arithmetic.kernels(recipe),
        loaders.open(Microbatch(ids, windows.windows(*sizes(images, ids))) for ids in batches) as loader,
    ):
        for x, _ in loader:
            with arithmetic.autocast(recipe, device):
                logits = model(x.to(dtype, memory_format=layout))
            likeliest = logits.double().softmax(1).topk(min(top, logits.shape[1]))
            for labels, shares in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
                yield Prediction(images.name(done), list(zip(labels, shares, strict=True)))
                done += 1
