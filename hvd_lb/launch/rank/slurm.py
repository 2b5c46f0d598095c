"""A task of Slurm as a rank of Horovod."""

from __future__ import annotations

from collections.abc import Mapping

from hvd_lb.launch.starters.allocation import expand_counts


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What Horovod reads of its rank, from what Slurm gives to a task that `srun_command` started."""
    tasks = expand_counts(environ["SLURM_STEP_TASKS_PER_NODE"])
    node, local_rank = int(environ["SLURM_NODEID"]), int(environ["SLURM_LOCALID"])
    # Nodes may have different numbers of tasks: those with one of this local rank.
    across = [index for index, count in enumerate(tasks) if count > local_rank]
    return {
        "HOROVOD_HOSTNAME": environ["SLURMD_NODENAME"],
        "HOROVOD_RANK": environ["SLURM_PROCID"],
        "HOROVOD_SIZE": str(sum(tasks)),
        "HOROVOD_LOCAL_RANK": str(local_rank),
        "HOROVOD_LOCAL_SIZE": str(tasks[node]),
        "HOROVOD_CROSS_RANK": str(across.index(node)),
        "HOROVOD_CROSS_SIZE": str(len(across)),
    }
