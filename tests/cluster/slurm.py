"""A real Slurm over hosts of a lab: one munged and slurmctld, a slurmd per node.

with lab(["h0", "h1", "h2"]) as hosts, slurm(hosts[0], {hosts[1]: 2, hosts[2]: 1}) as cluster:
    cluster.run(["srun", "--nodes", "2", "hostname"])

The nodes pretend to have GPUs of the type `lab`, as many as CPUs. Two partitions over all nodes: jobs in `urgent`
preempt those in `main`, which are put back into the queue. A node that does not answer is given up after ten seconds,
or another time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hosts import Host
from real_runs import until

_TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
NODE_TIMEOUT = 10
GRACE = 60


@dataclass(frozen=True)
class Cluster:
    """`environment` lets any process of the hosts use Slurm's commands; `folder` holds the daemons' logs."""

    controller: Host
    environment: Mapping[str, str]
    folder: Path

    def run(self, command: list[object], **settings: Any) -> subprocess.CompletedProcess[str]:
        """A command on the controller's host."""
        environment = {**self.environment, **settings.pop("env", {})}
        return self.controller.run(command, env=environment, **settings)

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        words = self.run(["scontrol", "show", "job", "--oneliner", number]).stdout.split()
        return dict(word.partition("=")[::2] for word in words)


@contextmanager
def slurm(controller: Host, nodes: Mapping[Host, int], node_timeout: int = NODE_TIMEOUT) -> Iterator[Cluster]:
    """Slurm with so many CPUs on each node; the test is skipped where it is not installed."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
    if absent := [tool for tool in _TOOLS if not shutil.which(tool, path=path)]:
        pytest.skip(f"needs {', '.join(absent)}: apt-get install slurmd slurmctld slurm-client munge")
    folder = controller.folder.parent / "slurm"
    folder.mkdir()
    (folder / "slurm.conf").write_text(_configuration(controller, nodes, folder, node_timeout))
    # Each host's own: in what they share, one host would find another's folder in the way.
    (folder / "mpi.conf").write_text("PMIxCliTmpDirBase=/dev/shm\n")
    (folder / "gres.conf").write_text(_pretended_gpus(nodes, folder))
    cluster = Cluster(controller, {"SLURM_CONF": f"{folder}/slurm.conf"}, folder)
    daemons = [controller.start(_munged(folder), stderr=subprocess.DEVNULL)]
    try:
        until((folder / "munge.socket").exists, 30)
        daemons.append(_daemon(controller, ["slurmctld", "-D", "-i"], cluster))
        daemons += [_daemon(node, ["slurmd", "-D", "-N", node.name], cluster) for node in nodes]
        until(lambda: _idle_nodes(cluster) == len(nodes), 60, every=0.3)
        yield cluster
    finally:
        for daemon in reversed(daemons):
            daemon.kill()
            daemon.wait()


def start_node(cluster: Cluster, node: Host) -> subprocess.Popen[str]:
    """A node's daemon again, after its host was killed and booted."""
    return _daemon(node, ["slurmd", "-D", "-N", node.name], cluster)


def _daemon(host: Host, command: list[str], cluster: Cluster) -> subprocess.Popen[str]:
    with (cluster.folder / f"{command[0]}.{host.name}.out").open("a") as log:
        return host.start(command, env=cluster.environment, stdin=-3, stdout=log, stderr=log)


def _idle_nodes(cluster: Cluster) -> int:
    said = cluster.run(
        ["sinfo", "--noheader", "--Node", "--partition", "main", "--format", "%T"], check=False
    )
    return said.stdout.split().count("idle")


def _munged(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(64))
    files = {"key": key, "socket": folder / "munge.socket"}
    files |= {name: folder / f"munge.{name}" for name in ("pid", "log", "seed")}
    options = {"key": "--key-file", "socket": "--socket", "pid": "--pid-file", "log": "--log-file"}
    options["seed"] = "--seed-file"
    return ["munged", "--foreground", "--force", *(f"{options[name]}={file}" for name, file in files.items())]


def _pretended_gpus(nodes: Mapping[Host, int], folder: Path) -> str:
    for number in range(max(nodes.values())):
        os.mknod(folder / f"nvidia{number}", 0o600 | 0o020000, os.makedev(1, 3))  # /dev/null's numbers
    return "".join(
        f"NodeName={node.name} Name=gpu Type=lab File={folder}/nvidia[0-{cpus - 1}] Flags=nvidia_gpu_env\n"
        for node, cpus in nodes.items()
    )


def _configuration(controller: Host, nodes: Mapping[Host, int], folder: Path, node_timeout: int) -> str:
    lines = [
        "ClusterName=lab",
        f"SlurmctldHost={controller.name}({controller.address})",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "GresTypes=gpu",
        "SlurmdParameters=config_overrides",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdPidFile={folder}/slurmd.%n.pid",
        f"SlurmdLogFile={folder}/slurmd.%n.log",
        f"SlurmdSpoolDir={folder}/spool.%n",
        f"StateSaveLocation={folder}/state",
        f"SlurmdTimeout={node_timeout}",
        "ReturnToService=2",
        "LaunchParameters=use_interactive_step",
        "JobRequeue=1",
        "KillWait=20",
        "MinJobAge=3600",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0",
        *(
            f"NodeName={node.name} NodeHostname={node.name} NodeAddr={node.address} CPUs={cpus} Gres=gpu:lab:{cpus}"
            for node, cpus in nodes.items()
        ),
        f"PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime={GRACE}",
        "PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2",
    ]
    return "\n".join(lines) + "\n"
