"""What is taken as what: the usual names of splits, --val, Kaggle's ImageNet, and advice that is right."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import photo

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.sources.shards import named_shards
from hvd_lb.errors import UserError

Make = Callable[..., Path]


def make_splits(
    make_classes: Make, folder: Path, *splits: str, classes: tuple[str, ...] = ("ant", "bee")
) -> Path:
    for split in splits:
        make_classes(folder / split, dict.fromkeys(classes, 4 if "ra" in split.lower() else 2))
    return folder


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Val"),
        ("TRAIN", "TEST"),
        ("Training", "Testing"),
        ("training", "validation"),
        ("train", "valid"),
        ("train", "test"),
    ],
)
def test_usual_names_of_splits_are_understood_and_said(
    train: str, val: str, tmp_path: Path, make_classes: Make
) -> None:
    data = open_dataset(str(make_splits(make_classes, tmp_path / "set", train, val)))
    assert data.train.classes == data.val.classes == ["ant", "bee"]
    assert (len(data.train), len(data.val)) == (8, 4)
    assert data.notes == (f"{train}/ is trained on, {val}/ is the validation split",)


def test_validation_comes_before_test_and_plain_names_need_no_word(
    tmp_path: Path, make_classes: Make
) -> None:
    folder = make_splits(make_classes, tmp_path / "set", "train", "test", "val")
    (folder / "test" / "ant" / "0.png").unlink()
    data = open_dataset(str(folder))
    assert len(data.val) == 4
    assert data.notes == ()


def test_a_flat_test_folder_is_no_validation_split(tmp_path: Path, make_classes: Make) -> None:
    folder = make_splits(make_classes, tmp_path / "set", "train")
    (folder / "test").mkdir()
    photo(20, 30).save(folder / "test" / "1.png")
    with pytest.raises(UserError, match="set: has no val/; give --val PATH, or --val-fraction 0.1"):
        open_dataset(str(folder))
    assert open_dataset(str(folder), val_fraction=0.5).train.classes == ["ant", "bee"]


def test_flat_validation_images_are_seen_beside_other_folders(tmp_path: Path, make_classes: Make) -> None:
    folder = make_splits(make_classes, tmp_path / "set", "train")
    for name in ("val", "devkit"):
        (folder / name).mkdir()
    photo(20, 30).save(folder / "val" / "1.png")
    with pytest.raises(UserError, match="set/val: its images .* lie in no class folders"):
        open_dataset(str(folder))


def test_shards_that_are_not_found_by_name_are_said(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "00000.tar").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"train: holds shards, not class folders; name them: --data '.*/train/\*.tar'"
    ):
        open_dataset(str(tmp_path))
    with pytest.raises(
        UserError, match="none is called train-NUMBER.tar; name them, such as --data .*/00000.tar"
    ):
        open_dataset(str(tmp_path / "train"))


@pytest.mark.parametrize("name", ["train.csv", "train-0.tar"])
def test_a_pipe_is_no_list_and_no_shard(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    for val in (None, str(tmp_path / name)):
        with pytest.raises(UserError, match=f"{name}: is (no file, but a pipe|named for)"):
            open_dataset(str(tmp_path / name), val=val, val_fraction=None if val else 0.5)


def test_what_cannot_be_looked_at_is_said(tmp_path: Path) -> None:
    for spec in (f"{tmp_path}/{'x' * 300}", f"{tmp_path}/{'x' * 300}.csv"):
        with pytest.raises(UserError, match="cannot be read .File name too long"):
            open_dataset(spec)


def test_train_may_be_the_name_of_a_class(tmp_path: Path, make_classes: Make) -> None:
    make_classes(tmp_path / "set", {"bus": 3, "car": 3, "train": 3})
    assert open_dataset(str(tmp_path / "set"), val_fraction=0.5).train.classes == ["bus", "car", "train"]


def test_two_folders_for_one_split_are_told(tmp_path: Path, make_classes: Make) -> None:
    folder = make_splits(make_classes, tmp_path / "set", "train", "val", "validation")
    with pytest.raises(UserError, match="set: has both val and validation; name what to use"):
        open_dataset(str(folder))


@pytest.mark.parametrize("splits", [("Train",), ("Val",), ("testing",), ("all/train", "all/val")])
def test_the_advice_of_an_error_works(splits: tuple[str, ...], tmp_path: Path, make_classes: Make) -> None:
    """Whatever is advised, followed to the letter, ends with the classes of the set, not its splits."""
    folder = make_splits(make_classes, tmp_path / "set", *splits)
    spec, options = str(folder), {}
    with pytest.raises(UserError) as raised:
        open_dataset(spec)
    if found := re.search(r"--data (\S+?)[;,.]?( |$)", str(raised.value)):
        spec = found[1]
    elif "--val-fraction 0.1" in str(raised.value):
        options = {"val_fraction": 0.3}
    if "--data" in str(raised.value) and "--val-fraction 0.1, which" in str(raised.value):
        options = {"val_fraction": 0.3}
    assert open_dataset(spec, **options).train.classes == ["ant", "bee"]


def test_a_level_too_high_or_too_low_says_which_is_meant(tmp_path: Path, make_classes: Make) -> None:
    folder = make_splits(make_classes, tmp_path / "set", "train", "val")
    make_splits(make_classes, tmp_path / "more", "one", "two")
    with pytest.raises(
        UserError, match=r"one holds no images, only folders \(ant, bee\): which are the classes\?"
    ):
        open_dataset(str(tmp_path / "more"), val_fraction=0.5)
    with pytest.raises(
        UserError, match="train/ant: holds images .*, but no class folders; give the folder above"
    ):
        open_dataset(str(folder / "train" / "ant"), val_fraction=0.5)
    with pytest.raises(
        UserError, match=f"set/train: is one split only; give --data {folder}, which has both"
    ):
        open_dataset(str(folder / "train"))
    shutil.move(folder, tmp_path / "up" / "set")
    with pytest.raises(UserError, match="these are no classes but splits; give --data .*up/set"):
        open_dataset(str(tmp_path / "up"), val_fraction=0.5)


def test_a_level_too_high_is_seen_through_folders_that_hold_one_other(
    tmp_path: Path, make_classes: Make
) -> None:
    """seg_train/seg_train/CLASS beside seg_test/seg_test/CLASS: archives unpacked into folders of their names."""
    for split in ("seg_train", "seg_test"):
        make_classes(tmp_path / "set" / split / split, {"ant": 2, "bee": 2})
    with pytest.raises(
        UserError,
        match=r"set/seg_test/seg_test holds no images, only folders \(ant, bee\): .* --data \S*/seg_test/seg_test ",
    ):
        open_dataset(str(tmp_path / "set"), val_fraction=0.5)
    for name in ("one", "two"):
        make_splits(make_classes, tmp_path / "more" / name / "inner", "train", "val")
    with pytest.raises(UserError, match="these are no classes but splits; give --data .*more/one/inner"):
        open_dataset(str(tmp_path / "more"), val_fraction=0.5)
    for name in ("one", "two"):
        make_classes(tmp_path / "deep" / name / "images", {"large": 3})
    assert open_dataset(str(tmp_path / "deep"), val_fraction=0.4).train.classes == ["one", "two"]


def test_a_list_beside_images_without_class_folders_is_named(tmp_path: Path) -> None:
    """train/ and train.csv, as competitions have them."""
    (tmp_path / "train").mkdir()
    for number in range(4):
        photo(9, 9, number).save(tmp_path / "train" / f"{number}.png")
    with pytest.raises(
        UserError, match=r"train: holds images \(0.png\), but no class folders; sort them into these, or"
    ):
        open_dataset(str(tmp_path), val_fraction=0.5)
    (tmp_path / "train.csv").write_text("".join(f"train/{i}.png,{'ab'[i % 2]}\n" for i in range(4)))
    with pytest.raises(
        UserError, match=r"no class folders; give --data (\S*/train.csv), if that names each"
    ) as raised:
        open_dataset(str(tmp_path), val_fraction=0.5)
    advised = re.search(r"--data (\S*/train.csv)", str(raised.value))
    assert advised
    assert open_dataset(advised[1], val_fraction=0.5).train.classes == ["a", "b"]


def test_images_may_lie_one_folder_deeper_in_each_class(tmp_path: Path, make_classes: Make) -> None:
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            make_classes(tmp_path / "set" / split / label, {"images": 2})
    assert np.bincount(open_dataset(str(tmp_path / "set")).train.labels).tolist() == [2, 2]


def test_one_class_teaches_nothing(tmp_path: Path, make_classes: Make) -> None:
    folder = make_splits(make_classes, tmp_path / "set", "train", "val", classes=("ant",))
    with pytest.raises(UserError, match=r"train: has one class folder only \(ant\)"):
        open_dataset(str(folder))


def test_classes_that_val_lacks_are_said_and_those_train_lacks_refused(
    tmp_path: Path, make_dataset: Make
) -> None:
    folder = make_dataset(tmp_path / "set")
    shutil.rmtree(folder / "val" / "bee")
    data = open_dataset(str(folder))
    assert data.val.classes == ["ant", "bee", "cat"]
    assert np.bincount(data.val.labels).tolist() == [4, 0, 4]
    assert data.notes == ("val: classes without a folder: 1 of 3 (bee)",)
    (folder / "val" / "Cat").mkdir()
    with pytest.raises(
        UserError, match=r"val: has classes .*: Cat; 'Cat' and 'cat' differ in upper and lower case"
    ):
        open_dataset(str(folder))


def test_accents_in_two_forms_are_explained(tmp_path: Path, make_classes: Make) -> None:
    composed, decomposed = (unicodedata.normalize(form, "abeille dorée") for form in ("NFC", "NFD"))
    make_classes(tmp_path / "set" / "train", {"ant": 1, composed: 1})
    make_classes(tmp_path / "set" / "val", {"ant": 1, decomposed: 1})
    with pytest.raises(UserError, match=r"another Unicode form \(NFC and NFD"):
        open_dataset(str(tmp_path / "set"))
    make_classes(tmp_path / "set" / "train", {decomposed: 1})
    with pytest.raises(UserError, match=r"train: has two classes of one name; .* \(NFC and NFD"):
        open_dataset(str(tmp_path / "set"))


def test_images_beside_the_class_folders_are_said(tmp_path: Path, make_dataset: Make) -> None:
    folder = make_dataset(tmp_path / "set")
    shutil.copy(folder / "train" / "ant" / "0.png", folder / "train" / "stray.png")
    assert open_dataset(str(folder)).notes == (
        "train: images beside the class folders, which are not used: 1, such as stray.png",
    )


def test_what_came_beside_the_class_folders_later_is_said(tmp_path: Path, make_dataset: Make) -> None:
    """Though all that is indexed is as it was."""
    folder = make_dataset(tmp_path / "set")
    first = open_dataset(str(folder))
    assert first.notes == ()
    shutil.copy(folder / "train" / "ant" / "0.png", folder / "train" / "stray.png")
    for _ in range(2):
        again = open_dataset(str(folder))
        assert again.notes == (
            "train: images beside the class folders, which are not used: 1, such as stray.png",
        )
        assert again.fingerprint() == first.fingerprint()
    (folder / "train" / "stray.png").unlink()
    assert open_dataset(str(folder)).notes == ()


def test_val_names_the_validation_images(tmp_path: Path, make_classes: Make) -> None:
    make_splits(make_classes, tmp_path / "set", "train")
    make_classes(tmp_path / "other", {"bee": 3})
    (tmp_path / "val.csv").write_text("path,label\nother/bee/0.png,bee\n")
    for spec in ("set", "set/train"):
        data = open_dataset(str(tmp_path / spec), val=str(tmp_path / "other"))
        assert data.val.labels.tolist() == [1, 1, 1]
        assert open_dataset(str(tmp_path / spec), val=str(tmp_path / "val.csv")).val.labels.tolist() == [1]
    make_splits(make_classes, tmp_path / "set", "val")
    assert len(open_dataset(str(tmp_path / "set"), val=str(tmp_path / "other")).val) == 3


def test_val_that_is_none_is_refused(tmp_path: Path, make_classes: Make) -> None:
    folder = make_splits(make_classes, tmp_path / "set", "train", "val")
    wrong = {
        "set": "--val .*set: has splits of its own; name the one that is meant, such as --val .*set/val",
        "set/train": "set/train: is what is trained on",
        "nowhere": "nowhere: no such folder",
        "nowhere.csv": "nowhere.csv: no such file",
    }
    for spec, message in wrong.items():
        with pytest.raises(UserError, match=message):
            open_dataset(str(folder), val=str(tmp_path / spec))
    with pytest.raises(UserError, match="give one of them"):
        open_dataset(str(folder), val=str(folder / "val"), val_fraction=0.1)
    with pytest.raises(UserError, match="--val x: digits has its own validation set"):
        open_dataset("digits", val="x")


@pytest.mark.parametrize("given", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_imagenet_is_understood(given: str, tmp_path: Path, make_classes: Make) -> None:
    inner = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    make_classes(inner / "train", {"n01440764": 2, "n01443537": 3})
    for split in ("val", "test"):
        (inner / split).mkdir()
    for number in range(3):
        photo(20 + number, 30).save(inner / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
        photo(20, 30).save(inner / "test" / f"ILSVRC2012_test_{number:08d}.JPEG")
    with pytest.raises(UserError, match="val: its images .* lie in no class folders; .*LOC_val_solution.csv"):
        open_dataset(str(tmp_path / "kaggle" / given))
    (tmp_path / "kaggle" / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000001,n01443537 85 1 499 272 \n"
        "ILSVRC2012_val_00000000,n01440764 0 0 9 9 n01440764 2 2 5 5 \n"
        "ILSVRC2012_val_00000002,n01443537 1 2 3 4\n"
    )
    data = open_dataset(str(tmp_path / "kaggle" / given))
    assert (len(data.train), data.train.classes) == (5, ["n01440764", "n01443537"])
    assert data.val.labels.tolist() == [1, 0, 1]
    assert data.val.name(0) == str(inner / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert data.val.widths.tolist() == [21, 20, 22]
    photo(20, 30).save(inner / "val" / "ILSVRC2012_val_00000003.JPEG")  # the list was cut short
    with pytest.raises(
        UserError, match="csv: does not name 1 of the 4 images in .*_00000003.JPEG.; is it whole"
    ):
        open_dataset(str(tmp_path / "kaggle" / given))


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train.csv", "val.csv"),
        ("training.csv", "validation.csv"),
        ("Train.csv", "Test.csv"),
        ("my_train_list.tsv", "my_valid_list.tsv"),
        ("training-training.csv", "training-val.csv"),
    ],
)
def test_lists_beside_each_other(train: str, val: str, tmp_path: Path) -> None:
    photo(20, 30).save(tmp_path / "a.png")
    photo(21, 30).save(tmp_path / "b.png")
    photo(22, 30).save(tmp_path / "c.png")
    comma = "\t" if train.endswith("tsv") else ","
    (tmp_path / train).write_text(f"a.png{comma}x\nb.png{comma}y\n")
    (tmp_path / val).write_text(f"c.png{comma}y\n")
    data = open_dataset(str(tmp_path / train))
    assert data.val.labels.tolist() == [1]
    assert bool(data.notes) == (val not in ("val.csv", "training-val.csv"))
    if train.split(".")[0].lower() in ("train", "training"):
        assert open_dataset(str(tmp_path)).fingerprint() == data.fingerprint()


@pytest.mark.parametrize(
    ("range_", "expected"),
    [
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{0008..0011}", ["0008", "0009", "0010", "0011"]),
        ("{008..11}", ["008", "009", "010", "011"]),
        ("{98..101}", ["98", "99", "100", "101"]),
        ("{0..1}{0..1}", ["00", "01", "10", "11"]),
    ],
)
def test_ranges_count_with_the_width_of_their_first_number(
    range_: str, expected: list[str], tmp_path: Path
) -> None:
    for number in expected:
        (tmp_path / f"train-{number}.tar").touch()
    assert list(named_shards(f"{tmp_path}/train-{range_}.tar").shards) == [
        f"train-{of}.tar" for of in expected
    ]
    (tmp_path / f"train-{expected[-1]}.tar").unlink()
    with pytest.raises(UserError, match=rf"train-{expected[-1]}.tar: no such file"):
        named_shards(f"{tmp_path}/train-{range_}.tar")


def test_advised_paths_are_whole(tmp_path: Path, make_classes: Make) -> None:
    folder = make_splits(make_classes, tmp_path / "my set", "Val")
    with pytest.raises(UserError) as raised:
        open_dataset(str(folder))
    assert f"--data {shlex.quote(str(folder / 'Val'))} --val-fraction 0.1" in str(raised.value)
