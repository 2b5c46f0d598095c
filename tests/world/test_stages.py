"""What a process does, since when, and how long."""

from __future__ import annotations

import pytest
import torch
from together import Together, together

from hvd_lb.world.stages import Stage, Staged, Stages


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("hvd_lb.world.stages.time.monotonic", lambda: now[0])
    return now


def test_times_of_a_step_without_what_lies_between_steps(clock: list[float]) -> None:
    stages = Stages()
    clock[0] += 50  # starting counts nowhere
    for _ in range(2):
        stages.enter(Stage.DATA)
        clock[0] += 1
        stages.enter(Stage.COMPUTE)
        clock[0] += 2
        with stages.within(Stage.NETWORK):
            clock[0] += 4
            assert stages.now == (Stage.NETWORK, clock[0] - 4)
        clock[0] += 8
        assert stages.now == (Stage.COMPUTE, clock[0] - 8)
        with stages.between_steps():
            stages.enter(Stage.EVALUATION)
            clock[0] += 16
            with stages.within(Stage.NETWORK):
                clock[0] += 32
    assert stages.take() == (2, 20, 8)
    assert stages.take() == (0, 0, 0)
    stages.enter(Stage.DATA)
    clock[0] += 1
    assert stages.take() == (1, 0, 0)
    assert stages.now == (Stage.DATA, clock[0])


def test_an_error_in_a_wait_ends_its_stage() -> None:
    stages = Stages()
    with pytest.raises(ValueError, match="lost"), stages.within(Stage.NETWORK):
        raise ValueError("lost")
    assert stages.now[0] is Stage.STARTING


def test_every_wait_for_others_is_a_stage() -> None:
    def run(world: Together) -> list[object]:
        stages, seen = Stages(), []
        staged = Staged(world, stages)
        all_of = world._meeting.all_of

        def look(key: tuple[str, int]) -> list[torch.Tensor]:
            seen.append((key[0], stages.now[0]))
            return all_of(key)

        if world.rank == 0:
            world._meeting.all_of = look  # type: ignore[method-assign]
        world.barrier()
        seen.clear()
        handle = staged.allreduce_async(torch.ones(1), "sum")
        assert stages.now[0] is Stage.STARTING
        assert handle.wait() == 2
        assert staged.maximum_async(torch.ones(1), "most").wait() == 1
        assert staged.allreduce(torch.ones(1), "at once") == 2
        assert staged.broadcast(torch.tensor([world.rank]), "first") == 0
        assert staged.broadcast_bytes(b"x", "bytes") == b"x"
        staged.barrier()
        assert stages.now[0] is Stage.STARTING
        return [name for name, stage in seen if stage is Stage.NETWORK]

    names = together(2, run)[0]
    assert set(names) == {"sum", "most", "at once", "first", "bytes", "barrier"}
