"""Judging what hosts say: made up here, as GPUs and other versions are; tests/cluster asks real ones."""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.preflight import probe
from hvd_lb.launch.preflight.discovery import Come
from hvd_lb.launch.preflight.judge import PreflightReport, Request, preflight
from hvd_lb.machine.placement import Placement
from hvd_lb_cli.dispatch import newcomers
from hvd_lb_cli.output.show import print_preflight

GPU = {"name": "H100", "total": 80 * 2**30, "used": 2**28, "processes": 0, "mig": False}
Change = Callable[[dict[str, Any]], None]


def ask_with(changes: dict[str, Change], silent: dict[str, str] | None = None) -> Any:
    """Hosts that answer as this machine does, each with a change to it."""

    def ask(hosts: list[str], question: str) -> dict[str, str | UserError]:
        answers: dict[str, str | UserError] = {}
        for host in hosts:
            if silent and host in silent:
                answers[host] = UserError(silent[host])
                continue
            answer = copy.deepcopy(probe.answer(host, json.loads(question)))
            answer["interface"]["unreached"] = {}
            answer["identity"] = host  # here it is one machine
            changes.get(host, lambda answer: None)(answer)
            answers[host] = f"Welcome to {host}!\n{probe.ANSWER}{json.dumps(answer)}\n"
        return answers

    return ask


def examine(
    tmp_path: Path,
    changes: dict[str, Change],
    hosts: tuple[Host, ...] = (Host("127.0.0.1", 2), Host("127.0.0.2", 2)),
    device: str = "cpu",
    data: Path | None = None,
    silent: dict[str, str] | None = None,
) -> PreflightReport:
    pytest.importorskip("horovod")
    report = preflight(
        hosts, Request(device, data, tmp_path / "new" / "run", None), ask_with(changes, silent)
    )
    assert list(tmp_path.iterdir()) == [], "a marker was left"
    return report


def change(**values: Any) -> Change:
    return lambda answer: answer.update(values)


def gpus(count: int, **values: Any) -> Change:
    return change(gpus=[{**GPU, **values} for _ in range(count)])


def test_hosts_that_are_ready(tmp_path: Path) -> None:
    cluster = examine(tmp_path, {}, data=tmp_path).ready()
    assert cluster.hosts == [Host("127.0.0.1", 2), Host("127.0.0.2", 2)]
    assert (cluster.device, cluster.slots) == ("cpu", 4)
    assert cluster.interfaces == {"127.0.0.1": "lo", "127.0.0.2": "lo"}


def test_slots_are_gpus_where_nobody_says_how_many(tmp_path: Path) -> None:
    hosts = (Host("127.0.0.1"), Host("127.0.0.2"))
    cluster = examine(tmp_path, {"127.0.0.1": gpus(8), "127.0.0.2": gpus(4)}, hosts, device="auto").ready()
    assert cluster.hosts == [Host("127.0.0.1", 8), Host("127.0.0.2", 4)]
    assert cluster.device == "cuda"
    there = probe.usable_cores()
    assert examine(tmp_path, {}, hosts, device="auto").ready().hosts == [
        Host(name, there) for name in ("127.0.0.1", "127.0.0.2")
    ]


def test_the_cpu_can_be_asked_for_where_there_are_gpus(tmp_path: Path) -> None:
    assert examine(tmp_path, {"127.0.0.1": gpus(8)}, device="cpu").ready().device == "cpu"


@pytest.mark.parametrize(
    ("device", "changes", "problem"),
    [
        ("auto", {"127.0.0.1": gpus(2)}, "127.0.0.1: 2 GPUs, but other hosts have none"),
        ("cuda", {"127.0.0.1": gpus(2)}, "127.0.0.2: 2 GPUs are asked for and it has 0"),
        (
            "cuda",
            {"127.0.0.1": gpus(2), "127.0.0.2": gpus(1)},
            "127.0.0.2: 2 GPUs are asked for and it has 1",
        ),
        (
            "cuda",
            {"127.0.0.1": gpus(2), "127.0.0.2": gpus(2, used=40 * 2**30)},
            "127.0.0.2: GPU 0 is in use (40.0 of 80 GiB used)",
        ),
        (
            "cuda",
            {"127.0.0.1": gpus(2), "127.0.0.2": gpus(2, processes=1)},
            "127.0.0.2: GPU 0 is in use",
        ),
        (
            "cuda",
            {"127.0.0.1": gpus(2), "127.0.0.2": gpus(2, mig=True)},
            "127.0.0.2: GPU 0 is divided into MIG instances",
        ),
        ("cpu", {"127.0.0.2": change(identity="127.0.0.1")}, "127.0.0.2: it is 127.0.0.1 under another name"),
        (
            "cpu",
            {"127.0.0.2": change(horovod={"torch": "2.14.1", "gloo": True})},
            "Horovod built as gloo for torch 2.14.1",
        ),
        (
            "cpu",
            {"127.0.0.2": lambda a: a["versions"].update(torch="2.13.0")},
            "127.0.0.2: torch 2.13.0, here 2.1",
        ),
        ("cpu", {"127.0.0.2": lambda a: a["versions"].update(python="3.9.2")}, "python 3.9.2, here 3.1"),
        ("cpu", {"127.0.0.2": lambda a: a["versions"].update(horovod="none")}, "horovod none, here 0."),
        ("cpu", {"127.0.0.2": lambda a: a["versions"].update(pillow="11.3.0")}, "pillow 11.3.0, here 1"),
        (
            "cpu",
            {"127.0.0.2": change(output={"problem": "no folder /x there"})},
            "127.0.0.2: no folder /x there",
        ),
        (
            "cpu",
            {"127.0.0.2": change(interface={"problem": "no interface ib0"})},
            "127.0.0.2: no interface ib0",
        ),
        (
            "cpu",
            {"127.0.0.2": lambda a: a["interface"].update(unreached={"127.0.0.1": "no way to 127.0.0.1"})},
            "127.0.0.2: no way to 127.0.0.1",
        ),
    ],
)
def test_what_is_wrong_is_said_per_host(
    tmp_path: Path, device: str, changes: dict[str, Change], problem: str
) -> None:
    report = examine(tmp_path, changes, device=device)
    with pytest.raises(UserError) as error:
        report.ready()
    assert problem in str(error.value)
    assert "of 2 hosts not ready, nothing was started" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_patch_release_of_python_is_no_difference(tmp_path: Path) -> None:
    def patch(answer: dict[str, Any]) -> None:
        answer["versions"]["python"] = answer["versions"]["python"].rpartition(".")[0] + ".99"

    assert examine(tmp_path, {"127.0.0.2": patch}).cluster


def test_a_host_without_the_data(tmp_path: Path) -> None:
    report = examine(tmp_path, {}, data=tmp_path / "none")
    assert report.problems[0] == (
        f"127.0.0.1, 127.0.0.2: no readable data folder {tmp_path}/none there; mount it, at the same path"
    )


def test_all_problems_are_told_at_once_and_nobody_is_blamed_for_another(tmp_path: Path) -> None:
    changes: dict[str, Change] = {
        "127.0.0.1": lambda a: a["interface"].update(unreached={"127.0.0.2": "no way to 127.0.0.2"}),
        "127.0.0.3": lambda a: a["versions"].update(torch="1.0"),
    }
    hosts = tuple(Host(f"127.0.0.{i}", 1) for i in (1, 2, 3))
    problems = examine(tmp_path, changes, hosts, silent={"127.0.0.2": "key refused"}).problems
    assert [problem.partition(":")[0] for problem in problems] == ["127.0.0.2", "127.0.0.3"]


def test_a_fault_that_many_hosts_have_is_told_once(tmp_path: Path) -> None:
    hosts = tuple(Host(f"127.0.0.{number}", 1) for number in range(1, 31))
    bad = [host.name for host in hosts[4:19]]
    silent = {name: f"key refused: ssh-copy-id {name}, or name another key" for name in bad}
    report = examine(
        tmp_path, {"127.0.0.30": lambda a: a["versions"].update(torch="1.0")}, hosts, silent=silent
    )
    first, second = report.problems
    assert first == "127.0.0.[5-19] (15 hosts): key refused: ssh-copy-id HOST, or name another key"
    assert second.startswith("127.0.0.30: torch 1.0, here ")
    shown = io.StringIO()
    print_preflight(Console(file=shown, width=400), report)
    assert shown.getvalue().splitlines()[2:] == ["ok      127.0.0.[1-4], 127.0.0.[20-29] (14 hosts)"]


def test_a_host_is_asked_with_the_variables_of_the_run(tmp_path: Path) -> None:
    asked = []

    def ask(hosts: list[str], question: str) -> dict[str, str | UserError]:
        asked.append(json.loads(question)["environment"])
        return {}

    environment = {"CUDA_VISIBLE_DEVICES": "3", "NCCL_SOCKET_IFNAME": "=ib0", "TOKEN": "s3cret"}
    preflight([Host("h1", 1)], Request("cuda", None, tmp_path, None, environment=environment), ask)
    assert asked == [{"CUDA_VISIBLE_DEVICES": "3", "NCCL_SOCKET_IFNAME": "=ib0"}]


def test_a_shared_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="not a folder|cannot be written"):
        preflight([Host("127.0.0.1", 1)], Request("cpu", None, Path("/proc/x"), None), ask_with({}))


def joining(
    tmp_path: Path,
    changes: dict[str, Change],
    named: tuple[Host, ...] = (Host("127.0.0.1", 2), Host("127.0.0.2", 2)),
    device: str = "cuda",
    like: Placement | None = None,
) -> Any:
    """Who may join a job of two processes on 127.0.0.1."""
    pytest.importorskip("horovod")
    request = Request(device, None, tmp_path, None)
    new = {host.name for host in named if host != Host("127.0.0.1", 2)}
    return newcomers(request, ask_with(changes), like, named, new, {"127.0.0.1": 2})


BUSY = {**GPU, "used": 40 * 2**30, "processes": 1}


def test_a_host_without_gpus_does_not_join_a_run_on_gpus(tmp_path: Path) -> None:
    ready, problems = joining(tmp_path, {"127.0.0.1": change(gpus=[BUSY, BUSY])})
    assert (ready, problems) == ([], {"127.0.0.2": "2 GPUs are asked for and it has 0"})


def test_the_gpus_of_the_run_itself_are_not_in_the_way(tmp_path: Path) -> None:
    """On a host that is named with more slots than before."""
    there, named = {"127.0.0.1": change(gpus=[BUSY, BUSY, GPU])}, (Host("127.0.0.1", 3),)
    assert joining(tmp_path, there, named) == ([Come("127.0.0.1", 3, "lo")], {})
    there = {"127.0.0.1": change(gpus=[BUSY, BUSY, BUSY])}
    assert joining(tmp_path, there, named)[1] == {"127.0.0.1": "GPU 2 is in use (40.0 of 80 GiB used)"}


def test_hosts_with_gpus_may_join_a_run_on_cpus(tmp_path: Path) -> None:
    assert joining(tmp_path, {"127.0.0.2": gpus(8)}, device="cpu")[0] == [Come("127.0.0.2", 2, "lo")]


def test_one_of_another_cpu_or_gpu_joins_a_reproducible_run_with_a_note(tmp_path: Path) -> None:
    hosts = (Host("127.0.0.1", 2), Host("127.0.0.2", 2))
    changes = {"127.0.0.1": gpus(2), "127.0.0.2": gpus(2)}
    cluster = examine(tmp_path, changes, hosts, "cuda").ready()
    like = cluster.placement(gpus=4, processes=2, threads=1)
    assert joining(tmp_path, changes, like=like)[0] == [Come("127.0.0.2", 2, "lo")]

    def other(answer: dict[str, Any]) -> None:
        answer["gpus"] = [{**GPU, "name": "H200"}] * 2
        answer["cpu"]["cpu_features"] = [*answer["cpu"]["cpu_features"], "avx1024"]

    (come,), _ = joining(tmp_path, {**changes, "127.0.0.2": other}, like=like)
    assert come.note.startswith(
        "127.0.0.2 has other hardware than the run began with (CPU with avx1024; device: H100 → H200), which may"
    )
