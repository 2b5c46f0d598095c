"""One training step as events: forward and backward, buckets that become full, the exchange, the update, loading.

The exchange is what `optim/distributed` does: a bucket is handed over when backward has filled it, the engine looks
for such buckets every cycle and sums them one after the other, and the update waits for the last one (the paper,
section 4: communication runs in parallel with backward). Cycles begin at any moment of a step: an idle engine sees a
bucket half a cycle later on average. While both go on, backward and an exchange may slow each other down, as on hosts
where they share cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist


@dataclass(frozen=True)
class Filled:
    """A bucket: its bytes, and the seconds after the beginning of backward at which it is full."""

    size: int
    after: float


@dataclass(frozen=True)
class Compute:
    """What a device takes for one microbatch, in seconds. `spread` is the relative standard deviation between them."""

    forward: float
    backward: float
    update: float
    buckets: tuple[Filled, ...]
    images: int
    spread: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.update

    def scaled(self, factor: float) -> Compute:
        """The same on a device that takes `factor` times as long."""
        return replace(
            self,
            forward=self.forward * factor,
            backward=self.backward * factor,
            update=self.update * factor,
            buckets=tuple(Filled(bucket.size, bucket.after * factor) for bucket in self.buckets),
        )


@dataclass(frozen=True)
class Span:
    lane: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class StepTimes:
    """Of one step, in seconds. `exposed` is how long the device waits for the network, `data_wait` for images."""

    seconds: float
    compute: float
    exposed: float
    data_wait: float
    network: float
    spans: tuple[Span, ...]

    @property
    def utilisation(self) -> float:
        """The share of the step in which the device computes."""
        return self.compute / self.seconds


def simulate_step(
    compute: Compute,
    microbatches: int,
    exchange: Callable[[int], float],
    *,
    wait: float = 0.0,
    loading: float = 0.0,
    exchange_slowdown: float = 1.0,
    compute_slowdown: float = 1.0,
) -> StepTimes:
    """`exchange` is the seconds for a bucket of so many bytes, `wait` those until an idle engine sees it.

    `loading` are those for the images of the next step, which goes on beside the step, ahead of it. Beside backward an
    exchange takes `exchange_slowdown` times as long, and backward beside an exchange `compute_slowdown` times. Only the
    last of several microbatches fills buckets.
    """
    spans: list[Span] = []
    now = (microbatches - 1) * (compute.forward + compute.backward)
    if now:
        spans.append(Span("device", f"{microbatches - 1} microbatches before", 0.0, now))
    began = now + compute.forward
    spans.append(Span("device", "forward", now, began))
    free, left, busy = began, compute.backward, 0.0  # `left` of backward, when the network is free
    ended = began + left
    full = sorted((bucket.after, number, bucket.size) for number, bucket in enumerate(compute.buckets))
    for after, number, size in full:
        seconds = exchange(size)
        if not seconds:
            continue
        start = free
        if not busy or compute.backward - left < after:  # an idle engine; a busy one goes on at once
            start = max(free, ended - (compute.backward - after) + wait)
            left = max(0.0, ended - start)
        both = min(seconds * exchange_slowdown, left * compute_slowdown)
        free = start + both + (seconds - both / exchange_slowdown)
        left -= both / compute_slowdown
        ended += both - both / compute_slowdown
        busy += free - start
        spans.append(Span("network", f"bucket {number} ({size / 1e6:.1f} MB)", start, free))
    spans.append(Span("device", "backward", began, ended))
    now = ended
    exposed = max(0.0, free - now)
    if exposed:
        spans.append(Span("device", "waits for the network", now, now + exposed))
    now += exposed
    spans.append(Span("device", "update", now, now + compute.update))
    now += compute.update
    if loading:
        spans.append(Span("loader", "images of the next step", 0.0, loading))
    data_wait = max(0.0, loading - now)
    if data_wait:
        spans.append(Span("device", "waits for images", now, loading))
    computed = now - exposed
    return StepTimes(now + data_wait, computed, exposed, data_wait, busy, tuple(spans))


def slowest_of(devices: int) -> float:
    """By how many standard deviations the slowest of so many devices is expected to be late (Blom 1958)."""
    return 0.0 if devices == 1 else NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))


def trace_events(spans: tuple[Span, ...]) -> dict[str, object]:
    """As chrome://tracing and Perfetto read them."""
    lanes = list(dict.fromkeys(span.lane for span in spans))
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [
            *(
                {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": lane}}
                for number, lane in enumerate(lanes)
            ),
            *(
                {
                    "name": span.name,
                    "cat": span.lane,
                    "ph": "X",
                    "pid": 0,
                    "tid": lanes.index(span.lane),
                    "ts": 1e6 * span.start,
                    "dur": 1e6 * (span.end - span.start),
                }
                for span in spans
            ),
        ],
    }
