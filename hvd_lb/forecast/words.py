"""A forecast in sentences: rows for a terminal or a page, and what it recommends."""

from __future__ import annotations

from hvd_lb.forecast.predict import Estimate, Forecast, SameRun
from hvd_lb.report.text import count, duration

_WORTH = 0.75  # from this efficiency on, GPUs are used well
_FEW_FAILURES = 0.001
_LITTLE = 0.02  # a share of a step that is not worth a word


def rows(forecast: Forecast) -> list[tuple[str, str]]:
    """What is foretold, as (topic, sentence)."""
    f = forecast
    found = [
        ("forecast", f"{count(f.gpus, 'GPU')} of {f.cluster} by {f.algorithm}; device times: {f.device}"),
        ("a step", f"{_seconds(f.step)}; {100 * f.utilisation:.0f} % of it the GPU computes"),
        ("speed", f"{f.images_per_second.value:,.0f} images/s ({_numbers(f.images_per_second)})"),
        ("efficiency", efficiency(f)),
        ("an epoch", _seconds(f.epoch)),
        ("the whole run", _seconds(f.total)),
        ("what limits", limits(f)),
    ]
    found += [("by algorithm", line) for line in by_algorithm(f)]
    if f.loader_measured:
        enough = (
            "enough"
            if f.loader_measured >= f.loader_needed
            else f"{f.loader_needed / f.loader_measured:.1f} times as many are needed"
        )
        found.append(
            (
                "loading",
                f"{f.loader_needed:,.0f} images/s are needed on each host, {f.loader_measured:,.0f} known: {enough}",
            )
        )
    else:
        found.append(
            (
                "loading",
                f"{f.loader_needed:,.0f} images/s are needed on each host; what a host there loads is not known",
            )
        )
    if f.memory is not None and f.device_memory is not None:
        found.append(
            (
                "memory",
                f"{f.memory / 1e9:.1f} GB measured on one device, of {f.device_memory / 1e9:.0f} GB there",
            )
        )
    elif f.device_memory is not None:
        found.append(
            (
                "memory",
                f"{f.device_memory / 1e9:.0f} GB a GPU there; what a step needs is only known where a GPU took it",
            )
        )
    if f.failures is not None and f.failures_cost is not None and f.failures_cost_elastic is not None:
        expected = f"{f.failures:.2g}" if f.failures >= _FEW_FAILURES else f"fewer than {_FEW_FAILURES:g}"
        found.append(
            (
                "failures",
                f"{expected} expected in the run; going back to checkpoints costs {duration(f.failures_cost)} in "
                f"all, going on without the lost ranks {duration(f.failures_cost_elastic)} (2 min and 30 s assumed to "
                "start again)",
            )
        )
    if f.price is not None:
        found.append(("price", f"{f.price.value:,.2f} ({_numbers(f.price, ',.2f')})"))
    if f.paper:
        points = ", ".join(f"{gpus} GPUs {1000 * seconds:.0f} ms" for gpus, seconds in f.paper)
        found.append(("the paper", f"ResNet-50 with n = 32 on P100: a step on {points}"))
    found.append(("recommended", recommendation(f)))
    return found


def efficiency(f: Forecast) -> str:
    """Of one GPU, and as the paper has it, of one whole host."""
    if f.gpus == 1:
        return "one GPU"
    said = f"{_per_cent(f.efficiency)} of {f.gpus:,} times one GPU"
    if 1 < f.gpus_per_host < f.gpus:
        host = next(point for point in f.scaling[f.algorithm] if point.gpus == f.gpus_per_host)
        hosts = f.gpus / f.gpus_per_host
        said += f", {100 * f.efficiency.value / host.efficiency.value:.0f} % of {hosts:g} times a host"
    return said


def limits(f: Forecast) -> str:
    """What the GPUs wait for, and how much of it would mend it."""
    parts = {
        "computing": f.share.compute,
        "waiting for the slowest GPU": f.share.slowest,
        "waiting for the network": f.share.network,
        "waiting for images": f.share.data,
    }
    largest = max(parts, key=lambda name: parts[name])
    said = [
        f"{name} {100 * seconds / f.step.value:.0f} %"
        for name, seconds in parts.items()
        if seconds > _LITTLE * f.step.value or name == largest
    ]
    mend = []
    if f.share.network > _LITTLE * f.step.value:
        mend.append(
            f"{f.bandwidth_factor:.1f} times the bandwidth would hide the exchange"
            if f.bandwidth_factor
            else "no bandwidth would hide the exchange, whose latencies add up: fewer GPUs or another algorithm would"
        )
    if f.share.data > _LITTLE * f.step.value:
        mend.append(f"{f.loader_needed:,.0f} images/s on each host would spare the wait for images")
    if not mend:
        mend.append("only faster GPUs would change much")
    return f"{', '.join(said)}; {', and '.join(mend)}"


def by_algorithm(f: Forecast) -> list[str]:
    """A line for each algorithm: the efficiency from one GPU to all."""
    lines = []
    for name, points in f.scaling.items():
        shown = ", ".join(f"{point.gpus:,}: {100 * point.efficiency.value:.0f} %" for point in points)
        lines.append(f"{name}: {shown}")
    return lines


def recommendation(f: Forecast) -> str:
    """How many GPUs for this run, in words."""
    if f.gpus == 1:
        return "one GPU: nothing to choose"
    best = max(f.scaling, key=lambda name: f.scaling[name][-1].efficiency.value)
    gain = f.scaling[best][-1].efficiency.value / f.efficiency.value - 1
    another = (
        f" {best} would be {100 * gain:.0f} % faster than {f.algorithm}."
        if best != f.algorithm and gain > 0.03
        else ""
    )
    whole = f.same_run[-1]
    well = [run for run in f.same_run if _used(run, f) >= _WORTH]
    most = well[-1] if well else f.same_run[0]
    price = f", for {most.price.value:,.2f}" if most.price else ""
    if most.gpus == whole.gpus:
        half = f.same_run[-2]
        return (
            f"all {f.gpus:,} GPUs: {duration(whole.total.value)}{price}, {100 * _used(whole, f):.0f} % of one host's "
            f"efficiency. {half.gpus:,} would take {duration(half.total.value)}.{another}"
        )
    return (
        f"{count(most.gpus, 'GPU')} for the same run and the same weights: {duration(most.total.value)}{price}, "
        f"{100 * _used(most, f):.0f} % of one host's efficiency. All {f.gpus:,} take {duration(whole.total.value)} "
        f"at {100 * _used(whole, f):.0f} %.{another}"
    )


def without_cluster() -> tuple[str, str]:
    """What is said where no cluster is named."""
    return (
        "on a cluster",
        "name one for its time, efficiency and cost: --cluster big-basin, dgx-a100, dgx-h100, … or a file that "
        "`hvd-lb measure` writes",
    )


def _used(run: SameRun, f: Forecast) -> float:
    """Of what a host's GPUs do in this time, the share that these do each."""
    host = min(f.gpus, f.gpus_per_host)
    return next(one for one in f.same_run if one.gpus == host).gpu_hours.value / run.gpu_hours.value


def _seconds(of: Estimate) -> str:
    return f"{duration(of.value)} ({duration(of.low)} to {duration(of.high)})"


def _numbers(of: Estimate, form: str = ",.0f") -> str:
    return f"{of.low:{form}} to {of.high:{form}}"


def _per_cent(of: Estimate) -> str:
    return f"{100 * of.value:.0f} % ({100 * of.low:.0f} to {100 * of.high:.0f})"
