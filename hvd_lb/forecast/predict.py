"""A run on a cluster foretold: step, speed, efficiency, what limits it, failures, money, each with an interval.

An interval holds the middle 90 % of forecasts made with what is uncertain drawn at random: the links' figures, the
device's times, what the model itself is off by, and how unlike devices are. Of the last a single device tells nothing,
so an interval reaches up to what the paper's 256 GPUs showed (29 hours became 1 hour, docs/forecast.md).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict

from hvd_lb.forecast.collectives import ALGORITHMS, Hierarchy, Link
from hvd_lb.forecast.profile import ClusterProfile
from hvd_lb.forecast.step import Compute, StepTimes, simulate_step, slowest_of

PAPER_SPREAD = 0.084  #: relative, between the GPUs of the paper's clusters (devices/p100.yaml)
#: What the paper says of ResNet-50, n = 32, on 8 P100 a server: GPUs, seconds of a step (sections 1 and 5.5).
PAPER_CURVE = ((8, 0.232), (256, 0.232 * 32 / 29), (352, 0.232 * 1.12))
#: Relative standard deviation of runs from forecasts for reasons that no figure tells (benchmarks/forecast.py).
MODEL_ERROR = 0.06
RESTART_SECONDS = 120.0  #: assumed, from a failure until all ranks compute again
ELASTIC_SECONDS = 30.0  #: assumed, until the ranks that are left go on
_DRAWS = 100
_HIDDEN = 0.01  # an exchange that costs a step less is hidden


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Estimate(_Record):
    """A figure and the interval in which it is expected in nine of ten cases."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        return Estimate(value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def inverse(self, numerator: float) -> Estimate:
        return Estimate(value=numerator / self.value, low=numerator / self.high, high=numerator / self.low)


class Point(_Record):
    """So many GPUs with n images each. Seconds of a step; efficiency in images per second and GPU, one GPU being 1."""

    gpus: int
    step: Estimate
    images_per_second: Estimate
    efficiency: Estimate


class SameRun(_Record):
    """The run as it is, with its k virtual workers shared by fewer GPUs. Seconds; `price` in the profile's money."""

    gpus: int
    step: Estimate
    total: Estimate
    gpu_hours: Estimate
    price: Estimate | None


class Share(_Record):
    """Where the seconds of a step go."""

    compute: float
    slowest: float  #: waiting for the slowest GPU
    network: float  #: waiting for the exchange
    data: float  #: waiting for images


class Forecast(_Record):
    """As forecast.json has it; seconds, bytes, images."""

    version: int = 1
    cluster: str
    device: str
    model: str
    gpus: int
    gpus_per_host: int
    per_gpu_batch: int
    algorithm: str
    step: Estimate
    images_per_second: Estimate
    epoch: Estimate
    total: Estimate
    efficiency: Estimate
    share: Share
    utilisation: float
    scaling: dict[str, list[Point]]
    same_run: list[SameRun]
    bandwidth_factor: (
        float | None
    )  #: by which the network had to be faster to be hidden; None where latency is left
    loader_needed: float  #: images per second and host, so that nobody waits
    loader_measured: float | None
    memory: int | None  #: bytes on one device, measured
    device_memory: int | None
    failures: float | None  #: expected in the whole run
    failures_cost: float | None  #: seconds, going back to checkpoints
    failures_cost_elastic: float | None
    price: Estimate | None
    paper: list[tuple[int, float]] | None  #: (GPUs, seconds of a step) where the model is the paper's
    spans: list[tuple[str, str, float, float]]  #: the timeline: lane, what, from, to


@dataclass(frozen=True)
class Run:
    """What is to be run. Checkpoints come every so many steps or seconds; both are None where there are none."""

    model: str
    gpus: int
    per_gpu_batch: int
    steps_per_epoch: int
    steps: int
    checkpoint_every: int | None  #: steps
    checkpoint_seconds: float | None = None


@dataclass(frozen=True)
class Device:
    """Of one device: what was measured or is published. `error` is the relative standard deviation of its times.

    `loader` is in images per second of a whole host; `unlike` says whether `compute.spread` is that between devices.
    """

    name: str
    compute: Compute
    error: float
    unlike: bool = False
    memory: int | None = None
    loader: float | None = None


@dataclass(frozen=True)
class _Draw:
    """One possible cluster; the first one is as the figures say."""

    hierarchy: Hierarchy
    compute: Compute
    phase: float = 0.5  #: of the engine's cycle, when a bucket is full


def predict(run: Run, device: Device, cluster: ClusterProfile, algorithm: str | None = None) -> Forecast:
    """The forecast for `run.gpus` GPUs, one virtual worker each."""
    name = algorithm or cluster.algorithm
    draws = _draws(device, cluster)
    per_gpu = run.per_gpu_batch

    def steps(gpus: int, how: str, microbatches: int = 1) -> list[StepTimes]:
        loader = device.loader / min(cluster.gpus_per_host, gpus) if device.loader else None
        return [_step(draw, cluster, how, gpus, microbatches, loader) for draw in draws]

    alone = [step.seconds for step in steps(1, name)]
    counted = sizes(run.gpus, cluster.gpus_per_host)
    scaling = {}
    for how in ALGORITHMS:
        points = []
        for gpus in counted:
            seconds = [step.seconds for step in steps(gpus, how)]
            step = _estimate(seconds)
            points.append(
                Point(
                    gpus=gpus,
                    step=step,
                    images_per_second=step.inverse(gpus * per_gpu),
                    efficiency=_estimate([one / all_ for one, all_ in zip(alone, seconds, strict=True)]),
                )
            )
        scaling[how] = points
    here = next(point for point in scaling[name] if point.gpus == run.gpus)
    central = steps(run.gpus, name)[0]
    same = [_same_run(run, cluster, gpus, steps(gpus, name, -(-run.gpus // gpus))) for gpus in counted]
    total = here.step.times(run.steps)
    late = (
        central.compute
        - _step(
            replace(draws[0], compute=replace(draws[0].compute, spread=0.0)), cluster, name, run.gpus, 1, None
        ).compute
    )
    failures = cost = cost_elastic = None
    if cluster.gpu_hours_per_failure:
        failures = total.value * run.gpus / 3600 / cluster.gpu_hours_per_failure
        between = run.checkpoint_seconds or (run.checkpoint_every or run.steps) * here.step.value
        lost = min(between, total.value) / 2
        cost = failures * (RESTART_SECONDS + lost)
        cost_elastic = failures * (ELASTIC_SECONDS + here.step.value)
    return Forecast(
        cluster=cluster.name,
        device=device.name,
        model=run.model,
        gpus=run.gpus,
        gpus_per_host=cluster.gpus_per_host,
        per_gpu_batch=per_gpu,
        algorithm=name,
        step=here.step,
        images_per_second=here.images_per_second,
        epoch=here.step.times(run.steps_per_epoch),
        total=total,
        efficiency=here.efficiency,
        share=Share(
            compute=central.compute - late, slowest=late, network=central.exposed, data=central.data_wait
        ),
        utilisation=central.utilisation,
        scaling=scaling,
        same_run=same,
        bandwidth_factor=_bandwidth_factor(draws[0], cluster, name, run.gpus),
        loader_needed=per_gpu * min(cluster.gpus_per_host, run.gpus) / (central.seconds - central.data_wait),
        loader_measured=device.loader,
        memory=device.memory,
        device_memory=round(1e9 * cluster.gpu_memory_gb) if cluster.gpu_memory_gb else None,
        failures=failures,
        failures_cost=cost,
        failures_cost_elastic=cost_elastic,
        price=_price(total, run.gpus, cluster),
        paper=list(PAPER_CURVE) if run.model == "resnet50" and per_gpu == 32 else None,
        spans=[(span.lane, span.name, span.start, span.end) for span in central.spans],
    )


def sizes(most: int, per_host: int = 1) -> list[int]:
    """1, 2, 4, …, a host's GPUs and the number itself."""
    return sorted({*(1 << bit for bit in range(most.bit_length())), min(most, per_host), most})


def _step(
    draw: _Draw, cluster: ClusterProfile, algorithm: str, gpus: int, microbatches: int, loader: float | None
) -> StepTimes:
    """Of the slowest GPU, for which the others wait. `loader` is in images per second and GPU."""
    compute = draw.compute
    slowest = 1 + compute.spread / math.sqrt(microbatches) * slowest_of(gpus)

    def exchange(size: int) -> float:
        overhead = 1e-6 * cluster.overhead_us
        return overhead + draw.hierarchy.seconds(algorithm, gpus, size) if gpus > 1 else 0.0

    return simulate_step(
        compute.scaled(slowest),
        microbatches,
        exchange,
        wait=draw.phase * cluster.cycle_ms / 1000 if gpus > 1 else 0.0,
        exchange_slowdown=cluster.exchange_slowdown,
        compute_slowdown=cluster.compute_slowdown,
        loading=microbatches * compute.images / loader if loader else 0.0,
    )


def _draws(device: Device, cluster: ClusterProfile) -> list[_Draw]:
    """As the figures are, and then as they may be; the same ones each time."""
    hierarchy, compute = cluster.hierarchy(), device.compute
    draws = [_Draw(hierarchy, compute)]
    chance = random.Random(0)  # noqa: S311 - nothing secret

    def link(of: Link, error: float, whole: float) -> Link:
        factor = whole * chance.lognormvariate(0, error)
        return Link(of.alpha * factor, of.beta * factor, of.gamma * factor)

    for _ in range(_DRAWS):
        whole = chance.lognormvariate(0, MODEL_ERROR)  # of all times alike, so not of efficiencies
        between = link(hierarchy.between, cluster.between.error, whole)
        inside = link(hierarchy.inside, (cluster.inside or cluster.between).error, whole)
        most = compute.spread if device.unlike else max(compute.spread, PAPER_SPREAD)
        spread = chance.uniform(compute.spread, most)
        times = compute.scaled(whole * chance.lognormvariate(0, device.error))
        draws.append(_Draw(replace(hierarchy, between=between, inside=inside), replace(times, spread=spread)))
    return draws


def _estimate(values: Sequence[float]) -> Estimate:
    """The first is the forecast; the middle 90 % of all, widened to hold it."""
    ordered = sorted(values)
    cut = round(0.05 * (len(ordered) - 1))
    value = values[0]
    return Estimate(value=value, low=min(value, ordered[cut]), high=max(value, ordered[-1 - cut]))


def _same_run(run: Run, cluster: ClusterProfile, gpus: int, steps: Sequence[StepTimes]) -> SameRun:
    step = _estimate([one.seconds for one in steps])
    total = step.times(run.steps)
    return SameRun(
        gpus=gpus,
        step=step,
        total=total,
        gpu_hours=total.times(gpus / 3600),
        price=_price(total, gpus, cluster),
    )


def _price(total: Estimate, gpus: int, cluster: ClusterProfile) -> Estimate | None:
    """Whole hosts are paid for."""
    if cluster.price_per_gpu_hour is None:
        return None
    paid = -(-gpus // cluster.gpus_per_host) * cluster.gpus_per_host
    return total.times(paid / 3600 * cluster.price_per_gpu_hour)


def _bandwidth_factor(draw: _Draw, cluster: ClusterProfile, algorithm: str, gpus: int) -> float | None:
    """By how much links had to have more bandwidth for the exchange to cost less than 1 % of a step; 1: it does."""

    def hidden(factor: float) -> bool:
        def faster(link: Link) -> Link:
            return replace(link, beta=link.beta / factor)

        hierarchy = draw.hierarchy
        links = replace(hierarchy, between=faster(hierarchy.between), inside=faster(hierarchy.inside))
        step = _step(replace(draw, hierarchy=links), cluster, algorithm, gpus, 1, None)
        return step.exposed <= _HIDDEN * step.seconds

    if hidden(1.0):
        return 1.0
    if not hidden(1e6):
        return None
    low, high = 0.0, 6.0  # powers of ten
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if hidden(10**middle) else (middle, high)
    return float(10**high)
