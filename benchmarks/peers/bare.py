"""The network's work and torch's SGD in each of two processes, without exchange or data: what no trainer can beat."""

import os
from collections.abc import Callable

import steps
from steps import Case, network, plain_step, sgd, time_cases


def make(case: Case) -> Callable[[], object]:
    model = network(case)
    return plain_step(case, model, sgd(model))


steps.PICTURES = None
time_cases(make, int(os.environ["RANK"]))
