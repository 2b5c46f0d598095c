"""A job as the process sees it that has started it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from real_runs import until

from hvd_lb.launch.hosts import Host
from hvd_lb.launch.launch_plan import LaunchPlan
from hvd_lb.launch.processes import RankProcesses
from hvd_lb.report.run_directory import RunDirectory


@pytest.mark.parametrize("ours", [True, False])
def test_who_is_ended_hears_of_it_where_the_folder_is_its_own(tmp_path: Path, ours: bool) -> None:
    """In another run's it might save a checkpoint, and a wish in there would be heard by that run."""
    run = RunDirectory(tmp_path / "run")
    run.logs.mkdir(parents=True)
    script = "trap 'echo asked; exit 3' TERM; echo there; while :; do sleep 0.05; done"
    launch = LaunchPlan("local", [Host("localhost", 1)], lambda job_file: ["sh", "-c", script])
    job: Any = SimpleNamespace(to_json=lambda: "{}", environment={})
    nowhere = os.open(os.devnull, os.O_RDONLY)
    processes = RankProcesses(job, launch, run, nowhere)
    os.close(nowhere)
    until(lambda: "there" in processes.log.read_text(), 20)
    processes.stop(ours=ours)
    assert processes.poll() == (3 if ours else -9)
    assert ("asked" in processes.log.read_text(), run.stop.exists()) == (ours, ours)
