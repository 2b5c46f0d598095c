"""Tar shards: the same data set as the folder they were made of, foreign layouts, and a line for all that is amiss."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tars import Member, png, samples, write_tar

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import Images, same_images
from hvd_lb.data.sources.shards import named_shards
from hvd_lb.data.spec import absolute_spec
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
        tmp_path / "imagenet1k-train-[0-9]*.tar",
    ):
        data = open_dataset(str(spec))
        assert data.train.classes == ["ant", "bee"]
        assert data.train.widths.tolist() == [21, 22, 23]
        assert data.train.labels.tolist() == [1, 0, 1]
        assert data.train.read(np.array([1]))[0].tobytes() == png(1, 22)
        assert data.val.labels.tolist() == [1]


def test_shards_of_several_names_in_a_folder_are_not_taken_for_one_data_set(tmp_path: Path) -> None:
    for name in ("few-train-0", "few-val-0", "many-train-0", "many-train-1", "many-val-0"):
        write_tar(tmp_path / f"{name}.tar", [*samples([f"{name}-0"], b"0"), *samples([f"{name}-1"], b"1")])
    with pytest.raises(
        UserError, match=r"has both few-train-0.tar and many-train-0.tar, .* such as '.*/few-train-\*.tar'"
    ):
        open_dataset(str(tmp_path))
    data = open_dataset(f"{tmp_path}/many-train-*.tar")
    assert (len(data.train), len(data.val)) == (4, 2)
    both = open_dataset(f"{tmp_path}/{{few,many}}-train-*.tar", val=f"{tmp_path}/*-val-0.tar")
    assert (len(both.train), len(both.val)) == (6, 4)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("train-{1,3}.tar", ["train-1.tar", "train-3.tar"]),
        ("{train,train}-[12].tar", ["train-1.tar", "train-2.tar"]),
        ("train-[!1].tar", ["train-2.tar", "train-3.tar"]),
        ("[train]-1.tar", ["[train]-1.tar"]),
        ("train-{3,4}.tar", None),
        ("tra{i}n-1.tar", None),
    ],
)
def test_shards_are_named_as_in_a_shell(tmp_path: Path, pattern: str, named: list[str] | None) -> None:
    for name in ("train-1", "train-2", "train-3", "[train]-1"):
        write_tar(tmp_path / f"{name}.tar", samples("x", b"0"))
    if named is None:
        with pytest.raises(UserError, match="no such file"):
            named_shards(str(tmp_path / pattern))
    else:
        assert list(named_shards(str(tmp_path / pattern)).shards) == named


def test_a_shard_is_not_both_trained_on_and_validated_with(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"x-{number}.tar", samples([str(number)], b"0"))
    with pytest.raises(UserError, match="x-1.tar: is named for training and for validation"):
        open_dataset(str(tmp_path / "x-{0..1}.tar"), val=str(tmp_path / "x-{1..2}.tar"))


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


def test_images_come_in_the_order_in_which_they_lie_in_a_shard(tmp_path: Path) -> None:
    """And true is no number, as JSON has it."""
    members = [
        ("b.cls", b"1"),
        ("a.png", png(0)),
        ("b.png", png(1)),
        ("a.json", b'{"label": true, "cls": 0}'),
    ]
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "val-0.tar", [*samples("c", b"0"), *samples("d", b"1")])
    train = open_dataset(str(tmp_path)).train
    assert [train.name(number).partition(": ")[2] for number in range(2)] == ["a.png", "b.png"]
    assert train.labels.tolist() == [0, 1]


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


def two_images_in_joined_files(folder: Path) -> None:
    other = write_tar(folder.parent / "other.tar", samples("bc", b"x"))
    write_tar(third(folder), samples("ab", b"x"))
    third(folder).write_bytes(third(folder).read_bytes() + other.read_bytes())


def garbage_after_the_end(folder: Path) -> None:
    third(folder).write_bytes(third(folder).read_bytes() + b"more" * 300)


def zeros_instead_of_the_end(folder: Path) -> None:
    content = third(folder).read_bytes()[:3000]
    third(folder).write_bytes(content[:1536] + bytes(2_000_000))


def dots_and_both_readings(folder: Path) -> None:
    write_tar(third(folder), [*samples(["photo", "photo.2019"], b"x")])


def dots_and_no_label(folder: Path) -> None:
    write_tar(third(folder), [*samples("a", b"x"), ("photo.2019.png", png())])


def dots_after_a_name_without_a_label(folder: Path) -> None:
    write_tar(third(folder), [("photo.png", png()), *samples(["photo.2019"], b"x")])


def dots_in_the_ending_of_an_image(folder: Path) -> None:
    write_tar(third(folder), [*samples("a", b"x"), ("b.input.png", png()), ("b.cls", b"x")])


def long_name(folder: Path) -> None:
    write_tar(third(folder), samples(["n" * 70_000], b"x"))


def numbers_in_two_files_disagree(folder: Path) -> None:
    write_tar(third(folder), [*samples("a", b"3"), ("a.json", b'{"label": 4.0}')])


def two_files_disagree(folder: Path) -> None:
    write_tar(third(folder), [*samples("a", b"3"), ("a.json", b'{"label": 4}')])


def names_in_two_files_disagree(folder: Path) -> None:
    write_tar(third(folder), [*samples("a", b"ant"), ("a.json", b'{"cls": "bee"}')])


def one_json_disagrees_with_itself(folder: Path) -> None:
    write_tar(third(folder), [("a.png", png()), ("a.json", b'{"cls": 1, "label": 2}')])


def one_json_has_two_labels(folder: Path) -> None:
    write_tar(third(folder), [("a.png", png()), ("a.json", b'{"cls": 1, "size": 3, "cls": 2}')])


def heic(folder: Path) -> None:
    write_tar(third(folder), [("a.HEIC", b"ftyp"), ("a.cls", b"x")])


def other_member(kind: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with tarfile.open(third(folder), "w") as archive:
            for name, content in samples("b", b"x"):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            info = tarfile.TarInfo("a.png")
            info.type, info.linkname = kind, "b.png"
            archive.addfile(info)

    return write


symbolic_link = other_member(tarfile.SYMTYPE)
device = other_member(tarfile.CHRTYPE)
pipe_inside = other_member(tarfile.FIFOTYPE)


def pipe_for_a_shard(folder: Path) -> None:
    third(folder).unlink()
    os.mkfifo(third(folder))


def socket_for_a_shard(folder: Path) -> None:
    third(folder).unlink()
    here = os.getcwd()
    os.chdir(folder)  # its path may be too long for a socket's name
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(third(folder).name)
    finally:
        os.chdir(here)


def empty_label(folder: Path) -> None:
    write_tar(third(folder), samples("a", b" \n"))


def several_labels(folder: Path) -> None:
    write_tar(third(folder), samples("a", b"1\n2\n"))


def binary_label(folder: Path) -> None:
    write_tar(third(folder), samples("a", np.int64(1).tobytes()))


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
    two_images_in_joined_files: "train-000002.tar: 'b' has two images, 'b.png' and 'b.png'",
    garbage_after_the_end: r"train-000002.tar: has no tar header at byte \d+",
    zeros_instead_of_the_end: r"train-000002.tar: has nothing but zeros from byte \d+ on, .*copy it again",
    dots_and_both_readings: "train-000002.tar: 'photo.2019' has an image and a label, but would belong to 'photo'",
    dots_and_no_label: "train-000002.tar: 'photo.2019' has no label; expected photo.2019.cls",
    dots_after_a_name_without_a_label: "train-000002.tar: 'photo' has no label",
    dots_in_the_ending_of_an_image: "train-000002.tar: 'b' has a label, but no image",
    long_name: "'nnn.* has a name of 70004 bytes; rename it",
    numbers_in_two_files_disagree: "'a.cls' says '3', but `label` in 'a.json' says '4.0'; leave one of them out",
    two_files_disagree: "train-000002.tar: 'a.cls' says '3', but `label` in 'a.json' says '4'; leave one",
    names_in_two_files_disagree: "'a.cls' says 'ant', but `cls` in 'a.json' says 'bee'",
    one_json_disagrees_with_itself: "`label` in 'a.json' says '2', but `cls` in 'a.json' says '1'",
    one_json_has_two_labels: "train-000002.tar: 'a.json' is no JSON object .'cls' is there twice",
    heic: "train-000002.tar: 'a.HEIC': HEIC is not read: convert it to JPEG, PNG or AVIF",
    symbolic_link: "train-000002.tar: 'a.png' is a link: pack what it points to",
    device: "train-000002.tar: 'a.png' is no file, but a pipe or a device",
    pipe_inside: "train-000002.tar: 'a.png' is no file, but a pipe or a device",
    pipe_for_a_shard: "train-000002.tar: is no file, but a pipe",
    socket_for_a_shard: "train-000002.tar: is no file, but a pipe",
    empty_label: "train-000002.tar: 'a.cls' is no label",
    several_labels: "train-000002.tar: 'a.cls' is no label",
    binary_label: "train-000002.tar: 'a.cls' is no label",
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
    assert "no whole tar file" not in str(raised.value) or "no whole" in MISTAKES[mistake]


def names_of(images: Images) -> list[str]:
    return [images.name(number).rpartition(": ")[2] for number in range(len(images))]


def test_names_with_dots(tmp_path: Path) -> None:
    """By the first dot where that makes a sample, as WebDataset reads them, else by the last."""
    members = [
        *samples(["a", "photo.2019", "photo.2020", "x.y.z", "v1.0/b"], b"1"),
        ("c.seg.png", png(9)), ("c.png", png(2, 30)), ("c.cls", b"0"), ("c.seg.txt", b"text"), ("c.2.gif", b"GIF89a"),
        ("x.y.z.seg.png", png(9)), ("x.y.z.meta.json", b"{}"), ("c.1.jpg", b""), ("c.1.png", b""),
    ]  # fmt: skip
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "val-0.tar", samples("a", b"1"))
    train = open_dataset(str(tmp_path)).train
    assert names_of(train) == [
        "a.png", "photo.2019.png", "photo.2020.png", "x.y.z.png", "v1.0/b.png", "c.png"
    ]  # fmt: skip
    assert train.labels.tolist() == [1, 1, 1, 1, 1, 0]
    assert train.widths.tolist() == [20, 21, 22, 23, 24, 30]


@pytest.mark.parametrize("zeros", [0, 512, 200_000])
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_joined_tar_files_are_read_whole(zeros: int, kind: int, tmp_path: Path) -> None:
    parts = [
        write_tar(tmp_path / f"parts/{part}.tar", samples([f"{part}{'n' * 90}", f"{part}2"], b"x"), kind)
        for part in range(3)
    ]
    write_tar(tmp_path / "parts/none.tar", [], kind)
    parts.insert(1, tmp_path / "parts/none.tar")
    folder = tmp_path / "set"
    write_tar(folder / "val-0.tar", samples("a", b"x"))
    (folder / "train-0.tar").write_bytes(bytes(zeros).join(part.read_bytes() for part in parts))
    train = open_dataset(str(folder)).train
    assert names_of(train) == [f"{part}{name}.png" for part in range(3) for name in ("n" * 90, "2")]
    contents = train.read(np.arange(6))
    assert [content.tobytes() for content in contents] == [png(0, 20), png(1, 21)] * 3


@pytest.mark.parametrize(
    ("cls", "values", "label"),
    [
        (b"2", {"label": 2, "cls": "002"}, 2),
        (None, {"label": 1, "cls": "ant"}, 1),
        (None, {"cls": 2, "label": None}, 2),
        (None, {"cls": 1, "url": "x"}, 1),
        (None, {"url": "x" * 9000, "cls": 1}, 1),
        (b"2", {"label": "ant"}, 2),
        (b"2", [], 2),
        (None, {"label": 2.0}, 2),
        (b"\xef\xbb\xbf2", {"label": 2.0, "cls": "2."}, 2),
        (b"2", {}, 2),
    ],
)
def test_which_label_counts(cls: bytes | None, values: object, label: int, tmp_path: Path) -> None:
    """KEY.cls, then `label`, then `cls`; two numbers, or two names, have to be the same."""
    own = [("z.cls", cls)] if cls else []
    members = [("z.png", png()), *own, ("z.json", json.dumps(values).encode())]
    write_tar(
        tmp_path / "train-0.tar", [*samples("a", b"0"), *samples("b", b"1"), *samples("c", b"2"), *members]
    )
    write_tar(tmp_path / "val-0.tar", samples("a", b"1"))
    train = open_dataset(str(tmp_path)).train
    assert train.classes == ["0", "1", "2"]
    assert train.labels.tolist() == [0, 1, 2, label]


def test_shards_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for shard in random.Random(0).sample(range(8, 12), 4):
        write_tar(tmp_path / f"train-{shard}.tar", samples([f"of-{shard}"], b"0"))
        write_tar(tmp_path / f"val-{shard}.tar", samples([f"of-{shard}"], b"0"))
    for spec in (
        tmp_path,
        *(tmp_path / f"train-{pattern}.tar" for pattern in ("{8..11}", "*", "{8..9}*", "?*")),
    ):
        data = open_dataset(str(spec))
        assert names_of(data.train) == [
            f"of-{n}.png" for n in ((8, 9) if "9" in spec.name else (8, 9, 10, 11))
        ]
        assert names_of(data.val) == [f"of-{n}.png" for n in (8, 9, 10, 11)]
    assert len(named_shards(str(tmp_path / "train-*{0..1}*.tar")).shards) == 2  # 10 and 11, each once


@pytest.mark.parametrize(
    ("range_", "names"),
    [
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..011}", ["008", "009", "010", "011"]),
        ("{0..10..}", None),
        ("{0..2}", ["0", "1", "2"]),
        ("{0..10}", [str(number) for number in range(11)]),
        ("{00..10}", [f"{number:02}" for number in range(11)]),
        ("{000..002}", ["000", "001", "002"]),
        ("{9..9}", ["9"]),
        ("{1..2}-{09..10}", ["1-09", "1-10", "2-09", "2-10"]),
    ],
)
def test_ranges_are_those_of_a_shell(range_: str, names: list[str] | None, tmp_path: Path) -> None:
    for name in names or ["0"]:
        write_tar(tmp_path / f"train-{name}.tar", samples([f"of-{name}"], b"0"))
    write_tar(tmp_path / "val-0.tar", samples("a", b"0"))
    if names is None:
        with pytest.raises(UserError, match="no such file"):
            named_shards(str(tmp_path / f"train-{range_}.tar"))
    else:
        assert named_shards(str(tmp_path / f"train-{range_}.tar")).shards == tuple(
            f"train-{name}.tar" for name in names
        )


def test_a_shard_without_a_member_is_one_without_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples("ab", b"0"))
    write_tar(tmp_path / "train-1.tar", [])
    write_tar(tmp_path / "train-2.tar", samples("c", b"0"))
    write_tar(tmp_path / "val-0.tar", samples("a", b"0"))
    assert names_of(open_dataset(str(tmp_path)).train) == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    "address",
    [
        "hf://datasets/x",
        "ftp://host/train-0.tar",
        "pipe:aws s3 cp s3://b/x.tar -",
    ],
)
def test_addresses_of_other_kinds_are_not_read(address: str) -> None:
    for read in (open_dataset, absolute_spec):
        with pytest.raises(UserError, match="is no address that is read .*copy it") as raised:
            read(address)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="give /data/x"):
        open_dataset("file:///data/x")


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".tar.zst", ".tar.xz"])
def test_a_folder_of_compressed_shards(ending: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}-0000{ending}").write_bytes(b"x")
    for spec in (tmp_path, tmp_path / f"train-0000{ending}", tmp_path / f"train-{{0000..0003}}{ending}"):
        with pytest.raises(
            UserError, match=f"train-.*{ending}: compressed shards have no offsets .*decompress"
        ):
            open_dataset(str(spec))


def test_a_compressed_shard_among_others_is_not_left_out(shards: Path) -> None:
    (shards / "train-000004.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="train-000004.tar.gz: compressed shards have no offsets"):
        open_dataset(str(shards))
    (shards / "train-000004.tar.gz").rename(shards / "train-000000.tar.gz")  # the download that was unpacked
    open_dataset(str(shards))


@pytest.mark.parametrize(
    ("train", "val"),
    [("Train", "VAL"), ("train", "valid"), ("training", "validation"), ("a-train", "a-valid")],
)
def test_splits_of_shards_by_their_usual_names(train: str, val: str, tmp_path: Path) -> None:
    for split in (train, val):
        write_tar(tmp_path / f"{split}-0.tar", samples("a", b"x"))
    write_tar(tmp_path / "test-0.tar", [("a.png", png())])  # which has no labels
    for spec in (tmp_path, tmp_path / f"{train}-0.tar", tmp_path / f"{train}-*.tar"):
        data = open_dataset(str(spec))
        assert (len(data.train), data.val.name(0)) == (1, f"{tmp_path}/{val}-0.tar: a.png")


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


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"classes": ["x", "x"]}',
        '{"classes": ["y", "x"], "classes": ["x", "y"]}',
        '{"classes": [1]}',
        "{",
        "[" * 100_000,
    ],
)
def test_a_list_of_classes_that_is_none(content: str, shards: Path) -> None:
    (shards / "classes.json").write_text(content)
    with pytest.raises(UserError, match="classes.json: no list of classes"):
        open_dataset(str(shards))


@pytest.mark.parametrize("content", ["", "[]", '{"shards": "x"}', '{"shards": {"a": null}}', "[" * 100_000])
def test_a_manifest_that_is_none(content: str, shards: Path) -> None:
    (shards / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json: is not what `hvd-lb data pack` wrote; copy it again"):
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


@pytest.mark.parametrize("name", ["train", "val"])
def test_of_another_size_a_shard_is_another_one_whatever_its_time_is(name: str, shards: Path) -> None:
    path = shards / f"{name}-000000.tar"
    before, when = getattr(open_dataset(str(shards)), name), path.stat()
    write_tar(path, samples("abcdefghijklmnopqrstuvwx", b"x"))
    assert path.stat().st_size != when.st_size
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
    after = getattr(open_dataset(str(shards)), name)
    assert len(after) == len(before) - sum(before.index.rows["shard"] == 0) + 24
