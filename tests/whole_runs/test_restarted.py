"""--restarts where the next start cannot be made at once, or with fewer processes than were typed for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from elastic_runs import RECIPE, assert_the_same, with_faults
from real_runs import processes_of, until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod")]


@pytest.mark.parametrize(
    "how", [("--hostfile",), pytest.param(("--elastic", "--host-discovery"), marks=pytest.mark.long)]
)
def test_a_start_that_cannot_be_made_is_tried_again(
    hvd_lb: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...]
) -> None:
    """What names the hosts is away for two starts, and names one process then: to the same bits."""
    run, plain, names, script = (tmp_path / name for name in ("run", "plain", "names", "script"))
    assert hvd_lb(*RECIPE, "--processes", 1, "--output", plain).status == 0
    script.write_text(f"#!/bin/sh\nexec cat {names}\n")
    script.chmod(0o755)
    names.write_text("localhost:2\n")
    with_faults(tmp_path, monkeypatch, [(number, "step", 6, "SIGKILL") for number in (0, 1)])
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            names.write_text("localhost:1\n")
            os.environ["FAULTS"] = "[]"

    monkeypatch.setattr("hvd_lb_cli.dispatch.time", SimpleNamespace(sleep=sleep))
    begun = threading.Thread(target=lambda: (until((run / "logs" / "job.json").exists), names.unlink()))
    begun.start()
    where = (*how, names if how == ("--hostfile",) else script)
    typed = ("--engine", "torch", "--audit", 1, "--env", "FAULTS", "--restarts", 4)
    said = hvd_lb(*RECIPE, *where, *typed, "--output", run)
    begun.join()
    assert said.status == 0, said
    assert pauses == [10.0, 20.0]
    assert said.out.count("starting again (--restarts; ") == 3
    assert "processes: 1 on cpu, 1 thread each, and nobody to audit it (--audit)\n" in said.out
    failed, *away = said.err.splitlines()
    assert ("were lost" if "--elastic" in how else "rank ") in failed
    assert len(away) == 2
    for line in away:
        assert line.startswith(f"hvd-lb: error: {how[-1].removeprefix('--hostfile') or 'hostfile'} ")
        assert "No such file" in line
    assert "Traceback" not in said.err
    assert_the_same(plain, run)
    assert not processes_of(run)
