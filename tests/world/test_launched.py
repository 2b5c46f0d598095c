"""Which job a process is of, by what launchers leave in its environment."""

import os
import subprocess
import sys

import pytest

from hvd_lb.errors import UserError
from hvd_lb.world.launched import launched, refuse_torchrun, refuse_worlds_of_one, without_job

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        # left over in a shell, or of a job of one process
        ({"OMPI_COMM_WORLD_RANK": "1"}, None),
        ({"PMI_RANK": "1"}, None),
        ({"PMIX_RANK": "1"}, None),
        ({"HOROVOD_RANK": "1"}, None),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1"}, None),
        ({"PMI_RANK": "x", "PMI_SIZE": "many"}, None),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        # jobs
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}, (1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, (0, 4)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, (3, 4)),
        ({"PMIX_RANK": "3", "SLURM_STEP_NUM_TASKS": "4"}, (3, 4)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}, (1, 2)),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1", "PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
    ],
)
def test_a_job_has_several_processes(environment: dict[str, str], place: tuple[int, int] | None) -> None:
    assert launched(environment) == place


def test_processes_that_would_each_train_for_themselves() -> None:
    with pytest.raises(
        UserError, match=r"torchrun started this as one of 2 processes.*horovodrun -np 2.*unset WORLD_SIZE"
    ):
        refuse_worlds_of_one(TORCHRUN)
    with pytest.raises(UserError, match="srun started this as one of 4 processes"):
        refuse_worlds_of_one({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"})
    with pytest.raises(UserError, match="hvd-lb starts its own"):
        refuse_torchrun(TORCHRUN)
    for alone in ({}, TORCHRUN | {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "8"}, {"SLURM_PROCID": "0"}):
        refuse_worlds_of_one(alone)
        refuse_torchrun(alone)
    refuse_worlds_of_one(TORCHRUN | {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"})


def test_what_tells_of_another_job_is_not_inherited() -> None:
    inherited = dict.fromkeys(
        [
            "HOROVOD_RANK",
            "HOROVOD_SIZE",
            "HOROVOD_LOCAL_RANK",
            "HOROVOD_CROSS_SIZE",
            "HOROVOD_HOSTNAME",
            "HOROVOD_CONTROLLER",
            "HOROVOD_CPU_OPERATIONS",
            "HOROVOD_GLOO_RENDEZVOUS_ADDR",
            "HOROVOD_GLOO_IFACE",
            "OMPI_COMM_WORLD_RANK",
            "OMPI_UNIVERSE_SIZE",
            "OMPI_MCA_orte_hnp_uri",
            "OMPI_MCA_ess",
            "PMI_RANK",
            "PMI2_RANK",
            "PMIX_RANK",
            "PMIX_NAMESPACE",
        ],
        "1",
    )
    kept = dict.fromkeys(
        ["HOROVOD_CYCLE_TIME", "OMPI_MCA_btl", "PMIX_MCA_gds", "PATH", "RANK", "SLURM_JOB_ID", "PMIXED"], "1"
    )
    assert without_job(inherited | kept) == kept


@pytest.mark.slow
def test_init_under_torchrun_is_one_line() -> None:
    code = "import hvd_lb; hvd_lb.init()"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **TORCHRUN},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "torchrun started this as one of 2 processes" in ended.stderr.splitlines()[-1]
