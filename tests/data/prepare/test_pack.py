"""Packing: the layout, the same bytes always, kills at every moment, and folders that are not for it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import ArrayImages, Dataset, same_images
from hvd_lb.data.prepare.encode import Encoding
from hvd_lb.data.prepare.pack import Packed, pack
from hvd_lb.errors import UserError

ROOT = Path(__file__).parents[3]
SHARD_BYTES = 20_000


@pytest.fixture
def source(make_dataset: Callable[..., Path], tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "set", 6)


def packed(source: Path, target: Path, **options: object) -> Packed:
    dataset = open_dataset(str(source), on_bad_image="skip")
    settings = {"shard_bytes": SHARD_BYTES, "threads": 2, **options}
    return pack(dataset, target, source=str(source), **settings)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members(target: Path, split: str) -> list[list[tuple[str, bytes]]]:
    """(name, content) of what is in each shard."""
    shards = []
    for path in sorted(target.glob(f"{split}-*.tar")):
        with tarfile.open(path) as archive:
            shards.append([(info.name, archive.extractfile(info).read()) for info in archive])  # type: ignore[union-attr]
    return shards


def test_the_layout(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    result = packed(source, target)
    dataset = open_dataset(str(source))
    manifest = json.loads((target / "manifest.json").read_text())
    images_of = {
        f"{split}-{number:06d}.tar": len(shard) // 2
        for split in ("train", "val")
        for number, shard in enumerate(members(target, split))
    }
    shards = {
        name: {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "images": images_of[name],
        }
        for name, content in contents(target).items()
        if name.endswith(".tar")
    }
    assert manifest["shards"] == shards
    assert json.loads((target / "classes.json").read_text()) == {"classes": ["ant", "bee", "cat"]}
    assert sorted(os.listdir(target)) == sorted([*shards, "classes.json", "manifest.json"])
    assert result.images == 36
    assert result.bytes == sum(len(content) for name, content in contents(target).items() if name in shards)
    for split, images in (("train", dataset.train), ("val", dataset.val)):
        found = members(target, split)
        assert len(found) > 2
        expected = []
        for i in range(len(images)):
            path = Path(images.name(i))
            expected += [
                (f"{i:012d}{path.suffix.lower()}", path.read_bytes()),
                (f"{i:012d}.cls", str(images.labels[i]).encode()),
            ]
        assert [member for shard in found for member in shard] == expected
    assert all(shard["bytes"] <= SHARD_BYTES for shard in shards.values())


def test_the_bytes_depend_on_nothing_else(source: Path, tmp_path: Path) -> None:
    packed(source, tmp_path / "a", threads=1)
    copy = shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)
    packed(copy, tmp_path / "b", threads=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for path in (tmp_path / "a").glob("*.tar"):
        with tarfile.open(path) as archive:
            for info in archive:
                assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (
                    *(0, 0, 0, "", ""),
                    0o644,
                )


def test_an_image_larger_than_a_shard_has_one_of_its_own(source: Path, tmp_path: Path) -> None:
    packed(source, tmp_path / "packed", shard_bytes=1)
    assert [len(shard) for shard in members(tmp_path / "packed", "train")] == [2] * 18


def test_shrunk_images_are_entered_with_those_that_would_not_decode(source: Path, tmp_path: Path) -> None:
    cut = source / "train" / "ant" / "2.png"
    cut.write_bytes(cut.read_bytes()[:-300])
    result = packed(source, tmp_path / "packed", encoding=Encoding(max_side=24))
    assert result.undecodable == 1
    manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
    assert manifest["made_from"]["max_side"] == 24
    assert manifest["made_from"]["quality"] == 90
    assert manifest["shards"]["train-000000.tar"]["undecodable"] == 1
    [(name, content), *_] = members(tmp_path / "packed", "train")[0]
    assert name == "000000000000.jpg"
    assert Image.open(io.BytesIO(content)).size == (16, 24)


def test_lists_and_shards_can_be_packed(source: Path, tmp_path: Path) -> None:
    packed(source, tmp_path / "first")
    packed(tmp_path / "first", tmp_path / "again")
    lines = ["path,label"]
    images = open_dataset(str(source)).train
    for i in (4, 2, 17, 9):
        lines.append(f"{images.name(i)},{images.classes[int(images.labels[i])]}")
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    packed(tmp_path / "train.csv", tmp_path / "of-list")
    assert contents(tmp_path / "again") == contents(tmp_path / "first")
    found = [member for shard in members(tmp_path / "of-list", "train") for member in shard]
    assert [content for _, content in found[::2]] == [
        Path(images.name(i)).read_bytes() for i in (4, 2, 17, 9)
    ]


def test_broken_images_are_copied(source: Path, tmp_path: Path) -> None:
    cut = source / "train" / "ant" / "2.png"
    cut.write_bytes(cut.read_bytes()[:-300])
    (source / "train" / "bee" / "1.JPEG").write_bytes(b"no image")
    packed(source, tmp_path / "packed")
    before, after = (open_dataset(str(of), on_bad_image="skip") for of in (source, tmp_path / "packed"))
    assert same_images(after.fingerprint(), before.fingerprint())
    ids = np.arange(len(before.train))
    assert [one.tobytes() for one in after.train.read(ids)] == [
        one.tobytes() for one in before.train.read(ids)
    ]


def test_pixels_are_packed_as_png(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    images = ArrayImages(pixels, np.arange(10) % 3, ["a/b", "c", "d"], "noise")
    pack(Dataset("noise", images, images), tmp_path / "packed", source="noise")
    (shard,) = members(tmp_path / "packed", "val")
    for i, ((name, content), (_, label)) in enumerate(zip(shard[::2], shard[1::2], strict=True)):
        assert name == f"{i:012d}.png"
        assert (np.asarray(Image.open(io.BytesIO(content))) == pixels[i]).all()
        assert int(label) == i % 3


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves shards open
def test_webdataset_reads_it(source: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="needs pip install webdataset")
    target = tmp_path / "packed"
    packed(source, target)
    dataset = open_dataset(str(source))
    last = len(list(target.glob("train-*.tar"))) - 1
    urls = f"{target}/train-{{000000..{last:06d}}}.tar"
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpeg;png", "cls"))
    assert [label for _, label in samples] == dataset.train.labels.tolist()
    for i, (image, _) in enumerate(samples):
        with Image.open(dataset.train.name(i)) as original:
            assert (np.asarray(image) == np.asarray(original.convert("RGB"))).all()


# Forks for each place where a run may be killed: before the n-th write, sync or rename. A killed run and the one after
# it must end as one that nobody killed. Prints how many places there were.
KILLED_EVERYWHERE = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.prepare import pack_folder, shard_writer
from hvd_lb.data.prepare.pack import pack

source, target = Path(sys.argv[1]), Path(sys.argv[2])
dataset = open_dataset(str(source))

def run(kill_at):
    child = os.fork()
    if not child:
        left = kill_at
        def dying(function):
            def wrapper(*arguments):
                nonlocal left
                left -= 1
                if left < 0:
                    if function is write:
                        arguments[0]._file.write(arguments[1][:100])
                        arguments[0]._file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)
            return wrapper
        write = shard_writer.ShardWriter._write
        if kill_at is not None:
            shard_writer.ShardWriter._write = dying(write)
            for name in ("replace", "fsync"):
                setattr(os, name, dying(getattr(os, name)))
            shutil.rmtree = dying(shutil.rmtree)
        pack(dataset, target, source=str(source), shard_bytes=9_000, threads=2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def files():
    return {path.name: path.read_bytes() for path in target.rglob("*") if path.is_file()}

assert run(None) == 0
undisturbed = files()
for place in itertools.count():
    shutil.rmtree(target)
    killed = run(place)
    if killed == 0:
        break
    assert killed == -signal.SIGKILL, killed
    assert (target / ".unfinished").exists(), place
    if place % 3 == 0:
        run(place // 2)  # and once more
    assert run(None) == 0, place
    assert files() == undisturbed, place
print(place)
"""


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_dataset(tmp_path / "set", 2)
    command = [sys.executable, "-c", KILLED_EVERYWHERE, str(source), str(tmp_path / "packed")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_all_that_is_packed_is_on_the_disk_before_it_has_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And names are, before anything says that they are there: a folder is synced before journal and manifest."""
    sizes: dict[int, int] = {}  # of what was synced, by its inode
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        there = os.fstat(descriptor)
        sizes[there.st_ino] = there.st_size
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def renamed(before: Path, after: Path) -> None:
        there = os.stat(before)
        if tmp_path / "packed" in Path(after).parents:  # and not the index of the source
            assert sizes.get(there.st_ino) == there.st_size, after
        replace(before, after)
        events.append(("in " + Path(after).parent.name, Path(after).name))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    made = packed(source, tmp_path / "packed")
    assert events[-2:] == [("in packed", "manifest.json"), ("sync", "packed")]
    before = events[: events.index(("in packed", "manifest.json"))]
    last_sync = max(number for number, event in enumerate(before) if event == ("sync", "packed"))
    places = [number for number, (what, _) in enumerate(before) if what == "in packed"]
    assert len(places) == len(made.shards) + 1
    assert max(places) < last_sync
    work, journal = next((what.removeprefix("in "), name) for what, name in events if name == "shards.jsonl")
    for name in made.shards:
        finished = events.index((f"in {work}", name))
        assert events[finished + 1 : finished + 3] == [("sync", work), ("sync", journal)]


def test_the_journal_of_finished_shards_is_synced_to_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "shards.jsonl":
            synced.append(json.loads(path.read_text().splitlines()[-1])["name"])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    made = packed(source, tmp_path / "packed")
    assert synced == sorted(made.shards, key=synced.index)
    assert len(synced) == len(made.shards) > 2


def test_finished_shards_are_kept_and_damaged_ones_made_anew(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    first = packed(source, target)
    whole = contents(target)
    times = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert packed(source, target).kept == len(first.shards)
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == times

    flipped = bytearray(whole["train-000001.tar"])
    flipped[1500] ^= 1
    (target / "train-000001.tar").write_bytes(flipped)
    (target / "val-000000.tar").unlink()
    with (target / "val-000002.tar").open("ab") as file:
        file.write(b"more")
    assert packed(source, target).kept == len(first.shards) - 3
    assert contents(target) == whole


def killed_after(shards: int, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends with an error once so many shards are done."""

    def fails(label: str, done: int, total: int) -> None:
        if len(list((target / ".unfinished").glob("*.tar"))) == shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed(source, target, on_progress=fails)


def test_other_options_or_another_source_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "packed"
    killed_after(2, source, target, monkeypatch)
    before = contents(target)
    copy = shutil.copytree(source, tmp_path / "copy")
    for at, options, told in (
        (source, {"shard_bytes": 30_000}, "shard-size 20000, not 30000"),
        (source, {"encoding": Encoding(24)}, "max-side none, not 24"),
        (copy, {}, f"source {source}, not {copy}"),
    ):
        with pytest.raises(UserError, match=told) as raised:
            packed(at, target, **options)
        assert "\n" not in str(raised.value)
    shutil.rmtree(copy / "train" / "ant")
    shutil.rmtree(copy / "val" / "ant")
    with pytest.raises(UserError, match=r"was packed from other data or with other options \(data "):
        packed(copy, target)
    assert contents(target) == before

    assert packed(source, target).kept == 2
    with pytest.raises(UserError, match="shard-size 20000, not 30000"):
        packed(source, target, shard_bytes=30_000)


def test_what_is_half_packed_is_no_data_set(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "packed"
    killed_after(2, source, target, monkeypatch)
    with pytest.raises(UserError, match=r"packed: is not finished; give the command that makes it again"):
        open_dataset(str(target))
    packed(source, target)
    before, after = open_dataset(str(source)), open_dataset(str(target))
    assert same_images(after.fingerprint(), before.fingerprint())
    ids = np.arange(len(before.train))
    for one, other in zip(before.train.read(ids), after.train.read(ids), strict=True):
        assert (one == other).all()
    (target / ".unfinished").mkdir()  # killed when all was moved, but for the last shards
    with pytest.raises(UserError, match="is not finished"):
        open_dataset(str(target))


def test_a_source_that_changes_on_the_way_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "packed"
    image = source / "train" / "ant" / "0.png"
    image.write_bytes(image.read_bytes() + bytes(10_000))
    killed_after(2, source, target, monkeypatch)
    (target / ".unfinished" / "train-000000.tar").unlink()
    image.write_bytes(image.read_bytes()[:-1] + b"x")  # where the index does not look
    with pytest.raises(UserError, match=r"no longer gives the train-000000.tar that it gave before"):
        packed(source, target)
    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image)
    with pytest.raises(UserError, match=r"was packed from other data .*\(data \w+-\w+, not \w+-\w+\)"):
        packed(source, target)


def test_a_folder_of_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "other"
    target.mkdir()
    (target / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"other: holds thesis.tex; give a new or empty folder"):
        packed(source, target)
    (target / "thesis.tex").rename(target / "manifest.json")
    for content in ("{", "[]", '{"shards": {}}'):
        (target / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest.json: not written by"):
            packed(source, target)
    assert os.listdir(target) == ["manifest.json"]
    with pytest.raises(UserError, match="is a file"):
        packed(source, target / "manifest.json")
    (target / "manifest.json").unlink()
    assert packed(source, target).images == 36


def test_a_full_disk_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"0.01 MB free, but about 0.104 MB are to be written"):
        packed(source, tmp_path / "deep" / "packed")
    assert not (tmp_path / "deep").exists()


def test_a_disk_that_fills_up_is_no_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "packed"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"packed: No space left on device; the same command goes on"):
            packed(source, target)
    assert packed(source, target).images == 36


def test_two_runs_do_not_write_the_same_folder(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"

    def second(label: str, done: int, total: int) -> None:
        with pytest.raises(UserError, match="another `hvd-lb data pack` writes into it"):
            packed(source, target)

    packed(source, target, on_progress=second)
    assert packed(source, target).images == 36
