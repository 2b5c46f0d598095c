"""Tar shards: the same data set as the folder they were made of, foreign layouts, and a line for all that is amiss."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tars import Member, png, samples, write_tar

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import Images, same_images
from hvd_lb.errors import UserError

Make = Callable[..., Path]


def pack(images: Images, folder: Path, split: str, per_shard: int) -> None:
    """As docs/data.md describes it."""
    for shard, start in enumerate(range(0, len(images), per_shard)):
        members: list[Member] = []
        for i in range(start, min(start + per_shard, len(images))):
            ending = Path(images.name(i)).suffix.lower()
            members.append((f"{i:012d}{ending}", images.read(np.array([i]))[0].tobytes()))
            members.append((f"{i:012d}.cls", b"%d" % images.labels[i]))
        write_tar(folder / f"{split}-{shard:06d}.tar", members, tarfile.USTAR_FORMAT)


def test_a_packed_folder_is_the_folder(tmp_path: Path, make_dataset: Make) -> None:
    folder = open_dataset(str(make_dataset(tmp_path / "set", 11)))
    for split, images in (("train", folder.train), ("val", folder.val)):
        pack(images, tmp_path / "packed", split, 5)
    (tmp_path / "packed" / "classes.json").write_text(json.dumps({"classes": folder.train.classes}))
    packed = open_dataset(str(tmp_path / "packed"))
    again = open_dataset(str(tmp_path / "packed"))
    for data in (packed, again):
        assert same_images(data.fingerprint(), folder.fingerprint())
        assert data.train.classes == folder.train.classes
        for ours, theirs in ((data.train, folder.train), (data.val, folder.val)):
            for name in ("labels", "widths", "heights"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
            order = np.random.default_rng(0).permutation(len(ours))
            for a, b in zip(ours.read(order), theirs.read(order), strict=True):
                np.testing.assert_array_equal(a, b)
    assert packed.train.name(7) == f"{tmp_path}/packed/train-000001.tar: 000000000007.png"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_shards(kind: int, tmp_path: Path) -> None:
    deep = "n" * 90 if kind == tarfile.USTAR_FORMAT else "é" * 60 + "/" + "n" * 200
    members = [
        ("./a/one.JPEG", png(0, 21)), ("./a/one.json", b'{"label": "bee", "url": "x"}'), ("./a/one.txt", b"text"),
        (f"{deep}.png", png(1, 22)), (f"{deep}.cls", b"ant\n"), (f"{deep}.seg.png", b"no image of a sample"),
        ("b.cls", b"bee"), ("b.json", b"[]"), ("b.webp", png(2, 23)),
        (".hidden.png", b""), ("README", b"text"), ("a/._one.JPEG", b"of macOS"),
    ]  # fmt: skip
    write_tar(tmp_path / "imagenet1k-train-0000.tar", members, kind)
    write_tar(tmp_path / "imagenet1k-validation-00.tar", samples(["x"], b"bee"), kind)
    for spec in (
        tmp_path,
        tmp_path / "imagenet1k-train-{0000..0000}.tar",
        tmp_path / "imagenet1k-train-*.tar",
    ):
        data = open_dataset(str(spec))
        assert data.train.classes == ["ant", "bee"]
        assert data.train.widths.tolist() == [21, 22, 23]
        assert data.train.labels.tolist() == [1, 0, 1]
        assert data.train.read(np.array([1]))[0].tobytes() == png(1, 22)
        assert data.val.labels.tolist() == [1]


def test_shards_that_webdataset_wrote(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="needs pip install webdataset")
    for split, count in (("train", 30), ("val", 5)):
        with webdataset.ShardWriter(str(tmp_path / f"{split}-%06d.tar"), maxcount=8, verbose=0) as writer:
            for i in range(count):
                sample = {
                    "__key__": f"a.b/sample{i:04d}",
                    "png": png(i, 20 + i),
                    "json": {"label": i % 3},
                    "txt": "x",
                }
                writer.write(sample)
    data = open_dataset(str(tmp_path))
    assert data.train.classes == ["0", "1", "2"]
    assert data.train.labels.tolist() == [i % 3 for i in range(30)]
    assert data.train.widths.tolist() == list(range(20, 50))
    assert data.train.read(np.array([29]))[0].tobytes() == png(29, 49)
    assert len(data.val) == 5


def test_numbers_without_a_list_of_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [*samples("ab", b"0"), *samples("cd", b"2"), *samples("e", b"001")])
    write_tar(tmp_path / "val-0.tar", samples("a", b"2"))
    data = open_dataset(str(tmp_path))
    assert data.train.classes == ["0", "1", "2"]
    assert data.train.labels.tolist() == [0, 0, 2, 2, 1]


def test_labels_are_positions_in_the_list_of_classes(tmp_path: Path) -> None:
    """Names of classes that are numbers, as digits sorted by name have."""
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["0", "1", "10", "2"]}))
    write_tar(
        tmp_path / "train-0.tar", [of for label in b"0123" for of in samples(chr(label), bytes([label]))]
    )
    write_tar(tmp_path / "val-0.tar", samples("a", b"2"))
    data = open_dataset(str(tmp_path))
    assert data.train.labels.tolist() == [0, 1, 2, 3]
    assert data.val.classes[data.val.labels[0]] == "10"


def test_a_range_takes_its_shards_in_order_and_shards_can_be_divided(tmp_path: Path) -> None:
    for shard in range(12):
        write_tar(tmp_path / f"part-{shard}.tar", samples([f"{shard}{key}" for key in "abcd"], b"x"))
    data = open_dataset(str(tmp_path / "part-{2..11}.tar"), val_fraction=0.3)
    train, val = ([of.name(i) for i in range(len(of))] for of in (data.train, data.val))
    shards = [int(name.split("part-")[1].split(".")[0]) for name in train]
    assert shards == sorted(shards)
    assert len({*train, *val}) == 40
    assert 4 <= len(val) <= 20
    with pytest.raises(UserError, match="no validation shards beside it"):
        open_dataset(str(tmp_path / "part-{2..11}.tar"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    for split, count in (("train", 4), ("val", 1)):
        for shard in range(count):
            write_tar(folder / f"{split}-{shard:06d}.tar", samples([f"{shard}{key}" for key in "abc"], b"x"))
    return folder


def third(folder: Path) -> Path:
    return folder / "train-000002.tar"


def cut_in_an_image(folder: Path) -> None:
    os.truncate(third(folder), 700)


def cut_between_members(folder: Path) -> None:
    with tarfile.open(third(folder)) as archive:
        last = archive.getmembers()[-1]
    os.truncate(third(folder), last.offset)


def no_tar(folder: Path) -> None:
    third(folder).write_bytes(b"no tar at all" * 100)


def empty_file(folder: Path) -> None:
    third(folder).write_bytes(b"")


def damaged_header(folder: Path) -> None:
    with tarfile.open(third(folder)) as archive:
        at = archive.getmembers()[2].offset
    content = bytearray(third(folder).read_bytes())
    content[at + 5] ^= 0xFF
    third(folder).write_bytes(content)


def compressed(folder: Path) -> None:
    third(folder).write_bytes(gzip.compress(third(folder).read_bytes()))


def missing_shard(folder: Path) -> None:
    third(folder).unlink()


def no_label(folder: Path) -> None:
    write_tar(third(folder), [*samples("a", b"x"), ("d/b.png", png()), ("d/b.txt", b"")])


def no_image(folder: Path) -> None:
    write_tar(third(folder), [*samples("a", b"x"), ("d/b.cls", b"x")])


def twice(folder: Path) -> None:
    write_tar(third(folder), [*samples("a", b"x"), *samples("a", b"x")])


def two_labels(folder: Path) -> None:
    write_tar(third(folder), [*samples("a", b"x"), ("a.cls", b"x")])


def two_kinds(folder: Path) -> None:
    write_tar(third(folder), [*samples("a", b"x"), ("a.jpg", png())])


def empty_label(folder: Path) -> None:
    write_tar(third(folder), samples("a", b" \n"))


def no_json(folder: Path) -> None:
    write_tar(third(folder), [("a.png", png()), ("a.json", b"{")])


def json_without_label(folder: Path) -> None:
    write_tar(third(folder), [("a.png", png()), ("a.json", b'{"label": [1]}')])


def gif(folder: Path) -> None:
    write_tar(third(folder), [("a.gif", b"GIF89a"), ("a.cls", b"x")])


def link(folder: Path) -> None:
    with tarfile.open(third(folder), "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.LNKTYPE, "b.png"
        archive.addfile(info)


def broken_image(folder: Path) -> None:
    write_tar(third(folder), [*samples("a", b"x"), ("b.png", b"no image"), ("b.cls", b"x")])


def unknown_class(folder: Path) -> None:
    (folder / "classes.txt").write_text("x\n")
    write_tar(third(folder), [*samples("a", b"x"), *samples("b", b"y")])


def manifest_size(folder: Path) -> None:
    known = {third(folder).name: {"sha256": "", "bytes": 5, "images": 3}}
    (folder / "manifest.json").write_text(json.dumps({"shards": known}))


def manifest_missing(folder: Path) -> None:
    known = {"train-000004.tar": {"sha256": "", "bytes": 5, "images": 3}}
    (folder / "manifest.json").write_text(json.dumps({"shards": known}))


MISTAKES = {
    cut_in_an_image: "train-000002.tar: no whole tar file .*; copy it again",
    cut_between_members: "train-000002.tar: ends without the mark of its end",
    no_tar: "train-000002.tar: no whole tar file",
    empty_file: "train-000002.tar: no whole tar file .empty file",
    damaged_header: "train-000002.tar: has no tar header at byte",
    compressed: "train-000002.tar: is compressed .gzip.*decompress it",
    missing_shard: "set: has no train-000002.tar; copy it",
    no_label: "train-000002.tar: 'd/b' has no label; expected d/b.cls or d/b.json",
    no_image: "train-000002.tar: 'd/b' has a label, but no image",
    twice: "train-000002.tar: 'a' has two images",
    two_labels: "train-000002.tar: 'a.cls' is there twice",
    two_kinds: "train-000002.tar: 'a' has two images, 'a.png' and 'a.jpg'",
    empty_label: "train-000002.tar: 'a.cls' is no label",
    no_json: "train-000002.tar: 'a.json' is no JSON object",
    json_without_label: "train-000002.tar: 'a.json' has no label",
    gif: "train-000002.tar: 'a.gif': GIF is not read",
    link: "train-000002.tar: 'a.png' is a link: pack what it points to",
    broken_image: "train-000002.tar: b.png: cannot be decoded .no known image format",
    unknown_class: "train-000002.tar: b.png: label 'y' is no class",
    manifest_size: r"train-000002.tar: has \d+ bytes, but 5 in manifest.json",
    manifest_missing: "set: has no train-000004.tar; copy it",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_name_shard_and_key_in_one_line(mistake: Callable[[Path], None], shards: Path) -> None:
    mistake(shards)
    with pytest.raises(UserError, match=MISTAKES[mistake]) as raised:
        open_dataset(str(shards))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("train-{000000..000009}.tar", "train-000004.tar: no such file and 5 more"),
        ("train-{3..1}.tar", "expected an increasing range"),
        ("other-*.tar", r"other-\*.tar: no such file"),
        ("train-000000.tar.gz", "compressed shards have no offsets"),
        ("classes.json", "expected a folder of images, a list .* or shards"),
    ],
)
def test_names_that_are_none(spec: str, said: str, shards: Path) -> None:
    (shards / "classes.json").write_text("{}")
    with pytest.raises(UserError, match=said):
        open_dataset(str(shards / spec))


@pytest.mark.parametrize("content", ["{}", "[]", '{"classes": ["x", "x"]}', '{"classes": [1]}', "{"])
def test_a_list_of_classes_that_is_none(content: str, shards: Path) -> None:
    (shards / "classes.json").write_text(content)
    with pytest.raises(UserError, match="classes.json: no list of classes"):
        open_dataset(str(shards))


def test_a_shard_that_was_cut_while_in_use_is_named(shards: Path) -> None:
    data = open_dataset(str(shards))
    os.truncate(third(shards), 600)
    with pytest.raises(UserError, match=r"train-000002.tar: 2a.png: has 88 bytes now, but had"):
        data.train.read(np.array([6]))


def test_a_shard_that_changed_is_scanned_again(shards: Path) -> None:
    assert len(open_dataset(str(shards)).train) == 12
    write_tar(third(shards), samples("ab", b"x"))
    data = open_dataset(str(shards))
    assert len(data.train) == 11
    shutil.copy(shards / "val-000000.tar", shards / "train-000004.tar")
    assert len(open_dataset(str(shards)).train) == 14
