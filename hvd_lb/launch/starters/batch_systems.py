"""The hosts of a job of LSF, PBS, Cobalt, Grid Engine or SkyPilot, from what each leaves in the environment.

They are reached over ssh. What is counted are cores or tasks, never GPUs: a host's slots are left open. (Slurm, which
starts processes itself, is in `allocation`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host, read_hostfile

# Systems that write a file of hosts: what marks a job of theirs, and the variable with the file's name.
_FILES = {
    "PBS": ("PBS_JOBID", "PBS_NODEFILE"),
    "Cobalt": ("COBALT_JOBID", "COBALT_NODEFILE"),
    "Grid Engine": ("JOB_ID", "PE_HOSTFILE"),
}
_INSTEAD = "run hvd-lb in the job's own shell, name hosts with --hosts, or give --launcher local for this machine alone"


def batch_job(environment: Mapping[str, str]) -> tuple[list[Host], str] | None:
    """Hosts of the job that this process is in, and what it is, such as "PBS job 7"; None in none.

    UserError, naming the variable and its file, where they say nothing that can be read.
    """
    if hosts := lsf_hosts(environment):
        return hosts, f"LSF job {environment['LSB_JOBID']}"
    for system, (job, file) in _FILES.items():
        if job in environment and environment.get(file):
            where = f"{file} of this {system} job, {environment[file]}"
            try:
                there = read_hostfile(Path(environment[file]), where)
            except UserError as error:
                raise UserError(f"{error}; {_INSTEAD}") from None
            return [
                Host(host.name, cpus=host.slots or 1) for host in there
            ], f"{system} job {environment[job]}"
    if addresses := environment.get("SKYPILOT_NODE_IPS", "").split():
        return _skypilot(addresses, environment), "SkyPilot task"
    return None


def lsf_hosts(environment: Mapping[str, str]) -> list[Host] | None:
    """The hosts of the LSF job this is in, or None: LSB_MCPU_HOSTS is "launch 1 h1 8 h2 8", the first without slots."""
    fields = environment.get("LSB_MCPU_HOSTS", "").split()
    if "LSB_JOBID" not in environment or not fields:
        return None
    try:
        counts = dict(zip(fields[::2], map(int, fields[1::2]), strict=True))
    except ValueError:
        raise UserError(
            f"LSB_MCPU_HOSTS is {environment['LSB_MCPU_HOSTS']!r}, expected hosts and counts, such as h1 8 h2 8: "
            "unset it, or give --launcher local for this machine alone"
        ) from None
    first, *others = counts
    # jobs that span several hosts are started from a batch host with one core, which takes no processes
    names = others if others and counts[first] == 1 else list(counts)
    return [Host(name, cpus=counts[name]) for name in names]


def _skypilot(addresses: list[str], environment: Mapping[str, str]) -> list[Host]:
    """SkyPilot runs the same commands on every node; the first one is to start all ranks."""
    if environment.get("SKYPILOT_NODE_RANK", "0") != "0":
        raise UserError(
            "this is not the first node of this SkyPilot task, and that one starts the processes of all: "
            'run hvd-lb where "$SKYPILOT_NODE_RANK" is 0'
        )
    gpus = environment.get("SKYPILOT_NUM_GPUS_PER_NODE", "0")
    if not gpus.isdecimal():
        raise UserError(
            f"SKYPILOT_NUM_GPUS_PER_NODE is {gpus!r}, expected a number: unset it, or name the hosts with --hosts"
        )
    return [Host(address, int(gpus) or None) for address in addresses]
