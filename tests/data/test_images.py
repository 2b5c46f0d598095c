"""The protocol's plain implementation, fingerprints, and the choice of a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.data.spec import default_data
from hvd_lb.errors import UserError


def make(labels: list[int], size: int = 4, classes: str = "ab") -> ArrayImages:
    return ArrayImages(np.zeros((len(labels), size, size), np.uint8), np.array(labels), list(classes), "made")


def test_colour_is_kept_and_grey_repeated() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    images = ArrayImages(colour, np.array([0, 1]), ["a", "b"], "made")
    assert (images.widths.tolist(), images.heights.tolist()) == ([5, 5], [3, 3])
    np.testing.assert_array_equal(images.read(np.array([1]))[0], colour[1])
    assert make([0]).read(np.array([0]))[0].shape == (4, 4, 3)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 4), (3, 4, 4)])
def test_wrong_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="made"):
        ArrayImages(np.zeros(shape, np.uint8), np.zeros(2), ["a"], "made")


def test_the_fingerprint_changes_with_what_fixes_the_mathematics_only() -> None:
    same = Dataset("x", make([0, 1]), make([0])).fingerprint()
    assert Dataset("elsewhere", make([0, 1]), make([0])).fingerprint() == same
    others = [
        Dataset("x", make([1, 0]), make([0])),
        Dataset("x", make([0, 1]), make([1])),
        Dataset("x", make([0, 1, 1]), make([0])),
        Dataset("x", make([0, 1], size=5), make([0])),
        Dataset("x", make([0, 1], classes="ac"), make([0])),
        Dataset("x", make([0]), make([0, 1])),
    ]
    assert len({same, *(other.fingerprint() for other in others)}) == len(others) + 1


def test_the_default_is_what_the_environment_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hvd_lb.data.spec._USUAL_FOLDER", tmp_path / "data")
    with pytest.raises(UserError, match="give --data .*digits.*HVD_LB_DATA"):
        default_data()
    (tmp_path / "data").mkdir()
    assert default_data() == str(tmp_path / "data")
    monkeypatch.setenv("HVD_LB_DATA", "digits")
    assert default_data() == "digits"


def test_val_fraction_is_refused_where_it_has_no_meaning() -> None:
    for spec in ("digits", "synthetic:10"):
        with pytest.raises(UserError, match="has its own validation set"):
            open_dataset(spec, val_fraction=0.1)
