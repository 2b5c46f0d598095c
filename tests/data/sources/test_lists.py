"""Lists of images: what is read from them, and the line that is named for each mistake."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import photo

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.sources.lists import read_list
from hvd_lb.errors import UserError

Make = Callable[..., Path]
PICTURES = ["a.png", "b c.png", 'quote".png', "comma,.png", "é 漢.png", "line\nbreak.png", "sub/d.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    for width, name in enumerate(PICTURES, start=20):
        photo(width, 30).save(folder / name)
    return folder


def write(path: Path, records: list[list[str]], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, delimiter=delimiter).writerows(records)


@pytest.mark.parametrize("header", [[], [["path", "label"]], [["label", "extra", "Path"]]])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_pair_of_lists_is_a_data_set(suffix: str, header: list[list[str]], folder: Path) -> None:
    labels = ["bee", "ant", "bee", "ant", "bee", "the cat, or dog", "bee"]
    records = [list(of) for of in zip(PICTURES, labels, strict=True)]
    if header and header[0][0] == "label":
        records = [[label, "", path] for path, label in records]
    for split, chosen in (("train", records), ("val", records[:2])):
        write(folder / f"{split}.{suffix}", header + chosen, "\t" if suffix == "tsv" else ",")
    for spec in (folder, folder / f"train.{suffix}"):
        data = open_dataset(str(spec))
        assert data.train.classes == data.val.classes == ["ant", "bee", "the cat, or dog"]
        assert data.train.labels.tolist() == [1, 0, 1, 0, 1, 2, 1]
        assert data.train.widths.tolist() == list(range(20, 27))
        assert [os.path.relpath(data.train.name(i), folder) for i in range(7)] == PICTURES
        assert data.val.labels.tolist() == [1, 0]
        assert data.train.read(np.array([5]))[0].tobytes() == (folder / PICTURES[5]).read_bytes()


def test_numbers_are_labels_as_they_are(folder: Path) -> None:
    write(folder / "train.csv", [["a.png", "2"], ["b c.png", "00"], ["sub/d.png", "1"], ["comma,.png", "10"]])
    write(folder / "val.csv", [["a.png", "02"]])
    with pytest.raises(UserError, match="no images to train on in 3, 4, 5 and 4 more"):
        open_dataset(str(folder))
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    with pytest.raises(UserError, match=r"train.csv, line 4: label '10' is no class; expected one of the 3"):
        open_dataset(str(folder))
    write(folder / "train.csv", [["a.png", "2"], ["b c.png", "00"], ["sub/d.png", "bee"]])
    data = open_dataset(str(folder))
    assert data.train.classes == ["ant", "bee", "cat"]
    assert data.train.labels.tolist() == [2, 0, 1]
    assert data.val.labels.tolist() == [2]


def test_one_list_is_divided_and_paths_may_be_absolute(folder: Path, tmp_path: Path) -> None:
    records = [[str(folder / name), "one" if i % 2 else "two"] for i, name in enumerate(PICTURES)]
    (tmp_path / "lists").mkdir()
    write(tmp_path / "lists" / "all.csv", records)
    data = open_dataset(str(tmp_path / "lists" / "all.csv"), val_fraction=0.3)
    names = [of.name(i) for of in (data.train, data.val) for i in range(len(of))]
    assert sorted(names) == sorted(path for path, _ in records)


def test_a_column_of_splits_is_not_passed_over(folder: Path) -> None:
    """All images would be trained on, those of the test, too."""
    records = [
        ["path", "label", "Split", "by"],
        ["a.png", "x", "train", "test"],
        ["b c.png", "y", "Test", "test"],
    ]
    write(folder / "train.csv", records)
    with pytest.raises(
        UserError, match=r"has images of several splits \(Test, train\), by its column 'Split'"
    ):
        open_dataset(str(folder / "train.csv"), val_fraction=0.5)
    records = [[*record[:2], "train", "test"] for record in records[1:]]
    write(folder / "train.csv", [["path", "label", "split", "by"], *records])
    write(
        folder / "val.csv",
        [["path", "label", "split"], ["comma,.png", "x", "val"], ["sub/d.png", "y", "val"]],
    )
    assert len(open_dataset(str(folder)).train) == 2


def test_a_file_that_is_named_several_times_is_on_one_side(folder: Path) -> None:
    """Also of a class so small that one of its images is moved over to validate, and of one with a single file;
    however its path is written."""
    photo(9, 9).save(folder / "e.png")
    counts = {"a.png": ("x", 9), "b c.png": ("x", 9), "sub/d.png": ("y", 9), "e.png": ("z", 1)}
    paths = itertools.cycle(["{}", "./{}", "sub/../{}", ".//{}"])
    write(
        folder / "train.csv",
        [[next(paths).format(name), label] for name, (label, count) in counts.items() for _ in range(count)],
    )
    for fraction in (1e-9, 1 - 1e-9):
        data = open_dataset(str(folder / "train.csv"), val_fraction=fraction)
        train, val = ({of.name(i) for i in range(len(of))} for of in (data.train, data.val))
        assert not train & val
        assert np.bincount(data.train.labels).tolist() == [9, 9, 1]
        assert np.bincount(data.val.labels, minlength=3).tolist() == [9, 0, 0]


def test_names_that_are_no_text_are_kept(folder: Path) -> None:
    strange = os.fsencode(folder) + b"/\xff\xfe.png"
    os.rename(folder / "a.png", strange)
    (folder / "train.csv").write_bytes(b"\xef\xbb\xbf\xff\xfe.png,1\nb c.png,0\n")
    (folder / "val.csv").write_bytes(b"b c.png,0\r\n")
    data = open_dataset(str(folder))
    assert os.fsencode(data.train.name(0)) == strange


def test_a_changed_list_is_read_again(folder: Path) -> None:
    write(folder / "train.csv", [["a.png", "x"], ["b c.png", "y"]])
    write(folder / "val.csv", [["a.png", "x"]])
    before = open_dataset(str(folder))
    write(folder / "train.csv", [["a.png", "y"], ["b c.png", "x"]])
    after = open_dataset(str(folder))
    assert after.train.labels.tolist() == [1, 0]
    assert before.fingerprint() != after.fingerprint()


MISTAKES = {
    "a.png,x\nb.png,x\n": r"train.csv, line 2: 'b.png' cannot be read \(No such file",
    "a.png,x\n\nb c.png\n": "train.csv, line 3: 1 columns, expected 2",
    "path,label\na.png,x,y\n": "train.csv, line 2: 3 columns, expected 2",
    '"line\nbreak.png",x\na.png,\n': "train.csv, line 3: no label",
    "a.png,x\n,x\n": "train.csv, line 2: no path",
    "path,Label,x,target\na.png,x,1,y\n": "train.csv, line 1: Label and target are columns of labels: rename or remove",
    'a.png,x\n"b c.png,x\n': "train.csv, line 2: a quote is not closed",
    "a.png,x\nsub/d.txt,x\n": r"train.csv, line 2: 'sub/d.txt': no image file \(.jpg",
    "a.png,x\nsub/d.gif,x\n": "train.csv, line 2: 'sub/d.gif': GIF is not read",
    "name;kind\n": r"train.csv, line 1: expected `path,label`, not 'name;kind'",
    "a.png,99999999999\n": "train.csv, line 1: label '99999999999' is no class",
    "": r"set: holds no images \(train.csv\); expected some of each class",
    "a.png,0\nb c.png,-1\nsub/d.png,1\n": "train.csv, line 2: label '-1' is no whole number from 0 on",
    'a.png,0\nb c.png,"the cat"\n': "train.csv, line 2: label 'the cat' is no whole number from 0 on",
    "a.png,1\nb c.png,2\n": "labels begin at 1, but are counted from 0",
    "a.png,x\nb c.png,y\na.png,y\n": "train.csv, line 3: 'a.png' is 'y', but 'x' in line 1; leave one out",
    "a.png,x\n./sub/../a.png,y\n": "train.csv, line 2: './sub/../a.png' is 'y', but 'x' in line 1",
    "a.png,x\n../set/a.png,y\n": "train.csv, line 2: '../set/a.png' is 'y', but 'x' in line 1",
    "a.png,x\nsub\\d.png,y\n": "train.csv, line 2: .*cannot be read .*; expected / between folders",
    "path,label\na.png ,x\n": "train.csv, line 2: 'a.png ': no image file",
    "A.png,x\n": "train.csv, line 1: 'A.png' cannot be read .*; 'A.png' and 'a.png' differ in upper and lower case",
    "e\u0301 漢.png,x\n": r"train.csv, line 1: .* cannot be read .*another Unicode form \(NFC and NFD",
}


@pytest.mark.parametrize("content", MISTAKES)
def test_mistakes_name_the_line(content: str, folder: Path) -> None:
    (folder / "train.csv").write_text(content)
    (folder / "val.csv").write_text("a.png,x\n")
    with pytest.raises(UserError, match=MISTAKES[content]) as raised:
        open_dataset(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        "path,label\na.png,0\nb c.png,1\n",
        "\ufeffpath,label\r\na.png,0\r\n\r\nb c.png,1\r\n",
        "\n \n\ufeff"[:3] + "path,label\na.png,0\n  \n,\nb c.png,1",
        "a.png,0\rb c.png,1\r",
        '"a.png","0"\n"b c.png","1"\n',
        "a.png, 0\n b c.png, 1 \n",
        "a.png,0.0\nb c.png,1.0\n",
        "a.png,000\nb c.png,001\n",
        "PATH,x,LABEL\na.png,,0\nb c.png,,1\n",
    ],
)
def test_lists_however_they_were_saved(content: str, folder: Path) -> None:
    for split in ("train", "val"):
        (folder / f"{split}.csv").write_bytes(content.encode())
    data = open_dataset(str(folder))
    assert data.train.classes == ["0", "1"]
    assert data.train.labels.tolist() == data.val.labels.tolist() == [0, 1]
    assert [os.path.relpath(data.train.name(i), folder) for i in range(2)] == ["a.png", "b c.png"]


def test_numbers_keep_their_order_beyond_ten(folder: Path) -> None:
    records = [[name, str(label)] for label, name in enumerate([*PICTURES, *PICTURES])]
    for number in range(len(PICTURES), len(records)):
        records[number][0] = f"{number}.png"
        photo(20, 30).save(folder / records[number][0])
    for split in ("train", "val"):
        write(folder / f"{split}.csv", records[::-1])
    data = open_dataset(str(folder))
    assert data.train.classes == [str(label) for label in range(14)]
    assert data.train.labels.tolist() == list(range(14))[::-1]


def test_lines_that_repeat_others_are_said(folder: Path) -> None:
    write(folder / "train.csv", [["a.png", "x"], ["b c.png", "y"], ["a.png", "x"], ["./a.png", "x"]])
    photo(20, 30).save(folder / "c.png")
    write(folder / "val.csv", [["c.png", "x"], ["c.png", "x"], ["./c.png", "x"]])
    data = open_dataset(str(folder))
    assert len(data.train) == 4
    assert data.notes == tuple(
        f"{split}.csv: lines that repeat others, whose images count again: 2" for split in ("train", "val")
    )


@pytest.mark.parametrize("given", [False, True])
def test_validation_images_that_are_trained_on_are_said(folder: Path, given: bool) -> None:
    other = folder / "lists" / "val.csv" if given else folder / "val.csv"
    other.parent.mkdir(exist_ok=True)
    above = "../" if given else ""
    write(folder / "train.csv", [["a.png", "x"], ["b c.png", "y"]])
    for content, told in (
        (
            [[f"{above}./a.png", "x"], [f"{above}c.png", "y"]],
            "val.csv: 1 of its 2 images are trained on, too (train.csv)",
        ),
        ([[f"{above}c.png", "y"]], ""),
    ):
        photo(20, 30).save(folder / "c.png")
        write(other, content)
        data = open_dataset(str(folder / "train.csv"), val=str(other) if given else None)
        assert [note[: len(told)] for note in data.notes] == [told] * bool(told)


def test_a_list_and_a_folder_that_share_images_are_said(folder: Path, tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("val", "de")):
        for name in names:
            for label in ("x", "y"):
                (folder / "set" / split / label).mkdir(parents=True, exist_ok=True)
                photo(20, 30).save(folder / "set" / split / label / f"{name}.png")
    link = tmp_path / "link"
    link.symlink_to(folder / "set")
    write(
        folder / "list.csv",
        [[f"set/{name}", name[-7]] for name in ("train/x/a.png", "val/x/d.png", "val/y/d.png")],
    )
    for train, val, told in (
        (link / "train", folder / "list.csv", "1 of its 3 images are trained on, too (train)"),
        (folder / "list.csv", link / "val", "2 of its 3 images are validated with, too (val)"),
    ):
        notes = open_dataset(str(train), val=str(val)).notes
        assert notes == (f"list.csv: {told}: accuracy will look better than it is",)
    write(folder / "list.csv", [[f"set/val/{name}/d.png", name] for name in "xy"])
    assert open_dataset(str(link / "train"), val=str(folder / "list.csv")).notes == ()


def test_a_list_does_not_validate_itself(folder: Path) -> None:
    write(folder / "train.csv", [["a.png", "x"]])
    with pytest.raises(UserError, match="train.csv: is what is trained on"):
        open_dataset(str(folder / "train.csv"), val=str(folder / "train.csv"))


def test_other_encodings_are_told(folder: Path) -> None:
    (folder / "train.csv").write_text("a.png,x\n", encoding="utf-16")
    (folder / "val.csv").write_text("a.png,x\n")
    with pytest.raises(UserError, match="train.csv: is no UTF-8 text .*save it as CSV in UTF-8"):
        open_dataset(str(folder))


def test_what_is_missing_is_said(folder: Path) -> None:
    write(folder / "train.csv", [["a.png", "x"]])
    with pytest.raises(UserError, match="no val.csv beside it; .*--val-fraction"):
        open_dataset(str(folder))
    write(folder / "val.csv", [["a.png", "z"]])
    with pytest.raises(UserError, match="val.csv, line 1: label 'z' is no class; expected one of the 1"):
        open_dataset(str(folder))
    with pytest.raises(UserError, match="nowhere.csv: no such file"):
        open_dataset(str(folder / "nowhere.csv"))


@given(
    st.lists(st.tuples(st.text(min_size=1), st.text("abc 漢\"\n,\t'", min_size=1)), min_size=1, max_size=9)
)
def test_what_csv_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, str]]
) -> None:
    usable = [[path.replace("\0", "").lstrip() + "x.png", "l" + label.strip()] for path, label in records]
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        path = tmp_path_factory.mktemp("lists") / f"list.{suffix}"
        with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            try:
                csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(
                    [["path", "label"], *usable]
                )
            except UnicodeEncodeError:
                return
        assert [[entry.path, entry.label] for entry in read_list(path)] == usable
