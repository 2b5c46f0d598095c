"""The CPU: its cores, its name and its instruction sets. Imports nothing heavy, so that probes can ask."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hvd_lb.machine.limits import cpu_quota

#: Variables by which libraries take other kernels, and so round otherwise. All processes of a run have the same.
KERNEL_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
)

# Instruction sets by which kernels are chosen.
_FEATURES = ("sse", "ssse", "avx", "fma", "f16c", "amx", "bmi", "asimd", "sve")

# One of these sets is what oneDNN needs for its kernels in half precision; it needs nothing for fp32.
_HALF_NEEDS = {
    "bf16": ({"avx512bw", "avx512vl", "avx512dq"}, {"avx_ne_convert"}),
    "fp16": ({"avx512_fp16"}, {"avx_ne_convert"}),
}


def usable_cores() -> int:
    """Cores this process may run on, and no more than the CPU time that its container gets."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else min(cores, math.ceil(quota))


def describe_cpu() -> dict[str, Any]:
    """This machine's processor, as environment.json has it; kernels are chosen by its features."""
    return {
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "cores": usable_cores(),
    }


def kernel_variables() -> dict[str, str]:
    """Those of `KERNEL_VARIABLES` that are set."""
    return {name: os.environ[name] for name in KERNEL_VARIABLES if os.environ.get(name)}


def computes_by(cpu: Mapping[str, Any], gpus: Collection[str]) -> dict[str, Any]:
    """What of a host rounding depends on, by its `describe_cpu`, with KERNEL_VARIABLES where its processes have some of
    their own, and the names of the GPUs that compute.
    """
    names = ("machine", "cpu_features", "cpu_capability", *KERNEL_VARIABLES)
    return {
        **{name: cpu[name] for name in names if name in cpu},
        "device": " and ".join(sorted({*gpus})) or "cpu",
    }


def cpu_features() -> list[str]:
    """The vector instruction sets of this CPU, as Linux names them; empty where it does not say."""
    lines = cpu_info().splitlines()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(flag for flag in line.partition(":")[2].split() if flag.startswith(_FEATURES))


def is_slow_in(precision: str, cpu: Mapping[str, Any]) -> bool:
    """Whether torch computes `precision` without oneDNN on the x86 CPU of this `describe_cpu`: many times slower."""
    features = {*cpu.get("cpu_features", ())}
    if cpu.get("machine") != "x86_64" or not features or precision not in _HALF_NEEDS:
        return False
    return not any(features >= needed for needed in _HALF_NEEDS[precision])


def cpu_info() -> str:
    """Linux's description of the CPUs, empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def cpu_name() -> str:
    """As its maker names it."""
    names = (
        line.partition(":")[2].strip() for line in cpu_info().splitlines() if line.startswith("model name")
    )
    return next(names, platform.processor() or "unknown")
