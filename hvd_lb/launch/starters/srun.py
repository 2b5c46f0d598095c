"""A run in a Slurm allocation: its hosts asked and its processes started by srun, without ssh between nodes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.launch.allreduce import needs_mpi
from hvd_lb.launch.hosts import assign
from hvd_lb.launch.launch_plan import LaunchPlan, agent_command, head_command, rank_command
from hvd_lb.launch.preflight import probe
from hvd_lb.launch.preflight.ask import NOT_INSTALLED, Ask
from hvd_lb.launch.preflight.cluster import Cluster
from hvd_lb.launch.starters.allocation import PyxisContainer, one_per_node, one_somewhere, srun_command

_ANSWER_SECONDS = 120.0
_SECONDS_PER_HOST = 0.5  # all read Python from one file system


def asking_over_srun(gpus: int, container: PyxisContainer | None = None) -> Ask:
    """Asks the nodes of the allocation, with `gpus` on each, by one step of a task on each."""

    def ask(hosts: list[str], question: str) -> dict[str, str | UserError]:
        probing = [_python(container), "-P", "-m", "hvd_lb.launch.preflight.probe"]
        command = one_per_node(hosts, probing, gpus=gpus, container=container)
        answers: dict[str, str | UserError]
        seconds = _ANSWER_SECONDS + _SECONDS_PER_HOST * len(hosts)
        try:
            completed = subprocess.run(
                command,
                input=question,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
            said, answers = completed.stdout, {host: _why_silent(host, completed.stderr) for host in hosts}
        except subprocess.TimeoutExpired as late:  # what is there by then is bytes, also of text
            said = (late.stdout or b"").decode("utf-8", "replace")
            answers = {host: UserError("no answer in time: is the node up?") for host in hosts}
        for line in said.splitlines():
            if line.startswith(probe.ANSWER):
                answers[probe.parse(line)["name"]] = line
        return answers

    return ask


def over_srun(
    cluster: Cluster,
    processes: int,
    gpus: int,
    environment: Mapping[str, str],
    container: PyxisContainer | None = None,
    *,
    elastic: bool = False,
) -> LaunchPlan:
    """`processes` on the nodes of an allocation, with `gpus` on each.

    By one step: of a task on each node, its agent; or of a task for each rank, where Open MPI has to find them. An
    `elastic` job has a step for each node: no other ends with it, and it can be taken again.
    """
    hosts = assign(cluster.hosts, processes)
    python = _python(container)
    mpi = _mpi_plugin() if needs_mpi(environment) else None

    def agents(job_file: Path) -> list[str]:
        if elastic:
            return head_command(job_file, cluster.address, "nodes", one_somewhere(gpus=gpus))
        agent = agent_command(job_file, python)
        srun = one_per_node([host.name for host in hosts], agent, gpus=gpus, container=container)
        return head_command(job_file, cluster.address, "all", srun)

    def tasks(job_file: Path) -> list[str]:
        places = [(host.name, host.slots or 1) for host in hosts]
        return srun_command(
            places, rank_command(job_file, python), gpus=gpus, mpi=mpi or "none", container=container
        )

    return LaunchPlan(
        "slurm",
        hosts,
        tasks if mpi else agents,
        interfaces={host.name: cluster.interfaces[host.name] for host in hosts},
        environment=environment,
        agents=not mpi,
    )


def _python(container: PyxisContainer | None) -> str:
    """The interpreter that has hvd-lb: the image's, else this one."""
    return "python" if container else sys.executable


def _mpi_plugin() -> str:
    """The way in which srun starts processes of Open MPI; UserError where this Slurm has none."""
    completed = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, check=False)
    plugins = re.findall(r"\bpmix(?:_v\d+)?\b", completed.stdout + completed.stderr)
    if not plugins:
        raise UserError(
            "this Slurm starts no processes of Open MPI (srun --mpi=list names no pmix): use --allreduce ring"
        )
    return "pmix" if "pmix" in plugins else str(plugins[0])


def _why_silent(host: str, said: str) -> UserError:
    about = [line for line in said.splitlines() if re.search(rf"\b{re.escape(host)}\b", line)]
    last = next(iter(reversed(about or said.splitlines())), "srun said nothing").strip()
    if "No such file" in said or "exit code 127" in last or NOT_INSTALLED.search(said):
        return UserError(f"no hvd-lb there ({last}): install it where it is here, {sys.executable}")
    return UserError(f"it gave no answer: {last}")
