from pathlib import Path

import pytest

from hvd_lb.errors import UserError
from hvd_lb.launch.allreduce import HorovodBuild, allreduce_environment, needs_mpi
from hvd_lb.launch.options import LaunchOptions, environment

FULL = HorovodBuild(mpi=True, nccl=True)


# What every run has, by --hang-timeout.
PATIENCE = {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "1800", "HVD_LB_HANG_TIMEOUT": "300"}


def test_options_become_horovods_variables() -> None:
    options = LaunchOptions(
        fusion_threshold=64,
        cycle_time=2.5,
        autotune=True,
        timeline=Path("/runs/t.json"),
        env=("A=b=c", "NCCL_DEBUG=INFO"),
    )
    here = {"NCCL_DEBUG": "WARN", "NCCL_IB_HCA": "mlx5", "AWS_SECRET_ACCESS_KEY": "s", "PATH": "/bin"}
    assert environment(options, here) == PATIENCE | {
        "HOROVOD_FUSION_THRESHOLD": str(64 * 2**20),
        "HVD_LB_SHARED_MEMORY": "0",
        "HOROVOD_CYCLE_TIME": "2.5",
        "HOROVOD_AUTOTUNE": "1",
        "HOROVOD_TIMELINE": "/runs/t.json",
        "A": "b=c",
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_HCA": "mlx5",
    }


def test_horovods_variables_go_along_but_not_those_that_say_who_a_process_is() -> None:
    tuning = {"HOROVOD_CYCLE_TIME": "5", "HOROVOD_GLOO_TIMEOUT_SECONDS": "90", "HOROVOD_LOG_LEVEL": "debug"}
    place = {
        "HOROVOD_RANK": "1",
        "HOROVOD_SIZE": "2",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "h9",
        "HOROVOD_HOSTNAME": "x",
    }
    assert environment(LaunchOptions(), {**tuning, **place}) == PATIENCE | tuning


@pytest.mark.parametrize("seconds", ["abc", "", "0", "-1", "1.5", "1e3", "9999999", " 60"])
def test_a_time_that_horovod_would_misread_is_refused(seconds: str) -> None:
    """It takes the digits at the beginning, and 0 where there are none."""
    with pytest.raises(UserError, match=r"HOROVOD_GLOO_TIMEOUT_SECONDS=.*: expected whole seconds"):
        environment(LaunchOptions(), {"HOROVOD_GLOO_TIMEOUT_SECONDS": seconds})
    with pytest.raises(UserError, match="expected whole seconds"):
        environment(LaunchOptions(env=(f"HOROVOD_GLOO_TIMEOUT_SECONDS={seconds}",)), {})


def test_the_hang_timeout_is_that_of_its_option() -> None:
    named = ("HVD_LB_HANG_TIMEOUT=abc",)
    assert environment(LaunchOptions(env=named), {})["HVD_LB_HANG_TIMEOUT"] == "300"
    assert environment(LaunchOptions(elastic=True), {})["HVD_LB_HANG_TIMEOUT"] == "60"
    assert environment(LaunchOptions(elastic=True, hang_timeout=0), {})["HVD_LB_HANG_TIMEOUT"] == "0"


def test_a_variable_without_a_value_is_handed_on() -> None:
    assert environment(LaunchOptions(env=("TOKEN",)), {"TOKEN": "t"}) == PATIENCE | {"TOKEN": "t"}
    with pytest.raises(UserError, match="TOKEN is not set here"):
        environment(LaunchOptions(env=("TOKEN",)), {})


@pytest.mark.parametrize("item", ["", "=x", "1A=x", "A B=x", "A;reboot=x", "A\n=x"])
def test_what_is_no_variable_is_refused(item: str) -> None:
    with pytest.raises(UserError, match="NAME=VALUE"):
        environment(LaunchOptions(env=(item,)), {})


def test_allreduce_variables() -> None:
    def variables(name: str, device: str) -> dict[str, str]:
        return allreduce_environment(name, device, several_hosts=True, mpirun=True, build=FULL)  # type: ignore[arg-type]

    assert variables("auto", "cpu") == {"HOROVOD_CPU_OPERATIONS": "GLOO"}
    assert variables("ring", "cpu") == {"HOROVOD_CPU_OPERATIONS": "GLOO", "HVD_LB_SHARED_MEMORY": "0"}
    assert variables("auto", "cuda") == {"HOROVOD_CPU_OPERATIONS": "GLOO"}
    assert variables("ring", "cuda")["NCCL_ALGO"] == "Ring"
    assert variables("hierarchical", "cuda")["HOROVOD_HIERARCHICAL_ALLREDUCE"] == "1"
    halving = variables("halving-doubling", "cpu")
    assert halving["OMPI_MCA_coll_tuned_allreduce_algorithm"] == "6"  # Open MPI: 6 is rabenseifner
    assert [
        needs_mpi(variables(name, device)) for name, device in (("auto", "cuda"), ("hierarchical", "cuda"))
    ] == [
        False,
        True,
    ]
    assert needs_mpi(halving)


@pytest.mark.parametrize(
    ("name", "device", "several_hosts", "build", "mpirun", "reason"),
    [
        ("halving-doubling", "cpu", True, HorovodBuild(False, True), True, "built without MPI"),
        ("halving-doubling", "cpu", True, FULL, False, "no mpirun"),
        ("halving-doubling", "cuda", True, FULL, True, "NCCL, which has rings and trees"),
        ("hierarchical", "cpu", True, FULL, True, "needs GPUs"),
        ("hierarchical", "cuda", False, FULL, True, "more than one host"),
        ("hierarchical", "cuda", True, HorovodBuild(True, False), True, "NCCL"),
        ("hierarchical", "cuda", True, HorovodBuild(False, True), True, "built without MPI"),
    ],
)
def test_what_the_build_or_the_hosts_cannot_do_is_refused_with_the_reason(
    name: str, device: str, several_hosts: bool, build: HorovodBuild, mpirun: bool, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        allreduce_environment(name, device, several_hosts=several_hosts, mpirun=mpirun, build=build)  # type: ignore[arg-type]
