"""A sum does not wait for Horovod's next cycle (docker/horovod.patch, part 7)."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hvd_lb.world.build import begins_at_once

RANKS = Path(__file__).parent / "ranks" / "cycles.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "fusion", "at_once"), [(2, "0", True), (3, "0", True), (2, "1000", False)]
)
def test_a_sum_waits_for_no_cycle(
    horovodrun: Callable, monkeypatch: pytest.MonkeyPatch, processes: int, fusion: str, at_once: bool
) -> None:
    if not begins_at_once():
        pytest.skip("another Horovod than docker/build-horovod.sh builds")
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "1000")
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", fusion)
    job = horovodrun(RANKS, processes, timeout=120)
    assert job.returncode == 0, job.output
    (line,) = [line for line in job.output.splitlines() if "CYCLES" in line]
    together, after_a_late_one = json.loads(line.partition("CYCLES ")[2])
    if at_once:
        assert max(together, after_a_late_one) < 0.3
    else:  # what is fused waits, so that there is something to fuse
        assert together > 0.8
