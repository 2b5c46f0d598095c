"""What the Horovod that docker/build-horovod.sh builds asks an agent's rendezvous while ranks find each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.launch.agent.places import rank_environments
from hvd_lb.world.build import built_with

RANKS = Path(__file__).parent / "ranks" / "forked.py"


@pytest.mark.slow
def test_a_rank_asks_as_often_however_many_there_are(rendezvous: Any) -> None:
    if not built_with():
        pytest.skip("Horovod is not installed, or not as docker/build-horovod.sh builds it")
    asked = [requests(rendezvous, [("h1", size), ("h2", size)], generation=size) for size in (2, 5)]
    # In each of three scopes (all ranks, those of a host, those of the same place on each host): a rank's addresses are
    # put, those of the others are got, and its own taken back. All of it happens twice.
    assert asked == [2 * 9 * 4, 2 * 9 * 10]


def requests(rendezvous: Any, hosts: list[tuple[str, int]], generation: int) -> int:
    """How many a job makes that starts and then starts again."""
    before = rendezvous.server.requests
    places = [place for name, _ in hosts for place in rank_environments(hosts, name).values()]
    environments = [
        {**place, **rendezvous.environment(rank, generation), "HOROVOD_GLOO_IFACE": "lo"}
        for rank, place in enumerate(places)
    ]
    subprocess.run(
        [sys.executable, RANKS],
        input=json.dumps(environments),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        check=True,
        timeout=120,
    )
    asked: int = rendezvous.server.requests - before
    return asked
