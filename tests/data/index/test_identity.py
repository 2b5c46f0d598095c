"""What a data set's fingerprint sees, and what it does not; a stale index gives no other image's pixels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import Member, png, write_tar

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.files.journal import _HEAD, Journal, _checksum
from hvd_lb.data.images import Dataset, fingerprint_note, images_of, refuse_other_images, same_images
from hvd_lb.data.index import store
from hvd_lb.data.index.dataset import index_splits
from hvd_lb.data.index.images import IndexedImages
from hvd_lb.data.index.index import Index, open_index
from hvd_lb.data.prepare.pack import pack
from hvd_lb.data.sources.folders import FolderSource
from hvd_lb.data.sources.lists import ListSource
from hvd_lb.data.sources.source import States, stamped
from hvd_lb.errors import UserError

Make = Callable[..., Path]
LONG_AGO = 10**18


def bitmaps(folder: Path, colours: dict[str, int]) -> Path:
    """Files of one length, of one time: "split/class/name" to a grey level."""
    for name, level in colours.items():
        path = folder / f"{name}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (level, level, level)).save(path)
    settle(folder)
    return folder


def settle(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, ns=(LONG_AGO, LONG_AGO))


COLOURS = {
    f"{split}/{label}/{i}": 20 * i + at
    for split in ("train", "val")
    for at, label in enumerate("ab")
    for i in range(3)
}


def fingerprint(folder: Path) -> str:
    return open_dataset(str(folder)).fingerprint()


def swap(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "tmp")
    (folder / other).rename(folder / one)
    (folder / "tmp").rename(folder / other)


CHANGES = {
    "classes swapped": lambda folder: swap(folder, "train/a", "train/b"),
    "files swapped": lambda folder: swap(folder, "train/a/0.bmp", "train/a/2.bmp"),
    "files of two classes swapped": lambda folder: swap(folder, "train/a/0.bmp", "train/b/0.bmp"),
    "classes of val swapped": lambda folder: swap(folder, "val/a", "val/b"),
    "files of val swapped": lambda folder: swap(folder, "val/a/0.bmp", "val/a/2.bmp"),
    "other bytes": lambda folder: Image.new("RGB", (8, 8), (7, 7, 7)).save(folder / "train" / "a" / "0.bmp"),
    "other bytes of the last": lambda folder: Image.new("RGB", (8, 8)).save(folder / "train" / "b" / "2.bmp"),
    "other bytes of the last of val": lambda folder: Image.new("RGB", (8, 8)).save(folder / "val/b/2.bmp"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_images_have_another_fingerprint_also_where_length_and_time_are_the_same(
    change: str, tmp_path: Path
) -> None:
    folder = bitmaps(tmp_path / "set", COLOURS)
    before = fingerprint(folder)
    CHANGES[change](folder)
    for path in folder.rglob("*.bmp"):
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    after = fingerprint(folder)
    assert not same_images(before, after)
    with pytest.raises(UserError, match="step-8 was trained on other data than set is now"):
        refuse_other_images(Path("step-8"), before, after, "set")
    shutil.rmtree(tmp_path / "cache")
    assert fingerprint(folder) == after


def rename_in_order(folder: Path) -> None:
    (folder / "train" / "a" / "2.bmp").rename(folder / "train" / "a" / "3.bmp")


def rename_class(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "a").rename(folder / split / "aa")


def test_new_names_are_seen_and_the_images_known_to_be_the_same(tmp_path: Path) -> None:
    folder = bitmaps(tmp_path / "set", COLOURS)
    before = fingerprint(folder)
    rename_in_order(folder)
    after = fingerprint(folder)
    assert after != before
    assert same_images(before, after)
    assert "other names" in fingerprint_note(before, after)
    rename_class(folder)
    assert not same_images(before, fingerprint(folder))


def test_place_and_time_play_no_part(tmp_path: Path) -> None:
    folder = bitmaps(tmp_path / "set", COLOURS)
    before = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copyfile)
    folder.rename(tmp_path / "moved")
    (tmp_path / "linked").symlink_to("moved")
    (tmp_path / "moved" / "train" / "a" / ".DS_Store").touch()
    for place in ("copied", "moved", "linked"):
        assert fingerprint(tmp_path / place) == before
    (tmp_path / "moved" / "val").rename(tmp_path / "moved" / "Validation")
    assert fingerprint(tmp_path / "moved") == before


def test_packed_images_are_the_same_elsewhere(tmp_path: Path) -> None:
    folder = bitmaps(tmp_path / "set", COLOURS)
    data = open_dataset(str(folder))
    pack(data, tmp_path / "one", source="set", shard_bytes=10**6)
    pack(data, tmp_path / "many", source="set", shard_bytes=4_000)
    found = [fingerprint(tmp_path / place) for place in ("set", "one", "many")]
    assert len(set(found)) == 3
    assert len(set(map(images_of, found))) == 1


def members(order: str) -> list[Member]:
    return [
        member
        for key in order
        for member in ((f"{key}.png", png(ord(key))), (f"{key}.cls", b"%d" % (ord(key) % 2)))
    ]


def test_shards_packed_anew_with_the_same_images_are_seen_by_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only offsets differ: an index from before, in another host's cache, reads from wrong places."""
    shard = tmp_path / "set" / "train-0.tar"
    write_tar(tmp_path / "set" / "val-0.tar", members("ab"))
    write_tar(shard, members("abcd"))
    settle(tmp_path / "set")
    for host in "12":
        monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / host))
        before = fingerprint(tmp_path / "set")
    write_tar(shard, [("a.txt", b"x" * 5000), *members("abcd")])
    stale = open_dataset(str(tmp_path / "set"), expected=before)
    with pytest.raises(UserError, match="is another file than when it was indexed, with other bytes"):
        stale.train.read(np.arange(4))
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "1"))
    launcher = open_dataset(str(tmp_path / "set"))
    assert launcher.fingerprint() != before
    assert same_images(launcher.fingerprint(), before)
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "2"))
    rank = open_dataset(str(tmp_path / "set"), expected=launcher.fingerprint())
    assert rank.fingerprint() == launcher.fingerprint()
    for one, other in zip(launcher.train.read(np.arange(4)), rank.train.read(np.arange(4)), strict=True):
        assert one.tobytes() == other.tobytes()


def test_evidence_is_of_all_that_is_known_of_bytes_and_of_places(tmp_path: Path) -> None:
    for number, keys in enumerate(("abc", "def", "ghi")):
        write_tar(tmp_path / "set" / f"{'val' if number == 2 else 'train'}-{number % 2}.tar", members(keys))
    index = open_dataset(str(tmp_path / "set")).train.index
    content, place = IndexedImages(index).evidence(0, 6)
    for field, of_content in (("size", True), ("head", True), ("offset", False), ("shard", False)):
        rows = index.rows.copy()
        rows[field][4] ^= 1
        other = IndexedImages(replace(index, rows=rows)).evidence(0, 6)
        assert [other[0] != content, other[1] != place] == [of_content, not of_content], field
    names = index.names.copy()
    names[-1] ^= 1
    renamed = replace(index.facts, shards=["train-0.tar", "train-2.tar"])
    for changed in (replace(index, names=names), replace(index, facts=renamed)):
        other = IndexedImages(changed).evidence(0, 6)
        assert [other[0] != content, other[1] != place] == [False, True]


def test_an_image_of_the_same_length_put_in_place_of_another_is_named_when_read(tmp_path: Path) -> None:
    folder = bitmaps(tmp_path / "set", COLOURS)
    data = open_dataset(str(folder))
    shutil.copy(folder / "train" / "a" / "1.bmp", folder / "train" / "a" / "0.bmp")
    with pytest.raises(UserError, match=r"train/a/0.bmp: is another file than when .*data index --check"):
        data.train.read(np.array([0]))


def test_a_file_of_a_list_that_was_overwritten_is_seen_whatever_its_time_is(tmp_path: Path) -> None:
    """The system knows when it touched a file last."""
    bitmaps(tmp_path / "i", {"a": 1, "b": 2})
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text("i/a.bmp,x\ni/b.bmp,y")
    settle(tmp_path)
    before = fingerprint(tmp_path)
    bitmaps(tmp_path / "i", {"a": 7})
    assert not same_images(before, fingerprint(tmp_path))


def test_what_a_stamp_changes_with() -> None:
    def digests(*states: tuple[int, int, int]) -> list[bytes]:
        found = States()
        for state in states:
            found.add(state)
        return [found.digest(few) for few in (True, False)]

    few, many = digests((1, 2, 3), (4, 5, 6))
    for states, of_many in (((9, 2, 3), True), ((1, 9, 3), True), ((1, 2, 9), False)):
        other, other_many = digests(states, (4, 5, 6))
        assert [other != few, other_many != many] == [True, of_many]
    assert stamped([b"a\0b"]) != stamped([b"a", b"b"])


def test_a_check_of_everything_sees_what_nothing_else_shows(tmp_path: Path) -> None:
    folder = bitmaps(tmp_path / "set", COLOURS) / "train"
    source = FolderSource(folder, folder, "all", cheap=0)
    before = open_index(source)
    swap(folder, "a/0.bmp", "b/0.bmp")
    settle(folder)
    assert (open_index(source).rows == before.rows).all()
    after = open_index(source, check="full")
    assert (after.rows["head"] != before.rows["head"]).sum() == 2
    assert after.keep[0] == before.keep[0]
    assert after.identity != before.identity  # what follows from it is of other images
    kept = open_index(source, check="full")
    assert kept.identity == after.identity
    assert os.stat(kept.keep[0]).st_ino == os.stat(after.keep[0]).st_ino


def test_a_check_of_everything_takes_nothing_from_an_older_journal(tmp_path: Path) -> None:
    """One that an interrupted process has left beside an index of the same stamp."""
    folder = bitmaps(tmp_path / "set", COLOURS) / "train"
    source = FolderSource(folder, folder, "all", cheap=0)
    before = open_index(source)
    measured = before.rows[["size", "width", "height", "orientation", "kind", "head"]].copy()
    for block, rows in ((0, measured[:2]), (2, measured[2:])):
        content = rows.tobytes()
        with store.journal(before.keep[0]).open("ab") as file:
            file.write(_HEAD.pack(block, len(content), _checksum(block, content)) + content)
    assert [start for start, _ in Journal(store.journal(before.keep[0])).blocks()] == [0, 2]
    swap(folder, "a/0.bmp", "b/0.bmp")
    settle(folder)
    assert (open_index(source, check="full").rows["head"] != before.rows["head"]).sum() == 2


def test_a_fingerprint_that_is_kept_is_of_both_splits(tmp_path: Path) -> None:
    folder = bitmaps(tmp_path / "set", COLOURS)
    bitmaps(tmp_path / "other", {f"{label}/{i}": 90 for label in "ab" for i in range(3)})
    for _ in range(2):
        both = [
            open_dataset(str(folder / "train"), val=str(of)).fingerprint()
            for of in (folder / "val", tmp_path / "other")
        ]
        assert not same_images(*both)


def test_a_repaired_file_is_found_in_a_large_folder(tmp_path: Path) -> None:
    """Whoever repairs a file in its place changes no folder."""
    folder = bitmaps(tmp_path / "set", COLOURS) / "train"
    source = FolderSource(folder, folder, "all", cheap=0)
    whole = (folder / "a" / "0.bmp").read_bytes()
    (folder / "a" / "0.bmp").write_bytes(b"broken")
    settle(folder)
    assert open_index(source, on_bad_image="skip").facts.broken == 1
    (folder / "a" / "0.bmp").write_bytes(whole)
    assert open_index(source).facts.broken == 0


def test_a_known_fingerprint_touches_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bitmaps(tmp_path / "set", COLOURS)
    before = fingerprint(folder)
    monkeypatch.setattr(IndexedImages, "evidence", lambda *_: pytest.fail("the rows were hashed again"))
    assert fingerprint(folder) == before


def test_hashing_takes_arrays_not_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large split some rows at a time; parts that were held out are read from the names of the whole."""
    folder = bitmaps(tmp_path / "set", {f"{label}/{i:03}": i % 256 for label in "ab" for i in range(100)})
    monkeypatch.setattr("hvd_lb.data.images._CHUNK", 64)
    data = open_dataset(str(folder), val_fraction=0.3)
    calls = []
    names_of = Index.names_of
    monkeypatch.setattr(Index, "names_of", lambda *of: calls.append(of) or names_of(*of))
    assert Dataset("x", data.train, data.val).fingerprint()
    assert len(calls) == -(-len(data.train) // 64) + -(-len(data.val) // 64)
    for images in (data.train, data.val):
        for start, stop in ((0, 10), (10, len(images)), (5, 5)):
            names, lengths = images.index.names_of(start, stop)
            expected = [images.index.relative(i) for i in range(start, stop)]
            assert names == b"".join(expected)
            assert lengths.tolist() == [len(name) for name in expected]


def test_what_older_versions_kept_is_compared_and_said_to_be_less(tmp_path: Path) -> None:
    found = fingerprint(bitmaps(tmp_path / "set", COLOURS))
    old = found.split("-")[0]
    assert same_images(old, found)
    assert "older version" in fingerprint_note(old, found)
    assert not same_images("0" * 16, found)
    assert fingerprint_note(found, found) == ""


def test_the_first_part_is_the_whole_of_older_fingerprints() -> None:
    assert open_dataset("digits").fingerprint().split("-")[0] == "84550e2628b5081f"


def named(folder: Path, name: str, labels: str) -> str:
    """A shard, last changed long ago, whose images are labelled by these words."""
    path = folder / name
    found: list[Member] = []
    for number, label in enumerate(labels.split()):
        found += [(f"{number}.png", png(number)), (f"{number}.cls", label.encode())]
    write_tar(path, found)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return str(path)


def names_of_val(data: Dataset) -> list[str]:
    assert data.train.classes == data.val.classes
    return [data.val.classes[label] for label in data.val.labels]


def test_validation_images_have_the_classes_of_the_training_images_at_hand(tmp_path: Path) -> None:
    """Their index is not made anew because of their own files, which nobody looks at one by one."""
    val = named(tmp_path / "v", "val-0.tar", "bee cat bee")
    for at, classes in enumerate(("bee cat dog", "ant bee cat", "bee cat dog", "cat bee")):
        data = open_dataset(named(tmp_path / str(at), "train-0.tar", classes), val=val)
        assert names_of_val(data) == ["bee", "cat", "bee"]
        told = open_dataset(
            str(tmp_path / str(at) / "train-0.tar"), val=val, expected=data.fingerprint()
        )  # a rank
        assert names_of_val(told) == ["bee", "cat", "bee"]


def test_many_validation_files_have_the_classes_of_the_training_images_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderSource.__init__, "__defaults__", (0, None, ()))  # no file is cheap to look at
    folder = bitmaps(tmp_path / "set", COLOURS)
    assert names_of_val(open_dataset(str(folder))) == [*"aaabbb"]
    bitmaps(folder, {"train/0/x": 77})
    os.utime(folder / "train")
    assert names_of_val(open_dataset(str(folder))) == [*"aaabbb"]


def test_shards_that_were_added_are_seen(tmp_path: Path) -> None:
    named(tmp_path, "val-0.tar", "bee cat")
    for number, classes in enumerate((["bee", "cat"], ["ant", "bee", "cat"])):
        named(tmp_path, f"train-{number}.tar", " ".join(classes))
        for spec in (tmp_path, tmp_path / "train-*.tar"):
            data = open_dataset(str(spec))
            assert (len(data.train), data.train.classes) == (2 + 3 * number, classes)
            assert names_of_val(data) == ["bee", "cat"]


def test_a_file_of_classes_that_comes_changes_or_goes_is_seen(tmp_path: Path) -> None:
    named(tmp_path, "train-0.tar", "ant bee cat")
    named(tmp_path, "val-0.tar", "cat ant")
    given = tmp_path / "classes.txt"
    for at, classes in enumerate(["", "bee cat ant", "ant bee cat", "cat ant bee", ""]):
        given.write_text(classes.replace(" ", "\n"))
        os.utime(given, ns=(LONG_AGO + at, LONG_AGO + at))
        if not classes:
            given.unlink()
        data = open_dataset(str(tmp_path))
        assert data.train.classes == (classes or "ant bee cat").split()
        assert names_of_val(data) == ["cat", "ant"]


def test_validation_images_with_a_file_of_classes_of_their_own(tmp_path: Path) -> None:
    train = bitmaps(tmp_path / "set", {f"{name}/{i}": i for name in ("ant", "bee", "cat") for i in range(2)})
    own = bitmaps(tmp_path / "own", dict.fromkeys("acn", 9))
    (own / "v.csv").write_text("a.bmp,ant\nc.bmp,cat\nn.bmp,0\n")
    (own / "classes.txt").write_text("cat\nbee\nant\n")
    shard = named(own, "v-0.tar", "ant cat 0")
    for val in (str(own / "v.csv"), shard):
        data = open_dataset(str(train), val=val)
        assert names_of_val(data) == ["ant", "cat", "cat"]


def test_a_class_of_the_same_length_and_time_is_seen_by_a_check_of_everything(tmp_path: Path) -> None:
    named(tmp_path, "val-0.tar", "bee cat")
    for classes in (["bee", "cat"], ["bug", "cat"]):
        named(tmp_path, "train-0.tar", " ".join(classes))
        named(tmp_path, "val-0.tar", " ".join(classes))
        splits, _ = index_splits(str(tmp_path), check="full")
        assert splits["train"].classes == classes


def test_images_that_a_new_training_list_shares_with_many_validation_images_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ListSource.__init__, "__defaults__", (None, 0, None, None, None)
    )  # no file is cheap to look at
    bitmaps(tmp_path / "i", dict.fromkeys("abc", 9))
    for name, content in (("val.csv", "i/c.bmp,y"), ("train.csv", "i/a.bmp,x\ni/b.bmp,y")):
        (tmp_path / name).write_text(content)
    settle(tmp_path)
    assert open_dataset(str(tmp_path)).notes == ()
    (tmp_path / "train.csv").write_text("i/a.bmp,x\ni/b.bmp,y\ni/c.bmp,y")
    (note,) = open_dataset(str(tmp_path)).notes
    assert note.startswith("val.csv: 1 of its 1 images are trained on, too (train.csv)")
