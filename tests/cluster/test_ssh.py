"""`hvd-lb train --hosts` on three hosts of a lab: real sshd and mpirun, real faults."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hosts import Host, lab
from PIL import Image
from real_runs import kill_all, processes_of, trained_steps, until

from hvd_lb.launch.launch_plan import head_command

pytest.importorskip("horovod")
pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HVD_LB = Path(sys.executable).with_name("hvd-lb")
DIGITS = ("--data", "digits", "--device", "cpu", "--model", "resnet8", "--threads", 1, "--reproducible")
LONG = (*DIGITS, "--gpus", 3, "--epochs", 4, "--checkpoint-every", "5steps", "--keep-checkpoints", 50)
THREE = ("--hosts", "h1:1,h2:1,h3:1")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with lab(["h1", "h2", "h3"]) as hosts:
        yield hosts


def hvd_lb(host: Host, *arguments: object, status: int = 0) -> tuple[str, str]:
    """What the command printed on that host; it must end with this exit status and without a traceback."""
    done = host.run([HVD_LB, *arguments], check=False, timeout=300)
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout, done.stderr


def start(host: Host, *arguments: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return host.start([HVD_LB, *arguments], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)


def same(host: Host, *runs: Path) -> bool:
    return "bitwise identical" in hvd_lb(host, "compare", *runs)[0]


@pytest.fixture(scope="module")
def undisturbed(hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    hvd_lb(hosts[0], "simulate", *LONG, "--run", "--output", run)
    return run


@pytest.mark.parametrize(("port", "engine"), [(22, "horovod"), (12345, "torch")])
def test_six_processes_on_three_hosts_are_bitwise_the_simulated_ones(
    hosts: list[Host], tmp_path: Path, port: int, engine: str
) -> None:
    recipe = (*DIGITS, "--gpus", 6, "--epochs", 1)
    cluster, simulated = tmp_path / "cluster", tmp_path / "simulated"
    where = ("--hosts", "h1:2,h2:2,h3:2", "--ssh-port", port, "--engine", engine)
    out, _ = hvd_lb(hosts[0], "train", *recipe, *where, "--output", cluster)
    assert f"engine: {engine}, as asked for\nhosts: h1:2, h2:2, h3:2 (--hosts), by ssh\n" in out
    assert ("controller: Gloo, as nothing here needs MPI\n" in out) == (engine == "horovod")
    hvd_lb(hosts[0], "simulate", *recipe, "--run", "--output", simulated)
    assert same(hosts[0], cluster, simulated)
    logs = {path.name for path in (cluster / "logs").glob("rank-*.log")}
    assert logs == {f"rank-{rank:04d}-h{rank // 2 + 1}.log" for rank in range(6)}


def test_sixteen_ranks_a_host_start_with_sshds_default_limits(hosts: list[Host], tmp_path: Path) -> None:
    """In place of ranks scripts: 48 that load torch would need 14 GB."""
    assert "MaxStartups" not in (hosts[0].folder / "sshd_config").read_text()
    package = tmp_path / "stub" / "hvd_lb" / "launch" / "rank"
    package.mkdir(parents=True)
    (package / "entry.py").write_text("import time; time.sleep(3)")
    job_file = tmp_path / "run" / "logs" / "job.json"
    job_file.parent.mkdir(parents=True)
    job = {
        "hosts": [(host.name, 16) for host in hosts],
        "processes": 48,
        "output": str(tmp_path / "run"),
        "environment": {"PYTHONPATH": str(tmp_path / "stub"), "HOROVOD_GLOO_TIMEOUT_SECONDS": "600"},
    }
    job_file.write_text(json.dumps(job))
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new"]
    hosts[0].run(head_command(job_file, hosts[0].address, "each", ssh), timeout=200)
    endings = map(json.loads, (job_file.parent / "endings.jsonl").read_text().splitlines())
    assert sorted((of["rank"], of["host"], of["status"]) for of in endings) == [
        (rank, f"h{rank // 16 + 1}", 0) for rank in range(48)
    ]


def test_uneven_hosts_from_a_file_and_a_launching_machine_that_takes_no_part(
    hosts: list[Host], tmp_path: Path
) -> None:
    (tmp_path / "hostfile").write_text("h2 slots=1\nh3 slots=3\n")
    recipe = (*DIGITS, "--gpus", 5, "--epochs", 1)
    cluster, simulated = tmp_path / "cluster", tmp_path / "simulated"
    hvd_lb(hosts[0], "train", *recipe, "--hostfile", tmp_path / "hostfile", "--output", cluster)
    hvd_lb(hosts[0], "simulate", *recipe, "--run", "--output", simulated)
    assert same(hosts[0], cluster, simulated)
    assert {path.name[10:12] for path in (cluster / "logs").glob("rank-*.log")} == {"h2", "h3"}


def bulk_of_pairs(hosts: list[Host]) -> list[int]:
    """Bytes that were acknowledged on the present connections between each two hosts, those of sshd left out."""
    pairs: dict[frozenset[str], int] = {}
    for host in hosts:
        lines = host.run(["ss", "-tinHO", "state", "established"]).stdout.splitlines()
        for line in lines:
            ends = re.findall(r"(10\.77\.0\.\d+)(?:%\w+)?:(\d+)", line)
            acknowledged = re.search(r"bytes_acked:(\d+)", line)
            if len(ends) == 2 and acknowledged and not {port for _, port in ends} & {"22", "12345"}:
                pair = frozenset(address for address, _ in ends)
                pairs[pair] = pairs.get(pair, 0) + int(acknowledged[1])
    return sorted(
        pairs.get(frozenset((a.address, b.address)), 0)
        for a, b in zip(hosts, hosts[1:] + hosts[:1], strict=True)
    )


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no Open MPI")
@pytest.mark.parametrize("allreduce", ["ring", "halving-doubling"])
def test_the_allreduce_that_was_asked_for_is_the_one_that_runs(
    hosts: list[Host], tmp_path: Path, undisturbed: Path, allreduce: str
) -> None:
    """In a ring of three hosts each sends to the next. Halving and doubling needs a power of two: first one of the
    three hands its part to another, and never talks to the third."""
    run = tmp_path / "run"
    process = start(hosts[0], "train", *LONG, *THREE, "--allreduce", allreduce, "--output", run)
    until(lambda: trained_steps(run) >= 8 or process.poll() is not None, 120)
    least, _, most = bulk_of_pairs(hosts)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert most > 500_000, "nothing was exchanged"
    assert ("MPI, which --allreduce" in out) == (allreduce == "halving-doubling")
    assert (least < most / 10) if allreduce == "halving-doubling" else (least > most / 3)
    assert same(hosts[0], run, undisturbed)


def refused(hosts: list[Host], tmp_path: Path, *arguments: object) -> str:
    """The one line by which a command that cannot work is refused, with nothing started or written."""
    before = sorted(tmp_path.rglob("*"))
    command = ("train", "--gpus", 3, "--device", "cpu", "--output", tmp_path / "run", *arguments)
    _, err = hvd_lb(hosts[0], *command, status=2)
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return err


def test_a_wrong_port_an_unknown_host_and_a_host_without_an_interface(
    hosts: list[Host], tmp_path: Path
) -> None:
    digits = ("--data", "digits")
    assert "h2, h3: no sshd answers on port 2222" in refused(
        hosts, tmp_path, *digits, *THREE, "--ssh-port", 2222
    )
    assert "h9: no such host" in refused(hosts, tmp_path, *digits, "--hosts", "h1:1,h9:2")
    assert "no interface ib0" in refused(hosts, tmp_path, *digits, *THREE, "--network-interface", "ib0")
    assert "10.77.0.200: no route to it" in refused(hosts, tmp_path, *digits, "--hosts", "h1:1,10.77.0.200:2")
    two_names = ("--hosts", "h1:1,h2:1,10.77.0.2:1")
    assert "10.77.0.2: it is h2 under another name" in refused(hosts, tmp_path, *digits, *two_names)
    ib = ("--env", "NCCL_SOCKET_IFNAME==ib0,eth")
    assert "NCCL_SOCKET_IFNAME==ib0,eth leaves none of its" in refused(hosts, tmp_path, *digits, *THREE, *ib)


def test_a_refused_key(hosts: list[Host], tmp_path: Path) -> None:
    hosts[1].refuse_key()
    try:
        assert "h2: key refused" in refused(hosts, tmp_path, "--data", "digits", *THREE)
    finally:
        hosts[1].accept_key()


def test_host_keys_are_checked(tmp_path: Path) -> None:
    with lab(["h1", "h2"]) as hosts:
        run = ("--data", "digits", "--hosts", "h1:1,h2:1", "--gpus", 2)
        assert "h2: its host key is not in known_hosts" in refused(
            hosts, tmp_path, *run, "--strict-host-keys"
        )
        hvd_lb(hosts[0], "doctor", "--hosts", "h1:1,h2:1", "--output", tmp_path)  # notes the key
        hosts[1].change_host_key()
        assert "h2: its host key is another than in known_hosts" in refused(hosts, tmp_path, *run)


def test_other_versions(hosts: list[Host], tmp_path: Path) -> None:
    (installed,) = [f for f in metadata.files("torch") or [] if f.name == "METADATA"]
    file = Path(str(installed.locate()))
    other = tmp_path / "METADATA"
    other.write_text(
        re.sub(r"^Version: .*$", "Version: 2.13.0", file.read_text(), count=1, flags=re.MULTILINE)
    )
    hosts[2].replace(file, other)
    try:
        said = refused(hosts, tmp_path, "--data", "digits", *THREE)
        assert f"h3: torch 2.13.0, here {metadata.version('torch')}; install the same" in said
    finally:
        hosts[2].put_back(file)


def test_a_host_without_hvd_lb(hosts: list[Host], tmp_path: Path) -> None:
    hosts[1].hide(Path(sys.prefix))
    try:
        assert "h2: no hvd-lb there" in refused(hosts, tmp_path, "--data", "digits", *THREE)
    finally:
        hosts[1].put_back(Path(sys.prefix))


def images(folder: Path, count: int) -> Path:
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "val" / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(
                folder / "train" / name / f"{i}.jpg"
            )
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / "val" / name / "0.jpg")
    return folder


def test_a_host_without_data_or_with_other_data(hosts: list[Host], tmp_path: Path) -> None:
    data, other = images(tmp_path / "mount" / "data", 12), images(tmp_path / "other", 13)
    arguments = ("--data", data, *THREE, "--model", "resnet8", "--per-gpu-batch", 4)
    hosts[2].hide(data.parent)
    try:
        assert f"h3: no readable data folder {data} there" in refused(hosts, tmp_path, *arguments)
    finally:
        hosts[2].put_back(data.parent)
    hosts[2].replace(data, other)
    try:
        run = tmp_path / "run"
        _, err = hvd_lb(
            hosts[0],
            "train",
            *arguments,
            "--gpus",
            3,
            "--device",
            "cpu",
            "--epochs",
            1,
            "--output",
            run,
            status=1,
        )
        assert "rank 2 on h3 failed" in err
        # The hosts share a cache: h3 takes the index of the others, and finds at the first file that it is another.
        assert f"{data}/train/" in err
        assert "bytes" in err
    finally:
        hosts[2].put_back(data)


def test_an_output_folder_that_is_not_shared(hosts: list[Host], tmp_path: Path) -> None:
    hosts[1].hide(tmp_path)
    try:
        assert f"h2: {tmp_path} is another folder than here" in refused(
            hosts, tmp_path, "--data", "digits", *THREE
        )
    finally:
        hosts[1].put_back(tmp_path)


@contextmanager
def running(hosts: list[Host], run: Path, *more: object) -> Iterator[subprocess.Popen[str]]:
    """A run on all three hosts that has taken some steps, also where it goes on."""
    before = trained_steps(run)
    process = start(hosts[0], "train", *LONG, *THREE, "--output", run, *more)
    try:
        until(lambda: trained_steps(run) >= before + 6 or process.poll() is not None, 300)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        kill_all(run)
        process.kill()
        process.communicate()


def test_no_secret_on_a_command_line_and_no_open_door(hosts: list[Host], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(hosts, run, "--env", "TOKEN=pa55word"):
        for host in hosts[1:]:
            assert "hvd_lb.launch.rank.entry" in (shown := host.run(["ps", "axww", "-o", "args"]).stdout)
            assert "pa55word" not in shown
        for host in hosts:
            for line in host.run(["ss", "-ltnHp"]).stdout.splitlines():
                assert "sshd" in line or f" {host.address}:" in line or " 127.0.0.1:" in line, line
        assert (run / "logs" / "job.json").stat().st_mode & 0o077 == 0
        others = [path for path in run.rglob("*") if path.is_file() and path.stat().st_mode & 0o004]
        assert not [
            path for path in others if b"pa55word" in path.read_bytes() and path.name != "environment.json"
        ]


def test_nothing_is_left_on_any_host_when_the_launcher_is_killed(hosts: list[Host], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(hosts, run) as process:
        assert len(processes_of(run)) > 6
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        until(lambda: not processes_of(run), 60)


def test_stopped_on_three_hosts_gone_on_on_two_and_on_one(
    hosts: list[Host], tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    with running(hosts, run) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, out + err
        assert "with a checkpoint; the same command goes on there" in out
        assert not processes_of(run)
    out, _ = hvd_lb(hosts[1], "train", *LONG, "--hosts", "h3:2,h2:1", "--output", run)
    assert "going on from step" in out
    assert same(hosts[0], run, undisturbed)


def test_a_killed_rank_is_named_with_its_host(hosts: list[Host], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(hosts, run) as process:
        found = hosts[2].run(["pgrep", "-f", "^[^ ]*python -P -m hvd_lb.launch.rank.entry"]).stdout.split()
        hosts[2].run(["kill", "-KILL", *found])
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1, out + err
        assert err.startswith("hvd-lb: error: rank 2 on h3 failed: ")
        assert "ended by SIGKILL" in err
        assert err.count("\n") == 1
        until(lambda: not processes_of(run), 60)


def test_a_rank_that_stands_still_for_a_while_ends_nothing_and_one_that_crashes_is_named(
    hosts: list[Host], tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    with running(hosts, run) as process:
        pids = {number: str(of["pid"]) for number, of in ranks_of(run).items()}
        hosts[2].run(["kill", "-STOP", pids["2"]])
        time.sleep(40)  # more than Gloo waits by itself
        before = trained_steps(run)
        hosts[2].run(["kill", "-CONT", pids["2"]])
        until(lambda: trained_steps(run) > before + 2 or process.poll() is not None)
        hosts[1].run(["kill", "-SEGV", pids["1"]])
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1, out + err
        assert err.startswith("hvd-lb: error: rank 1 on h2 failed: ended by SIGSEGV")
        assert err.count("\n") == 1
        until(lambda: not processes_of(run), 60)
    hvd_lb(hosts[0], "train", *LONG, *THREE, "--output", run)
    assert same(hosts[0], run, undisturbed)


def ranks_of(run: Path) -> dict[str, dict[str, object]]:
    """What the head of a job has heard of its ranks."""
    told = json.loads((run / "logs" / "ranks.json").read_text())["ranks"]
    return {number: dict(of) for number, of in told.items()}


def test_a_cut_network_ends_the_run_on_both_sides_with_the_hosts_name(
    hosts: list[Host], tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    with running(hosts, run) as process:
        hosts[2].cut()
        try:
            out, err = process.communicate(timeout=200)
            assert process.returncode == 1, out + err
            assert err.startswith("hvd-lb: error: rank 2 on h3 failed: ")
            assert "its host or network went away" in err
            assert err.count("\n") == 1
            until(lambda: not processes_of(run), 120)  # while it is cut
        finally:
            hosts[2].fix()
    hvd_lb(hosts[0], "train", *LONG, *THREE, "--output", run)
    assert same(hosts[0], run, undisturbed)


def test_a_run_is_watched_and_stopped_from_another_host(hosts: list[Host], tmp_path: Path) -> None:
    run, long = tmp_path / "run", ("--epochs", 400)
    with running(hosts, run, *long) as process:
        now = json.loads(hvd_lb(hosts[1], "status", run, "--json")[0])
        assert (now["state"], now["launched_on"], now["hosts"]) == ("running", "h1", ["h1", "h2", "h3"])
        assert "hosts: h1:1, h2:1, h3:1 (--hosts), by ssh" in hvd_lb(hosts[1], "logs", run)[0]
        assert "has no log of rank 9" in hvd_lb(hosts[1], "logs", run, "--rank", 9, status=2)[1]
        assert "interrupted by SIGINT" in hvd_lb(hosts[1], "stop", run)[0]
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, out + err
        assert not processes_of(run)
    with running(hosts, run, *long) as process:
        assert "is asked to end at once" in hvd_lb(hosts[2], "stop", run, "--now")[0]
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, out + err
        assert out.endswith("stopped at once; the same command goes on from the last checkpoint\n")
        assert not processes_of(run)
    with running(hosts, run, *long) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        # Until its ranks have noticed, the run's lock is still held.
        until(lambda: json.loads(hvd_lb(hosts[1], "status", run, "--json")[0])["state"] == "lost", 60)
        until(lambda: not processes_of(run), 60)


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_lost_host_ends_the_run_with_its_name_and_the_others_go_on(
    tmp_path: Path, undisturbed: Path, restarts: int
) -> None:
    with lab(["h1", "h2", "h3"]) as hosts:
        run = tmp_path / "run"
        with running(hosts, run, "--restarts", restarts) as process:
            hosts[2].kill()
            out, err = process.communicate(timeout=300)
            assert process.returncode == (0 if restarts else 1), out + err
            assert err.startswith("hvd-lb: error: rank 2 on h3 failed: ")
            assert out.count("left out: h3: ") == restarts
            until(lambda: not processes_of(run), 60)
        if not restarts:
            hvd_lb(hosts[0], "train", *LONG, "--hosts", "h1:1,h2:2", "--output", run)
        assert same(hosts[0], run, undisturbed)


def test_hostile_names_reach_no_shell(hosts: list[Host], tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "a b;touch pwned;$(touch pwned)'\"\\"
    folder.mkdir()
    run = folder / "run `touch pwned`"
    there = ("sh", "-c", 'cd "$0" && exec "$@"', folder)
    done = hosts[0].run([*there, HVD_LB, "train", *LONG, *THREE, "--output", run], timeout=300)
    assert "ended: finished" in done.stdout
    assert same(hosts[0], run, undisturbed)
    assert not [*tmp_path.rglob("pwned*"), *Path.cwd().glob("pwned*")]
    for name in ("-oProxyCommand=touch pwned", "h1;touch pwned", "$(touch pwned)"):
        assert "is not a host" in refused(hosts, tmp_path / "none", "--data", "digits", "--hosts", name)


def test_a_dry_run_writes_nothing_and_what_it_prints_runs(
    hosts: list[Host], tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    script, _ = hvd_lb(hosts[0], "train", *LONG, *THREE, "--output", run, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    hosts[0].run(["bash", "-eu"], input=script, timeout=300)
    weights = "checkpoints/last/model.safetensors"
    assert (run / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_doctor_examines_hosts_alone(hosts: list[Host], tmp_path: Path) -> None:
    out, _ = hvd_lb(hosts[0], "doctor", "--hosts", "h1:2,h2:2", "--output", tmp_path)
    assert "ready: h1:2, h2:2: 4 processes on cpu" in out
    assert list(tmp_path.iterdir()) == []
    out, _ = hvd_lb(hosts[0], "doctor", "--hosts", "h1:2,h9:2", "--output", tmp_path, status=1)
    assert "wrong   h9  reached: no such host" in out


def test_what_a_login_by_hand_gets_by_a_users_configuration_is_left_out(
    hosts: list[Host], tmp_path: Path
) -> None:
    config = hosts[0].folder / "ssh_config"
    before = config.read_text()
    config.write_text(before + "RequestTTY force\nRemoteCommand tmux\n")
    try:
        out, _ = hvd_lb(hosts[0], "doctor", "--hosts", "h1:1,h2:1", "--output", tmp_path)
    finally:
        config.write_text(before)
    assert "ready: h1:1, h2:1: 2 processes on cpu" in out
