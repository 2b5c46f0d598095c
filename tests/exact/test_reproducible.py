"""The surroundings of the reproducible mode: kernels, and what is told where the last bits may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL
import pytest
import torch

from hvd_lb.errors import UserError
from hvd_lb.exact.reproducible import deterministic_kernels, rounding_environment
from hvd_lb.exact.rounding import rounding_differences
from hvd_lb.launch.resume import find_resume_point
from hvd_lb.machine.cpu import cpu_features
from hvd_lb.recipe import Recipe
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.training.checkpoint import CheckpointStore
from hvd_lb.training.saved_state import SavedState


def test_settings_are_put_back() -> None:
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    with deterministic_kernels("resnet8"):
        assert torch.are_deterministic_algorithms_enabled()
        assert not settings.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert settings.fill_uninitialized_memory == before


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    with (
        pytest.raises(UserError, match="mynet uses put_, .*--no-reproducible"),
        deterministic_kernels("mynet"),
    ):
        torch.zeros(3).put_(torch.arange(2), torch.ones(2))
    with pytest.raises(RuntimeError, match="something else"), deterministic_kernels("mynet"):
        raise RuntimeError("something else")


def test_the_environment_is_described_and_compared() -> None:
    here = rounding_environment("cpu")
    assert here["device"] == "cpu"
    assert here["torch"] == torch.__version__
    assert here["cpu_features"] == cpu_features() == sorted(set(cpu_features()))
    assert rounding_differences(here, dict(here)) == []
    assert here["pillow"] == PIL.__version__
    elsewhere = {**here, "torch": "2.15.0", "cpu_features": [*here["cpu_features"][1:], "avx1024"]}
    assert rounding_differences(here, elsewhere) == [
        f"CPU without {here['cpu_features'][0]}, with avx1024",
        f"torch: {torch.__version__} → 2.15.0",
    ]


def test_variables_that_choose_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older checkpoints lack them, and so do runs without any: both are as not set."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    here = rounding_environment("cpu")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    there = rounding_environment("cpu")
    assert rounding_differences(here, there) == ["ONEDNN_MAX_CPU_ISA: not set → AVX2"]
    assert rounding_differences(there, here) == ["ONEDNN_MAX_CPU_ISA: AVX2 → not set"]
    assert rounding_differences(there, dict(there)) == []


@pytest.mark.parametrize("reproducible", [False, True])
def test_going_on_elsewhere_is_warned_about(reproducible: bool, tmp_path: Path) -> None:
    recipe, here = Recipe(reproducible=reproducible), rounding_environment("cpu")
    state = SavedState(
        next={"epoch": 0, "step": 3}, recipe=recipe.mathematics(), data="", optimizer={}, scaler={}, loss_images=0,
        environment={**here, "torch": "2.13.0"}, best_error=None, evaluation=None,
    )  # fmt: skip
    CheckpointStore(tmp_path / "run" / "checkpoints").save(3, {}, {}, state.to_json())
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    resume_point = find_resume_point(RunDirectory(tmp_path / "run"), recipe, "auto", 9, lambda: here)
    assert resume_point.step == 3
    if reproducible:
        (message,) = resume_point.messages
        assert (
            f"step-00000003 was made with other software or hardware (torch: 2.13.0 → {torch.__version__})"
            in message
        )
        assert "not bitwise" in message
    else:
        assert resume_point.messages == []


def test_of_what_is_not_known_nothing_is_said() -> None:
    here = rounding_environment("cpu")
    assert rounding_differences(here, {**here, "cpu_capability": None}) == []
    assert rounding_differences({**here, "cpu_capability": None}, here) != []
    older = {name: value for name, value in here.items() if name != "pillow"}
    assert rounding_differences(older, here) == []
