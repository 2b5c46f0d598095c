"""From what was measured to profiles. Of a network: α by round trips of links, β and the engine's part by allreduces.

An allreduce of b bytes between p processes takes o + 2 (p − 1) α + 2 (p − 1) / p · b β by the ring that Gloo and NCCL
have. Of its line over b, one number of processes gives o + 2 (p − 1) α together; the links were also measured by
themselves, and so α is known apart and o is what is left: the engine's negotiation.
"""

from __future__ import annotations

import statistics

from hvd_lb.errors import UserError
from hvd_lb.forecast.collectives import ring
from hvd_lb.forecast.measured import MeasuredCompute
from hvd_lb.forecast.profile import ClusterProfile, DeviceProfile, LinkProfile
from hvd_lb.network.alpha_beta import fit
from hvd_lb.network.measure import NetworkReport
from hvd_lb.recipe import Recipe

_LEAST_ERROR = 0.02  # the machine has hiccups that a straight line through five sizes may not show


def fit_cluster(report: NetworkReport, *, name: str, cores: int, when: str) -> ClusterProfile:
    """The profile of the hosts that were measured; with one host, each of its processes counts as a host.

    With several processes a host all of the time counts as between hosts, and nothing as inside. UserError where the
    allreduces are too few for a line.
    """
    hosts = max(1, len(report.hosts))
    several = hosts > 1 and report.processes % hosts == 0
    servers, per_host = (hosts, report.processes // hosts) if several else (report.processes, 1)
    if len(report.allreduces) < 2:
        raise UserError(
            "the network is too slow for two sizes of allreduces, so its latency and bandwidth cannot be told apart"
        )
    sizes, seconds = zip(*report.allreduces, strict=True)
    line = fit(sizes, seconds)
    whole = ring(servers, 1.0)
    latencies = [late for _, _, late in report.latencies]
    alpha = statistics.median(latencies) if latencies and several else line.alpha / whole.steps
    alpha = min(alpha, line.alpha / whole.steps)
    if line.beta <= 0:
        raise UserError(
            "larger allreduces did not take longer: the network's bandwidth cannot be told; measure again"
        )
    bandwidth = whole.wire / line.beta  # bytes a second
    by_links = (
        "half a round trip over TCP, the median of the links"
        if latencies and several
        else "by allreduces alone"
    )
    sources = {
        "gpus_per_host": "as started",
        "cores_per_host": "as hosts say",
        "between.latency_us": f"measured {when}: {by_links}",
        "between.bandwidth_gbit_s": f"measured {when}: allreduces of {len(sizes)} sizes, {report.processes} processes",
        "between.error": f"measured {when}: root mean square of the line's relative deviations, at least 2 %",
        "overhead_us": f"measured {when}: what these allreduces take besides their steps",
        "exchange_slowdown": f"measured {when}: allreduces with and without computing beside them",
        "compute_slowdown": f"measured {when}: computing with and without allreduces beside it",
        "cycle_ms": "the engine's, as a run has it",
    }
    inside = None
    if per_host > 1:
        inside = LinkProfile(latency_us=0.0, bandwidth_gbit_s=1e6, error=0.0)
        sources |= dict.fromkeys(
            ("inside.latency_us", "inside.bandwidth_gbit_s", "inside.error"), "not told apart: see between"
        )
    return ClusterProfile(
        name=name,
        description=f"{servers} {'hosts' if several else 'processes on one host'}, {report.device}, measured {when}",
        gpus_per_host=per_host,
        between=LinkProfile(
            latency_us=1e6 * alpha,
            bandwidth_gbit_s=8e-9 * bandwidth,
            error=min(1.0, max(_LEAST_ERROR, line.error)),
        ),
        inside=inside,
        cycle_ms=report.cycle_ms,
        exchange_slowdown=report.exchange_slowdown,
        compute_slowdown=report.compute_slowdown,
        overhead_us=max(0.0, 1e6 * (line.alpha - whole.steps * alpha)),
        cores_per_host=cores,
        sources=sources,
    )


def with_loader(cluster: ClusterProfile, images_per_second: float, how: str) -> ClusterProfile:
    """The same cluster, whose hosts load so many."""
    sources = {**cluster.sources, "loader_images_s": how}
    return cluster.model_copy(update={"loader_images_s": images_per_second, "sources": sources})


def fit_device(recipe: Recipe, parts: MeasuredCompute, *, name: str, where: str) -> DeviceProfile:
    """What was measured of the device here, for forecasts elsewhere."""
    compute, how = (
        parts.compute,
        f"measured on {where}, {parts.microbatches} microbatches of {parts.images} images",
    )
    return DeviceProfile(
        name=name,
        description=where,
        model=recipe.model,
        image_size=recipe.image_size,
        per_gpu_batch=recipe.per_gpu_batch,
        precision=recipe.precision,
        microbatch_ms=1000 * compute.seconds,
        backward_ms=1000 * compute.backward,
        update_ms=1000 * compute.update,
        spread=min(1.0, compute.spread),
        error=min(1.0, parts.error),
        sources=dict.fromkeys(("microbatch_ms", "backward_ms", "update_ms", "spread", "error"), how),
    )
