"""A process is told from others by its machine, its number and its start."""

import os
import platform
import subprocess
import sys
from typing import Any

import pytest

from hvd_lb.launch.launch_plan import process_environment
from hvd_lb.machine.process import is_running, memory_variables, started, this_life, this_process


def test_this_process_is_running() -> None:
    assert is_running(this_process()) is True


def test_a_number_that_is_used_again_is_another_process() -> None:
    mine = this_process()
    assert is_running({**mine, "started": mine["started"] + 1}) is False


def test_a_process_that_has_ended_is_no_more_also_before_it_is_waited_for() -> None:
    child = subprocess.Popen(["sleep", "60"])
    record = {**this_process(), "pid": child.pid, "started": started(child.pid)}
    assert is_running(record) is True
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    assert is_running(record) is False
    child.wait()
    assert is_running(record) is False


@pytest.mark.parametrize("other", [{"host": "h2"}, {"machine": "another boot"}])
def test_of_another_machine_or_boot_nothing_is_said(other: dict[str, Any]) -> None:
    assert is_running({**this_process(), **other}) is None


def test_another_start_of_a_container_is_another_life() -> None:
    ask = "from hvd_lb.machine.process import this_life; print(this_life())"
    here = [sys.executable, "-c", ask]
    assert subprocess.check_output(here, text=True).strip() == this_life()
    container = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*container, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("this machine allows no namespaces")
    lives = {subprocess.check_output([*container, *here], text=True).strip() for _ in range(3)}
    assert len({*lives, this_life()}) == 4


def test_the_most_memory_is_that_of_this_program_alone() -> None:
    """Asked in a child of one that holds 300 MB: `getrusage` there would count them."""
    held = b"x" * 300_000_000
    asked = (
        "from hvd_lb.machine.process import peak_memory as p; a = p(); b = b'x' * 100_000_000; print(a, p())"
    )
    before, after = map(int, subprocess.check_output([sys.executable, "-c", asked]).split())
    assert before < len(held) // 2
    assert 90_000_000 < after - before < 110_000_000


_FAULTS = """
import resource, torch
from hvd_lb.machine.process import keep_memory
keep_memory()
step = lambda: torch.zeros(16, 2**20).add_(1).sum()  # 64 MB, more than malloc's largest threshold
for _ in range(4):
    step()
def faults_of_eight_steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# Now and then something small takes a piece of the block, and the next step needs another block, once.
print(min(faults_of_eight_steps() for _ in range(4)))
"""


def _page_faults(**settings: str) -> int:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    program = [sys.executable, "-c", _FAULTS]
    return int(subprocess.run(program, env=bare | settings, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_memory_of_one_step_serves_the_next() -> None:
    assert _page_faults() < 1000
    assert _page_faults(MALLOC_ARENA_MAX="2", GLIBC_TUNABLES="glibc.malloc.arena_test=2") < 1000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_with_what_processes_of_a_run_are_started_with_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert _page_faults(**memory_variables()) < 1000


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ({}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}),
        ({"GLIBC_TUNABLES": ""}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}),
        (
            {"GLIBC_TUNABLES": "glibc.rtld.nns=5"},
            {"GLIBC_TUNABLES": "glibc.rtld.nns=5:glibc.malloc.tcache_count=0"},
        ),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_max=100"}, {}),
        ({"MALLOC_TRIM_THRESHOLD_": "1"}, {}),
    ],
)
def test_small_pieces_are_not_set_aside_unless_the_user_has_them(
    monkeypatch: pytest.MonkeyPatch, present: dict[str, str], expected: dict[str, str]
) -> None:
    for name in [*os.environ]:
        if name.startswith(("MALLOC_", "GLIBC_")):
            monkeypatch.delenv(name)
    for name, value in present.items():
        monkeypatch.setenv(name, value)
    assert memory_variables() == expected
    assert process_environment(1, "cpu").items() >= expected.items()
    assert "GLIBC_TUNABLES" not in process_environment(1, "cuda")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
@pytest.mark.parametrize(
    "settings",
    [
        {"MALLOC_MMAP_THRESHOLD_": "1000000"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.trim_threshold=1000000"},
    ],
)
def test_what_the_user_has_set_of_malloc_stays(settings: dict[str, str]) -> None:
    assert _page_faults(**settings) > 8 * 64 * 2**20 / 4096 / 2
