"""Real processes that torch.distributed connects; what is asked of every engine is in tests/optim/ranks/checks.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hvd_lb.errors import ExchangeError
from hvd_lb.world.lines import Lines
from hvd_lb.world.torch_distributed import TorchHandle

RANK = Path(__file__).parent / "ranks" / "world_of_torch.py"
pytestmark = pytest.mark.slow


def start(count: int, *arguments: str, **variables: str) -> list[subprocess.Popen[str]]:
    """The processes of a job that nobody watches, so that each of them ends as it does by itself."""
    return [
        subprocess.Popen(
            [sys.executable, RANK, *arguments],
            env={
                **os.environ,
                **variables,
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out + err) for process, (out, err) in zip(processes, said, strict=True)]


def test_left_and_joined_again(torchrun: Callable) -> None:
    job = torchrun(RANK, 2, "again")
    assert job.returncode == 0, job.output
    assert job.output.count("again and again") == 2


def test_a_rank_that_is_killed_is_an_error_of_the_others(rendezvous: Any) -> None:
    (_, first), (status, _), (_, third) = ended(start(3, "killed", **rendezvous.environment()))
    assert status == -signal.SIGKILL
    for said in (first, third):
        assert said.splitlines()[-1].startswith("hvd_lb.errors.ExchangeError: sum: another process has ended")


def test_a_rank_that_raises_in_the_middle_of_an_exchange_ends_at_once(rendezvous: Any) -> None:
    (_, first), (status, second) = ended(start(2, "raises", **rendezvous.environment()))
    assert status == 1
    assert "RuntimeError: mine" in second
    assert second.splitlines()[-1] == "rank 1 ends in the middle of an exchange with the others"
    assert "ExchangeError: another sum: another process has ended" in first


def test_who_does_not_come_is_named(rendezvous: Any) -> None:
    *here, absent = start(3, "short patience", **rendezvous.environment())
    absent.kill()
    (_, said), *_ = ended([*here, absent])
    assert "UserError: " in said
    assert "of 3 ranks did not come within 1 s: " in said
    assert "2; where RANK and WORLD_SIZE's variables are left from another job, unset them" in said


def test_what_was_aborted_is_an_error_though_it_ends_without_one() -> None:
    """As NCCL's does: its kernel ends, with anything in the tensor. What had ended before is what it is."""
    ends = SimpleNamespace(is_completed=lambda: lines.are_cut, wait=lambda: True)
    ended = SimpleNamespace(is_completed=lambda: True, wait=lambda: True)
    lines = Lines()
    early, late = (TorchHandle(torch.ones(1), "sum", lines, aborted=True) for _ in range(2))
    early.begin(lambda: cast(Any, ended))
    late.begin(lambda: cast(Any, ends))
    assert early.wait().item() == 1
    assert not late.done
    lines.cut()
    assert late.done
    with pytest.raises(ExchangeError, match="sum: another process has ended"):
        late.wait()
