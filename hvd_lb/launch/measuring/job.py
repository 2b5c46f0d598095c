"""A job whose ranks measure something instead of training, started as a run is.

Its files are in a folder of its own, in the one of the output, which all hosts share; it is gone at the end.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvd_lb.doctor.alike import Answer
from hvd_lb.errors import UserError
from hvd_lb.launch.job import Job, Task
from hvd_lb.launch.launch_plan import LaunchPlan, cycles, process_environment
from hvd_lb.launch.options import CYCLE_TIME, FUSION_THRESHOLD
from hvd_lb.launch.processes import RankProcesses
from hvd_lb.launch.rank.names import MEASURED
from hvd_lb.machine.placement import Placement
from hvd_lb.network.measure import NetworkReport
from hvd_lb.recipe import Recipe
from hvd_lb.report.run_directory import PASSING, RunDirectory
from hvd_lb.world.build import begins_at_once

_NO_CYCLES = {CYCLE_TIME: "0.1"}  # ms: what is measured is not when a cycle began
_MOST_SECONDS = 600.0  # with every link cut, a tournament of 32 hosts takes that long


def measure_network(placement: Placement, launch: LaunchPlan, output: Path) -> NetworkReport:
    """What the ranks have measured; `output` is a folder that all hosts share, or will be.

    UserError when they could not, with the reason of the first that failed.
    """
    text = _measured("network", "the network", placement, launch, output, **_NO_CYCLES)
    report = NetworkReport.model_validate_json(text)
    if launch.engine != "horovod":
        return report
    variables = {**cycles(launch, placement.device), **launch.environment}
    cycle, fusion = float(variables.get(CYCLE_TIME, "1")), float(variables.get(FUSION_THRESHOLD, "0"))
    return report.model_copy(
        update={"cycle_ms": cycle if fusion or not begins_at_once() else min(cycle, 1.0)}
    )


def compare_bits(placement: Placement, launch: LaunchPlan, output: Path) -> list[Answer]:
    """What each rank has computed from the same microbatch, by rank; as `measure_network`."""
    text = _measured("alike", "a microbatch on each host", placement, launch, output)
    return [Answer.model_validate(answer) for answer in json.loads(text)]


def _measured(
    task: Task, what: str, placement: Placement, launch: LaunchPlan, output: Path, **environment: str
) -> str:
    """The report that rank 0 of such a job has written."""
    with _folder(output) as run:
        lock = run.lock()
        job = Job(
            task=task,
            recipe=Recipe.model_validate({"gpus": placement.processes}),
            output=run.path,
            device=placement.device,
            processes=placement.processes,
            threads=placement.threads,
            pin=placement.pin,
            checkpoint=None,
            data_fingerprint="",
            engine=launch.engine,
            starter=launch.starter,
            hosts=[(host.name, host.slots or 1) for host in launch.hosts],
            interfaces=dict(launch.interfaces),
            environment={
                **process_environment(placement.threads, placement.device),
                **launch.environment,
                **environment,
            },
        )
        processes = RankProcesses(job, launch, run, lock.descriptor)
        try:
            status = processes.wait(_MOST_SECONDS)
        finally:
            processes.stop()
            lock.close()
        if status is None:
            raise UserError(
                f"{what} could not be measured within {_MOST_SECONDS:.0f} s: name fewer hosts, to find the one "
                "that hangs"
            )
        if status:
            raise UserError(f"{what} could not be measured: {processes.failure(status)}")
        return (run.path / MEASURED).read_text("utf-8")


@contextmanager
def _folder(output: Path) -> Iterator[RunDirectory]:
    """A new folder in the nearest one that exists, for its owner alone."""
    parent = next(folder for folder in (output, *output.parents) if folder.is_dir())
    try:
        path = Path(tempfile.mkdtemp(prefix=f"{PASSING}measuring-", dir=parent))
    except OSError as error:
        raise UserError(
            f"output folder {parent} cannot be written ({error.strerror}): choose another --output"
        ) from None
    try:
        yield RunDirectory(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
