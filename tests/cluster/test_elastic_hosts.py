"""`hvd-lb train --hosts … --elastic` on three hosts of a lab: ranks, agents, hosts and links are lost and come back.

The weights are those of the undisturbed run, bitwise.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from elastic_runs import (
    RECIPE,
    RESCALED,
    STEPS,
    Fault,
    assert_it_comes_again,
    assert_the_same,
    at,
    events,
    script_in,
    with_faults,
)
from hosts import Host, lab
from PIL import Image
from real_runs import kill_all, processes_of, until

from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.kubernetes.pod import ending_well

pytest.importorskip("horovod")
pytestmark = [pytest.mark.cluster, pytest.mark.slow]
horovod_and_torch = pytest.mark.parametrize("engine", ["horovod", "torch"])

HVD_LB = Path(sys.executable).with_name("hvd-lb")
THREE = ("--hosts", "h1:1,h2:1,h3:1")
# The others wait for who takes the place of a lost one.
ALL = ("--min-processes", 3)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with lab(["h1", "h2", "h3"]) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [HVD_LB, *RECIPE, "--processes", 1, "--output", run]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return run


@contextmanager
def running(
    host: Host,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    faults: Sequence[Fault],
    *options: object,
    where: Sequence[object] = THREE,
    recipe: Sequence[object] = RECIPE,
) -> Iterator[subprocess.Popen[str]]:
    with_faults(folder, monkeypatch, faults)
    run, pipe = folder / "run", subprocess.PIPE
    process = host.start(
        [HVD_LB, *recipe, *where, "--elastic", "--env", "FAULTS", *options, "--output", run],
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
    )
    try:
        yield process
    finally:
        kill_all(run)
        process.kill()
        process.communicate()


def finished(process: subprocess.Popen[str], run: Path) -> str:
    """What it printed, once it has come to its end and left nothing behind."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "Traceback" not in out + err
    until(lambda: not processes_of(run), 60)
    return out


def elastic_submission(run: Path) -> Submission:
    words = ("train", "--elastic")
    return Submission(words, "run", "cpu", processes=3, per_node=1, output=run, elastic=True)


def agent_of(host: Host, run: Path) -> str:
    (pid,) = host.run(["pgrep", "-f", f"^[^ ]*python -P -m hvd_lb.launch.agent.host {run}"]).stdout.split()
    return str(pid)


@horovod_and_torch
@pytest.mark.parametrize("fault", [(2, "step", 5, "SIGKILL"), (0, "sums", 7, "SIGKILL")])
def test_a_rank_that_is_killed_is_replaced_on_its_host(
    hosts: list[Host],
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    fault: Fault,
) -> None:
    run = tmp_path / "run"
    with running(hosts[0], tmp_path, monkeypatch, [fault], *ALL, "--engine", engine) as process:
        out = finished(process, run)
    assert_the_same(undisturbed, run)
    (change,) = events(run)
    who = f"rank {fault[0]} on h{fault[0] + 1}"
    assert (change["lost"], change["joined"]) == ([f"{who} (ended by SIGKILL)"], 1)
    assert who in out
    assert (run / "logs" / f"rank-0003-h{fault[0] + 1}.log").exists()


@horovod_and_torch
@pytest.mark.parametrize("how", ["agent", "host", "link"])
@pytest.mark.parametrize("which", [1, 0])
def test_a_host_is_lost_and_comes_back(
    hosts: list[Host],
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    how: str,
    which: int,
) -> None:
    """By its agent, its power, or its link, which says nothing; and the host of the launching process by its agent."""
    if which == 0 and how != "agent":
        pytest.skip("with it the launching process would be lost")
    run, here = tmp_path / "run", tmp_path / "go"
    faults: list[Fault] = [(2, "step", 5, str(here))]
    options = (*ALL, "--engine", engine, "--hang-timeout", 16)
    host = hosts[which]
    with running(hosts[0], tmp_path, monkeypatch, faults, *options) as process:
        until(lambda: (tmp_path / "go.there").exists() or process.poll() is not None)
        ends: dict[str, Callable[[], object]] = {
            "agent": lambda: host.run(["kill", "-KILL", agent_of(host, run)]),
            "host": host.kill,
            "link": host.cut,
        }
        ends[how]()
        here.touch()
        log = run / "logs" / "launcher.log"
        until(lambda: f"{host.name} is lost" in log.read_text())
        if how == "host":
            host.boot()
        elif how == "link":
            host.fix()
        out = finished(process, run)
    assert_the_same(undisturbed, run)
    (change,) = events(run)
    (lost,) = change["lost"]
    why = "no word from it for 12 s" if how == "link" else "its connection ended"
    assert lost.startswith(f"rank {which} on {host.name} (its agent was killed, or its host or network went")
    if how != "host":  # whose end may be seen or not
        assert why in lost
    assert change["joined"] == 1
    assert out.count(f"{host.name} is lost (") == 1
    assert f"{host.name} is back: 1 starting there" in out


@horovod_and_torch
def test_a_host_with_notice_to_end_leaves_after_the_step_and_comes_back(
    hosts: list[Host], tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """As a pod on a node that is drained: its own hook, then its end, then another one under its name.

    While it still answers it gets no ranks.
    """
    run, here = tmp_path / "run", tmp_path / "go"
    faults: list[Fault] = [(0, "step", 5, str(here))]
    *hook, _ = ending_well(elastic_submission(run))["preStop"]["exec"]["command"]
    with running(hosts[0], tmp_path, monkeypatch, faults, *ALL, "--engine", engine) as process:
        until(lambda: (tmp_path / "go.there").exists() or process.poll() is not None)
        first = (hosts[2].folder / "sshd.pid").read_text().strip()  # in a pod it is process 1
        ending = hosts[2].start([*hook, first])
        until(lambda: "h3 has notice to end" in (run / "logs" / "launcher.log").read_text())
        here.touch()
        assert ending.wait(60) == 0
        log = run / "logs" / "launcher.log"
        until(lambda: "h3: it had notice to end, and has not been started anew" in log.read_text())
        hosts[2].kill()
        hosts[2].boot()
        out = finished(process, run)
    assert_the_same(undisturbed, run)
    (change,) = events(run)  # as the others wait
    assert (change["left"], change["lost"], change["joined"]) == (["rank 2 on h3"], [], 1)
    assert not change["repeated"]
    assert "h3 is lost (it had notice to end)" in out
    assert "h3 is back: 1 starting there" in out


def test_the_others_go_on_without_a_lost_host(
    hosts: list[Host], tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three, one of which is away for good, and a killed ssh, by which nothing is lost."""
    run, here = tmp_path / "run", tmp_path / "go"
    with running(hosts[0], tmp_path, monkeypatch, [(2, "step", 5, str(here))]) as process:
        until(lambda: (tmp_path / "go.there").exists() or process.poll() is not None)
        hosts[0].run(["pkill", "-KILL", "-f", f"^ssh .* h2 .*{run}"])
        hosts[2].kill()
        out = finished(process, run)
        hosts[2].boot()
    assert_the_same(undisturbed, run)
    assert [change["processes"] for change in events(run) if change["lost"]] == [2]
    assert out.count("h3 is lost (") == 1
    assert "h2" not in "".join(lost for change in events(run) for lost in change["lost"])


def test_a_newcomer_that_fails_ends_no_run_and_its_host_is_tried_again(
    hosts: list[Host], tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose data are not there yet, say."""
    run = tmp_path / "run"
    faults: list[Fault] = [(2, "step", 5, "SIGKILL"), (3, "data", 1, "UserError")]
    with running(hosts[0], tmp_path, monkeypatch, faults, *ALL) as process:
        out = finished(process, run)
    assert_the_same(undisturbed, run)
    assert events(run)[-1]["processes"] == 3
    assert "h3 is lost (rank 3 ended before it had joined (exit code 2))" in out
    assert "h3 is back" in out


@horovod_and_torch
def test_a_dead_connection_between_two_hosts_is_made_anew(
    hosts: list[Host], tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """The head reaches both, so neither is lost: all wait for each other."""
    run, here = tmp_path / "run", tmp_path / "go"
    options = ("--engine", engine, "--hang-timeout", 12)
    with running(hosts[0], tmp_path, monkeypatch, [(2, "step", 5, str(here))], *options) as process:
        until(lambda: (tmp_path / "go.there").exists() or process.poll() is not None)
        towards = (hosts[2].address, "dev", "eth0")
        hosts[1].run(["ip", "neigh", "replace", *towards, "lladdr", "02:00:00:00:00:99", "nud", "permanent"])
        here.touch()
        log = run / "logs" / "launcher.log"
        try:  # Not before: what is sent again would arrive, and nobody would have to connect anew.
            until(lambda: "they connect anew" in log.read_text() or process.poll() is not None)
        finally:
            hosts[1].run(["ip", "neigh", "del", *towards])
        out = finished(process, run)
    assert_the_same(undisturbed, run)
    assert "they connect anew" in out
    assert not [lost for change in events(run) for lost in change["lost"]]


def test_hosts_that_a_script_names_join_and_leave(
    hosts: list[Host], tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, script, names = tmp_path / "run", tmp_path / "script", tmp_path / "names"
    script.write_text(f"#!/bin/sh\nexec cat {names}\n")
    script.chmod(0o755)
    names.write_text("h1:1\nh2:1\n")
    faults: list[Fault] = [(0, "step", step, str(tmp_path / f"go{step}")) for step in (4, 7, 10)]
    where = ("--host-discovery", script, "--max-processes", 3)
    log = run / "logs" / "launcher.log"
    with (
        hosts[2].with_another_cpu() as feature,
        running(hosts[0], tmp_path, monkeypatch, faults, where=where) as process,
    ):
        for step, now, said in (
            (4, "h1:1\nh2:1\nh3:2\n", "rank 2 on h3 is ready to join"),
            (7, "h1:1\nh3:2\n", "rank 1 on h2 has heard that it is to leave"),
            (10, "h1:1\nh3:2\n", "rank 3 on h3 is ready to join"),
        ):
            until(lambda step=step: (tmp_path / f"go{step}.there").exists() or process.poll() is not None)  # type: ignore[misc]
            names.write_text(now)
            until(lambda said=said: said in log.read_text() or process.poll() is not None)  # type: ignore[misc]
            (tmp_path / f"go{step}").touch()
        out = finished(process, run)
    assert_the_same(undisturbed, run)
    changes = events(run)
    sizes = [(change["before"], change["processes"], change["joined"]) for change in changes]
    assert sizes == [(2, 3, 1), (3, 2, 0), (2, 3, 1)]  # h3's second place is taken when h2 has gone
    assert [change["left"] for change in changes] == [[], ["rank 1 on h2"], []]
    assert "h3 is there: 1 starting there" in out
    assert out.count(f"h3 has other hardware than the run began with (CPU without {feature})") == 1
    assert "h2 is to go: its processes leave after the present step" in out


@pytest.mark.long
@horovod_and_torch
def test_a_run_on_one_host_grows_to_three_and_is_alone_again(
    hosts: list[Host], tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """They find the first one by the name by which the script names it."""
    run, grow, shrink = (tmp_path / name for name in ("run", "grow", "shrink"))
    script, names = script_in(tmp_path, "h1:1\n")
    faults: list[Fault] = [(0, "step", 4, str(grow)), (0, "step", 8, str(shrink))]
    where = ("--host-discovery", script, "--engine", engine)
    ready = [f"on h{number} is ready to join" for number in (2, 3)]
    gone = [f"on h{number} has heard that it is to leave" for number in (2, 3)]
    with running(hosts[0], tmp_path, monkeypatch, faults, where=where) as process:
        at(grow, process, run, lambda: names.write_text("h1:1\nh2:1\nh3:1\n"), ready)
        at(shrink, process, run, lambda: names.write_text("h1:1\n"), gone)
        out = finished(process, run)
    assert_the_same(undisturbed, run)
    first, *others = events(run)
    assert (first["before"], first["processes"], first["joined"]) == (1, 3, 2)
    assert others[-1]["processes"] == 1
    assert not [change for change in events(run) if change["lost"] or change["repeated"]]
    assert "warning:" not in out


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_each_host_has_a_cache_of_its_own(
    hosts: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    """One that joins fills its cache, and one whose agent was lost does so again."""
    noise = np.random.default_rng(0)
    for number in range(24):
        place = tmp_path / "data" / ("train", "val")[number % 2] / ("ant", "bee")[number % 3 % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 256, (20 + number, 24, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.jpg")
    recipe = (
        *("train", "--data", tmp_path / "data", "--device", "cpu", "--model", "resnet8", "--image-size", 16),
        *("--threads", 1, "--gpus", 4, "--per-gpu-batch", 2, "--steps", STEPS, "--reproducible"),
        *("--log-every", 1, "--eval-every", "6steps", "--checkpoint-every", "6steps", "--loader", loader),
        "--log-samples",
    )
    plain = [HVD_LB, *recipe, "--processes", 1, "--output", tmp_path / "plain"]
    subprocess.run(list(map(str, plain)), check=True, stdout=subprocess.DEVNULL)
    script, names = script_in(tmp_path, "h1:1\nh2:1\n")
    run, come, back = (tmp_path / name for name in ("run", "come", "back"))
    faults: list[Fault] = [(0, "step", 4, str(come)), (0, "step", 8, str(back))]
    where = ("--host-discovery", script, "--max-processes", 4, "--cache", "memory")
    first, others = ([f"rank {member} on h3 is ready to join" for member in of] for of in ((2, 3), (4, 5)))
    with running(hosts[0], tmp_path, monkeypatch, faults, where=where, recipe=recipe) as process:
        at(come, process, run, lambda: names.write_text("h1:1\nh2:1\nh3:2\n"), first)
        at(back, process, run, lambda: hosts[2].run(["kill", "-KILL", agent_of(hosts[2], run)]), others)
        finished(process, run)
    assert_the_same(tmp_path / "plain", run)
    assert events(run)[-1]["processes"] == 4
    assert not [name for host in hosts for name in host.run(["ls", "/dev/shm"]).stdout.split()]


@pytest.mark.parametrize(
    ("engine", "how"), [("torch", "rank"), ("horovod", "agent"), ("torch", "host"), ("horovod", "link")]
)
def test_k_follows_the_hosts_that_there_are(
    hosts: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, how: str
) -> None:
    """Of six virtual workers a host that is lost takes two along, and brings two back."""
    run, go, back = tmp_path / "run", tmp_path / "go", tmp_path / "back"
    faults: list[Fault] = [(0, "step", 3, str(go)), (0, "step", 6, str(back))]
    # Of the link only silence tells; and rank 0 stands still while the host comes back, which is no hang.
    silence = ("--hang-timeout", 40) if how == "link" else ()
    recipe = (*RESCALED, "--gpus", 6, "--per-gpu-batch", 24, "--engine", engine, *silence)
    host, log = hosts[2], run / "logs" / "launcher.log"
    with running(hosts[0], tmp_path, monkeypatch, faults, recipe=recipe) as process:

        def at(gate: Path) -> None:
            until(lambda: Path(f"{gate}.there").exists() or process.poll() is not None)

        at(go)
        ends: dict[str, Callable[[], object]] = {
            "rank": lambda: host.run(["pkill", "-KILL", "-f", f"rank.entry {run}"]),
            "agent": lambda: host.run(["kill", "-KILL", agent_of(host, run)]),
            "host": host.kill,
            "link": host.cut,
        }
        ends[how]()
        go.touch()
        at(back)
        if how == "host":
            host.boot()
        elif how == "link":
            host.fix()
        until(lambda: "on h3 is ready to join" in log.read_text() or process.poll() is not None)
        back.touch()
        finished(process, run)
    first, *_ = events(run)
    assert first["lost"][0].startswith("rank 2 on h3")
    workers = [scale.workers for scale in assert_it_comes_again(run).scales(None)]
    assert workers == [6, 4, 6]


def test_k_follows_the_hosts_that_a_script_names(
    hosts: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the k of the start, as far as --max-processes goes; who is asked to leave takes its workers along."""
    run, come, leave = (tmp_path / name for name in ("run", "come", "leave"))
    script, names = script_in(tmp_path, "h1:1\nh2:1\n")
    faults: list[Fault] = [(0, "step", 3, str(come)), (0, "step", 6, str(leave))]
    where = ("--host-discovery", script, "--max-processes", 4)
    recipe = (*RESCALED, "--per-gpu-batch", 24)
    ready = [f"rank {member} on h3 is ready to join" for member in (2, 3)]
    with running(hosts[0], tmp_path, monkeypatch, faults, where=where, recipe=recipe) as process:
        at(come, process, run, lambda: names.write_text("h1:1\nh2:1\nh3:2\n"), ready)
        heard = ["rank 1 on h2 has heard that it is to leave"]
        at(leave, process, run, lambda: names.write_text("h1:1\nh3:2\n"), heard)
        finished(process, run)
    recorded = assert_it_comes_again(run)
    begun, joined, left = recorded.scales(None)
    assert [begun.workers, (joined.step, joined.workers), left.workers] == [4, (4, 8), 6]
    assert left.step in (7, 8)  # who waits for the sums of a step says in the next one that it leaves
    assert [change["left"] for change in events(run)] == [[], ["rank 1 on h2"]]
