"""A job whose ranks measure the network instead of training, started as a run is.

Its files are in a folder of its own, in the one of the output, which all hosts share; it is gone at the end.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.launch.job import Job
from hvd_lb.launch.launch_plan import LaunchPlan, process_environment
from hvd_lb.launch.processes import RankProcesses
from hvd_lb.launch.rank.names import NETWORK_REPORT
from hvd_lb.machine.placement import Placement
from hvd_lb.network.measure import NetworkReport
from hvd_lb.recipe import Recipe
from hvd_lb.report.run_directory import RunDirectory

_MOST_SECONDS = 600.0  # with every link cut, a tournament of 32 hosts takes that long


def measure_network(placement: Placement, launch: LaunchPlan, output: Path) -> NetworkReport:
    """What the ranks have measured; `output` is a folder that all hosts share, or will be.

    UserError when they could not, with the reason of the first that failed.
    """
    with _folder(output) as run:
        lock = run.lock()
        job = Job(
            task="network",
            recipe=Recipe.model_validate({"gpus": placement.processes}),
            output=run.path,
            device=placement.device,
            processes=placement.processes,
            threads=1,
            pin=placement.pin,
            checkpoint=None,
            data_fingerprint="",
            engine=launch.engine,
            starter=launch.starter,
            hosts=[(host.name, host.slots or 1) for host in launch.hosts],
            interfaces=dict(launch.interfaces),
            environment={**process_environment(1), **launch.environment},
        )
        processes = RankProcesses(job, launch, run, lock.descriptor)
        try:
            status = processes.wait(_MOST_SECONDS)
        finally:
            processes.stop()
            lock.close()
        if status is None:
            raise UserError(
                f"the network could not be measured within {_MOST_SECONDS:.0f} s: name fewer hosts, to find "
                "the one that hangs"
            )
        if status:
            raise UserError(f"the network could not be measured: {processes.failure(status)}")
        return NetworkReport.model_validate_json((run.path / NETWORK_REPORT).read_text("utf-8"))


@contextmanager
def _folder(output: Path) -> Iterator[RunDirectory]:
    """A new folder in the nearest one that exists, for its owner alone."""
    parent = next(folder for folder in (output, *output.parents) if folder.is_dir())
    try:
        path = Path(tempfile.mkdtemp(prefix=".hvd-lb-network-", dir=parent))
    except OSError as error:
        raise UserError(
            f"output folder {parent} cannot be written ({error.strerror}): choose another --output"
        ) from None
    try:
        yield RunDirectory(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
