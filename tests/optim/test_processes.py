"""DistributedOptimizer and the world in real Horovod jobs; the checks are in ranks/checks.py."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "ranks" / "checks.py"
CHECKS = [
    node.name
    for node in ast.parse(WORKER.read_text()).body
    if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "check" for d in node.decorator_list)
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 3], ids=lambda p: f"{p} processes")
def job(request: pytest.FixtureRequest, horovodrun: Callable) -> tuple[dict[str, int], str]:
    """(check → number of processes in which it failed, all output) of one job."""
    job = horovodrun(WORKER, request.param)
    lines = [line.partition("CHECK ")[2] for line in job.output.splitlines() if "CHECK " in line]
    assert job.returncode == 0, job.output
    return dict(map(json.loads, lines)), job.output


@pytest.mark.parametrize("check", CHECKS)
def test_check(job: tuple[dict[str, int], str], check: str) -> None:
    failures, output = job
    assert failures.get(check) == 0, output
