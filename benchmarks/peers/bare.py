"""The network's own work and torch's SGD in each of two processes, and no exchange: what no trainer can beat."""

import os
from collections.abc import Callable

from steps import Case, network, plain_step, sgd, time_cases


def make(case: Case) -> Callable[[], object]:
    model = network(case)
    return plain_step(case, model, sgd(model))


time_cases(make, int(os.environ["RANK"]))
