"""DistributedOptimizer and the world in real jobs of both engines; the checks are in ranks/checks.py."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "ranks" / "checks.py"


def decorated(*decorators: str) -> list[str]:
    """The names of the functions there with one of these decorators."""
    functions = [node for node in ast.parse(WORKER.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any(ast.unparse(d) in decorators for d in f.decorator_list)]


pytestmark = pytest.mark.slow


def run(launcher: Callable, processes: int) -> tuple[dict[str, int], str]:
    """(check → number of processes in which it failed, all output) of one job."""
    job = launcher(WORKER, processes, timeout=240)
    lines = [line.partition("CHECK ")[2] for line in job.output.splitlines() if "CHECK " in line]
    assert job.returncode == 0, job.output
    return dict(map(json.loads, lines)), job.output


@pytest.fixture(
    scope="module",
    params=[
        ("horovodrun", 3, "memory"),
        ("torchrun", 2, "engine"),
        *(
            pytest.param(job, marks=pytest.mark.long)
            for job in (("horovodrun", 2, "engine"), ("torchrun", 3, "memory"))
        ),
    ],
    ids=lambda param: "{} of {}, sums by {}".format(*param),
)
def job(request: pytest.FixtureRequest) -> Iterator[tuple[dict[str, int], str]]:
    launcher, processes, sums = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVD_LB_SHARED_MEMORY", "1" if sums == "memory" else "0")
        yield run(request.getfixturevalue(launcher), processes)


@pytest.fixture(scope="module")
def alone(horovodrun: Callable) -> tuple[dict[str, int], str]:
    return run(horovodrun, 1)


@pytest.mark.parametrize("check", decorated("check", "check_alone_too"))
def test_check(job: tuple[dict[str, int], str], check: str) -> None:
    failures, output = job
    assert failures.get(check) == 0, output


@pytest.mark.parametrize(("launcher", "processes"), [("horovodrun", 1), ("horovodrun", 3), ("torchrun", 3)])
def test_the_program_in_docs_library_runs(
    request: pytest.FixtureRequest, tmp_path: Path, launcher: str, processes: int
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "library.md").read_text("utf-8")
    program = tmp_path / "program.py"
    program.write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    job = request.getfixturevalue(launcher)(program, processes, timeout=240)
    assert job.returncode == 0, job.output


@pytest.mark.parametrize("check", decorated("check_alone_too"))
def test_check_on_one_process(alone: tuple[dict[str, int], str], check: str) -> None:
    failures, output = alone
    assert failures.get(check) == 0, output
