"""One GPU: is it right, how fast is it, and against whom. Everything of hvd-lb that only a GPU can tell.

    python benchmarks/gpu.py [--device cuda] [--rows tests,steps,...] [--minutes 8] [--output gpu.json]

Rows run in processes of their own, most valuable first, so that a failure ends one of them, and one that takes too long
leaves time for the others; the results are written as JSON after every row. After `--minutes` it ends. Peers (a bare
torch loop of the same network and batch, torchvision's DataLoader) are measured in
the same process, in turns. `--device cpu --small` runs all of it in small, to find mistakes before a GPU is paid for.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from limited import file_to_write, minutes, names_of, run_limited
from loader import MEAN, STD, make_jpegs, microbatches
from torch import Tensor

import hvd_lb as lb
from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.kernels.batch_norm import proved_batch_norm
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer

Step = Callable[[], object]
Make = Callable[[], Step]
Row = Callable[["Bench"], Iterator[dict[str, Any]]]


class Bench:
    """The device, and how large everything is."""

    def __init__(self, device: str, small: bool):
        self.device, self.small = torch.device(device), small
        self.model, self.pixels = ("resnet8", 32) if small else ("resnet50", 224)
        self.warm_up, self.turns, self.steps = (1, 2, 1) if small else (1, 3, 6)
        # A batch that fills a GPU; a virtual worker's n is 32 in the paper.
        self.large = 64 if small else 256

    def trainer(self, gpus: int, images: int, world: Any = None, **changes: Any) -> Trainer:
        """A trainer whose batches are given to it; its data are never read."""
        labels = np.arange(16_384) % 1000
        nothing = ArrayImages(np.zeros((16_384, 8, 8), np.uint8), labels, [str(i) for i in range(1000)], "-")
        values = {"model": self.model, "image_size": self.pixels, "learning_rate": 1e-4, **changes}
        if self.device.type == "cuda":  # an error where that cannot be
            values.setdefault("cuda_graphs", "on")
        made = Trainer(
            Recipe(gpus=gpus, per_gpu_batch=images, **values), Dataset("-", nothing, nothing),
            world or lb.current(), device=self.device, threads=4, observer=SilentObserver(),
        )  # fmt: skip
        made.model.train()
        return made

    def batches(self, images: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(0)
        return [
            (
                torch.randn(images, 3, self.pixels, self.pixels, device=self.device),
                torch.randint(0, 1000, (images,), device=self.device),
            )
            for _ in range(count)
        ]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def take_turns(self, sides: dict[str, Step], warm_up: int | None = None) -> dict[str, float]:
        """Median milliseconds of a step of each side; one that fails is taken out of `sides`, and told."""
        warm_up = self.warm_up if warm_up is None else warm_up
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(warm_up + self.turns):
            for name, run in list(sides.items()):
                self.wait()
                began = time.perf_counter()
                try:
                    for _ in range(self.steps):
                        run()
                    self.wait()
                except Exception as error:
                    tell_failure(name, error)
                    del sides[name], times[name]
                    continue
                if turn >= warm_up:
                    times[name].append(1000 * (time.perf_counter() - began) / self.steps)
        return {name: statistics.median(values) for name, values in times.items()}

    def make_one_by_one(self, makers: dict[str, Make]) -> tuple[dict[str, Step], dict[str, float]]:
        """The sides, after their first steps, and GiB that each had at most, from being made to the end of these.

        Batches that lie ready are not in it. What others before it hold meanwhile does not change, and is taken off;
        a graph's memory is counted while it is recorded, as a replayed one does not allocate.
        """
        on_gpu = self.device.type == "cuda"
        sides, peaks = dict[str, Step](), dict[str, float]()
        for name, make in makers.items():
            gc.collect()
            if on_gpu:
                self.wait()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if on_gpu else 0
            try:
                run = make()
                for _ in range(self.warm_up * self.steps):
                    run()
                self.wait()
            except Exception as error:
                tell_failure(name, error)
                continue
            sides[name] = run
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else 0.0
        return sides, peaks


def tell_failure(side: str, error: Exception) -> None:
    print(json.dumps({"side": side, "error": f"{type(error).__name__}: {error}"}), flush=True)


def whole_step(made: Trainer, ready: list[tuple[Tensor, Tensor]]) -> Step:
    endless = itertools.cycle(ready)

    def step() -> None:
        with made.kernels():
            made.train_step(endless)

    return step


def our_step(
    bench: Bench,
    ready: list[tuple[Tensor, Tensor]],
    workers: int,
    images: int,
    own_batch_norm: bool = True,
    **changes: Any,
) -> Step:
    trainer = bench.trainer(workers, images, **changes)
    if not own_batch_norm:
        trainer.forward.group.batch_norm = None
    return whole_step(trainer, ready)


def autocast(bench: Bench, precision: str) -> Any:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(bench.device.type, dtype=dtype, enabled=dtype is not None)


def bare_step(
    bench: Bench,
    ready: Iterable[tuple[Tensor, Tensor]],
    precision: str,
    channels_last: bool,
    microbatches: int = 1,
    **options: Any,
) -> Step:
    """Forward, backward and torch's SGD: what anybody would write for one GPU. A list begins again at its end."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = build_model(bench.model, 1000, seed=0).to(bench.device).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(lb.parameter_groups(network), 1e-4, 0.9, nesterov=True, **options)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=precision == "fp16")
    endless = itertools.cycle(ready) if isinstance(ready, list) else iter(ready)

    def step() -> None:
        tf32 = precision == "tf32"
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            optimizer.zero_grad(set_to_none=True)
            for x, y in itertools.islice(endless, microbatches):
                with autocast(bench, precision):
                    loss = F.cross_entropy(network(x.to(memory_format=layout)), y) / microbatches
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return step


def reference_step(bench: Bench, ready: list[tuple[Tensor, Tensor]], amp: bool) -> Step:
    """What a step of torchvision's references/classification/train.py does by default, or with --amp: contiguous
    memory, torch's own choice of arithmetic (TF32 in convolutions) and of SGD; loss and errors are read each time.
    """
    network = build_model(bench.model, 1000, seed=0).to(bench.device).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, 0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=amp)
    endless = itertools.cycle(ready)

    def step() -> tuple[float, ...]:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            torch.backends.cuda.matmul.allow_tf32 = False
            x, y = next(endless)
            with torch.autocast(bench.device.type, torch.float16, enabled=amp):
                output = network(x)
                loss = F.cross_entropy(output, y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            with torch.inference_mode():
                right = output.topk(5).indices == y[:, None]
                return loss.item(), right[:, 0].float().mean().item(), right.any(1).float().mean().item()

    return step


def graphed_step(bench: Bench, ready: list[tuple[Tensor, Tensor]]) -> Step:
    """The bare bf16 loop as one CUDA graph: the least that launching can cost."""
    network = build_model(bench.model, 1000, seed=0).to(bench.device).to(memory_format=torch.channels_last)
    network.train()
    optimizer = torch.optim.SGD(lb.parameter_groups(network), 1e-4, 0.9, nesterov=True, foreach=True)
    x, y = (tensor.clone() for tensor in ready[0])
    x = x.to(memory_format=torch.channels_last)

    def one() -> None:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()

    torch.backends.cudnn.benchmark = True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()
    return lambda kept=(x, y, network, optimizer): graph.replay()  # the graph holds their memory, not them


# Rows


def doctor(bench: Bench) -> Iterator[dict[str, Any]]:
    """What this machine has and lacks."""
    from hvd_lb.doctor.examine import examine

    yield from map(asdict, examine())


def selftest(bench: Bench) -> Iterator[dict[str, Any]]:
    """A sum, DALI's pixels, and training on every device, tried."""
    from hvd_lb.doctor.selftest import selftest as trials

    yield from map(asdict, trials())


def tests(bench: Bench) -> Iterator[dict[str, Any]]:
    """The tests marked gpu; on the CPU the same tests there."""
    root = Path(__file__).parents[1]
    on_gpu = bench.device.type == "cuda"
    words = ("from devices import", "mark.gpu") if on_gpu else ("from devices import",)
    # No other files: these need pytest and nothing else that hvd-lb does not.
    files = [
        file for file in root.glob("tests/**/test_*.py") if any(word in file.read_text() for word in words)
    ]
    chosen = ["-m", "gpu", *files] if on_gpu else ["-k", "cpu", *files]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-n",
        "6",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",  # which stops where tests run side by side
        "--tb=short",
        *map(str, chosen),
    ]
    said: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root
    ) as process:
        for line in process.stdout or ():
            said.append(line)
            # [gw0] [ 12%] PASSED tests/…; each by itself, as time may run out
            if found := re.match(r"\[gw.*%\] ([A-Z]+) (.*)", line):
                yield {"test": found[2].strip(), "result": found[1]}
    yield {"code": process.returncode, "result": said[-1].strip() if said else ""}
    if process.returncode:
        yield {"said": "".join(said)[-6000:]}


def right(bench: Bench) -> Iterator[dict[str, Any]]:
    """One step's gradients against fp64 on the CPU, for every precision and layout; waits of the host in a step."""
    images, pixels, workers = 32, 32, 2
    torch.manual_seed(1)
    batches = [
        (torch.randn(images, 3, pixels, pixels), torch.randint(0, 10, (images,))) for _ in range(workers)
    ]

    def gradients(device: str, **changes: Any) -> dict[str, Tensor]:
        here = Bench(device, small=True)
        made = here.trainer(
            workers, images, model="resnet8", image_size=pixels, zero_gamma=False, num_classes=10, **changes
        )
        before = {name: p.detach().cpu().double().clone() for name, p in made.model.named_parameters()}
        for _ in range(30):  # exponents that are too large, or fp16's first scales, cost a step
            with suppress(FixedPointOverflow), made.kernels():
                made.train_step((x.to(device), y.to(device)) for x, y in batches)
            after = {name: p.detach().cpu().double() for name, p in made.model.named_parameters()}
            change = {name: after[name] - before[name] for name in before}
            if any(bool(of.any()) for of in change.values()):
                return change
        raise RuntimeError("no step was taken")

    settings = {"learning_rate": 1.0, "warmup": "none", "weight_decay": 0.0}
    expected = gradients("cpu", precision="fp64", **settings)
    norm = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    for precision in ("fp64", "fp32", "tf32", "bf16", "fp16"):
        for channels_last in (False, True):
            for reproducible in (False, True):
                case = {"precision": precision, "channels_last": channels_last, "reproducible": reproducible}
                try:
                    found = gradients(str(bench.device), **case, **settings)
                    difference = (
                        sum(float((found[name] - g).square().sum()) for name, g in expected.items()) ** 0.5
                    )
                    yield {**case, "relative_difference": difference / norm}
                except Exception as error:
                    yield {**case, "error": f"{type(error).__name__}: {error}"}


def waits(bench: Bench) -> Iterator[dict[str, Any]]:
    """How often a step makes the host wait for the GPU, and where."""
    if bench.device.type != "cuda":
        return
    ready = bench.batches(8)
    for reproducible in (False, True):
        for precision in ("bf16", "fp16"):
            run = whole_step(bench.trainer(2, 8, precision=precision, reproducible=reproducible), ready)
            run()
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
            torch.cuda.set_sync_debug_mode("default")
            places: dict[str, int] = {}
            for one in caught:
                place = f"{Path(one.filename).name}:{one.lineno}"
                places[place] = places.get(place, 0) + 1
            yield {
                "reproducible": reproducible,
                "precision": precision,
                "waits": len(caught),
                "places": places,
            }


def steps(bench: Bench) -> Iterator[dict[str, Any]]:
    """Whole steps against the bare loop, in images a second; in two cases against torchvision's reference, too."""
    for precision, channels_last, images in (
        ("bf16", True, 32), ("bf16", True, bench.large), ("fp32", False, 32), ("fp16", True, bench.large),
        ("tf32", True, bench.large), ("tf32", False, 32),
    ):  # fmt: skip
        ready = bench.batches(images)
        ours = partial(our_step, bench, ready, 1, images, precision=precision, channels_last=channels_last)
        bare = partial(bare_step, bench, ready, precision, channels_last)
        makers: dict[str, Make] = {
            "hvd-lb": ours,
            "without graphs": partial(ours, cuda_graphs="off"),
            "bare": partial(bare, fused=True),
        }
        if precision == "bf16":
            makers["reproducible"] = partial(ours, reproducible=True)
        if (precision, images) == ("bf16", 32):
            makers["bare, foreach"] = partial(bare, foreach=True)
            if bench.device.type == "cuda":
                makers["bare, CUDA graph"] = partial(graphed_step, bench, ready)
        if precision == "fp16" or (precision, images) == ("tf32", 32):
            makers["torchvision"] = partial(reference_step, bench, ready, amp=precision == "fp16")
        yield figures(bench, makers, images, precision=precision, channels_last=channels_last, images=images)


def virtual(bench: Bench) -> Iterator[dict[str, Any]]:
    """Eight virtual workers of 32 on one GPU, against the bare loop of eight microbatches; in both modes.

    Together they are measured by the bare loop of one batch of all images, which has another batch norm.
    """
    workers, images = 8, 8 if bench.small else 32
    for precision in ("bf16", "fp32"):
        ready, whole = bench.batches(images, 8), bench.batches(workers * images, 1)
        last = precision == "bf16"
        ours = partial(our_step, bench, ready, workers, images, precision=precision, channels_last=last)
        makers: dict[str, Make] = {
            "hvd-lb": partial(ours, together=1),
            "without graphs": partial(ours, together=1, cuda_graphs="off"),
            "together": partial(ours, together=workers),
            "together, torch's batch norm": partial(ours, together=workers, own_batch_norm=False),
            "bare": partial(bare_step, bench, ready, precision, last, workers, fused=True),
            "bare, one batch": partial(bare_step, bench, whole, precision, last, fused=True),
            "reproducible": partial(ours, reproducible=True),
        }
        yield figures(bench, makers, workers * images, workers=workers, images=images, precision=precision)


def reproducible(bench: Bench) -> Iterator[dict[str, Any]]:
    """The reproducible mode against the float mode with one virtual worker."""
    for precision in ("bf16", "fp32"):
        for images in (32, bench.large):
            ready, last = bench.batches(images), precision == "bf16"
            ours = partial(our_step, bench, ready, 1, images, precision=precision, channels_last=last)
            makers: dict[str, Make] = {"reproducible": partial(ours, reproducible=True), "float": ours}
            yield figures(bench, makers, images, images=images, precision=precision)


def batch_norms(bench: Bench) -> Iterator[dict[str, Any]]:
    """Batch norm of eight virtual workers of 32 images, forward and backward, by our kernels and by torch's.

    torch's for one batch of all images have other statistics, and no more to do. Bytes are those that have to be read
    or written: three times all values forward, five times backward.
    """
    if bench.device.type != "cuda":
        return
    workers, images = 8, 32
    ours, errors = proved_batch_norm(bench.device, torch.bfloat16, True)
    for channels, side in ((64, 112), (256, 56), (512, 28), (1024, 14), (512, 7), (2048, 7)):
        for order in (torch.channels_last, torch.contiguous_format):
            shape = workers * images, channels, side, side
            x, along = (
                torch.randn(shape, device=bench.device, dtype=torch.bfloat16).to(memory_format=order)
                for _ in range(2)
            )
            weight, bias = torch.randn(2, channels, device=bench.device)
            leaves = [of.requires_grad_() for of in (x, weight, bias)]

            def each(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
                return torch.cat([F.batch_norm(of, None, None, weight, bias, True) for of in x.split(images)])

            def at_once(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
                assert ours, errors
                return ours(x, workers, weight, bias, 1e-5)[0]

            def one_batch(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
                return F.batch_norm(x, None, None, weight, bias, True)

            def recorded(of: Callable[[], Tensor], leaves: Any = leaves, along: Tensor = along) -> Make:
                def make() -> Step:
                    def work() -> Any:
                        return torch.autograd.grad(of(), leaves, along)

                    stream = torch.cuda.Stream()
                    stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(stream):
                        for _ in range(3):
                            work()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=stream):
                        work()
                    return graph.replay

                return make

            makers = {
                "hvd-lb": recorded(at_once),
                "torch, worker by worker": recorded(each),
                "torch, one batch": recorded(one_batch),
            }
            took = bench.take_turns(bench.make_one_by_one(makers)[0], warm_up=0)
            yield {
                "channels": channels,
                "side": side,
                "channels_last": order == torch.channels_last,
                "milliseconds": {name: round(value, 4) for name, value in took.items()},
                "gigabytes_per_second": {
                    name: round(8 * x.nbytes / value / 1e6) for name, value in took.items()
                },
            }


def compiled(bench: Bench) -> Iterator[dict[str, Any]]:
    """`--compile` against the same steps without: one virtual worker, and eight, which it computes together."""
    images = 8 if bench.small else 32
    for workers in (1, 2 if bench.small else 8):
        ready = bench.batches(images, workers)
        ours = partial(our_step, bench, ready, workers, images, precision="bf16", channels_last=True)
        makers: dict[str, Make] = {
            "hvd-lb": partial(ours, together=1),
            "without graphs": partial(ours, together=1, cuda_graphs="off"),
            "compiled": partial(ours, together=workers, cuda_graphs="off", compile=True),
        }
        yield figures(bench, makers, workers * images, workers=workers, images=images, precision="bf16")


def figures(bench: Bench, makers: dict[str, Make], step_images: int, **about: Any) -> dict[str, Any]:
    sides, peaks = bench.make_one_by_one(makers)
    took = bench.take_turns(sides, warm_up=0)
    return {
        **about,
        "milliseconds": {name: round(value, 3) for name, value in took.items()},
        "images_per_second": {name: round(1000 * step_images / value, 1) for name, value in took.items()},
        "peak_gib": {name: round(peaks[name], 2) for name in took},
    }


def launches(bench: Bench) -> Iterator[dict[str, Any]]:
    """Kernels and calls of one step, by torch's profiler."""
    if bench.device.type != "cuda":
        return
    from torch.profiler import ProfilerActivity, profile

    ready = bench.batches(32)
    sides = {
        "bare, fused": bare_step(bench, ready, "bf16", True, fused=True),
        "bare, foreach": bare_step(bench, ready, "bf16", True, foreach=True),
        "hvd-lb": whole_step(bench.trainer(1, 32, precision="bf16", channels_last=True), ready),
        "without graphs": whole_step(
            bench.trainer(1, 32, precision="bf16", channels_last=True, cuda_graphs="off"), ready
        ),
        "reproducible": whole_step(
            bench.trainer(1, 32, precision="bf16", channels_last=True, reproducible=True), ready
        ),
    }
    for name, run in sides.items():
        for _ in range(3):
            run()
        bench.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run()
            bench.wait()
        events = profiler.key_averages()
        count = {event.key: event.count for event in events}
        gpu = sum(getattr(event, "self_device_time_total", 0) for event in events) / 1000
        yield {
            "side": name,
            "launches": sum(n for key, n in count.items() if "aunchKernel" in key),
            "graphs": sum(n for key, n in count.items() if "GraphLaunch" in key),
            "copies": sum(n for key, n in count.items() if key.startswith(("cudaMemcpy", "cudaMemset"))),
            "waits": sum(n for key, n in count.items() if "ynchronize" in key),
            "gpu_milliseconds": round(gpu, 2),
        }


def update(bench: Bench) -> Iterator[dict[str, Any]]:
    """The update alone: SGD of this project against torch's.

    Runs in the float mode have the fused one, which divides by the images of a step as well, here by 1, as the
    quotients are written back. The plain ones are for --reproducible and fp64.
    """
    sides: dict[str, Step] = {}
    for label in ("fused", "form 10", "form 9", "torch foreach", "torch fused"):
        model = build_model(bench.model, 1000, seed=0).to(bench.device)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if label.startswith("torch"):
            options: dict[str, Any] = {label.split()[1]: True}
            sides[label] = torch.optim.SGD(
                lb.parameter_groups(model), 1e-4, 0.9, weight_decay=1e-4, nesterov=True, **options
            ).step
        elif label == "fused":
            ours: Any = lb.SGD(lb.parameter_groups(model), 1e-4, fused=True)
            ours.grad_scale = torch.ones((), device=bench.device)
            sides[label] = ours.step
        else:
            sides[label] = lb.SGD(lb.parameter_groups(model), 1e-4, form=int(label.split()[1])).step
    yield {"milliseconds": {name: round(value, 3) for name, value in bench.take_turns(sides).items()}}


def loaders(bench: Bench) -> Iterator[dict[str, Any]]:
    """JPEG files of 500×375 to tensors on the device, and to the network, against torchvision's DataLoader."""
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    from hvd_lb.data.dataset import open_dataset
    from hvd_lb.data.loading.contract import Preprocessing
    from hvd_lb.data.loading.open import open_loader

    threads, images = (2, 16) if bench.small else (16, bench.large)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HVD_LB_CACHE"] = str(Path(temporary) / "cache")
        folder = make_jpegs(Path(temporary) / "jpeg", 64 if bench.small else 2048)
        data = open_dataset(str(folder)).train

        def ours(kind: Any) -> Iterator[Any]:
            pixels = Preprocessing(bench.pixels, MEAN, STD, antialias=True)
            return open_loader(
                kind,
                data,
                microbatches(data, images),
                pixels,
                batch_size=images,
                device=bench.device,
                threads=threads,
            )

        def theirs() -> Iterator[Any]:
            transform = v2.Compose(
                [v2.RandomResizedCrop(bench.pixels, antialias=True), v2.RandomHorizontalFlip()]
            )
            dataset = ImageFolder(
                str(folder / "train"),
                transform,
                loader=lambda path: decode_image(path, mode=ImageReadMode.RGB),
            )
            loader = torch.utils.data.DataLoader(
                dataset, images, sampler=torch.utils.data.RandomSampler(dataset, True, 10**9),
                num_workers=threads, prefetch_factor=1, drop_last=True, pin_memory=bench.device.type == "cuda",
            )  # fmt: skip
            mean, std = (torch.tensor(of, device=bench.device).view(3, 1, 1) for of in (MEAN, STD))
            for x, y in loader:
                x = x.to(bench.device, non_blocking=True)
                yield x.float().div_(255).sub_(mean).div_(std), y.to(bench.device, non_blocking=True)

        for name, make in (
            ("hvd-lb dali", lambda: ours("dali")),
            ("DataLoader", theirs),
            ("hvd-lb torchvision", lambda: ours("torchvision")),
        ):
            for what in ("tensors", "training"):
                side = make()
                made = bench.trainer(1, images, precision="bf16", channels_last=True)
                bare = bare_step(bench, side, "bf16", True, fused=True)

                def one(side: Iterator[Any] = side, what: str = what, name: str = name, made: Trainer = made,
                        bare: Step = bare) -> None:  # fmt: skip
                    if what == "tensors":
                        next(side)
                    elif name == "DataLoader":
                        bare()
                    else:
                        with made.kernels():
                            made.train_step(side)

                try:
                    # More than any side has ready when it begins: torch's workers one batch each.
                    repeat(one, 2 * threads)
                    bench.wait()
                    began = time.perf_counter()
                    count = repeat(one, 2 * threads)
                    bench.wait()
                    seconds = (time.perf_counter() - began) / count
                    yield {
                        "side": name, "to": what, "threads": threads, "images": images,
                        "images_per_second": round(images / seconds, 1),
                    }  # fmt: skip
                finally:
                    if hasattr(side, "close"):
                        side.close()
                    del side, one, bare
        if bench.device.type == "cuda":
            yield from decoding_alone(bench, folder, images)
        # Of several nvJPEGs that one counts which is found first; DALI wants 13.2 or newer.
        mapped = Path("/proc/self/maps").read_text()
        yield {"nvjpeg": sorted({line.split()[-1] for line in mapped.splitlines() if "nvjpeg" in line})}


def repeat(run: Step, times: int, seconds: float = 8) -> int:
    """So many times, or fewer where that takes longer; how many."""
    end, done = time.perf_counter() + seconds, 0
    while done < times and time.perf_counter() < end:
        run()
        done += 1
    return done


def decoding_alone(bench: Bench, folder: Path, images: int) -> Iterator[dict[str, Any]]:
    """Whole images decoded on the GPU by torchvision (nvJPEG), from memory."""
    from torchvision.io import decode_jpeg, read_file

    files = [read_file(str(file)) for file in sorted((folder / "train").rglob("*.jpg"))[:images]]
    run = bench.take_turns({"decode_jpeg": lambda: decode_jpeg(files, device="cuda")})
    yield {
        "side": "torchvision decode_jpeg on the GPU",
        "images_per_second": round(1000 * images / run["decode_jpeg"], 1),
    }


def decoder(bench: Bench) -> Iterator[dict[str, Any]]:
    """What DALI's settings are worth: windows or whole images, how colours are widened, the share of a GPU's own JPEG
    decoder, room for the largest image, and decoding on the CPU.
    """
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    from hvd_lb.data.loading.nvjpeg import load_nvjpeg

    yield {"nvjpeg": load_nvjpeg()}

    on_gpu, images = bench.device.type == "cuda", 16 if bench.small else bench.large
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_jpegs(Path(temporary) / "jpeg", images)
        files = [np.fromfile(file, np.uint8) for file in sorted((folder / "train").rglob("*.jpg"))]
        ours = {
            "windows": True,
            "jpeg_fancy_upsampling": True,
            "hw_decoder_load": 0.65,
        }  # as the loader has them
        room = {"preallocate_width_hint": 500, "preallocate_height_hint": 375}
        settings: list[dict[str, Any]] = [
            ours, {**ours, "windows": False}, {**ours, "jpeg_fancy_upsampling": False}, {**ours, "device": "cpu"},
            {**ours, "windows": False, "jpeg_fancy_upsampling": False},
            *({**ours, "hw_decoder_load": share} for share in (0.0, 0.9, 1.0)),
            {**ours, **room}, {**ours, "device_memory_padding": 0, "host_memory_padding": 0},
        ]  # fmt: skip
        for setting in settings:
            options = {"device": "mixed" if on_gpu else "cpu", **setting}
            with Pipeline(images, 16, 0 if on_gpu else None, exec_dynamic=True) as pipeline:
                data = fn.external_source(source=lambda: files, batch=True)
                if options.pop("windows"):
                    decode = fn.decoders.image_slice(data, start=(40, 30), shape=(400, 300), **options)
                else:
                    decode = fn.decoders.image(data, **options)
                decode = decode.gpu() if on_gpu else decode
                pipeline.set_outputs(fn.resize(decode, size=[224, 224], interp_type=types.INTERP_LINEAR))
            try:
                took = bench.take_turns({"dali": pipeline.run})["dali"]
                yield {**setting, "images_per_second": round(1000 * images / took, 1)}
            except KeyError:
                yield {**setting, "images_per_second": None}


def simulated(bench: Bench) -> Iterator[dict[str, Any]]:
    """256 virtual workers of 32 images on one GPU: a step of 8,192 images, as `simulate --gpus 256` takes it."""
    workers, images, group = (8, 8, 4) if bench.small else (256, 32, 8)
    ours = partial(
        our_step, bench, bench.batches(images, 8), workers, images, precision="bf16", channels_last=True
    )
    makers: dict[str, Make] = {
        "apart": partial(ours, together=1),
        f"together {group}": partial(ours, together=group),
    }
    bench.warm_up, bench.turns, bench.steps = 1, 1, 1
    yield figures(bench, makers, workers * images, workers=workers, images=images)


def processes(bench: Bench) -> Iterator[dict[str, Any]]:
    """The same recipe on one process and under Horovod: bits in the reproducible mode, and time."""
    with tempfile.TemporaryDirectory() as temporary:
        digests: dict[str, Any] = {}
        for count in (1, 2):
            file = Path(temporary) / f"{count}.json"
            launcher = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", str(count)]
            launcher += ["-H", f"localhost:{count}", "--network-interface", "lo"]
            command = [
                *launcher,
                sys.executable,
                __file__,
                "--device",
                bench.device.type,
                "--rank",
                str(file),
            ]
            command += ["--small"] if bench.small else []
            output, errors, failure = run_limited(command, RANKS_SECONDS)
            if failure:
                yield {"processes": count, "error": failure, "last": (errors or output).strip()[-600:]}
                continue
            digests[f"Horovod, {count}"] = json.loads(file.read_text())
        digests["alone"] = steps_of_a_rank(bench, ThroughTheHost(lb.current()))
        yield {
            "same_bits": {
                name: found["digest"] == digests["alone"]["digest"] for name, found in digests.items()
            },
            "milliseconds": {name: found["milliseconds"] for name, found in digests.items()},
        }


class ThroughTheHost:
    """A world whose sums of GPU tensors are formed on the CPU: NCCL refuses two processes on one GPU."""

    def __init__(self, world: Any) -> None:
        self._world = world
        self.rank, self.size = world.rank, world.size
        self.local_rank, self.local_size = world.local_rank, world.local_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    def allreduce_async(self, tensor: Tensor, name: str) -> Any:
        return Returning(tensor, self._world.allreduce_async(tensor.cpu(), name))

    def maximum_async(self, tensor: Tensor, name: str) -> Any:
        return Returning(tensor, self._world.maximum_async(tensor.cpu(), name))

    def allreduce(self, tensor: Tensor, name: str) -> Tensor:
        return self.allreduce_async(tensor, name).wait()

    def broadcast(self, tensor: Tensor, name: str) -> Tensor:
        return tensor.copy_(self._world.broadcast(tensor.cpu(), name))


class Returning:
    """A sum under way on the CPU, which `tensor` gets."""

    def __init__(self, tensor: Tensor, handle: Any) -> None:
        self._tensor, self._handle = tensor, handle

    def wait(self) -> Tensor:
        return self._tensor.copy_(self._handle.wait())


def nccl(bench: Bench) -> Iterator[dict[str, Any]]:
    """A process by itself whose sums go through NCCL, by each engine: the bits, and what the way costs a step."""
    from hvd_lb.world.horovod import HorovodWorld
    from hvd_lb.world.launched import Place
    from hvd_lb.world.torch_distributed import TorchWorld

    alone = steps_of_a_rank(bench, lb.current())
    yield {"engine": "none", **alone}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    worlds: dict[str, Callable[[], Any]] = {
        "torch": lambda: TorchWorld(Place("RANK and WORLD_SIZE", 0, 1, 0)),
        "horovod": HorovodWorld,
    }
    for name, make in worlds.items():
        try:
            found = steps_of_a_rank(bench, make())
            yield {"engine": name, **found, "same_bits": found["digest"] == alone["digest"]}
        except Exception as error:
            yield {"engine": name, "error": f"{type(error).__name__}: {error}"}


def graphs(bench: Bench) -> Iterator[dict[str, Any]]:
    """Whether replayed graphs compute the bits that launched kernels do, in the reproducible mode; the same again."""
    if bench.device.type != "cuda":
        return
    for model, together in (("resnet50", 1), ("resnet50", 2), ("mobilenet_v3_large", 1), ("vit_b_16", 1)):
        for precision in ("bf16", "fp32"):
            ready = bench.batches(16)
            digests = []
            case = {"model": model, "together": together, "precision": precision}
            try:
                for choice in ("on", "off", "off"):
                    made = bench.trainer(
                        4, 16, **case, cuda_graphs=choice, reproducible=True, channels_last=True
                    )
                    run = whole_step(made, ready)
                    for _ in range(3):
                        while not attempted(run):
                            pass
                    digests.append(digest_of(made))
                same = {"graphs_same": digests[0] == digests[1], "launched_same": digests[1] == digests[2]}
                yield case | same
            except Exception as error:
                yield {**case, "error": f"{type(error).__name__}: {error}"}


def attempted(run: Step) -> bool:
    """Whether a step could be taken; if not, its scales are better now."""
    try:
        run()
    except FixedPointOverflow:
        return False
    return True


def commands(bench: Bench) -> Iterator[dict[str, Any]]:
    """hvd-lb as one types it: a run that is killed and goes on, held against the one that is not, and a rehearsal."""
    device = bench.device.type
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        common = ["--recipe", "digits", "--gpus", "8", "--per-gpu-batch", "16", "--device", device]
        common += ["--processes", "1", "--reproducible", "--checkpoint-every", "5steps", "--epochs", "6"]
        rehearsed = [
            "--gpus",
            "256",
            "--model",
            bench.model,
            "--image-size",
            str(bench.pixels),
            "--device",
            device,
        ]
        rehearsed += [
            "--data",
            "synthetic:20000",
            "--budget",
            "20s",
            "--precision",
            "bf16",
            "--channels-last",
        ]
        lines = {
            "train": ["train", *common, "--output", here / "whole"],
            "killed": ["train", *common, "--output", here / "parts"],
            "resumed": ["train", *common, "--output", here / "parts"],
            "compare": ["compare", here / "whole", here / "parts"],
            "verify": ["verify", here / "whole"],
            "simulate": ["simulate", *rehearsed],
        }
        for name, arguments in lines.items():
            began = time.perf_counter()
            hvd_lb = [sys.executable, "-c", "from hvd_lb_cli.main import main; main()"]
            process = subprocess.Popen(
                [*hvd_lb, *map(str, arguments)], text=True, cwd=here,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=name == "killed",  # others end with this row, where it has no more time
            )  # fmt: skip
            if name == "killed":
                while process.poll() is None and not list((here / "parts").glob("checkpoints/step-*5")):
                    time.sleep(0.1)
                with suppress(ProcessLookupError):  # it has ended, and tells why
                    os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[0]
            yield {
                "command": name, "code": process.returncode, "seconds": round(time.perf_counter() - began, 1),
                "said": said[-1500:],
            }  # fmt: skip


def digest_of(made: Trainer) -> str:
    digest = hashlib.sha256()
    for parameter in made.model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def steps_of_a_rank(bench: Bench, world: Any) -> dict[str, Any]:
    """Six reproducible steps of four virtual workers; a digest of the weights, and the time of a step in float mode."""
    from hvd_lb.plan.hosting import hosted

    images = 8
    ready = bench.batches(images, 4)
    mine = [ready[worker] for worker in hosted(world.rank, world.size, 4)]
    made = bench.trainer(4, images, world, reproducible=True, learning_rate=0.1)
    run = whole_step(made, mine)
    for _ in range(6):
        run()
    step = whole_step(bench.trainer(4, images, world, precision="bf16", channels_last=True), mine)
    for _ in range(3):
        step()
    bench.wait()
    began = time.perf_counter()
    for _ in range(10):
        step()
    bench.wait()
    return {"digest": digest_of(made), "milliseconds": round(100 * (time.perf_counter() - began), 2)}


ROWS: dict[str, Row] = {
    "doctor": doctor, "selftest": selftest, "tests": tests, "right": right, "steps": steps, "loaders": loaders,
    "virtual": virtual, "waits": waits, "launches": launches, "processes": processes, "reproducible": reproducible,
    "simulated": simulated, "graphs": graphs, "nccl": nccl, "commands": commands, "decoder": decoder,
    "update": update, "compiled": compiled, "batch_norms": batch_norms,
}  # fmt: skip


#: seconds for these, at least
LONGER = {"selftest": 120.0, "tests": 150.0, "steps": 100.0, "compiled": 200.0}
RANKS_SECONDS = 30.0  #: for each start of `processes`, so that a row has room for both and for more


NO_GPU = "none: "
WITHOUT_GPU = ("doctor", "selftest")  #: rows that say why


def machine(device: str) -> dict[str, Any]:
    import torchvision

    about = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": sys.version.split()[0],
    }
    if device == "cuda":
        try:
            about |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        except (RuntimeError, AssertionError) as error:  # no driver, no GPU; a torch for the CPU
            about["gpu"] = f"{NO_GPU}{str(error).partition(chr(10))[0]}"
    return about | {"date": time.strftime("%Y-%m-%d"), "cores": len(os.sched_getaffinity(0))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny networks, to try the script out")
    parser.add_argument("--rows", type=names_of(ROWS), default=list(ROWS), help="names, with commas")
    parser.add_argument("--output", type=file_to_write, default=Path("gpu.json"))
    parser.add_argument("--seconds", type=float, default=75, help="limit for a row")
    parser.add_argument("--minutes", type=minutes, default=8, help="limit for all of them")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one or options.rank:
        lb.init()
        bench = Bench(options.device, options.small)
        if options.rank:
            found = steps_of_a_rank(bench, ThroughTheHost(lb.current()))
            if lb.current().rank == 0:
                options.rank.write_text(json.dumps(found))
            lb.shutdown()
            return
        for result in ROWS[options.one](bench):
            print(json.dumps(result), flush=True)
        return
    results: dict[str, Any] = {"machine": machine(options.device)}
    print(json.dumps(results["machine"]), flush=True)
    end = time.monotonic() + 60 * options.minutes
    lacking = results["machine"].get("gpu", "").startswith(NO_GPU)
    for name in WITHOUT_GPU if lacking else options.rows:
        command = [sys.executable, __file__, "--device", options.device, "--one", name]
        command += ["--small"] if options.small else []
        began = time.monotonic()
        limit = max(options.seconds, LONGER.get(name, 0.0))
        results[name] = run_row(command, min(limit, end - began))
        options.output.write_text(json.dumps(results, indent=1))
        lines = map(json.dumps, results[name])
        print(f"== {name} ({time.monotonic() - began:.0f} s)", *lines, sep="\n", flush=True)
    if lacking:
        sys.exit(
            f"torch finds no GPU, so only {' and '.join(WITHOUT_GPU)} were run, see {options.output}; "
            "--device cpu --small rehearses the other rows"
        )


def run_row(command: list[str], seconds: float) -> list[dict[str, Any]]:
    """What a row has found in so many seconds."""
    output, errors, failure = run_limited(command, seconds)
    found = list[dict[str, Any]]()
    for line in output.splitlines(keepends=True):
        if line.startswith("{") and line.endswith("}\n"):
            with suppress(ValueError):  # a library's
                found.append(json.loads(line))
    return found + ([{"error": failure, "last": errors[-1500:]}] if failure else [])


if __name__ == "__main__":
    main()
