"""NVIDIA GPUs as the driver's library (NVML) lists them: without torch, and without a context on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: The variables by which a process is shown some of a machine's GPUs.
SHOWN_BY = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


def gpus(environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a process with this environment sees, in its order, as JSON values; empty without a driver.

    Of each `name`, `uuid`, `bus` (its PCI address, such as 0000:17:00.0), `total` and `used` memory in bytes, the
    number of compute `processes`, and `mig`, whether it is one that is divided into instances, or one of these.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, or none of its library
        return []
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip().startswith("MIG-"):  # of several, CUDA takes the first
        return [
            {
                "name": "MIG instance",
                "uuid": visible,
                "bus": "",
                "total": 0,
                "used": 0,
                "processes": 0,
                "mig": True,
            }
        ]
    order = in_order(visible, [pynvml.nvmlDeviceGetUUID(handle) for handle in handles])
    return [_describe(pynvml, handles[index]) for index in order]


def gpu_in_words(index: int, environment: Mapping[str, str]) -> str:
    """`GPU 1 (0000:17:00.0)`: of those that a process with this environment sees, and where it is on its host."""
    there = gpus(environment)
    where = there[index]["bus"] or there[index]["uuid"] if index < len(there) else ""
    return f"GPU {index} ({where})" if where else f"GPU {index}"


def _describe(nvml: Any, handle: Any) -> dict[str, Any]:
    def ask(question: Any, unknown: Any) -> Any:
        try:
            return question(handle)
        except nvml.NVMLError:  # not for this kind of GPU, or not allowed
            return unknown

    memory = ask(nvml.nvmlDeviceGetMemoryInfo, None)
    return {
        "name": nvml.nvmlDeviceGetName(handle),
        "uuid": nvml.nvmlDeviceGetUUID(handle),
        "bus": nvml.nvmlDeviceGetPciInfo(handle).busId.lower()[-12:],
        "total": memory.total if memory else 0,
        "used": memory.used if memory else 0,
        "processes": len(ask(nvml.nvmlDeviceGetComputeRunningProcesses, ())),
        "mig": ask(nvml.nvmlDeviceGetMigMode, [0])[0] == nvml.NVML_DEVICE_MIG_ENABLE,
    }


def in_order(visible: str | None, uuids: Sequence[str]) -> list[int]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order: numbers or beginnings of UUIDs, with commas between.

    As CUDA reads it: what follows a name that no GPU has is left out.
    """
    if visible is None:
        return list(range(len(uuids)))
    order: list[int] = []
    for name in map(str.strip, visible.split(",")):
        named = [
            i
            for i, uuid in enumerate(uuids)
            if name == str(i) or (name[:4] == "GPU-" and uuid.startswith(name))
        ]
        if not named or named[0] in order:
            break
        order.append(named[0])
    return order
