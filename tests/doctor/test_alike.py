"""Hosts that compute other bits are found: here a process that may not use this CPU's vector instructions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hvd_lb.doctor.alike import Answer, answer, unlike

AS = """
import sys, torch
from hvd_lb.doctor.alike import answer
print(answer(torch.device("cpu"), sys.argv[1], int(sys.argv[2])).model_dump_json())
"""


def made(host: str, rank: int, *digests: str, **environment: str) -> Answer:
    return Answer(
        host=host,
        rank=rank,
        digests=dict(zip(("pixels", "logits"), digests, strict=True)),
        environment=environment,
    )


def test_who_is_unlike_most_is_named() -> None:
    same = [made(f"h{rank}", rank, "a", "b", torch="2") for rank in range(3)]
    assert unlike(same) == []
    (line,) = unlike([made("h9", 0, "a", "c", torch="1"), *same[1:]])
    assert line == "rank 0 on h9 computes other bits than rank 1 on h1: logits (torch: 2 → 1)"
    (line,) = unlike([*same[:2], made("h2", 2, "x", "b", torch="2")])
    assert line.endswith("h2 computes other bits than rank 0 on h0: pixels (the same libraries and CPU features, so "
                         "perhaps faulty)")  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has no such instructions"
)
def test_a_process_without_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    here = answer(torch.device("cpu"), "h1", 0)
    found = []
    for rank, capability in ((1, None), (2, "default")):
        environment = {**os.environ, **({"ATEN_CPU_CAPABILITY": capability} if capability else {})}
        done = subprocess.run(
            [sys.executable, "-c", AS, "h2", str(rank)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(Answer.model_validate_json(done.stdout.splitlines()[-1]))
    assert found[0].digests == here.digests
    assert set(here.digests) == {
        *("pixels by dali", "pixels by torchvision", "first weights", "logits", "gradients", "statistics")
    }
    (line,) = unlike([here, *found])
    assert line.startswith("rank 2 on h2 computes other bits than rank 0 on h1: ")
    assert "cpu_capability" in line
