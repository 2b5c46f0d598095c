"""Who waits for the rest of a message has an error when the connection is cut (docker/horovod.patch, part 9)."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hvd_lb.world.build import tells_of_cut_messages

RANKS = Path(__file__).parent / "ranks" / "cut.py"
TIMEOUT = 20


@pytest.mark.slow
def test_a_world_is_left_at_once_in_the_midst_of_a_message(
    horovodrun: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not tells_of_cut_messages():
        pytest.skip("another Horovod than docker/build-horovod.sh builds")
    monkeypatch.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", str(TIMEOUT))
    job = horovodrun(RANKS, 2, "horovod", 0.03, timeout=120)
    assert "BROKEN" not in job.output  # no part of a message is taken for all of it
    seconds = [float(line.partition("LEFT ")[2]) for line in job.output.splitlines() if "LEFT" in line]
    assert len(seconds) == 2, job.output
    assert max(seconds) < TIMEOUT / 2  # without an error it waits for all of it
