"""A process that waits for the others for long says so, once, and for what."""

from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "ranks" / "patience.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "watched"), [("horovodrun", False), ("torchrun", False), ("torchrun", True)]
)
def test_who_waits_says_so(engine: str, watched: bool, request: pytest.FixtureRequest) -> None:
    launch: Callable = request.getfixturevalue(engine)
    job = launch(SCRIPT, 2, "watched" if watched else "alone")
    told = [line for line in job.output.splitlines() if "has waited for the other processes" in line]
    expected = ["rank 1 has waited for the other processes for 0.5 s, for late."] + [
        f"rank {rank} has waited for the other processes for 1 s, for hvd_lb.optimizer.0." for rank in (0, 1)
    ]
    assert len(told) == (0 if watched else 3), job.output
    assert all(any(text in line for line in told) for text in expected if not watched), job.output
