"""Labels as they are written: what is a number, what is a name, and what is neither."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_lb.data.sources.labels import Classes, UnknownLabel, classes_in, find_classes, read_classes
from hvd_lb.errors import UserError

ELEVEN = [str(number) for number in range(11)]


WRITTEN = ("{}", "{}.0", "{:03}", "{}.", "+{}")


@pytest.mark.parametrize("form", WRITTEN)
def test_whole_numbers_are_labels_as_they_are(form: str) -> None:
    written = [form.format(number) for number in range(11)]
    classes = find_classes(written[::-1])
    assert classes.names == ELEVEN
    assert classes.numbers(written).tolist() == list(range(11))
    assert Classes(classes.names, False).numbers(["2.0", "010"]).tolist() == [2, 10]


@pytest.mark.parametrize("odd", ["-1", "1.5", "nan", "NaN", "inf", "", "?", "None", "cat", "1e3", "٣", "0x1"])
def test_what_is_no_number_among_numbers_is_named(odd: str) -> None:
    with pytest.raises(
        UnknownLabel, match=re.escape(f"label {odd!r} is no whole number from 0 on")
    ) as raised:
        find_classes([*ELEVEN, odd])
    assert raised.value.label == odd


@pytest.mark.parametrize("odd", ["-1", "1.5", "nan"])
def test_what_looks_like_a_number_is_no_name(odd: str) -> None:
    with pytest.raises(UnknownLabel, match="it looks like a number"):
        find_classes(["ant", "bee", odd])


@given(
    st.sets(
        st.text("abcé-_. 1", min_size=1).filter(lambda of: not of[0].isdigit() and of[0] not in "-."),
        min_size=1,
    )
)
def test_names_are_sorted(names: set[str]) -> None:
    classes = find_classes(names)
    assert classes.names == sorted(names)
    assert classes.numbers(classes.names).tolist() == list(range(len(names)))


def test_one_name_in_two_unicode_forms_is_explained() -> None:
    with pytest.raises(UnknownLabel, match="NFC and NFD"):
        find_classes(["f\u00e9e", "fe\u0301e", "ant"])
    with pytest.raises(UnknownLabel, match="NFC and NFD"):
        find_classes(["f\u00e9e", "ant"]).numbers(["fe\u0301e"])


def test_in_a_file_of_classes_numbers_are_positions_and_names_are_names() -> None:
    classes = Classes(["bond", "007", "10"], True)
    assert classes.numbers(["007", "bond", "0", "2", "2.0", "10", "01"]).tolist() == [1, 0, 0, 2, 2, 2, 1]
    with pytest.raises(UnknownLabel, match="label '3' is no class; .*; do the labels begin at 1"):
        classes.numbers(["1", "2", "3"])
    with pytest.raises(UnknownLabel, match="label '3' is no class; expected one of the 3 .* such as 'bond'$"):
        classes.numbers(["0", "1", "3"])


def test_in_a_file_of_numbers_in_another_order_numbers_are_positions_only() -> None:
    """Else "2" would be position 2 and "3" the name that stands there."""
    with pytest.raises(UnknownLabel, match="label '3' is no class; .*; do the labels begin at 1"):
        Classes(["1", "2", "3"], True).numbers(["1", "2", "3"])
    assert Classes(["0", "1", "10", "2"], True).numbers(["0", "1", "2", "3"]).tolist() == [0, 1, 2, 3]
    assert Classes(["01", "02"], True).numbers(["01", "02"]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("training", "own", "labels", "expected"),
    [
        (["ant", "bee", "cat"], "cat bee ant", ["cat", "ant", "0", "2"], [2, 0, 2, 0]),
        (["ant", "bee", "cat"], "dog cat", ["cat", "1"], [2, 2]),
        (["0", "1", "2"], "cat bee ant", ["cat", "ant", "0", "2"], [0, 2, 0, 2]),
        (["0", "1", "2"], "2 1 0", ["0", "2", "1"], [2, 0, 1]),
    ],
)
def test_a_file_beside_validation_images_labels_them_as_training_does(
    training: list[str], own: str, labels: list[str], expected: list[int], tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text(own.replace(" ", "\n"))
    classes = classes_in(tmp_path, Classes(training, False))
    assert classes is not None
    assert classes.names == training
    assert classes.numbers(labels).tolist() == expected


@pytest.mark.parametrize("label", ["dog", "0", "3"])
def test_a_class_that_training_has_not_is_named(label: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\ncat\nbee")
    classes = classes_in(tmp_path, Classes(["3", "bee", "cat"], False))
    assert classes is not None
    if label == "3":  # a name, as the file has no such position
        assert classes.numbers([label]).tolist() == [0]
        return
    with pytest.raises(UnknownLabel, match=f"label '{label}' is no class; .* 3 of the training split"):
        classes.numbers([label])


@pytest.mark.parametrize("text", ["ant\nbee\n", "\ufeffant\r\nbee\r\n", "ant\nbee", "ant\nbee\n\n\n"])
def test_files_of_classes_however_they_were_saved(text: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert read_classes(tmp_path) == Classes(["ant", "bee"], True)


def test_lines_of_classes_end_at_line_ends_only(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("ant\x0cx\nbee\u2028y\n".encode() + b"\xff\n")
    assert read_classes(tmp_path) == Classes(["ant\x0cx", "bee\u2028y", "\udcff"], True)
    for text in (b"ant\n\nbee\n", "ant\nbee\n".encode("utf-16")):
        (tmp_path / "classes.txt").write_bytes(text)
        with pytest.raises(UserError, match="classes.txt: no list of classes"):
            read_classes(tmp_path)
