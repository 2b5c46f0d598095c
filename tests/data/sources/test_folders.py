"""A folder of one's own: order, splits, and one clear line for everything that can be wrong with it."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.files.rows import ROW, Table
from hvd_lb.data.index.hold_out import divide, hold_out
from hvd_lb.data.index.index import Index
from hvd_lb.data.index.store import facts_of
from hvd_lb.errors import UserError

Make = Callable[..., Path]


def make_index(names: list[str]) -> Index:
    """An index of "class/file" names without files."""
    names = sorted(names)
    classes = sorted({name.split("/")[0] for name in names})
    labels = np.array([classes.index(name.split("/")[0]) for name in names], np.int64)
    encoded = [name.encode() for name in names]
    rows = np.ones(len(names), ROW)
    rows["label"], rows["shard"] = labels, -1
    rows["name_bytes"] = [len(name) for name in encoded]
    rows["name_at"] = np.cumsum(rows["name_bytes"], dtype=np.int64) - rows["name_bytes"]
    table = Table(classes, rows, np.frombuffer(b"".join(encoded), np.uint8), [], None)
    return Index(Path("x"), facts_of(table), rows, table.names)


def test_order_and_labels_are_those_of_imagefolder(
    tmp_path: Path, make_dataset: Make, make_classes: Make
) -> None:
    folder = make_dataset(tmp_path / "set", 12)
    for nested in ("a-b", "a", "a/deeper"):
        make_classes(folder / "train" / "bee" / nested, {"z": 2})
    (folder / "train" / "README.txt").write_text("beside the classes: ignored")
    (folder / "train" / "ant" / ".DS_Store").write_text("hidden: ignored")
    (folder / "train" / ".cache").mkdir()
    data = open_dataset(str(folder))
    (folder / "train" / ".cache").rmdir()  # to ImageFolder it would be a class without images
    for images, split in ((data.train, "train"), (data.val, "val")):
        reference = ImageFolder(str(folder / split))
        assert images.classes == reference.classes
        assert [images.name(i) for i in range(len(images))] == [path for path, _ in reference.samples]
        assert images.labels.tolist() == reference.targets
        sizes = [image.size for image, _ in reference]
        assert list(zip(images.widths.tolist(), images.heights.tolist(), strict=True)) == sizes
        assert images.read(np.array([1]))[0].tobytes() == Path(images.name(1)).read_bytes()


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path: Path, make_dataset: Make) -> None:
    first = open_dataset(str(make_dataset(tmp_path / "here"))).fingerprint()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert open_dataset(str(tmp_path / "there")).fingerprint() == first


@pytest.mark.parametrize("inside", [".", "train"])
def test_val_fraction_divides_one_folder(inside: str, tmp_path: Path, make_classes: Make) -> None:
    make_classes(tmp_path / "set" / inside, {"ant": 20, "bee": 2, "cat": 1})
    data = open_dataset(str(tmp_path / "set"), val_fraction=0.3)
    train, val = ([images.name(i) for i in range(len(images))] for images in (data.train, data.val))
    assert len(train) + len(val) == len({*train, *val}) == 23
    assert np.bincount(data.val.labels, minlength=3)[1:].tolist() == [1, 0]
    assert data.val.classes == data.train.classes == ["ant", "bee", "cat"]
    assert data.val.read(np.array([0]))[0].tobytes() == Path(val[0]).read_bytes()
    assert [Path(name).parent.name for name in val] == [data.val.classes[label] for label in data.val.labels]


@pytest.mark.slow
@given(st.integers(0, 2**31), st.sets(st.text("abc", min_size=1, max_size=6), min_size=30), st.data())
def test_a_file_added_moves_no_other(seed: int, names: set[str], data: st.DataObject) -> None:
    files = [f"class/{name}.png" for name in names]
    added = data.draw(st.sampled_from(files))
    sets = []
    for listed in (files, [file for file in files if file != added]):
        index = make_index(listed)
        held_out = hold_out(index, 0.5, seed)
        sets.append({index.relative(i) for i in np.flatnonzero(held_out)})
    assert sets[0] - sets[1] <= {added.encode()}
    assert sets[1] <= sets[0]


def test_the_split_is_what_it_was_in_the_first_version() -> None:
    index = make_index([f"{label}/{i}.png" for label in "ab" for i in range(40_000)])
    key = (7).to_bytes(8, "little", signed=True)
    digests = [hashlib.blake2b(index.relative(i), digest_size=8, key=key).digest() for i in range(80_000)]
    expected = [int.from_bytes(digest, "little") < 0.25 * 2**64 for digest in digests]
    assert hold_out(index, 0.25, 7).tolist() == expected


def test_the_held_out_share_is_the_fraction_and_follows_the_seed() -> None:
    index = make_index([f"{label}/{i}.png" for label in "abcd" for i in range(2500)])
    for fraction in (0.01, 0.1, 0.5, 0.9):
        assert hold_out(index, fraction, 0).mean() == pytest.approx(
            fraction, abs=4 * (fraction / 10_000) ** 0.5
        )
    assert (hold_out(index, 0.5, 0) == hold_out(index, 0.5, 0)).all()
    assert (hold_out(index, 0.5, 0) != hold_out(index, 0.5, 1)).any()


def test_what_is_moved_over_for_a_class_is_what_comes_next_by_its_hash() -> None:
    """Of a class with all or none held out the one nearest to the limit: so it is also the one that a slightly other
    fraction would move.
    """
    index = make_index([f"{label}/{i}.png" for label in "abcdefgh" for i in range(3)])
    key = (3).to_bytes(8, "little", signed=True)
    digests = [hashlib.blake2b(index.relative(i), digest_size=8, key=key).digest() for i in range(24)]
    share = np.array([int.from_bytes(digest, "little") / 2**64 for digest in digests]).reshape(8, 3)
    for fraction in (1e-9, 0.2, 0.5, 0.8, 1 - 1e-9):
        expected = share < fraction
        for of, chosen in zip(share, expected, strict=True):
            if chosen.all():
                chosen[of.argmax()] = False
            elif not chosen.any():
                chosen[of.argmin()] = True
        assert hold_out(index, fraction, 3).reshape(8, 3).tolist() == expected.tolist()


def test_a_kept_division_is_that_of_the_index_the_fraction_and_the_seed(tmp_path: Path) -> None:
    """Several may lie in one folder, as where an index was made anew whose stamp is that of the former."""
    names = [f"{label}/{i}.png" for label in "ab" for i in range(50)]
    indexes = [
        replace(make_index([*names, more]), identity="same", keep=(tmp_path,)) for more in ("a/x", "b/x")
    ]
    for _ in range(2):
        for index, fraction, seed in itertools.product(indexes, (0.25, 0.5), (0, 1)):
            parts, held_out = divide(index, fraction, seed), hold_out(index, fraction, seed)
            for part, chosen in ((parts.train, ~held_out), (parts.val, held_out)):
                assert np.array_equal(part.rows, index.rows[chosen])
                assert part.facts.counts == np.bincount(index.labels[chosen]).tolist()
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_a_fraction_that_is_none_is_refused(fraction: float, tmp_path: Path, make_classes: Make) -> None:
    make_classes(tmp_path / "set", {"ant": 2})
    with pytest.raises(UserError, match="expected a number between 0 and 1"):
        open_dataset(str(tmp_path / "set"), val_fraction=fraction)


def break_missing(folder: Path) -> None:
    shutil.rmtree(folder)


def break_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def break_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def break_no_val(folder: Path) -> None:
    shutil.rmtree(folder / "val")


def break_no_train(folder: Path) -> None:
    shutil.rmtree(folder / "train")


def break_classes(folder: Path) -> None:
    shutil.rmtree(folder / "val" / "bee")
    for i in range(5):
        (folder / "val" / f"extra{i}").mkdir()


def break_text(folder: Path) -> None:
    for name in ("notes.txt", "list.csv"):
        (folder / "train" / "bee" / name).write_text("no image")


def break_content(folder: Path) -> None:
    (folder / "train" / "bee" / "1.JPEG").write_text("no image")
    (folder / "train" / "cat" / "0.png").write_bytes(b"")


def break_no_images(folder: Path) -> None:
    for file in (folder / "val").glob("*/*"):
        file.unlink()


def break_empty_class(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "dog").mkdir()


def break_link(folder: Path) -> None:
    (folder / "train" / "ant" / "gone.png").symlink_to(folder / "nowhere.png")


MISTAKES = {
    break_missing: "set: no such folder",
    break_file: "set: expected a folder of images, a list .* not a file of another kind",
    break_empty: "set: is empty; expected train/ and val/",
    break_no_val: "set: has no val/; .*--val-fraction",
    break_no_train: "set: has val/, but no train/; expected both.* --data .*set/val --val-fraction 0.1",
    break_classes: "val: has classes that are not among the 3 of the .*'ant': extra0, extra1, extra2 and 2 more",
    break_text: r"train/bee/list.csv and 1 more: no image file \(.jpg",
    break_content: r"train/bee/1.JPEG: cannot be decoded .*; repair or remove it, .* \(2 such files in",
    break_no_images: "val: holds no images",
    break_empty_class: "no images to train on in dog",
    break_link: "train/ant/gone.png: cannot be read",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_are_named_in_one_line(
    mistake: Callable[[Path], None], tmp_path: Path, make_dataset: Make
) -> None:
    folder = make_dataset(tmp_path / "set")
    mistake(folder)
    with pytest.raises(UserError, match=MISTAKES[mistake]) as raised:
        open_dataset(str(folder))
    assert "\n" not in str(raised.value)


def test_val_fraction_beside_a_val_folder_is_refused(tmp_path: Path, make_dataset: Make) -> None:
    with pytest.raises(UserError, match="set has a val of its own"):
        open_dataset(str(make_dataset(tmp_path / "set")), val_fraction=0.1)


def test_nothing_to_hold_out_is_an_error(tmp_path: Path, make_classes: Make) -> None:
    make_classes(tmp_path / "set", {"ant": 1, "bee": 1})
    with pytest.raises(UserError, match="no class has two images"):
        open_dataset(str(tmp_path / "set"), val_fraction=0.5)


def test_a_file_that_vanished_is_named_when_read(tmp_path: Path, make_dataset: Make) -> None:
    data = open_dataset(str(make_dataset(tmp_path / "set")))
    os.unlink(data.train.name(0))
    with pytest.raises(UserError, match="train/ant/0.png: cannot be read"):
        data.train.read(np.array([0]))
