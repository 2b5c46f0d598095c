"""--elastic: processes are killed, hang or leave within a run, and its end has the bits of the undisturbed one.

Where a process dies is said exactly: by what it is about to do, in which step.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from elastic_runs import RECIPE, Fault, assert_the_same, at, events, ranks_of, script_in, with_faults
from real_runs import SMALL, Start, finish, processes_of, until

from hvd_lb.errors import UserError
from hvd_lb.launch.starters.local import local
from hvd_lb.world import build
from hvd_lb_cli.dispatch import refuse_elastic

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]
horovod_and_torch = pytest.mark.parametrize(
    "engine", ["horovod", pytest.param("torch", marks=pytest.mark.long)]
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process, which nothing happens to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "-m", "hvd_lb_cli.main", *RECIPE, "--processes", 1, "--output", run]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return run


@pytest.fixture
def disturbed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, str]]:
    """disturbed(processes, *options, faults=…): an elastic run to its end, and what it printed."""

    def run(
        processes: int,
        *options: object,
        faults: Sequence[Fault] = (),
        meanwhile: Callable[[Path], object] = lambda run: None,
    ) -> tuple[Path, str]:
        begun = begin(start, tmp_path, monkeypatch, processes, *options, faults=faults)
        meanwhile(tmp_path / "run")
        out, _ = finish(begun)
        assert not processes_of(tmp_path / "run")
        return tmp_path / "run", out

    return run


def begin(
    start: Start,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    *options: object,
    faults: Sequence[Fault],
) -> subprocess.Popen[str]:
    with_faults(folder, monkeypatch, faults)
    return start(*RECIPE, "--processes", processes, "--elastic", *options, "--output", folder / "run")


def agent_of(run: Path) -> int:
    (agent,) = (
        pid for pid in processes_of(run) if b"launch.agent.host" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return agent


@horovod_and_torch
@pytest.mark.parametrize(
    ("processes", "faults", "left"),
    [
        (2, [(1, "step", 5, "SIGKILL")], [1]),
        pytest.param(2, [(0, "sums", 7, "SIGKILL")], [1], marks=pytest.mark.long),
        pytest.param(4, [(1, "step", 3, "SIGKILL"), (2, "sums", 3, "SIGKILL")], [2], marks=pytest.mark.long),
        pytest.param(3, [(2, "log", 6, "SIGKILL")], [2], marks=pytest.mark.long),
        pytest.param(3, [(1, "save", 4, "SIGKILL")], [2], marks=pytest.mark.long),
        pytest.param(3, [(0, "save", 8, "SIGKILL")], [2], marks=pytest.mark.long),
        pytest.param(3, [(0, "evaluation", 1, "SIGKILL")], [2], marks=pytest.mark.long),
        pytest.param(3, [(1, "evaluation", 2, "SIGKILL")], [2], marks=pytest.mark.long),
        pytest.param(3, [(1, "step", 5, "error")], [2], marks=pytest.mark.long),
        pytest.param(3, [(1, "step", 5, "HostError")], [2], marks=pytest.mark.long),
        pytest.param(3, [(0, "end", 1, "SIGKILL")], [2], marks=pytest.mark.long),
        pytest.param(3, [(0, "join", 1, "SIGKILL")], [2], marks=pytest.mark.long),
        pytest.param(3, [(0, "step", 0, "SIGKILL")], [2], marks=pytest.mark.long),
        # The second one dies while the others wait for the next generation, begin it, or hand over the state.
        pytest.param(
            3, [(2, "step", 5, "SIGKILL"), (1, "join", 2, "SIGKILL")], [2, 1], marks=pytest.mark.long
        ),
        pytest.param(
            4, [(3, "step", 5, "SIGKILL"), (0, "join", 2, "SIGKILL")], [3, 2], marks=pytest.mark.long
        ),
        pytest.param(
            3, [(2, "step", 5, "SIGKILL"), (1, "state", 1, "SIGKILL")], [2, 1], marks=pytest.mark.long
        ),
    ],
)
def test_killed_processes_change_no_bit(
    disturbed: Callable[..., tuple[Path, str]],
    undisturbed: Path,
    engine: str,
    processes: int,
    faults: list[Fault],
    left: list[int],
) -> None:
    run, out = disturbed(processes, "--engine", engine, faults=faults)
    assert_the_same(undisturbed, run)
    changes = events(run)
    lost = [lost for change in changes for lost in change["lost"]]
    ends = {how: f"ended by {how}" if how == "SIGKILL" else "exit code 1" for *_, how in faults}
    assert sorted(lost) == sorted(f"rank {number} on localhost ({ends[how]})" for number, *_, how in faults)
    assert all(line in out for line in lost)
    losing = [change for change in changes if change["lost"]]  # others take those in that come for the lost
    assert sum(change["repeated"] for change in changes) <= len(losing) <= len(faults)
    assert losing[-1]["processes"] >= left[-1]
    assert len(events(run, "recovered")) <= len(changes)


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_digest_that_was_not_written_is_made_again(
    disturbed: Callable[..., tuple[Path, str]], undisturbed: Path, tmp_path: Path, number: int
) -> None:
    """Rank 0 is killed before it writes the digest of step 5, 10 or 12, when the others might have gone on long ago."""
    gate = tmp_path / "gate"

    def meanwhile(run: Path) -> None:
        until(lambda: gate.with_name("gate.there").exists())
        time.sleep(0.5)
        gate.touch()

    faults: list[Fault] = [(0, "digest", number, "SIGKILL"), (0, "digest", number, str(gate))]
    run, _ = disturbed(3, "--engine", "torch", faults=faults, meanwhile=meanwhile)
    assert_the_same(undisturbed, run)


@horovod_and_torch
@pytest.mark.parametrize(
    ("processes", "faults"),
    [
        (2, [(1, "step", 5, "SIGKILL")]),
        pytest.param(3, [(0, "sums", 7, "SIGKILL"), (2, "sums", 7, "SIGKILL")], marks=pytest.mark.long),
        # The first one that takes a lost one's place dies before it has joined, and so does the next.
        pytest.param(
            2,
            [(1, "step", 5, "SIGKILL"), (2, "data", 1, "SIGKILL"), (3, "data", 1, "HostError")],
            marks=pytest.mark.long,
        ),
        # The first one that takes a lost one's place dies when it is given the state, its successor does not.
        pytest.param(2, [(1, "step", 5, "SIGKILL"), (2, "state", 1, "SIGKILL")], marks=pytest.mark.long),
    ],
)
def test_others_take_the_places_of_the_lost(
    disturbed: Callable[..., tuple[Path, str]],
    undisturbed: Path,
    engine: str,
    processes: int,
    faults: list[Fault],
) -> None:
    """They are waited for here."""
    options = ("--engine", engine, "--min-processes", processes)
    run, out = disturbed(processes, *options, faults=faults)
    assert_the_same(undisturbed, run)
    last = events(run)[-1]
    assert (last["processes"], last["joined"]) == (processes, min(len(faults), processes - 1))
    assert f"fewer than --min-processes {processes}: waiting for those that are starting" in out


@horovod_and_torch
def test_one_process_becomes_three_and_one_again(
    start: Start, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Of this machine, by a script; it begins without an engine, and hands over its state by that."""
    run, grow, shrink = (tmp_path / name for name in ("run", "grow", "shrink"))
    script, names = script_in(tmp_path, "localhost:1\n")
    with_faults(tmp_path, monkeypatch, [(0, "step", 3, str(grow)), (0, "step", 6, str(shrink))])
    options = ("--elastic", "--host-discovery", script, "--max-processes", 3, "--engine", engine)
    process = start(*RECIPE, *options, "--output", run)
    ready = [f"rank {member} on localhost is ready to join" for member in (1, 2)]
    at(grow, process, run, lambda: names.write_text("localhost:3\n"), ready)
    gone = [f"rank {member} on localhost has heard that it is to leave" for member in (1, 2)]
    told = ["localhost takes 1 now, before 3", *gone]
    at(shrink, process, run, lambda: names.write_text("localhost:1\n"), told)
    finish(process)
    assert not processes_of(run)
    assert_the_same(undisturbed, run)
    first, *others = events(run)
    assert (first["before"], first["processes"], first["joined"]) == (1, 3, 2)
    assert others[-1]["processes"] == 1
    assert sorted(left for change in others for left in change["left"]) == [
        f"rank {member} on localhost" for member in (1, 2)
    ]
    assert not [change for change in events(run) if change["lost"] or change["repeated"]]


@pytest.mark.long
@pytest.mark.parametrize("where", [(), ("--hosts", "localhost:1")])
def test_one_process_that_nobody_can_join_is_told_so(
    start: Start, tmp_path: Path, undisturbed: Path, where: Sequence[object]
) -> None:
    out, _ = finish(start(*RECIPE, "--elastic", "--processes", 1, *where, "--output", tmp_path / "run"))
    assert "warning: --elastic, but never more than one process here" in out
    assert_the_same(undisturbed, tmp_path / "run")


@pytest.mark.long
def test_one_process_is_audited_when_others_have_joined(
    start: Start, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, grow = tmp_path / "run", tmp_path / "grow"
    script, names = script_in(tmp_path, "localhost:1\n")
    with_faults(tmp_path, monkeypatch, [(0, "step", 3, str(grow)), (1, "step", 6, "lie")])
    options = ("--elastic", "--host-discovery", script, "--audit", 1, "--engine", "torch")
    process = start(*RECIPE, *options, "--output", run)
    ready = [f"rank {member} on localhost is ready to join" for member in (1, 2)]
    at(grow, process, run, lambda: names.write_text("localhost:3\n"), ready)
    out, _ = finish(process)
    assert ", and nobody to audit it (--audit)" in out
    assert [audit["liars"] for audit in events(run, "audit")] == [[1]]
    assert_the_same(undisturbed, run)


@pytest.mark.long
@horovod_and_torch
@pytest.mark.parametrize("leaver", [0, 1])
def test_who_is_asked_to_leaves_after_the_step(
    disturbed: Callable[..., tuple[Path, str]], undisturbed: Path, engine: str, leaver: int
) -> None:
    run, out = disturbed(2, "--engine", engine, faults=[(leaver, "step", 5, "SIGTERM")])
    assert_the_same(undisturbed, run)
    (change,) = events(run)
    assert (change["left"], change["lost"], change["step"]) == ([f"rank {leaver} on localhost"], [], 6)
    assert not change["repeated"]
    assert f"asked to leave: rank {leaver} on localhost" in out


@pytest.mark.long
def test_when_all_are_asked_to_leave_the_run_ends_with_a_checkpoint_and_goes_on(
    start: Start, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Fault] = [(0, "step", 5, "SIGTERM"), (1, "step", 5, "SIGTERM")]
    out, _ = finish(begin(start, tmp_path, monkeypatch, 2, faults=faults), 128 + signal.SIGTERM)
    assert "stopped after 6 steps, with a checkpoint" in out
    monkeypatch.setenv("FAULTS", "[]")
    finish(start(*RECIPE, "--processes", 1, "--output", tmp_path / "run"))
    assert_the_same(undisturbed, tmp_path / "run")


@pytest.mark.long
def test_when_the_only_host_has_notice_to_end_the_run_ends_with_a_checkpoint(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is asked in a step of which rank 0 still waits: it stays for another one, and is the last."""
    run, here = tmp_path / "run", tmp_path / "go"
    process = begin(start, tmp_path, monkeypatch, 2, faults=[(0, "step", 5, str(here))])
    until(lambda: (tmp_path / "go.there").exists() or process.poll() is not None)
    os.kill(agent_of(run), signal.SIGTERM)
    log = run / "logs" / "launcher.log"
    until(lambda: log.read_text().count("has heard that it is to leave") == 2)
    assert "has notice to end" in log.read_text()
    here.touch()
    out, _ = finish(process, 128 + signal.SIGTERM)
    assert re.search(r"stopped after [67] steps, with a checkpoint", out)


@pytest.mark.long
@horovod_and_torch
def test_who_is_asked_to_leave_while_too_few_are_there_leaves_at_once(
    disturbed: Callable[..., tuple[Path, str]], undisturbed: Path, tmp_path: Path, engine: str
) -> None:
    """The others wait on, and go on when they are enough."""
    here = tmp_path / "go"
    faults: list[Fault] = [
        *((number, "step", 5, "SIGKILL") for number in (2, 3)),
        *((number, "data", 1, str(here)) for number in (4, 5)),
    ]

    def meanwhile(run: Path) -> None:
        log = run / "logs" / "launcher.log"
        until(lambda: log.exists() and "2 of 4 processes are left" in log.read_text())
        leaver = ranks_of(run)[1]
        os.kill(leaver, signal.SIGTERM)
        until(lambda: 1 not in ranks_of(run), 30)
        here.touch()

    options = ("--engine", engine, "--min-processes", 3)
    run, out = disturbed(4, *options, faults=faults, meanwhile=meanwhile)
    assert_the_same(undisturbed, run)
    (change,) = [change for change in events(run) if change["lost"]]
    assert (change["left"], change["joined"]) == (["rank 1 on localhost"], 2)
    assert "asked to leave: rank 1 on localhost" in out


@pytest.mark.long
@horovod_and_torch
@pytest.mark.parametrize("how", ["host", "rank", "ctrl-c"])
@pytest.mark.parametrize("at", [("step", 5), ("sums", 4)])
def test_a_run_that_waits_for_others_ends_with_a_checkpoint(
    start: Start,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    how: str,
    at: tuple[str, int],
) -> None:
    """No further step is taken, also where something of the last one is still to be done."""
    if at[0] == "sums" and (engine, how) != ("torch", "host"):
        pytest.skip("as with the others")
    run = tmp_path / "run"
    faults: list[Fault] = [(1, *at, "SIGKILL"), (2, "data", 1, str(tmp_path / "never"))]
    options = ("--engine", engine, "--min-processes", 2)
    process = begin(start, tmp_path, monkeypatch, 2, *options, faults=faults)
    until(lambda: (tmp_path / "never.there").exists() or process.poll() is not None)
    log = run / "logs" / "launcher.log"
    until(lambda: "waiting for those that are starting" in log.read_text() or process.poll() is not None)
    if how == "ctrl-c":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(agent_of(run) if how == "host" else ranks_of(run)[0], signal.SIGTERM)
    out, _ = finish(process, 128 + (signal.SIGINT if how == "ctrl-c" else signal.SIGTERM))
    assert "stopped after 5 steps, with a checkpoint" in out
    assert not processes_of(run)
    monkeypatch.setenv("FAULTS", "[]")
    finish(start(*RECIPE, "--processes", 2, "--output", run))
    assert_the_same(undisturbed, run)


@pytest.mark.long
@horovod_and_torch
def test_ctrl_c_ends_an_elastic_run_that_has_lost_a_rank(
    start: Start, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    run = tmp_path / "run"
    faults: list[Fault] = [(0, "step", 2, "SIGKILL"), (1, "step", 5, "SIGSTOP")]
    process = begin(start, tmp_path, monkeypatch, 2, "--engine", engine, faults=faults)
    until(lambda: (run / "metrics.jsonl").exists() and events(run, "recovered"))
    process.send_signal(signal.SIGINT)
    until(lambda: (run / "logs" / "stop").exists())
    os.kill(ranks_of(run)[1], signal.SIGCONT)
    out, _ = finish(process, 128 + signal.SIGINT)
    assert "with a checkpoint" in out
    monkeypatch.setenv("FAULTS", "[]")
    finish(start(*RECIPE, "--processes", 2, "--output", run))
    assert_the_same(undisturbed, run)


@pytest.mark.long
@pytest.mark.parametrize(
    ("faults", "options", "words", "saved"),
    [
        (
            [(1, "step", 5, "SIGKILL"), *((number, "data", 1, "SIGKILL") for number in range(2, 6))],
            ("--min-processes", 2),
            "1 of 2 processes are left, fewer than --min-processes 2",
            5,
        ),
        (
            [(1, "step", 4, "SIGTERM")],  # heard while it is taken
            ("--min-processes", 2),
            "1 of 2 processes are left, fewer than --min-processes 2",
            5,
        ),
        (
            [(0, "step", 5, "SIGKILL"), (1, "step", 5, "SIGKILL")],
            (),
            "all processes that had the state of the run were lost",
            4,
        ),
    ],
)
def test_a_run_that_cannot_go_on_ends_in_one_line_and_goes_on_from_its_last_state(
    start: Start,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    faults: list[Fault],
    options: tuple[object, ...],
    words: str,
    saved: int,
) -> None:
    """It is saved where somebody has it; the newest checkpoint before is of step 4."""
    run = tmp_path / "run"
    out, err = finish(begin(start, tmp_path, monkeypatch, 2, *options, faults=faults), 1)
    assert ("after 5 steps, with a checkpoint; the same command goes on there" in out) == (saved == 5)
    assert f"hvd-lb: error: {words}" in err
    assert len(err.splitlines()) == 1
    assert not processes_of(run)
    monkeypatch.setenv("FAULTS", "[]")
    out, _ = finish(start(*RECIPE, "--processes", 2, "--elastic", "--output", run))
    assert f"going on from step {saved}" in out
    assert_the_same(undisturbed, run)


@pytest.mark.parametrize(
    "fault", [(1, "step", 9, "SIGKILL"), pytest.param((0, "join", 1, "SIGKILL"), marks=pytest.mark.long)]
)
def test_others_join_a_job_that_began_with_a_checkpoint_which_is_gone_later(
    start: Start, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """It makes room for that of step 8: who comes in step 9 has the state of others. Before any step it is read."""
    run = tmp_path / "run"
    options = ("--keep-checkpoints", 1, "--min-processes", 2)
    finish(begin(start, tmp_path, monkeypatch, 2, *options, faults=[(0, "step", 5, "UserError")]), 1)
    monkeypatch.setenv("FAULTS", json.dumps([fault]))
    out, _ = finish(start(*RECIPE, "--processes", 2, "--elastic", *options, "--output", run))
    assert "going on from step 4" in out
    assert "before it had joined" not in out
    assert_the_same(undisturbed, run)
    assert events(run)[-1]["joined"] == 1


@pytest.mark.long
def test_what_a_user_has_to_put_right_ends_the_run(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = finish(begin(start, tmp_path, monkeypatch, 2, faults=[(1, "step", 5, "UserError")]), 1)
    assert "rank 1 on localhost failed: put it right" in err
    assert not processes_of(tmp_path / "run")


@pytest.mark.long
@horovod_and_torch
def test_one_that_hangs_is_taken_out(
    disturbed: Callable[..., tuple[Path, str]], undisturbed: Path, engine: str
) -> None:
    options = ("--engine", engine, "--hang-timeout", 8)
    run, out = disturbed(3, *options, faults=[(1, "step", 5, "SIGSTOP")])
    assert_the_same(undisturbed, run)
    assert "rank 1 on localhost has not arrived in step 5 (stopped or unreachable)" in out
    (change,) = [change for change in events(run) if change["lost"]]
    assert change["lost"] == ["rank 1 on localhost (ended by SIGKILL)"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "fault"),
    [(2, (1, "step", 5, "SIGKILL")), (3, (0, "sums", 7, "SIGKILL")), (3, (1, "step", 5, "SIGSTOP"))],
)
def test_who_waits_for_a_lost_one_within_nccl_is_freed(
    disturbed: Callable[..., tuple[Path, str]],
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    fault: Fault,
) -> None:
    """Within a pretended one, which goes wrong as NCCL does; in the same processes there is a new one then."""
    monkeypatch.setenv("PRETENDED_NCCL", "1")
    options = ("--engine", "torch", "--min-processes", processes, "--hang-timeout", 8)
    run, _ = disturbed(processes, *options, faults=[fault])
    assert_the_same(undisturbed, run)
    assert events(run)[-1]["joined"] == 1
    for rank in {*range(processes)} - {fault[0]}:
        log = (run / "logs" / f"rank-{rank:04d}-localhost.log").read_text()
        assert "the pretended NCCL is aborted" in log
        assert "begins again" not in log


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--elastic", "--max-processes", 3), "--max-processes is for hosts that --host-discovery finds"),
        (("--processes", 1, "--elastic", "--min-processes", 2), "--min-processes 2 of 1 process"),
        (("--processes", 2, "--min-processes", 2), "--min-processes is for runs that go on"),
        (("--processes", 2, "--elastic", "--min-processes", 3), "--min-processes 3 of 2 processes"),
        (
            ("--launcher", "kubernetes", "--k8s-kind", "trainjob", "--elastic", "--device", "cpu"),
            "--elastic with --k8s-kind trainjob",
        ),
        (
            ("--launcher", "slurm", "--container-image", "i", "--elastic"),
            "--elastic is not possible yet for a run that is started as a Slurm job in containers",
        ),
        (
            ("--launcher", "slurm", "--image", "i", "--elastic"),
            "--elastic is not possible yet for a run that is started as a Slurm job in containers",
        ),
        (
            ("--host-discovery", "/bin/hostname", "--image", "i", "--elastic"),
            "--host-discovery is not possible in containers",
        ),
        (
            ("--launcher", "slurm", "--elastic", "--device", "auto"),
            "--elastic is possible on GPUs, which a job has without --device cpu, with --engine torch only",
        ),
    ],
)
def test_what_cannot_be_elastic_is_refused(
    hvd_lb: Callable[..., Any], tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    said = hvd_lb("train", *SMALL, "--gpus", 4, *options, "--output", tmp_path / "run")
    assert said.status == 2
    assert said.err.startswith(f"hvd-lb: error: {words}")
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "variables", "words"),
    [
        ("cuda", {}, "on GPUs with Horovod, .*: give --engine torch"),
        ("cpu", {"HOROVOD_CPU_OPERATIONS": "MPI"}, "with an --allreduce of Open MPI"),
    ],
)
def test_what_is_not_built_is_refused(device: str, variables: dict[str, str], words: str) -> None:
    placement: Any = SimpleNamespace(device=device, processes=2)
    plan = replace(local(2, {}), environment=variables)
    with pytest.raises(UserError, match=f"--elastic is not possible yet {words}"):
        refuse_elastic(placement, plan, 1)
    refuse_elastic(placement, replace(plan, engine="torch"), 1)


@pytest.mark.parametrize(("parts", "possible"), [(8, True), (7, False), (None, False)])
def test_a_cycle_time_needs_a_horovod_that_joins_again(
    parts: int | None, possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "built_with", lambda: {"patch_parts": parts} if parts else {})
    plan = replace(local(2, {}), environment={"HOROVOD_CYCLE_TIME": "5"})
    refusal = pytest.raises(UserError, match="not possible yet with --cycle-time .* and this Horovod")
    with nullcontext() if possible else refusal:
        refuse_elastic(SimpleNamespace(device="cpu", processes=2), plan, 1)  # type: ignore[arg-type]
