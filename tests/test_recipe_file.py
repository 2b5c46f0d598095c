"""Recipe files: what YAML makes of plain words, and one line for whatever is no recipe."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from hvd_lb.errors import UserError
from hvd_lb.recipe import load_values, make_recipe
from hvd_lb.recipe_file import dump_values, parse_values


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("-7", -7),
        ("0", 0),
        ("true", True),
        ("off", False),
        ("~", None),
        ("", None),
        # what YAML 1.1 takes for numbers and dates
        ("010", "010"),
        ("0x1f", "0x1f"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("'8'", "8"),
        ("1e5x", "1e5x"),
    ],
)
def test_plain_words(written: str, value: object) -> None:
    read = parse_values(f"a: {written}\n", "f")["a"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    "text", ["1e5", "010", "1:30", "no", "2026-01-01", "é", "null", "0x1f", "a: b", "# a"]
)
def test_text_stays_text(text: str) -> None:
    """For other readers of YAML as well."""
    written = dump_values({"a": text, "b": [0.1, 1e-5, 1e22]})
    assert parse_values(written, "f") == yaml.safe_load(written) == {"a": text, "b": [0.1, 1e-5, 1e22]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"epochs: 3\nseed: 1\nepochs: 4\n", "epochs is there twice, in lines 1 and 3"),
        (b'"seed": 1\nseed: 1\n', "seed is there twice, in lines 1 and 2"),
        (b"epochs: &a 3\ngpus: *a\n", "line 1, column 9: anchors, aliases and tags"),
        (b"data: !!python/object:os.system x\n", "anchors, aliases and tags"),
        (b"crop_scale: !!set {0.1, 1.0}\n", "anchors, aliases and tags"),
        (b"1: 2\n", "expected the name of a field"),
        (b"? [a]\n: 2\n", "expected the name of a field"),
        (b"epochs: 3\n---\nepochs: 4\n", "line 2, column 1: a second document begins"),
        (b"epochs:\t3\n", "line 1, column 8: a tab"),
        (b"epochs: 3\n\tseed: 1\n", "line 2, column 1: a tab"),
        ("epochs: 3\n".encode("utf-16-le"), "save it as UTF-8"),
        (b"gpus: 1: 2", "line 1, column 8"),
        (b"", "expected `field: value` lines"),
        (b"# nothing\n", "expected `field: value` lines"),
        (b"- a\n", "expected `field: value` lines"),
        (b"gpus 3\n", "expected `field: value` lines"),
        (b"gpus: " + b"[" * 20_000, "nested too deeply"),
        (b"gpus: " + b"9" * 5_000, "too many digits"),
        (b"a: \0\n", "no plain text"),
        (b"#" * 2_000_000, "more than 1,048,576 bytes"),
        ("epochs: 3\n".encode("utf-16"), "is not UTF-8 (byte 0)"),
        (b"description: caf\xe9\n", "is not UTF-8 (byte 16)"),
    ],
)
def test_what_is_no_recipe_is_told_in_one_line(content: bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_values(str(file))
    assert told in str(error.value)
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, told in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is a pipe or device"),
        (tmp_path / ("a" * 5000), "neither a preset"),
    ):
        with pytest.raises(UserError, match=told):
            load_values(str(path))


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfepochs: 3\n")
    assert load_values(str(tmp_path / "mine.yaml")) == {"epochs": 3}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"gpus": True}, "gpus = True: expected a whole number"),
        ({"gpus": 8.0}, "gpus = 8.0: expected a whole number"),
        ({"gpus": "8"}, "gpus = '8': expected a whole number"),
        ({"gpus": None}, "gpus is empty: expected a whole number"),
        ({"gpus": 10**30}, "less than or equal to"),
        ({"image_size": 10**9}, "less than or equal to"),
        ({"learning_rate": True}, "expected a number"),
        ({"learning_rate": "0.1"}, "expected a number"),
        ({"learning_rate": float("inf")}, "expected a finite number"),
        ({"flip": float("nan")}, "expected a finite number"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean = [0.5, nan, 0.5]: expected a finite number"),
        ({"mean": [123.7, 116.3, 103.5]}, "expected numbers from 0 to 1"),
        ({"mean": [True, False, True]}, "expected a number"),
        ({"std": [0.2, 0.2]}, "std = [0.2, 0.2]: expected 3 numbers"),
        ({"crop_scale": 0.5}, "expected 2 numbers"),
        ({"crop_ratio": [0.5, float("inf")]}, "expected a finite number"),
        ({"drop_epochs": "30,60"}, "expected a list of numbers"),
        ({"drop_epochs": [100, 150]}, "increasing epochs of a run of 90, from 0 to 90"),
        ({"drop_epochs": [30, float("nan")]}, "expected a finite number"),
        ({"nesterov": 1}, "nesterov = 1: expected true or false"),
        ({"data": False}, "expected text"),
        ({"data": ""}, "expected the name of data"),
        ({"momentum_form": True}, "should be 9 or 10"),
        ({"steps": "9" * 5000}, "(5,002 characters)"),
        ({"eval_every": "9" * 5000 + "steps"}, "such as 500steps"),
    ],
)
def test_values_of_another_kind(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        make_recipe(values, "mine.yaml")
    assert told in str(error.value)
    assert str(error.value).startswith("mine.yaml: ")
    assert len(str(error.value)) < 250


def test_negative_zero_is_zero() -> None:
    assert make_recipe({"weight_decay": -0.0}).digest() == make_recipe({"weight_decay": 0}).digest()
    assert make_recipe({"mean": [-0.0, 0, 0]}) == make_recipe({"mean": [0.0, 0.0, 0.0]})
