"""What a user may say about where and how a job is started. None of it touches the mathematics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvd_lb.errors import UserError
from hvd_lb.world.engine import EngineName
from hvd_lb.world.launched import without_job

LauncherName = Literal["auto", "local", "ssh", "slurm", "kubernetes"]
ElasticPolicy = Literal["keep-batch", "rescale"]
AllreduceName = Literal["auto", "ring", "hierarchical", "halving-doubling"]

#: The variable with the seconds for which ranks are waited for at the start; Horovod's own.
START_TIMEOUT = "HOROVOD_GLOO_TIMEOUT_SECONDS"
#: The variable with the milliseconds of its cycles.
CYCLE_TIME = "HOROVOD_CYCLE_TIME"
FUSION_THRESHOLD = "HOROVOD_FUSION_THRESHOLD"
#: With this the engine adds up what processes of one machine else do in shared memory.
SUMS_OF_ENGINE = {"HVD_LB_SHARED_MEMORY": "0"}
#: The variable with the seconds after which a rank reports that it does not go on; 0: never.
HANG_TIMEOUT = "HVD_LB_HANG_TIMEOUT"
# Long enough for the slowest step, short enough that a hang does not last the night (off by default in Horovod).
_STALL_SECONDS = 1800.0
_HANG_SECONDS, _HANG_SECONDS_ELASTIC = 300.0, 60.0

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# Variables that tune the libraries of a run go with it to every host; others stay, as they may be secret or local.
_CARRIED = (
    "NCCL_",
    "GLOO_",
    "UCX_",
    "DALI_",
    "OMP_",
    "MKL_",
    "ONEDNN_",
    "DNNL_",
    "ATEN_",
    "NVIDIA_TF32_",
    "KMP_",
    "TORCH_",
    "CUDA_LAUNCH_",
    "CUBLAS_",
    "HVD_LB_",
    "HOROVOD_",  # but for those that say who a process is
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


@dataclass(frozen=True)
class LaunchOptions:
    """Options of `train` that only the launcher reads."""

    launcher: LauncherName = "auto"
    hosts: str | None = None
    hostfile: Path | None = None
    ssh_port: int | None = None  #: None: what ~/.ssh/config says
    ssh_key: Path | None = None
    strict_host_keys: bool = False  #: refuse hosts that are not in known_hosts; else new ones are noted there
    network_interface: str | None = None  #: None: the one by which each host reaches the others
    engine: EngineName = "auto"
    allreduce: AllreduceName = "auto"
    fusion_threshold: float | None = None  #: MB
    cycle_time: float | None = None  #: ms
    autotune: bool = False
    timeline: Path | None = None
    forecast: Path | None = None  #: what the run is held against at its end
    pin: bool = True
    hang_timeout: float | None = (
        None  #: s without any progress before something is done; 0: never; see hang_seconds
    )
    elastic: bool = False  #: go on when processes are lost
    min_processes: int = 1  #: with fewer an elastic run waits for new ones, or ends
    elastic_policy: ElasticPolicy = "keep-batch"  #: what becomes of k when the number of processes changes
    log_samples: bool = False  #: each process writes which images it has given to each step
    host_discovery: Path | None = (
        None  #: a program that prints the hosts there are, also while the run goes on
    )
    max_processes: int | None = None  #: on hosts that it finds
    restarts: int = 0  #: how often a run that has failed is started again
    env: tuple[str, ...] = ()  #: NAME=VALUE, or NAME to take the value it has here
    dry_run: bool = False

    @property
    def hang_seconds(self) -> float:
        """Where a process that hangs is taken out, a mistake costs little; where the run is ended, it costs the run."""
        if self.hang_timeout is not None:
            return self.hang_timeout
        return _HANG_SECONDS_ELASTIC if self.elastic else _HANG_SECONDS


def environment(options: LaunchOptions, here: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for every process of the job, beside its own; `here` is this process's environment."""
    # Horovod's own end of ranks that wait for each other comes later, as it does not know for whom.
    stall = max(_STALL_SECONDS, 2 * options.hang_seconds)
    variables = {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": f"{stall:.0f}"} | carried_environment(here)
    if options.fusion_threshold is not None:
        variables[FUSION_THRESHOLD] = str(round(options.fusion_threshold * 2**20))
        variables |= SUMS_OF_ENGINE if options.fusion_threshold else {}
    if options.cycle_time is not None:
        variables[CYCLE_TIME] = f"{options.cycle_time:g}"
    if options.autotune:
        variables["HOROVOD_AUTOTUNE"] = "1"
    if options.timeline is not None:
        variables["HOROVOD_TIMELINE"] = str(options.timeline.expanduser().absolute())
    variables |= named_environment(options.env, here)
    variables[HANG_TIMEOUT] = f"{options.hang_seconds:g}"
    seconds = variables.get(START_TIMEOUT, "1")
    if not re.fullmatch("[1-9][0-9]{0,5}", seconds):
        raise UserError(f"{START_TIMEOUT}={seconds}: expected whole seconds from 1 to 999999, such as 600")
    return variables


def carried_environment(here: Mapping[str, str]) -> dict[str, str]:
    """The variables that go along without being named."""
    return {name: value for name, value in without_job(here).items() if name.startswith(_CARRIED)}


def named_environment(env: tuple[str, ...], here: Mapping[str, str]) -> dict[str, str]:
    """The variables of `--env NAME=VALUE` and `--env NAME`; UserError for what is neither."""
    variables = {}
    for item in env:
        name, equals, value = item.partition("=")
        if not _VARIABLE.fullmatch(name):
            raise UserError(
                f"--env {item!r} does not begin with a variable's name: expected NAME=VALUE or NAME"
            )
        if not equals and name not in here:
            raise UserError(f"--env {name}, but {name} is not set here: set it, or give --env {name}=VALUE")
        if "\0" in value:
            raise UserError(f"--env {name}: the value holds a null character")
        variables[name] = value if equals else here[name]
    return variables
