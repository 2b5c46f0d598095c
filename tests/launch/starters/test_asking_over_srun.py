"""Nodes that are asked by one step of Slurm; a script stands for srun."""

import os
from pathlib import Path

import pytest

from hvd_lb.errors import UserError
from hvd_lb.launch.preflight import probe
from hvd_lb.launch.starters import srun


def test_a_node_that_hangs_silences_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho \'{probe.ANSWER}{{"name": "h2"}}\'\nexec sleep 60\n')
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(srun, "_ANSWER_SECONDS", 2.0)
    answers = srun.asking_over_srun(0)(["h1", "h2"], "question\n")
    assert str(answers["h1"]).startswith("no answer in time")
    assert isinstance(answers["h1"], UserError)
    assert str(answers["h2"]).startswith(probe.ANSWER)
