"""The command lines of the launchers, exactly; that they run is for tests/cluster to show."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host, is_this_machine
from hvd_lb.launch.launch_plan import mpirun_command
from hvd_lb.launch.options import LaunchOptions
from hvd_lb.launch.preflight.ask import explain_failure
from hvd_lb.launch.preflight.cluster import Cluster
from hvd_lb.launch.starters.local import local
from hvd_lb.launch.starters.srun import over_srun
from hvd_lb.launch.starters.ssh import on_host, over_ssh, ssh_command

JOB = Path("/runs/a b;$(x)/logs/job.json")
RANK = [sys.executable, "-P", "-m", "hvd_lb.launch.rank.entry", str(JOB)]
HEAD = [sys.executable, "-P", "-m", "hvd_lb.launch.agent.head", str(JOB)]
SSH = (
    "ssh -T -o RemoteCommand=none -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o ConnectTimeout=10 "
    "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
)


def cluster(**changes: object) -> Cluster:
    values: dict[str, object] = {
        "hosts": [Host("h1", 2), Host("h2", 2)],
        "device": "cpu",
        "cores": {"h1": 4, "h2": 2},
        "interfaces": {"h1": "eth0", "h2": "ens3"},
        "interface": "eth0",
        "address": "10.0.0.1",
        "mpirun": True,
    }
    return Cluster(**{**values, **changes})  # type: ignore[arg-type]


def test_planning_needs_no_horovod() -> None:
    """A run on one process has none."""
    modules = "session, hvd_lb.launch.target, hvd_lb.launch.starters.local, hvd_lb.launch.starters.ssh"
    program = f"import sys; sys.modules['horovod'] = None; import hvd_lb.launch.{modules}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_process_here_is_a_plain_one() -> None:
    launch = local(1, {"A": "b"})
    assert launch.command(JOB) == RANK
    assert (launch.hosts, launch.interfaces, launch.environment) == ([Host("localhost", 1)], {}, {"A": "b"})


@pytest.mark.parametrize(("processes", "elastic"), [(3, False), (1, True)])
def test_several_here_talk_over_the_loopback(processes: int, elastic: bool) -> None:
    pytest.importorskip("horovod")
    launch = local(processes, {}, elastic=elastic)
    assert launch.command(JOB) == [*HEAD, "127.0.0.1", "each"]
    assert launch.agents
    assert launch.interfaces == {"localhost": "lo"}


def test_over_ssh_with_gloo() -> None:
    launch = over_ssh(cluster(), 3, LaunchOptions(ssh_port=12345, ssh_key=Path("/k y")), {})
    ssh = [*SSH.split(), "-p", "12345", "-i", "/k y"]
    assert launch.command(JOB) == [*HEAD, "10.0.0.1", "each", *ssh]
    assert launch.agents
    assert launch.hosts == [Host("h1", 2), Host("h2", 1)]
    assert launch.interfaces == {"h1": "eth0", "h2": "ens3"}


def test_over_ssh_with_open_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/x")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    launch = over_ssh(cluster(), 4, LaunchOptions(strict_host_keys=True), {"HOROVOD_CPU_OPERATIONS": "MPI"})
    ssh = SSH.replace("accept-new", "yes")
    assert not launch.agents
    assert launch.command(JOB) == [
        *("env", "-u", "LSB_JOBID", "mpirun", "--allow-run-as-root", "--tag-output", "-wdir", "/"),
        *("-np", "4", "-H", "h1:2,h2:2", "-bind-to", "none", "-map-by", "slot"),
        *("--mca", "pml", "ob1", "--mca", "btl", "^openib", "--mca", "btl_tcp_if_include", "ens3,eth0"),
        *("--mca", "oob_tcp_if_include", "ens3,eth0", "--mca", "plm_rsh_agent", "ssh"),
        *("--mca", "plm_rsh_args", ssh.removeprefix("ssh "), "--mca", "mpi_yield_when_idle", "1"),
        *("-x", "PATH", "-x", "PYTHONPATH", *RANK),
    ]


def test_many_hosts_are_all_reached_from_here_by_open_mpi() -> None:
    hosts = [Host(f"h{number}", 1) for number in range(64)]
    command = mpirun_command(hosts, JOB, ["eth0"], ["ssh"])
    assert command[command.index("plm_rsh_no_tree_spawn") + 1] == "true"
    assert "plm_rsh_no_tree_spawn" not in mpirun_command(hosts[1:], JOB, ["eth0"], ["ssh"])


def test_over_srun_one_task_a_node_starts_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = over_srun(cluster(), 3, 4, {})
    command = launch.command(JOB)
    assert command[: len(HEAD) + 2] == [*HEAD, "10.0.0.1", "all"]
    srun = command[command.index("srun") :]
    assert {"--nodelist=h1,h2", "--ntasks=2", "--gpus-per-node=4", "--input=all"} < set(srun)
    assert srun[-5:] == [sys.executable, "-P", "-m", "hvd_lb.launch.agent.host", str(JOB)]
    assert launch.agents
    # An elastic job has a step for each node, by its name and what is to be run there.
    command = over_srun(cluster(), 3, 4, {}, elastic=True).command(JOB)
    assert command[: len(HEAD) + 2] == [*HEAD, "10.0.0.1", "nodes"]
    srun = command[command.index("srun") :]
    assert {"--nodes=1", "--ntasks=1", "--gpus-per-node=4", "--input=all"} < set(srun)
    assert srun[-1] == "--nodelist"
    # Open MPI is started by Slurm itself, a task for each rank.
    monkeypatch.setattr("hvd_lb.launch.starters.srun._mpi_plugin", lambda: "pmix")
    launch = over_srun(cluster(), 3, 0, {"HOROVOD_CPU_OPERATIONS": "MPI"})
    srun = launch.command(JOB)
    assert {"--nodelist=h1,h1,h2", "--ntasks=3", "--mpi=pmix"} < set(srun)
    assert srun[-5:] == RANK
    assert not launch.agents


def test_mpirun_cannot_be_given_a_key_with_spaces() -> None:
    with pytest.raises(UserError, match="without spaces"):
        mpirun_command([Host("h1", 1)], JOB, ["eth0"], ssh_command(LaunchOptions(ssh_key=Path("/k y"))))


def test_no_secret_is_on_a_command_line() -> None:
    launch = over_ssh(cluster(), 4, LaunchOptions(), {"TOKEN": "s3cret"})
    assert "s3cret" not in " ".join(launch.command(JOB))


def test_what_a_shell_there_gets_is_quoted() -> None:
    command = ["python", "-m", "x", "a b; $(touch /tmp/x) 'q'", "-o"]
    remote = on_host(["ssh"], "192.0.2.1", command)
    assert remote[:2] == ["ssh", "192.0.2.1"]
    assert len(remote) == 3
    assert shlex.split(remote[2]) == command
    shown = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {remote[2]}"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines() == command


def test_this_machine_needs_no_ssh() -> None:
    assert is_this_machine("127.0.0.1")
    assert not is_this_machine("192.0.2.1")  # TEST-NET-1
    assert not is_this_machine("no-such-host.invalid")
    assert on_host(["ssh"], "localhost", ["true"]) == ["true"]


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (255, "ssh: Could not resolve hostname h9: Name or service not known", "no such host"),
        (255, "me@h2: Permission denied (publickey).", "key refused on port 2222: ssh-copy-id h2"),
        (255, "ssh: connect to host h2 port 2222: Connection refused", "no sshd answers on port 2222"),
        (255, "ssh: connect to host h2 port 2222: Connection timed out", "no answer on port 2222"),
        (
            255,
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            "ssh-keygen -R h2",
        ),
        (255, "No ED25519 host key is known for h2.\nHost key verification failed.", "log in once by hand"),
        (127, "bash: line 1: /opt/x/python: No such file or directory", "no hvd-lb there"),
        (1, "/usr/bin/python: No module named hvd_lb", "no hvd-lb there"),
        (1, "Traceback\nValueError: odd", "it gave no answer: ValueError: odd"),
        (3, "", "it gave no answer: exit code 3"),
        # A program's own words are no word of ssh.
        (1, "Permission denied", "it gave no answer: Permission denied"),
    ],
)
def test_why_a_host_gave_no_answer(status: int, said: str, expected: str) -> None:
    run = subprocess.CompletedProcess([], status, "", said)
    explained = explain_failure("h2", run, LaunchOptions(ssh_port=2222))
    assert expected in explained
    assert "\n" not in explained


def test_a_host_that_hangs() -> None:
    assert "no answer in time" in explain_failure("h2", None, LaunchOptions())


def test_threads_are_those_of_the_host_with_the_smallest_share() -> None:
    placed = cluster().placement(gpus=8, processes=None, threads=None)
    assert (placed.processes, placed.threads, placed.hosts) == (4, 1, ("h1", "h2"))
    assert (
        cluster().placement(gpus=8, processes=2, threads=None).threads == 2
    )  # both on h1, which has 4 cores
    assert cluster().placement(gpus=8, processes=2, threads=7).threads == 7
    with pytest.raises(UserError, match="expected 1 to 2"):
        cluster().placement(gpus=2, processes=3, threads=None)
