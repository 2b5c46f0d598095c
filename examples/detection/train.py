"""Trains Mask R-CNN with k virtual workers of two pictures, on any number of processes (section 5.4 of the paper).

    python examples/detection/train.py garments --backbone runs/backbone --workers 8 --output runs/detector
    horovodrun -np 2 python examples/detection/train.py …
    torchrun --nproc-per-node 2 examples/detection/train.py …

garments.py makes the pictures. The learning rate follows the linear rule from that of one worker, which is also that of
the constant warmup. With --reproducible any number of processes ends with the same bits.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from coco import Pictures, average_precision, found_in
from network import mask_rcnn
from safetensors.torch import save_model
from torchvision.models.detection import MaskRCNN

import hvd_lb as lb
from hvd_lb.plan.counter import generator_seed
from hvd_lb.plan.hosting import hosted
from hvd_lb.plan.samples import SamplePlan

PER_WORKER = 2


def main() -> None:
    options = arguments()
    world = lb.init()
    if world.size > options.workers:
        raise SystemExit(
            f"{world.size} processes for {options.workers} virtual workers: give at most as many"
        )
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(options.reproducible)
    pictures = Pictures(options.data, "train")
    plan = SamplePlan(len(pictures), options.workers, PER_WORKER, options.seed)
    torch.manual_seed(options.seed)
    model = mask_rcnn(options.backbone, len(pictures.categories), pictures.side).train()
    schedule = lb.Schedule(
        options.learning_rate,
        global_batch=PER_WORKER * plan.workers,
        reference_batch=PER_WORKER,  # the rate is for one worker, as in the paper's Table 3b
        steps_per_epoch=plan.steps_per_epoch,
        epochs=options.epochs,
        warmup="constant",
        warmup_epochs=options.warmup_epochs,
        drop_epochs=(60, 80),
    )
    sgd = lb.SGD(lb.parameter_groups(model, weight_decay=1e-4), nesterov=False)
    terms = plan.workers if options.reproducible else None
    opt = lb.DistributedOptimizer(sgd, model, schedule=schedule, reproducible_terms=terms)
    own = hosted(world.rank, world.size, plan.workers)
    end = min(options.steps or schedule.total_steps, schedule.total_steps)
    began = time.monotonic()
    while opt.steps < end:
        epoch, step = divmod(opt.steps, plan.steps_per_epoch)
        loss = 0.0
        for worker in own:
            indices = plan.image_ids(epoch, step, worker)
            # Torchvision draws proposals to learn from: as this worker would, whoever computes it.
            torch.manual_seed(generator_seed(options.seed, epoch, step, worker))
            losses = model(*pictures.augmented(indices, options.seed, epoch))
            mean = sum(losses.values())
            loss += mean.item() / len(own)
            opt.backward(mean * len(indices), last=worker == own[-1])
        try:
            opt.step(global_images=plan.step_images(step))
        except lb.FixedPointOverflow:  # with --reproducible: the scales fit now
            continue
        if world.rank == 0 and (opt.steps % plan.steps_per_epoch == 0 or opt.steps == end):
            rate, seconds = schedule(opt.steps - 1), time.monotonic() - began
            print(f"epoch {epoch}: loss {loss:.3f}, learning rate {rate:g}, {seconds:.0f} s", flush=True)
    if world.rank == 0:
        options.output.mkdir(parents=True, exist_ok=True)
        save_model(model, str(options.output / "model.safetensors"))
        if options.evaluate:
            figures = evaluate(model, Pictures(options.data, "val"))
            told = {"workers": plan.workers, "seed": options.seed, "steps": opt.steps, **figures}
            (options.output / "result.json").write_text(json.dumps(told, indent=1) + "\n")
            print(f"box AP {figures['box_ap']:.1f}, mask AP {figures['mask_ap']:.1f}")
    world.barrier()
    lb.shutdown()


def evaluate(model: MaskRCNN, pictures: Pictures) -> dict[str, float]:
    """Average precision on these pictures, in per cent."""
    model.eval()
    found = []
    with torch.no_grad():
        for index, image_id in enumerate(pictures.ids):
            (output,) = model([pictures[index][0]])
            found += found_in(image_id, output, pictures.categories)
    return average_precision(pictures.annotations, found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="what garments.py has made")
    parser.add_argument("--backbone", type=Path, required=True, help="run or model.safetensors of hvd-lb")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="virtual workers k, of two pictures each [1]")
    parser.add_argument("--learning-rate", type=float, default=0.0025, help="of one worker [0.0025]")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--warmup-epochs", type=float, default=0.5)
    parser.add_argument("--steps", type=int, help="end after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reproducible", action="store_true")
    parser.add_argument("--evaluate", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
