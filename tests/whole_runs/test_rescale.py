"""--elastic-policy rescale: k follows the processes, and what was recorded is enough to take the run again on one."""

from __future__ import annotations

import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from elastic_runs import RESCALED, Fault, assert_it_comes_again, events, with_faults
from real_runs import SMALL, Start, finish, processes_of, until

from hvd_lb.errors import UserError
from hvd_lb.launch.resume import ResumePoint
from hvd_lb.launch.session import rescaled
from hvd_lb.plan.run_plan import Scale
from hvd_lb.resolve import resolve
from hvd_lb.training.checkpoint import open_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]


@pytest.mark.long
@pytest.mark.parametrize("engine", ["horovod", "torch"])
def test_a_run_shrinks_and_grows_and_comes_again_on_one_process(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    run, gate = tmp_path / "run", tmp_path / "gate"
    with_faults(tmp_path, monkeypatch, [(1, "step", 3, "SIGKILL"), (0, "step", 6, str(gate))])
    process = start(*RESCALED, "--processes", 2, "--engine", engine, "--output", run)
    until(lambda: gate.with_name("gate.there").exists())
    until(lambda: "rank 2 on localhost is ready to join" in (run / "logs" / "launcher.log").read_text())
    gate.touch()
    out, _ = finish(process)
    assert not processes_of(run)
    shrunk, grown = events(run, "rescale")
    assert (shrunk["step"], shrunk["images"], shrunk["workers"], shrunk["before"]) == (3, 576, 2, 4)
    assert (grown["step"], grown["images"], grown["workers"], grown["before"]) == (7, 960, 4, 2)
    assert shrunk["lr"] == shrunk["full_lr"] == pytest.approx(grown["full_lr"] / 2, rel=0.2)
    assert grown["lr"] == pytest.approx(shrunk["lr"], rel=0.2)
    assert "epoch 0 step 3: 2 virtual workers from here on, before 4: minibatches of 96 images" in out
    assert "rising to" in out
    # The epoch has 3 steps of 192 images, 4 of 96, and 3 of what is left.
    assert [record["step"] for record in events(run, "eval")] == [9, 17]
    assert f"steps: {grown['total_steps']} of 18" in out
    recorded = assert_it_comes_again(run)
    assert [scale.workers for scale in recorded.scales(None)] == [4, 2, 4]
    page = (run / "report.html").read_text()
    assert "2 virtual workers from here on" in page


@pytest.mark.long
def test_a_run_goes_on_with_the_processes_that_there_are(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are lost after a change. It goes on from its checkpoint, where k is that of the processes again."""
    run = tmp_path / "run"
    faults: list[Fault] = [(1, "step", 3, "SIGKILL"), (0, "step", 6, "SIGKILL")]
    with_faults(tmp_path, monkeypatch, faults)
    _, err = finish(start(*RESCALED, "--processes", 2, "--output", run), 1)
    assert "all processes that had the state of the run were lost" in err
    saved = open_checkpoint(run / "checkpoints" / "last").saved
    assert (saved.rescaled or {})["scales"] == [[0, 0, 0, 4], [3, 0, 576, 2]]
    assert saved.next == {"epoch": 0, "step": 1}
    monkeypatch.setenv("FAULTS", "[]")
    _, err = finish(start(*RESCALED[:-2], "--processes", 2, "--output", run), 2)
    assert "whose minibatch follows the number of processes, 2 virtual workers each: give --elastic" in err
    assert len(err.splitlines()) == 1
    out, _ = finish(start(*RESCALED, "--processes", 2, "--output", run))
    assert "epoch 0 step 4: 4 virtual workers from here on, before 2" in out
    recorded = assert_it_comes_again(run)
    assert [(scale.step, scale.workers) for scale in recorded.scales(None)] == [(0, 4), (3, 2), (4, 4)]


@pytest.mark.long
def test_who_stops_and_goes_on_has_no_change(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with_faults(tmp_path, monkeypatch, [(0, "step", 5, "SIGTERM"), (1, "step", 5, "SIGTERM")])
    finish(start(*RESCALED, "--processes", 2, "--output", run), 128 + signal.SIGTERM)
    monkeypatch.setenv("FAULTS", "[]")
    finish(start(*RESCALED, "--processes", 2, "--output", run))
    assert not events(run, "rescale")
    assert_it_comes_again(run)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--elastic-policy", "rescale"), "--elastic-policy is for runs that go on when processes are lost"),
        (("--gpus", 3), "--elastic-policy rescale: each process keeps its virtual workers, and 3 cannot be"),
        (("--gpus", 8, "--together", 3, "--reproducible"), "--elastic-policy rescale: each process keeps"),
        (("--shuffle", "per-worker"), "--elastic-policy rescale: --shuffle per-worker divides the images"),
        (("--repeated-augment", 2), "--elastic-policy rescale: --repeated-augment counts images by whole"),
        (("--no-momentum-correction",), "--elastic-policy rescale: --no-momentum-correction would keep"),
        (("--on-nan", "rollback"), "--elastic-policy rescale: --on-nan rollback takes the very steps"),
        (("--recompute-bn", 64), "--elastic-policy rescale: --recompute-bn changes the state after a step"),
    ],
)
def test_what_cannot_be_rescaled_is_refused(
    hvd_lb: Callable[..., Any], tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    elastic = () if options[0] == "--elastic-policy" else ("--elastic", "--elastic-policy", "rescale")
    said = hvd_lb(
        "train", *SMALL, "--gpus", 4, "--processes", 2, *elastic, *options, "--output", tmp_path / "run"
    )
    assert said.status == 2
    assert said.err.startswith(f"hvd-lb: error: {words}"), said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_no_number_of_processes_may_be_without_a_run() -> None:
    """Eight of them would have more images in a minibatch than there are."""
    resolved = resolve({"data": "digits", "gpus": 4, "per_gpu_batch": 100}, recipe=None, default_gpus=4)
    placement: Any = SimpleNamespace(processes=2)
    scaled, per_process = rescaled(resolved, placement, ResumePoint(None, []), 1, 7)
    assert (scaled.scales, per_process) == ((Scale(0, 0, 0, 4),), 2)
    with pytest.raises(UserError, match="rescale with 8 processes .*: a minibatch of 16 × 100 = 1600 images"):
        rescaled(resolved, placement, ResumePoint(None, []), 1, 8)
