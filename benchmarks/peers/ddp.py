"""PyTorch's DistributedDataParallel over Gloo, as its documentation has it."""

from collections.abc import Callable

import torch.distributed as dist
from steps import Case, network, plain_step, sgd, time_cases
from torch.nn.parallel import DistributedDataParallel


def make(case: Case) -> Callable[[], object]:
    model = DistributedDataParallel(network(case))
    return plain_step(case, model, sgd(model))


dist.init_process_group("gloo")
time_cases(make, dist.get_rank())
dist.destroy_process_group()
