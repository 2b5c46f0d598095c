"""Horovod's own DistributedOptimizer, as its documentation has it.

With {"compress": "fp16"} in HVD_LB_BENCH, with its compression.
"""

import itertools
import json
import os
from collections.abc import Callable

import horovod.torch as hvd
from steps import Case, network, plain_step, sgd, time_cases

made = itertools.count()
compressed = "compress" in json.loads(os.environ.get("HVD_LB_BENCH", "{}"))


def make(case: Case) -> Callable[[], object]:
    model, number = network(case), next(made)
    names = [(f"{number}.{name}", p) for name, p in model.named_parameters()]
    compression = hvd.Compression.fp16 if compressed else hvd.Compression.none
    optimizer = hvd.DistributedOptimizer(sgd(model), named_parameters=names, compression=compression)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return plain_step(case, model, optimizer)


hvd.init()
time_cases(make, hvd.rank())
hvd.shutdown()
