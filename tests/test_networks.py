"""A start asks torchvision what a network can do only where an earlier one has not."""

from pathlib import Path

import pytest

from hvd_lb import networks
from hvd_lb.errors import UserError
from hvd_lb.training import models


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is looked at from now on, in a cache of the test's own."""
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    names, problem, found = models.model_names, models.input_problem, []

    def model_names() -> list[str]:
        found.append("names")
        return names()

    def input_problem(name: str, *shape: int) -> str:
        found.append(f"{name} {shape}")
        return problem(name, *shape)

    monkeypatch.setattr(models, "model_names", model_names)
    monkeypatch.setattr(models, "input_problem", input_problem)
    return found


def test_what_has_passed_is_not_looked_at_again(asked: list[str]) -> None:
    networks.check_model_name("resnet8")
    networks.check_input("resnet8", 10, 32, 2)
    seen = len(asked)
    for _ in range(3):
        networks.check_model_name("resnet8")
        networks.check_input("resnet8", 10, 32, 2)
    assert len(asked) == seen
    for shape in ((10, 32, 1), (10, 33, 2), (11, 32, 2)):
        networks.check_input("resnet8", *shape)
        assert f"resnet8 {shape}" in asked
    networks.check_input("resnet14", 10, 32, 2)
    assert "resnet14 (10, 32, 2)" in asked


def test_what_does_not_pass_is_told_each_time(asked: list[str]) -> None:
    for _ in range(2):
        asked.clear()
        with pytest.raises(UserError, match="unknown model 'resnet9'.*resnet"):
            networks.check_model_name("resnet9")
        with pytest.raises(UserError, match="unknown model '../resnet8'"):
            networks.check_model_name("../resnet8")
        with pytest.raises(UserError, match="alexnet cannot train on images of 16×16"):
            networks.check_input("alexnet", 10, 16, 2)
        assert "names" in asked
        assert "alexnet (10, 16, 2)" in asked


def test_other_versions_are_asked_anew(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    networks.check_model_name("resnet8")
    for package in ("torch", "torchvision"):
        networks._versions.cache_clear()
        monkeypatch.setattr(
            networks, "version", lambda name, package=package: "0" if name == package else "1"
        )
        networks.check_model_name("resnet8")
    networks._versions.cache_clear()
    assert asked == ["names"] * 3


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/proc/cache", "~/cache"])
def test_without_a_cache(asked: list[str], monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    monkeypatch.setenv("HVD_LB_CACHE", cache)
    monkeypatch.setenv("HOME", "/dev/null")
    for _ in range(2):
        networks.check_model_name("resnet8")
    assert asked == ["names"] * 2
