"""Sums of real processes in memory that all of them see; DistributedOptimizer on top of it: optim/test_processes.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_torch_distributed import ended

RANK = Path(__file__).parent / "ranks" / "in_memory.py"
pytestmark = pytest.mark.slow
LAUNCHERS = {"horovod": "horovodrun", "torch": "torchrun"}


@pytest.mark.parametrize(
    ("engine", "what", "processes"),
    [
        ("horovod", "sums", 3),
        ("torch", "sums", 2),
        ("torch", "sums", 5),
        ("torch", "memory_is_given_back", 2),
        ("torch", "threads", 2),
        ("torch", "forked", 2),
        ("horovod", "elsewhere", 3),
        ("torch", "elsewhere", 2),
        ("torch", "late", 3),
        ("torch", "found_by_two_threads", 3),
        ("torch", "interrupted", 2),
        ("torch", "waiting_threads", 2),
        ("horovod", "nobody_waits", 2),
        ("torch", "sent_to_others", 2),
        ("torch", "again", 2),
        ("horovod", "again", 2),
    ],
)
def test_of_processes(request: pytest.FixtureRequest, engine: str, what: str, processes: int) -> None:
    job = request.getfixturevalue(LAUNCHERS[engine])(RANK, processes, engine, what)
    assert job.returncode == 0, job.output
    assert job.output.count("ended as it should") == processes


def test_sums_of_unequal_numbers_are_refused_on_all(torchrun: Callable) -> None:
    job = torchrun(RANK, 2, "torch", "unequal")
    assert job.returncode == 0, job.output
    for rank, (own, other) in enumerate(((1000, 1001), (1001, 1000))):
        assert (
            f"rank {rank}: room: rank {1 - rank} adds up {other:,} numbers of torch.float32, rank {rank} {own:,} of "
            "torch.float32" in job.output
        )


def test_where_descriptors_are_few(torchrun: Callable) -> None:
    job = torchrun(RANK, 2, "torch", "few_descriptors")
    assert job.returncode == 0, job.output
    told = "no memory in common for 10 numbers ([Errno 24] Too many open files): raise the limit (ulimit), or set"
    assert job.output.count(told) == 2


def test_who_ends_in_the_middle_of_an_exchange_says_so(rendezvous: Any) -> None:
    (status, said), (other, _) = ended(start("ends_early", rendezvous, [{}] * 2))
    assert (status, other) == (1, 0)
    assert said == "rank 0 ends in the middle of an exchange with the others\n"


@pytest.mark.parametrize("engine", LAUNCHERS)
def test_where_one_cannot_look_into_others_all_take_the_engine(
    request: pytest.FixtureRequest, engine: str
) -> None:
    job = request.getfixturevalue(LAUNCHERS[engine])(RANK, 3, engine, "by_engine", "blind")
    assert job.returncode == 0, job.output
    for rank in range(3):
        assert f"rank {rank} has a {engine.title()}World" in job.output
    told = "sums go through the engine, as processes have no memory in common: not into others"
    assert job.output.count(told) == 1


def test_where_one_is_not_to_all_take_the_engine(rendezvous: Any) -> None:
    environments = [{"HVD_LB_SHARED_MEMORY": "0"} if rank == 1 else {} for rank in range(3)]
    for rank, (status, said) in enumerate(ended(start("by_engine", rendezvous, environments))):
        assert (status, said) == (0, f"rank {rank} has a TorchWorld\nended as it should\n")


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("HOROVOD_TIMELINE", "{folder}/timeline.json", "HorovodWorld"),
        ("HOROVOD_AUTOTUNE", "1", "HorovodWorld"),
        ("HOROVOD_TIMELINE", "", "SharedMemoryWorld"),
        ("HOROVOD_FUSION_THRESHOLD", "1000000", "SharedMemoryWorld"),  # for sums of the caller's own
    ],
)
def test_who_looks_at_the_sums_of_horovod_sees_them(
    horovodrun: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str,
    value: str,
    name: str,
) -> None:
    monkeypatch.setenv(variable, value.format(folder=tmp_path))
    job = horovodrun(RANK, 2, "horovod", "by_engine")
    assert job.returncode == 0, job.output
    assert all(f"rank {rank} has a {name}" in job.output for rank in range(2))


@pytest.mark.parametrize("what", ["killed", "killed_before_it_is_found", "left", "raises"])
def test_a_process_that_ends_is_an_error_of_the_others(what: str, rendezvous: Any) -> None:
    job = ended(start(what, rendezvous, [{}] * 3))
    assert job[1][0] == {"left": 0, "raises": 1}.get(what, -signal.SIGKILL)
    for status, said in (job[0], job[2]):
        assert status == 1
        last = said.splitlines()[-1]
        assert last.startswith("hvd_lb.errors.ExchangeError: "), said
        assert "has ended" in last


def start(what: str, rendezvous: Any, environments: list[dict[str, str]]) -> list[subprocess.Popen[str]]:
    """The processes of a job that nobody watches."""
    return [
        subprocess.Popen(
            [sys.executable, RANK, "torch", what],
            env={
                **os.environ,
                **rendezvous.environment(),
                **environment,
                "RANK": str(rank),
                "WORLD_SIZE": str(len(environments)),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, environment in enumerate(environments)
    ]
