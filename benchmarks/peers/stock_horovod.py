"""Horovod's own DistributedOptimizer, as its documentation has it."""

import itertools
from collections.abc import Callable

import horovod.torch as hvd
from steps import Case, network, plain_step, sgd, time_cases

made = itertools.count()


def make(case: Case) -> Callable[[], object]:
    model, number = network(case), next(made)
    names = [(f"{number}.{name}", p) for name, p in model.named_parameters()]
    optimizer = hvd.DistributedOptimizer(sgd(model), named_parameters=names)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return plain_step(case, model, optimizer)


hvd.init()
time_cases(make, hvd.rank())
hvd.shutdown()
