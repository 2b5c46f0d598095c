"""What a process sees of a machine's GPUs; a pretended driver stands for one."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hvd_lb.machine.gpus import gpu_in_words, gpus, in_order


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 0", [1, 0]),
        ("GPU-b", [1]),
        ("GPU-a,GPU-c1", [0, 2]),
        ("x", []),
        ("NoDevFiles", []),
        ("1,-1,0", [1]),  # CUDA stops at the first that is not there
        ("1,7,0", [1]),
        ("1,1", [1]),
    ],
)
def test_gpus_are_shown_by_cuda_visible_devices(visible: str | None, expected: list[int]) -> None:
    assert in_order(visible, ["GPU-a0", "GPU-b0", "GPU-c1"]) == expected


class Refused(Exception):
    pass


def driver(**changes: Any) -> Any:
    """Of two GPUs, as pynvml tells of them."""
    told = {
        "NVMLError": Refused,
        "NVML_DEVICE_MIG_ENABLE": 1,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetName": lambda handle: f"H10{handle}",
        "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(busId=f"00000000:{handle}A:00.0"),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=80, used=1),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [],
        "nvmlDeviceGetMigMode": lambda handle: [handle, 0],
    }
    return SimpleNamespace(**{**told, **changes})


def refuse(handle: int) -> Any:
    raise Refused


def test_they_are_told_in_the_order_of_the_ranks_that_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    assert [(gpu["name"], gpu["bus"], gpu["mig"]) for gpu in gpus({"CUDA_VISIBLE_DEVICES": "1,0"})] == [
        ("H101", "0000:1a:00.0", True),
        ("H100", "0000:0a:00.0", False),
    ]
    assert gpu_in_words(0, {"CUDA_VISIBLE_DEVICES": "1,0"}) == "GPU 0 (0000:1a:00.0)"
    assert gpu_in_words(2, {}) == "GPU 2"


def test_what_a_driver_does_not_tell_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "pynvml", driver(nvmlDeviceGetMemoryInfo=refuse, nvmlDeviceGetMigMode=refuse)
    )
    first, _ = gpus({})
    assert (first["used"], first["mig"]) == (0, False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus({}) == []


def test_of_mig_instances_a_process_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    (instance,) = gpus({"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"})
    assert instance["mig"]
    assert gpu_in_words(0, {"CUDA_VISIBLE_DEVICES": "MIG-1"}) == "GPU 0 (MIG-1)"
