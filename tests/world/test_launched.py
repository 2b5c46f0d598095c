"""Which job a process is of, by what launchers leave in its environment."""

import pytest

from hvd_lb.errors import UserError
from hvd_lb.world.launched import Place, launched, launched_alone, refuse_several, refuse_unclear, without_job

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        # left over in a shell, or of a job of one process
        ({"OMPI_COMM_WORLD_RANK": "1"}, None),
        ({"PMI_RANK": "1"}, None),
        ({"PMIX_RANK": "1"}, None),
        ({"HOROVOD_RANK": "1"}, None),
        ({"RANK": "1"}, None),
        ({"WORLD_SIZE": "8"}, None),
        ({"SLURM_PROCID": "0"}, None),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"PMI_RANK": "x", "PMI_SIZE": "many"}, None),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        # jobs
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}, Place("horovodrun", 1, 2)),
        (MPIRUN, Place("mpirun", 0, 4, 0)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, Place("mpirun", 3, 4)),
        ({"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4"}, Place("mpirun", 3, 4)),
        (SRUN | {"PMIX_RANK": "3"}, Place("srun --mpi=pmix", 3, 4, 1)),
        (SRUN, Place("srun", 3, 4, 1)),
        (TORCHRUN, Place("torchrun", 1, 2, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Place("RANK and WORLD_SIZE", 1, 2)),
        # one in another
        (
            {"PMI_RANK": "0", "PMI_SIZE": "1", "HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"},
            Place("horovodrun", 1, 2),
        ),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1", "PMI_RANK": "1", "PMI_SIZE": "2"}, Place("mpirun", 1, 2)),
        (SRUN | TORCHRUN, Place("torchrun", 1, 2, 1)),
        (MPIRUN | TORCHRUN, Place("torchrun", 1, 2, 1)),
        (SRUN | MPIRUN, Place("mpirun", 0, 4, 0)),
        # of a pod's own, in which mpirun or srun has started processes
        (MPIRUN | {"RANK": "0", "WORLD_SIZE": "8"}, Place("mpirun", 0, 4, 0)),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "8"}, Place("srun", 3, 4, 1)),
        (
            SRUN | {"RANK": "7", "WORLD_SIZE": "8", "MASTER_ADDR": "h1", "MASTER_PORT": "29500"},
            Place("RANK and WORLD_SIZE", 7, 8),
        ),
    ],
)
def test_a_job_has_several_processes(environment: dict[str, str], place: Place | None) -> None:
    assert launched(environment) == place


def test_a_job_of_one_process_is_told_by_its_variables() -> None:
    assert launched_alone({"RANK": "0", "WORLD_SIZE": "1"}) == "RANK=0 and WORLD_SIZE=1"
    assert launched_alone({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == (
        "SLURM_PROCID=0 and SLURM_STEP_NUM_TASKS=1"
    )
    assert launched_alone({"RANK": "0"}) is launched_alone({}) is launched_alone(TORCHRUN) is None


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "", "WORLD_SIZE": "2"},
        {"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "h1", "MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"HOROVOD_RANK": "", "HOROVOD_SIZE": "2"},
    ],
)
def test_a_job_that_does_not_say_which_process_this_is(environment: dict[str, str]) -> None:
    assert launched(environment) is None
    with pytest.raises(UserError, match=r"RANK='\w*' and \w+SIZE='\d?': expected two numbers"):
        refuse_unclear(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "h1", "MASTER_PORT": "29500"},
        {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "2"},
        {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "4"},
    ],
)
def test_a_rank_that_the_job_has_not_would_wait_for_ever(environment: dict[str, str]) -> None:
    assert launched(environment) is None
    with pytest.raises(UserError, match=r"=[259] and \w+=[24]: ranks of [24] processes are 0 to [13]"):
        refuse_unclear(environment)
    assert launched(environment | MPIRUN | {"OMPI_COMM_WORLD_RANK": "1"}) == Place("mpirun", 1, 4, 0)


def test_what_is_left_over_is_clear() -> None:
    for environment in ({}, {"RANK": ""}, {"WORLD_SIZE": "8"}, {"PMI_RANK": "x", "PMI_SIZE": "many"}):
        refuse_unclear(environment)
    refuse_unclear({"RANK": "", "WORLD_SIZE": "1"})


def test_a_command_of_one_process_refuses_to_be_several() -> None:
    with pytest.raises(
        UserError, match=r"srun started this as one of 4 processes, and `hvd-lb simulate` is one"
    ):
        refuse_several(SRUN, "hvd-lb simulate")
    refuse_several({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, "hvd-lb simulate")


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
            "MV2_COMM_WORLD_RANK",
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "MASTER_ADDR",
            "TORCHELASTIC_USE_AGENT_STORE",
        ],
        "1",
    )
    kept = dict.fromkeys(
        ["HOROVOD_CYCLE_TIME", "OMPI_MCA_btl", "PMIX_MCA_gds", "PATH", "RANKS", "SLURM_JOB_ID", "PMIXED"], "1"
    )
    assert without_job(inherited | kept) == kept
