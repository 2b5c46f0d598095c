"""A step that was replayed, as files: pictures, tensors, gradients, and the loss of each image."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hvd_lb.errors import UserError
from hvd_lb.replay.watched_step import StepSeen
from hvd_lb.report.run_directory import replace_text, strict_json
from hvd_lb.training.checkpoint import save_tensors
from hvd_lb.training.trainer import Trainer

_KEPT_APART = ("images", "gradients", "own_gradients")


def check_folder(folder: Path) -> None:
    """UserError where it is there and not empty, or it is plain that it cannot be made or written into."""
    there = next(of for of in (folder.absolute(), *folder.absolute().parents) if of.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder} cannot be written ({there} may not be written into): choose another folder"
        )
    if not there.is_dir() and there != folder.absolute():
        raise UserError(f"{folder} cannot be written ({there} is a file): choose another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give a new or an empty folder for what is replayed")


def write_step(folder: Path, trainer: Trainer, seen: StepSeen, figures: dict[str, Any]) -> list[Path]:
    """Writes into a folder, which is made; the paths. Microbatches are loaded anew: they depend on no weight.

    step.json: `figures` and those of the step; images.jsonl: each image, the worst first; pictures/ and
    microbatch.safetensors, `images` float32 (b, 3, S, S) as the network got them, `labels`, `image_ids` and `workers`
    int64 (b,); gradients.safetensors: the step's mean gradient, and with one worker own-gradients.safetensors.
    """
    check_folder(folder)
    (folder / "pictures").mkdir(parents=True)
    parts = [_load(trainer, seen.step, worker) for worker in _workers(trainer, seen)]
    for part in parts:
        _draw(folder / "pictures", trainer, part)
    tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
    save_tensors(tensors, folder / "microbatch.safetensors", {})
    _save(seen.gradients, folder / "gradients.safetensors")
    if seen.own_gradients:
        _save(seen.own_gradients, folder / "own-gradients.safetensors")
    worst_first = sorted(seen.images, key=lambda image: -image.loss)
    lines = [strict_json(asdict(image)) for image in worst_first]
    replace_text(folder / "images.jsonl", "".join(f"{line}\n" for line in lines))
    step = {
        name: value for name, value in vars(seen).items() if name not in _KEPT_APART and value is not None
    }
    replace_text(folder / "step.json", strict_json({**figures, **step}, indent=1) + "\n")
    return sorted(path for path in folder.iterdir())


def _workers(trainer: Trainer, seen: StepSeen) -> list[int]:
    if seen.worker is not None:
        return [seen.worker]
    return trainer.run_plan.at(seen.step).with_images()


def _load(trainer: Trainer, step: int, worker: int) -> dict[str, Tensor]:
    microbatch = trainer.microbatch(step, worker)
    with trainer.loaders_at(step).open([microbatch]) as loader:
        images, labels = next(loader)
    images, _ = trainer.forward.mixing(images, labels, step, worker)
    return {
        "images": images.cpu(),
        "labels": labels.cpu(),
        "image_ids": torch.from_numpy(np.asarray(microbatch.image_ids, np.int64)),
        "workers": torch.full((len(labels),), worker),
    }


def _draw(folder: Path, trainer: Trainer, part: dict[str, Tensor]) -> None:
    """What the network saw: its normalised colours as 0 to 255 again."""
    mean, std = (torch.tensor(colour).view(3, 1, 1) for colour in (trainer.recipe.mean, trainer.recipe.std))
    for position, image in enumerate(part["images"]):
        levels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        worker = int(part["workers"][position])
        name = f"worker-{worker:04d}-{position:04d}-image-{int(part['image_ids'][position])}.png"
        Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()).save(folder / name)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file, {})
