"""PyTorch's DistributedDataParallel over Gloo, as its documentation has it.

With {"compress": "fp16"} in HVD_LB_BENCH, with its hook for that.
"""

import json
import os
from collections.abc import Callable

import torch.distributed as dist
from steps import Case, network, plain_step, sgd, time_cases
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel


def make(case: Case) -> Callable[[], object]:
    model = DistributedDataParallel(network(case))
    if "compress" in json.loads(os.environ.get("HVD_LB_BENCH", "{}")):
        model.register_comm_hook(None, fp16_compress_hook)
    return plain_step(case, model, sgd(model))


dist.init_process_group("gloo")
time_cases(make, dist.get_rank())
dist.destroy_process_group()
