"""Whether a run goes on with the data it finds, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvd_lb.errors import UserError
from hvd_lb.launch import session
from hvd_lb.launch.resume import ResumePoint

NOW = "a" * 16 + "-" + "b" * 16 + "-" + "c" * 16


def messages(monkeypatch: pytest.MonkeyPatch, known: str | None) -> list[str]:
    checkpoint: Any = known and SimpleNamespace(path=Path("step-00000008"), saved=SimpleNamespace(data=known))
    monkeypatch.setattr(session, "find_resume_point", lambda *_: ResumePoint(checkpoint, ["before"]))
    monkeypatch.setattr(session, "rounding_environment", lambda device: {})
    resolved: Any = SimpleNamespace(
        recipe=None, total_steps=9, dataset=SimpleNamespace(name="pictures", fingerprint=lambda: NOW)
    )
    run: Any = None
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
