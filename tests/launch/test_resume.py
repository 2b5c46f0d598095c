"""Whose run a folder holds."""

from pathlib import Path

import pytest

from hvd_lb.errors import UserError
from hvd_lb.launch.resume import stored_recipe
from hvd_lb.report import run_directory
from hvd_lb.report.run_directory import RunDirectory, replace_text


def test_a_start_killed_while_it_writes_its_recipe_is_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.lock().close()

    def killed(*_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_directory.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_text(run.recipe, "data: digits\n")
    assert not run.recipe.exists()
    assert len(list(run.path.iterdir())) == 3
    (run.path / ".hvd-lb-preflight-00a1").touch()  # hosts were being asked
    (run.path / ".cache").mkdir()  # as in containers
    assert stored_recipe(run) is None
    (run.path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds something that is not a run"):
        stored_recipe(run)


@pytest.mark.parametrize("line", ["later: 1", "flip: 2.0", "momentum: 0.0"])
def test_a_recipe_that_this_version_cannot_read_is_left_alone(line: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.recipe.write_text(f"data: digits\n{line}\n")
    with pytest.raises(
        UserError, match=r"recipe.yaml: .*; go on with the version that wrote it, restore it or"
    ):
        stored_recipe(run)


def test_a_recipe_of_an_older_version_has_the_defaults_of_what_is_new(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.recipe.write_text("data: digits\nmodel: resnet8\nval_fraction: null\n")
    found = stored_recipe(run)
    assert found is not None
    assert (found.model, found.on_nan, found.max_rollbacks) == ("resnet8", "stop", 3)
