"""--restarts: after which ends a run is started again, and on which hosts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hvd_lb.doctor.finding import Finding
from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.preflight.judge import PreflightReport, Request
from hvd_lb.launch.target import Target
from hvd_lb_cli.dispatch import Restarts, examine

REQUEST = Request("cpu", None, Path("/run"), None)


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, True), (2, False), (130, False), (143, False)])
def test_a_failure_is_tried_again_and_nothing_else(status: int, again: bool) -> None:
    assert Restarts(1).wanted(status, Console(quiet=True)) is again


def test_only_so_often() -> None:
    restarts = Restarts(2)
    assert [restarts.wanted(1, Console(quiet=True)) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("down", "some_will_do", "used"),
    [("c", True, "ab"), ("", True, "abc"), ("c", False, None), ("abc", True, None)],
)
def test_hosts_that_do_not_answer_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    down: str,
    some_will_do: bool,
    used: str | None,
) -> None:
    def preflight(hosts: Sequence[Host], *_: object) -> PreflightReport:
        findings = {
            host.name: [
                Finding("reached", "wrong", "no route") if host.name in down else Finding("reached", "ok", "")
            ]
            for host in hosts
        }
        ready: Any = None if set(down) & findings.keys() else "".join(findings)
        return PreflightReport(findings, ready)

    monkeypatch.setattr("hvd_lb_cli.dispatch.preflight", preflight)
    target = Target("ssh", [Host(name, 1) for name in "abc"], "--hosts")
    if used is None:
        with pytest.raises(UserError, match="no route"):
            examine(Console(), target, REQUEST, lambda *_: {}, some_will_do)
    else:
        assert examine(Console(), target, REQUEST, lambda *_: {}, some_will_do) == used
        assert capsys.readouterr().out.count("left out: c: no route") == len(down)
