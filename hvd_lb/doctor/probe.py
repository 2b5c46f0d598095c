"""What a library is and can do, as JSON: `python -m hvd_lb.doctor.probe torch|torchvision|horovod|dali|gpus`."""

import importlib
import json
import sys
from importlib import metadata
from typing import Any


def torch() -> dict[str, Any]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        with torch.cuda.device(index):
            total = float((torch.ones(1024, device="cuda") + 1).sum())  # fails when no kernel fits the GPU
        devices.append({"name": torch.cuda.get_device_name(index), "works": total == 2048})
    return {"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices}


def torchvision() -> dict[str, Any]:
    import torch
    import torchvision

    # Its operators are missing when it was built for another torch.
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    return {"version": torchvision.__version__}


def horovod() -> dict[str, Any]:
    import horovod
    import horovod.torch as hvd

    # horovod.torch only prints a line when its library does not load; importing that says why.
    importlib.import_module("horovod.torch.mpi_lib_v2")

    return {
        "version": horovod.__version__,
        "gloo": bool(hvd.gloo_built()),
        "mpi": bool(hvd.mpi_built()),
        "nccl": bool(hvd.nccl_built()),
    }


def dali() -> dict[str, Any]:
    import numpy as np
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    from hvd_lb.data.loading.nvjpeg import load_nvjpeg

    pipeline = Pipeline(batch_size=2, num_threads=1, device_id=None)
    with pipeline:
        numbers = fn.external_source(source=lambda: np.full((2, 1), 21, np.int32), batch=True)
        pipeline.set_outputs(numbers * 2)
    (result,) = pipeline.run()
    version = metadata.version("nvidia-dali-cuda130")
    works = np.asarray(result.as_cpu().as_array()).tolist() == [[42], [42]]
    return {"version": version, "works": works, "nvjpeg": load_nvjpeg()}


def gpus() -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    version = pynvml.nvmlSystemGetCudaDriverVersion()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return {
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "cuda": f"{version // 1000}.{version % 1000 // 10}",
        "names": [pynvml.nvmlDeviceGetName(handle) for handle in handles],
        "gib": [pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30 for handle in handles],
    }


PROBES = {"torch": torch, "torchvision": torchvision, "horovod": horovod, "dali": dali, "gpus": gpus}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))
