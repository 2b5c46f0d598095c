"""A job of Horovod in processes forked from one that has loaded it. Their environments are on standard input.

Each meets the others, adds up with them, leaves and meets them again.
"""

from __future__ import annotations

import json
import os
import sys

import horovod.torch as hvd
import torch


def main() -> int:
    environments = json.loads(sys.stdin.read())
    pids = [fork(environment) for environment in environments]
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


def fork(environment: dict[str, str]) -> int:
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.environ.update(environment)
        for _ in range(2):
            hvd.init()
            total = hvd.allreduce(torch.ones(1), op=hvd.Sum, name="all").item()
            assert total == hvd.size() == int(environment["HOROVOD_SIZE"])
            hvd.shutdown()
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
