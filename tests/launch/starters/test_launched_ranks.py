"""Ranks that another launcher has started: what is made of what they say, and their line to the launching process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from typing import Any

import pytest

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.launch_plan import UNTOLD
from hvd_lb.launch.rank.launched import LaunchingProcess
from hvd_lb.launch.starters.launched import (
    RankZero,
    choose_gpus,
    cores_of,
    hosts_of,
    place_ranks,
    refuse_different,
)
from hvd_lb.recipe import Recipe
from hvd_lb.world.launched import Place


def rank(host: str = "h1", **said: Any) -> dict[str, Any]:
    alike = {
        "bound": [0, 1, 2, 3],
        "cores": 4,
        "gpu": None,
        "arguments": "a",
        "cpu": {},
        "versions": {"torch": "2.14"},
    }
    return {"host": host, **alike, **said}


def gpu(number: int, **said: Any) -> dict[str, Any]:
    return {"name": "H100", "uuid": f"GPU-{number}", "bus": f"0000:{number}7:00.0", "mig": False, **said}


def test_hosts_are_in_the_order_of_ranks() -> None:
    assert hosts_of([rank("h1"), rank("h1"), rank("h2")]) == [Host("h1", 2), Host("h2", 1)]
    assert hosts_of([rank("h1"), rank("h2"), rank("h1")]) == [Host("h1", 1), Host("h2", 1), Host("h1", 1)]


def test_cores_are_shared_by_those_that_are_bound_to_the_same() -> None:
    assert [cores_of([rank(), rank(), rank("h2")], number) for number in range(3)] == [2, 2, 4]
    apart = [rank(bound=[0], cores=1), rank(bound=[1], cores=1)]
    assert cores_of(apart, 0) == cores_of(apart, 1) == 1
    assert cores_of([rank(bound=[0], cores=1)] * 3, 2) == 1


def test_processes_are_those_that_were_started() -> None:
    ranks = [rank("h1"), rank("h1"), rank("h2")]
    place = Place("srun", 0, 3)
    placed = place_ranks(place, ranks, "cpu", Recipe(gpus=6), pin=True)
    assert (placed.processes, placed.threads, placed.hosts, placed.gpus) == (3, 2, ("h1", "h2"), ())
    assert place_ranks(place, ranks, "cpu", Recipe(gpus=6, threads=1), pin=True).threads == 1
    with pytest.raises(UserError, match="srun has started 3 processes, and --gpus 2 is for 2 at most"):
        place_ranks(place, ranks, "cpu", Recipe(gpus=2), pin=True)


def test_each_rank_has_a_gpu_of_its_own() -> None:
    ranks = [rank(gpu=gpu(0)), rank(gpu=gpu(1)), rank("h2", gpu=gpu(0))]
    assert choose_gpus(ranks, "auto") == choose_gpus(ranks, "cuda") == "cuda"
    assert choose_gpus(ranks, "cpu") == choose_gpus([rank(), rank()], "auto") == "cpu"
    placed = place_ranks(Place("srun", 0, 3), ranks, "cuda", Recipe(gpus=3), pin=True)
    assert placed.gpus == ("H100",) * 3
    with pytest.raises(UserError, match=r"rank 1, on h2, has no GPU for itself \(1 of 2 ranks have none\)"):
        choose_gpus([rank(gpu=gpu(0)), rank("h2")], "auto")
    with pytest.raises(UserError, match="rank 0, on h1, has no GPU"):
        choose_gpus([rank(), rank()], "cuda")
    with pytest.raises(UserError, match="ranks 0 and 1 both have GPU 0000:07:00.0 of h1"):
        choose_gpus([rank(gpu=gpu(0)), rank(gpu=gpu(0))], "auto")
    with pytest.raises(UserError, match="GPU of rank 1, on h1, is divided into MIG instances"):
        choose_gpus([rank(gpu=gpu(0)), rank(gpu=gpu(1, mig=True))], "auto")


def test_all_are_started_alike() -> None:
    refuse_different([rank(), rank("h2")])
    with pytest.raises(UserError, match="rank 1, on h2, was started with other arguments than rank 0"):
        refuse_different([rank(), rank("h2", arguments="b")])
    with pytest.raises(UserError, match=r"rank 1, on h2, has torch 2\.9, and rank 0 2\.14"):
        refuse_different([rank(), rank("h2", versions={"torch": "2.9"})])


@pytest.mark.parametrize("told", [True, False])
def test_the_line_between_rank_0_and_its_launching_process(told: bool) -> None:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:  # the launching process
        ours.close()
        status = 99
        try:
            rank_0 = RankZero(theirs)
            assert rank_0.met(20)
            assert rank_0.ranks() == ("torch", "because", [{"host": "h"}])
            with pytest.raises(subprocess.TimeoutExpired):
                rank_0.wait(0.1)
            assert rank_0.poll() is None
            status = rank_0.begin(json.dumps({"a": [1]}, indent=1)).wait(20)
        finally:
            os._exit(7 if status == UNTOLD else status)
    theirs.close()
    launching = LaunchingProcess(ours, child)
    launching.tell(["torch", "because", [{"host": "h"}]])
    heard = b""
    while not heard:
        heard = launching.job(1)
    assert json.loads(heard) == {"a": [1]}
    if told:
        launching.tell(3)
    else:
        ours.shutdown(socket.SHUT_RDWR)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (3 if told else 7)
    ours.close()


def test_rank_0_ends_as_a_launching_process_that_gives_up() -> None:
    for given_up, status in (
        (lambda: os._exit(2), b"2"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), b"137"),
    ):
        ours, theirs = socket.socketpair()
        child = os.fork()
        if not child:
            ours.close()
            given_up()
        theirs.close()
        with ours:
            assert LaunchingProcess(ours, child).job(20) == status
