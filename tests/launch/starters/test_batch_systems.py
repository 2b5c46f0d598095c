"""Hosts of the jobs of batch systems, from variables and files as these write them."""

from pathlib import Path

import pytest

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.options import LaunchOptions
from hvd_lb.launch.starters.batch_systems import batch_job, lsf_hosts
from hvd_lb.launch.target import find_target


def test_hosts_of_an_lsf_job() -> None:
    assert lsf_hosts({}) is None
    job = {"LSB_JOBID": "7", "LSB_MCPU_HOSTS": "batch1 1 g1 42 g2 42"}
    assert lsf_hosts(job) == [Host("g1", cpus=42), Host("g2", cpus=42)]
    assert lsf_hosts({**job, "LSB_MCPU_HOSTS": "g1 8"}) == [Host("g1", cpus=8)]
    assert lsf_hosts({**job, "LSB_MCPU_HOSTS": "g1 8 g2 8"}) == [Host("g1", cpus=8), Host("g2", cpus=8)]
    for text in ("g1", "g1 x", "g1 8 g2"):
        with pytest.raises(UserError, match=f"LSB_MCPU_HOSTS is '{text}'"):
            lsf_hosts({**job, "LSB_MCPU_HOSTS": text})


@pytest.mark.parametrize(
    ("job", "file", "lines", "hosts", "what"),
    [
        ("PBS_JOBID", "PBS_NODEFILE", "h1\nh1\nh2\nh2\n", {"h1": 2, "h2": 2}, "PBS job 7.pbs"),
        ("PBS_JOBID", "PBS_NODEFILE", "h1\nh2\n", {"h1": 1, "h2": 1}, "PBS job 7.pbs"),
        ("COBALT_JOBID", "COBALT_NODEFILE", "h1\nh2\n", {"h1": 1, "h2": 1}, "Cobalt job 7.pbs"),
        (
            "JOB_ID",
            "PE_HOSTFILE",
            "h1 8 all.q UNDEFINED\nh2 4 all.q UNDEFINED\n",
            {"h1": 8, "h2": 4},
            "Grid Engine job",
        ),
    ],
)
def test_a_job_of_a_batch_system_is_not_run_on_one_of_its_hosts_alone(
    job: str, file: str, lines: str, hosts: dict[str, int], what: str, tmp_path: Path
) -> None:
    (tmp_path / "nodes").write_text(lines)
    environment = {job: "7.pbs", file: str(tmp_path / "nodes")}
    target = find_target(LaunchOptions(), "auto", environment)
    assert target.kind == "ssh"
    # Its cores are counted there, and how many GPUs a host has is found out.
    assert target.hosts == [Host(name, cpus=count) for name, count in hosts.items()]
    assert target.how.startswith(what)
    assert find_target(LaunchOptions(launcher="local"), "auto", environment).kind == "local"
    (tmp_path / "nodes").write_text("localhost\n")
    assert find_target(LaunchOptions(), "auto", environment).kind == "local"


def test_a_file_that_is_gone_or_of_another_form_is_told_with_its_variable(tmp_path: Path) -> None:
    environment = {"PBS_JOBID": "7", "PBS_NODEFILE": str(tmp_path / "none")}
    with pytest.raises(
        UserError, match="PBS_NODEFILE of this PBS job, .*none cannot be read.*--launcher local"
    ):
        batch_job(environment)
    (tmp_path / "none").write_text("h1;reboot\n")
    with pytest.raises(UserError, match="PBS_NODEFILE of this PBS job, .*none, line 1.*--hosts"):
        batch_job(environment)
    assert batch_job({"PBS_JOBID": "7"}) is batch_job({"PE_HOSTFILE": "x"}) is batch_job({}) is None


def test_the_first_node_of_a_skypilot_task_starts_all() -> None:
    task = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_RANK": "0",
    }
    assert find_target(LaunchOptions(), "auto", task).hosts == [Host("10.0.0.1", 8), Host("10.0.0.2", 8)]
    assert batch_job({"SKYPILOT_NODE_IPS": "10.0.0.1"}) == ([Host("10.0.0.1")], "SkyPilot task")
    with pytest.raises(UserError, match="SKYPILOT_NODE_RANK"):
        batch_job({**task, "SKYPILOT_NODE_RANK": "1"})
    with pytest.raises(UserError, match="SKYPILOT_NUM_GPUS_PER_NODE is 'many'"):
        batch_job({**task, "SKYPILOT_NUM_GPUS_PER_NODE": "many"})
