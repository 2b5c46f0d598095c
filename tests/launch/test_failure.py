"""Which process a failed job is blamed on; the launchers' words are as they were seen."""

import json
from pathlib import Path

import pytest

from hvd_lb.launch.failure import RankFailure, find_failure
from hvd_lb.launch.hosts import Host

HOSTS = [Host("h1", 2), Host("h2", 2)]
HOROVODRUN = (
    "Process 3 exit with status code 137.\nTerminating remaining workers after failure of Process 3.\n"
    "RuntimeError: Horovod detected that one or more processes exited with non-zero status, thus causing the job to "
    "be terminated. The first process to do so was:\nProcess name: {rank}\nExit code: {code}\n"
)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path


def tell(logs: Path, rank: int, kind: str, message: str, time: float) -> None:
    content = {"rank": rank, "host": "?", "kind": kind, "message": message, "time": time}
    (logs / f"error-{rank:04d}.json").write_text(json.dumps(content))


def failure(logs: Path, said: str = "", status: int = 1, hosts: list[Host] = HOSTS) -> RankFailure:
    launcher = logs / "launcher.log"
    launcher.write_text(said)
    return find_failure(logs, launcher, hosts, status)


def test_the_first_error_of_its_own_counts_not_those_it_caused(logs: Path) -> None:
    tell(logs, 0, "HorovodInternalError", "Connection reset by peer", 1.0)
    tell(logs, 3, "UserError", "disk is full", 3.0)
    tell(logs, 2, "ValueError", "odd", 2.0)
    found = failure(logs, HOROVODRUN.format(rank=0, code=1))
    assert str(found) == f"rank 2 on h2 failed: ValueError: odd (full log: {logs}/rank-0002-h2.log)"


@pytest.mark.parametrize(
    "said",
    [
        HOROVODRUN.format(rank=3, code=137),
        HOROVODRUN.format(rank=3, code=-9),
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
        HOROVODRUN.format(rank=2, code=7),
        "mpirun detected that one or more processes exited with non-zero status, thus causing\nthe job to be "
        "terminated. The first process to do so was:\n\n  Process name: [[59049,1],2]\n  Exit code:    7\n",
        "srun: error: n2: task 2: Exited with exit code 7\n",
    ],
)
def test_an_exit_code_comes_with_the_last_words(logs: Path, said: str) -> None:
    (logs / "rank-0002-h2.log").write_text("hello\nImportError: no libfoo\n\n")
    assert failure(logs, said).message == "ended with exit code 7; last said: ImportError: no libfoo"


def test_a_lost_connection_is_told_from_a_killed_process(logs: Path) -> None:
    ended = HOROVODRUN.format(rank=2, code=255)
    assert "it was killed there" in failure(logs, ended).message
    found = failure(logs, f"[2]<stderr>:Timeout, server h2 not responding.\r\n{ended}")
    assert (found.rank, found.host) == (2, "h2")
    assert found.message == "the ssh connection to it ended: Timeout, server h2 not responding."


def test_what_srun_says_of_a_node_comes_before_the_ranks_that_it_ends(logs: Path) -> None:
    for rank in (0, 1):
        tell(logs, rank, "HorovodInternalError", "Connection reset by peer", rank)
    killed = "srun: error: h1: tasks 0-1: Killed\n"
    found = failure(logs, f"srun: error: Node failure on h2\n{killed}")
    assert (found.rank, found.host, found.message) == (2, "h2", "the node failed")
    found = failure(logs, f"srun: error: task 2 launch failed: Unspecified error\n{killed}")
    assert (found.rank, found.message) == (2, "Slurm did not start it: Unspecified error")


def test_who_neither_failed_nor_was_seen_to_end_was_lost(logs: Path) -> None:
    for rank in (0, 1):
        tell(logs, rank, "HorovodInternalError", "timed out", rank)
    found = failure(logs, HOROVODRUN.format(rank=1, code=1))
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


def test_a_single_process(logs: Path) -> None:
    found = failure(logs, "", -9, [Host("localhost", 1)])
    assert str(found).startswith("rank 0 on localhost failed: ended by SIGKILL")
