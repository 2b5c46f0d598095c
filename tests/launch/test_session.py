"""Whether a run goes on with the data it finds, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvd_lb.errors import UserError
from hvd_lb.exact.rounding import rounding_differences
from hvd_lb.launch import session
from hvd_lb.launch.launch_plan import cycles
from hvd_lb.launch.resume import ResumePoint
from hvd_lb.machine.cpu import computes_by
from hvd_lb.machine.environment import describe_environment
from hvd_lb.machine.placement import Placement
from hvd_lb.world import build

NOW = "a" * 16 + "-" + "b" * 16 + "-" + "c" * 16


def messages(monkeypatch: pytest.MonkeyPatch, known: str | None) -> list[str]:
    checkpoint: Any = known and SimpleNamespace(path=Path("step-00000008"), saved=SimpleNamespace(data=known))
    monkeypatch.setattr(session, "find_resume_point", lambda *_: ResumePoint(checkpoint, ["before"]))
    data = SimpleNamespace(name="pictures", fingerprint=lambda: NOW, refuse_among_classes=lambda _: None)
    resolved: Any = SimpleNamespace(recipe=None, total_steps=9, dataset=data)
    run: Any = SimpleNamespace(path=Path("run"))
    return session.resume_point_of(run, resolved, SimpleNamespace(device="cpu"), "auto").messages  # type: ignore[arg-type]


def test_the_same_data_need_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert messages(monkeypatch, None) == messages(monkeypatch, NOW) == ["before"]


def test_other_names_and_older_checkpoints_go_on_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    _, said = messages(monkeypatch, NOW[:-1] + "d")
    assert said == "step-00000008 was trained on the same images under other names or packed otherwise"
    _, said = messages(monkeypatch, "a" * 16)
    assert said.startswith(
        "step-00000008 was made by an older version, which kept no check of the images' bytes"
    )


@pytest.mark.parametrize("known", ["d" * 16, NOW.replace("a", "d"), NOW.replace("b", "d")])
def test_other_data_are_refused_before_anything_starts(known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="step-00000008 was trained on other data than pictures is now"):
        messages(monkeypatch, known)


def test_the_rounding_of_other_hosts_is_that_of_rank_0s_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed on a login node: it has no GPU, and another CPU."""
    seen = []

    def find(*arguments: Any) -> ResumePoint:
        seen.append(arguments[-1])
        return ResumePoint(None, [])

    monkeypatch.setattr(session, "find_resume_point", find)
    data = SimpleNamespace(refuse_among_classes=lambda _: None)
    resolved: Any = SimpleNamespace(recipe=None, total_steps=9, dataset=data)
    run: Any = SimpleNamespace(path=Path("run"))
    first = {"machine": "aarch64", "cpu": "Grace", "cpu_features": ["sve2"], "cores": 72}
    placement = Placement("cuda", 2, 1, ("h1", "h2"), gpus=("GH200", "H100"), first_host=first)
    session.resume_point_of(run, resolved, placement, "auto")
    there = seen[0]()
    assert (there["device"], there["machine"], there["cpu_features"]) == ("GH200", "aarch64", ["sve2"])
    ranks = {**there, "cpu_capability": "SVE256"}
    assert rounding_differences(ranks, there) == []
    assert rounding_differences({**ranks, "device": "H100"}, there) == ["device: H100 → GH200"]
    assert describe_environment(placement, [])["devices"] == ["GH200", "H100"]
    assert describe_environment(placement, [])["cpu"] == "Grace"


def test_hardware_that_is_not_rank_0s_is_told_by_host() -> None:
    cpu, gpu = {"machine": "x86_64", "cpu_features": ["avx", "avx2"], "cpu": "Epyc"}, ("H100",)
    hardware = {
        **{name: computes_by(cpu, gpu) for name in ("h1", "h2")},
        "h3": computes_by({**cpu, "cpu": "Xeon"}, gpu),
        **{name: computes_by({**cpu, "cpu_features": ["avx"]}, gpu) for name in ("h4", "h5")},
        "h6": computes_by(cpu, ("H100", "A100")),
        "h7": computes_by({**cpu, "MKL_CBWR": "AVX2"}, gpu),
    }
    placement = Placement("cuda", 6, 1, tuple(hardware), gpus=("H100",) * 6, hardware=hardware)
    assert session.unlike_hosts(placement, hardware) == {
        "CPU without avx2": ["h4", "h5"],
        "device: H100 → A100 and H100": ["h6"],
        "MKL_CBWR: not set → AVX2": ["h7"],
    }
    assert session.unlike_hosts(Placement("cpu", 2, 1), {}) == {}


@pytest.mark.parametrize(
    ("elastic", "late", "lasted", "done", "hopeless"),
    [
        (False, [1], 0, [], True),
        (True, [1], 0, ["kill 1"], False),
        (True, [], 0, ["connect anew"], False),
        (True, [0, 1], 239, [], False),
        (True, [0, 1], 240, [], True),
    ],
)
def test_what_an_elastic_job_overcomes_is_no_reason_for_its_end(
    elastic: bool, late: list[int], lasted: float, done: list[str], hopeless: bool
) -> None:
    did: list[str] = []
    processes: Any = SimpleNamespace(
        signal=lambda number, rank: did.append(f"kill {rank}"),
        connect_anew=lambda: did.append("connect anew"),
    )
    hangs: Any = SimpleNamespace(
        look=lambda: "no step", late=late, ranks=[0, 1], lasted=lasted, begin_again=lambda: None
    )
    job: Any = SimpleNamespace(elastic=elastic, environment={"HVD_LB_HANG_TIMEOUT": "60"})
    display: Any = SimpleNamespace(note=lambda text: None)
    assert session._hopeless(job, processes, hangs, display) == ("no step" if hopeless else None)
    assert did == done


@pytest.mark.parametrize(
    ("engine", "device", "elastic", "parts", "variables", "milliseconds"),
    [
        ("horovod", "cpu", False, None, {}, "10"),
        ("horovod", "cuda", False, 8, {}, None),
        ("torch", "cpu", False, 8, {}, None),
        ("horovod", "cpu", True, 8, {}, "10"),
        ("horovod", "cpu", True, 7, {}, None),
        ("horovod", "cpu", True, None, {}, None),
        ("horovod", "cpu", False, 8, {"HOROVOD_AUTOTUNE": "1"}, None),
    ],
)
def test_horovods_cycles_are_longer_on_cpus(
    engine: str,
    device: str,
    elastic: bool,
    parts: int | None,
    variables: dict[str, str],
    milliseconds: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "built_with", lambda: {"patch_parts": parts} if parts else {})
    launch: Any = SimpleNamespace(engine=engine, environment=variables)
    assert cycles(launch, device, elastic).get("HOROVOD_CYCLE_TIME") == milliseconds
