"""The example is run as its first lines say."""

import re
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "foreign_loop.py"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["horovodrun", "torchrun"])
def test_foreign_loop(launcher: str, request: pytest.FixtureRequest) -> None:
    job = request.getfixturevalue(launcher)(EXAMPLE, 2, timeout=180)
    assert job.returncode == 0, job.output
    losses = [float(loss) for loss in re.findall(r"epoch \d+: loss ([\d.]+)", job.output)]
    assert len(losses) == 8
    assert min(losses[-2:]) < losses[0], job.output
