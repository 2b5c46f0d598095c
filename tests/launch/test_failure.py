"""Which process a failed job is blamed on; the launchers' words are as they were seen."""

import json
from pathlib import Path

import pytest
from full_disk import room

from hvd_lb.launch.agent.record import Record
from hvd_lb.launch.failure import RankFailure, find_failure
from hvd_lb.launch.hosts import Host
from hvd_lb.report.run_directory import RunDirectory

HOSTS = [Host("h1", 2), Host("h2", 2)]
MPIRUN = (
    "mpirun detected that one or more processes exited with non-zero status, thus causing\nthe job to be "
    "terminated. The first process to do so was:\n\n  Process name: [[59049,1],{rank}]\n  Exit code:    {code}\n"
)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path


def tell(logs: Path, rank: int, kind: str, message: str, time: float) -> None:
    content = {"rank": rank, "host": "?", "kind": kind, "message": message, "time": time}
    (logs / f"error-{rank:04d}.json").write_text(json.dumps(content))


def failure(
    logs: Path, said: str = "", status: int = 1, hosts: list[Host] = HOSTS, *, agents: bool = False
) -> RankFailure:
    launcher = logs / "launcher.log"
    launcher.write_text(said)
    return find_failure(logs, launcher, hosts, status, agents=agents)


def test_the_first_error_of_its_own_counts_not_those_it_caused(logs: Path) -> None:
    tell(logs, 0, "HorovodInternalError", "Connection reset by peer", 1.0)
    tell(logs, 3, "UserError", "disk is full", 3.0)
    tell(logs, 2, "ValueError", "odd", 2.0)
    found = failure(logs, MPIRUN.format(rank=0, code=1))
    assert str(found) == f"rank 2 on h2 failed: ValueError: odd (full log: {logs}/rank-0002-h2.log)"


@pytest.mark.parametrize(
    "said",
    [
        MPIRUN.format(rank=3, code=137),
        "mpirun noticed that process rank 3 with PID 4711 on node h2 exited on signal 9 (Killed).\n",
        "srun: error: n2: task 3: Killed\n",
        "srun: error: n2: tasks 3-4: Killed\n",
    ],
)
def test_a_killed_process_is_found_though_it_said_nothing(logs: Path, said: str) -> None:
    tell(logs, 0, "HorovodInternalError", "Connection reset by peer", 1.0)
    found = failure(logs, said)
    assert (found.rank, found.host) == (3, "h2")
    assert "ended by SIGKILL" in found.message


@pytest.mark.parametrize(
    "said",
    [
        MPIRUN.format(rank=2, code=7),
        "srun: error: n2: task 2: Exited with exit code 7\n",
    ],
)
def test_an_exit_code_comes_with_the_last_words(logs: Path, said: str) -> None:
    (logs / "rank-0002-h2.log").write_text("hello\nImportError: no libfoo\n\n")
    assert failure(logs, said).message == "ended with exit code 7; last said: ImportError: no libfoo"


def heard(logs: Path, *entries: dict[str, object]) -> None:
    """endings.jsonl, as the head of a job writes it."""
    (logs / "endings.jsonl").write_text(
        "".join(f"{json.dumps({'time': 1.0, **entry})}\n" for entry in entries)
    )


def ended(rank: int, status: int, signalled: bool = False) -> dict[str, object]:
    return {"rank": rank, "host": "?", "pid": 7, "status": status, "signalled": signalled}


def test_the_first_rank_that_ended_by_itself_and_said_nothing(logs: Path) -> None:
    tell(logs, 0, "HorovodInternalError", "Connection reset by peer", 1.0)
    heard(logs, ended(0, 1), ended(2, -15, signalled=True), ended(3, -9), ended(1, -6))
    found = failure(logs)
    assert str(found).startswith("rank 3 on h2 failed: ended by SIGKILL (killed by hand, or")


def test_an_exit_code_that_was_heard_comes_with_the_last_words(logs: Path) -> None:
    (logs / "rank-0002-h2.log").write_text("hello\nImportError: no libfoo\n\n")
    heard(logs, ended(0, 0), ended(2, 7))
    assert str(failure(logs)) == (
        "rank 2 on h2 failed: ended with exit code 7; last said: ImportError: no libfoo "
        f"(full log: {logs}/rank-0002-h2.log)"
    )


def test_a_lost_host_is_the_cause_of_what_follows(logs: Path) -> None:
    heard(logs, ended(0, -6), {"host": "h2", "lost": "its agent was killed", "ranks": [3]})
    assert str(failure(logs)).startswith("rank 3 on h2 failed: its agent was killed")


def test_an_error_of_its_own_comes_before_what_was_heard(logs: Path) -> None:
    tell(logs, 1, "UserError", "disk is full", 1.0)
    heard(logs, ended(3, -9))
    assert failure(logs).message == "disk is full"


def test_who_did_not_come_to_meet_the_others(logs: Path) -> None:
    heard(logs, {"late": [2, 3], "seconds": 600.0}, ended(0, -15, signalled=True))
    assert str(failure(logs)).startswith(
        "rank 2 on h2 failed: it did not meet the other ranks within 600 s (nor did 1 more)"
    )


def test_what_gloo_says_of_a_rank_that_did_not_come(logs: Path) -> None:
    (logs / "rank-0000-h1.log").write_text(
        "terminate called after throwing an instance of 'gloo::IoException'\n"
        "  what():  [http_store.cc:82] Wait timeout after 30 seconds for key(s): 3. You may want to increase the "
        "timeout via HOROVOD_GLOO_TIMEOUT_SECONDS\n"
    )
    found = failure(
        logs, "mpirun noticed that process rank 0 with PID 1 on node h1 exited on signal 6 (Aborted).\n"
    )
    assert (found.rank, found.host) == (3, "h2")
    assert "did not meet the other ranks within 30 s" in found.message


def test_what_srun_says_of_a_node_comes_before_the_ranks_that_it_ends(logs: Path) -> None:
    for rank in (0, 1):
        tell(logs, rank, "HorovodInternalError", "Connection reset by peer", rank)
    killed = "srun: error: h1: tasks 0-1: Killed\n"
    found = failure(logs, f"srun: error: Node failure on h2\n{killed}")
    assert (found.rank, found.host, found.message) == (2, "h2", "the node failed")
    found = failure(logs, f"srun: error: task 2 launch failed: Unspecified error\n{killed}")
    assert (found.rank, found.message) == (2, "Slurm did not start it: Unspecified error")


def test_slurms_words_are_of_hosts_where_its_tasks_are_agents(logs: Path) -> None:
    """When it loses one it ends the others, and their ends are noticed first."""
    lost = {"time": 1.0, "host": "h1", "lost": "its agent was killed", "ranks": [0, 1]}
    (logs / "endings.jsonl").write_text(json.dumps(lost) + "\n")
    found = failure(logs, "all hosts: srun: error: task 1 launch failed: Unspecified error\n", agents=True)
    assert (found.rank, found.host) == (2, "h2")
    found = failure(logs, "all hosts: srun: error: Node failure on h2\n", agents=True)
    assert (found.rank, found.message) == (2, "the node failed")
    found = failure(logs, "", agents=True)
    assert (found.rank, found.host) == (0, "h1")


def test_who_neither_failed_nor_was_seen_to_end_was_lost(logs: Path) -> None:
    for rank in (0, 1):
        tell(logs, rank, "HorovodInternalError", "timed out", rank)
    found = failure(logs, MPIRUN.format(rank=1, code=1))
    assert (found.rank, found.host) == (2, "h2")
    assert "it was lost (and 1 more)" in found.message


def test_when_all_say_the_same_the_first_is_shown(logs: Path) -> None:
    for rank in range(4):
        tell(logs, rank, "HorovodInternalError", "shapes differ", 4.0 - rank)
    assert failure(logs).rank == 3


def test_a_launcher_that_could_not_even_start(logs: Path) -> None:
    found = failure(logs, "Traceback\nRuntimeError: could not connect to some hosts via ssh\n")
    assert str(found).startswith(
        "a process on h1 failed: ended with exit code 1; last said: RuntimeError: could not"
    )


@pytest.mark.parametrize(("status", "how"), [(-9, "SIGKILL"), (-40, "signal 40")])
def test_a_single_process(logs: Path, status: int, how: str) -> None:
    found = failure(logs, "", status, [Host("localhost", 1)])
    assert str(found).startswith(f"rank 0 on localhost failed: ended by {how}")


def test_an_elastic_job_tells_why_it_could_not_go_on_not_what_it_has_overcome(logs: Path) -> None:
    tell(logs, 1, "ValueError", "odd", 1.0)
    endings = [
        {"rank": 1, "host": "h1", "pid": 1, "status": 1, "signalled": False},
        {"generation": 1, "processes": 3},
        {"gave_up": "all processes that had the state of the run were lost"},
    ]
    (logs / "endings.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in endings))
    why = "all processes that had the state of the run were lost; ValueError: odd"
    what_to_do = "the same command goes on from the newest checkpoint, and --restarts has it do so by itself"
    assert str(failure(logs)) == f"{why}; {what_to_do} (full log: {logs}/launcher.log)"
    for status, how in (
        (-9, "ended by SIGKILL (killed by hand, or the"),
        (0, "ended with exit code 0; the same"),
    ):
        lost = {"rank": 2, "host": "h2", "pid": 2, "status": status, "signalled": False}
        (logs / "endings.jsonl").write_text(
            "".join(f"{json.dumps(entry)}\n" for entry in [*endings[:-1], lost, endings[-1]])
        )
        assert f"were lost; rank 2 on h2 {how}" in str(failure(logs))
    tell(logs, 5, "UserError", "put it right", 2.0)
    endings[-1] = {"wrong": 5}
    (logs / "endings.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in endings))
    found = failure(logs)
    assert (found.rank, found.host, found.message) == (5, "?", "put it right")


def test_what_was_heard_on_a_full_disk_is_told_as_far_as_it_is_whole(logs: Path) -> None:
    run = RunDirectory(logs)
    run.logs.mkdir()
    with room(150):
        record = Record(run)
        record.ending(rank=1, host="h1", pid=7, status=-9, signalled=False)
        record.ending(rank=2, host="h2", pid=8, status=1, signalled=False)
        record.close()
    record = Record(run)
    record.ending(rank=3, host="h2", pid=9, status=1, signalled=False)
    record.close()
    assert [json.loads(line)["rank"] for line in run.endings.read_text().splitlines()] == [1, 3]
    with run.endings.open("a") as file:
        file.write('{"time": 3.0, "ra')  # the head was killed
    assert "rank 1 on h1 failed: ended by SIGKILL" in str(failure(run.logs))
