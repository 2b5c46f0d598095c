"""Optimizers for large minibatches: momentum SGD in both of the paper's forms, and DistributedOptimizer."""

from hvd_lb.optim.distributed import DistributedOptimizer
from hvd_lb.optim.groups import parameter_groups
from hvd_lb.optim.sgd import SGD

__all__ = ["SGD", "DistributedOptimizer", "parameter_groups"]
