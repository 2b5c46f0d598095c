"""ImageNet's tar files in miniature: unpacked, interrupted, incomplete, hostile."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.options import UNFINISHED
from hvd_lb.data.prepare.imagenet import DEVKIT, TRAIN_TAR, VAL_TAR, Counts, prepare_imagenet
from hvd_lb.errors import UserError

savemat = pytest.importorskip("scipy.io").savemat

CLASSES = [f"n0144{i:04d}" for i in range(6)]
# ILSVRC2012_ID i + 1 is the class ORDER[i]: as in the real kit, not sorted by WordNet id.
ORDER = [3, 0, 5, 1, 4, 2]
PER_CLASS, VAL = 3, 12
TRUTH = [1 + (7 * i) % 6 for i in range(VAL)]
EXPECTED = Counts(train=6 * PER_CLASS, val=VAL, classes=6)


def jpeg(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20 + colour, 16), (colour, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            add(archive, name, content)
    return file.getvalue()


def devkit() -> bytes:
    fields = ("ILSVRC2012_ID", "WNID", "words", "num_children")
    synsets = np.empty((8, 1), [(name, object) for name in fields])
    for i in range(8):
        name = CLASSES[ORDER[i]] if i < 6 else f"n9999999{i}"  # inner nodes of the tree come last
        synsets[i, 0] = (i + 1, name, "words", 0 if i < 6 else 3)
    savemat(meta := io.BytesIO(), {"synsets": synsets}, do_compression=True)
    root = "ILSVRC2012_devkit_t12/data"
    truth = "".join(f"{label}\n" for label in TRUTH).encode()
    members = {f"{root}/meta.mat": meta.getvalue(), f"{root}/ILSVRC2012_validation_ground_truth.txt": truth}
    return tar(members, "w:gz")


def class_tar(name: str) -> bytes:
    return tar({f"{name}_{i}.JPEG": jpeg(i) for i in range(PER_CLASS)})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / TRAIN_TAR).write_bytes(tar({f"{name}.tar": class_tar(name) for name in CLASSES}))
    (folder / VAL_TAR).write_bytes(
        tar({f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(50 + i) for i in reversed(range(VAL))})
    )
    (folder / DEVKIT).write_bytes(devkit())
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_prepared(target: Path) -> None:
    expected = {f"train/{name}/{name}_{i}.JPEG": jpeg(i) for name in CLASSES for i in range(PER_CLASS)} | {
        f"val/{CLASSES[ORDER[TRUTH[i] - 1]]}/ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(50 + i)
        for i in range(VAL)
    }
    assert files(target) == expected
    assert sorted(path.name for path in target.iterdir()) == ["train", "val"]


def test_the_result_is_a_data_set(source: Path, tmp_path: Path) -> None:
    told = []
    counts = prepare_imagenet(
        source, tmp_path / "imagenet", expected=EXPECTED, on_progress=lambda *at: told.append(at)
    )
    assert counts == EXPECTED
    check_prepared(tmp_path / "imagenet")
    for label in ("train", "val"):
        done = [at[1] for at in told if at[0] == label]
        assert done == sorted(done)
        assert done[-1] <= told[-1][2] or label == "train"
    data = open_dataset(str(tmp_path / "imagenet"))
    assert data.train.classes == CLASSES
    assert data.val.labels.tolist() == sorted(ORDER[label - 1] for label in TRUTH)


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from hvd_lb.data.prepare import imagenet

left = int(sys.argv[3])
write = imagenet._write

def write_and_die(source, path):
    global left
    left -= 1
    if left < 0:
        path.write_bytes(source.read(100))
        os.kill(os.getpid(), signal.SIGKILL)
    write(source, path)

imagenet._write = write_and_die
imagenet.prepare_imagenet(Path(sys.argv[1]), Path(sys.argv[2]), expected=imagenet.Counts(18, 12, 6))
"""


def test_a_killed_run_is_continued(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "imagenet"
    # Killed in the second image of the third class; then, four classes later, in the sixth one to validate.
    for count in (7, 4 * PER_CLASS + 5):
        command = [sys.executable, "-c", INTERRUPTED, str(source), str(target), str(count)]
        killed = subprocess.run(command, check=False, cwd=Path(__file__).parents[3])
        assert killed.returncode == -signal.SIGKILL
        assert not (target / "val").exists()
        assert (target / "train").exists() == (count > 7)
        with pytest.raises(UserError):
            open_dataset(str(target))
    assert prepare_imagenet(source, target, expected=EXPECTED) == EXPECTED
    check_prepared(target)


def test_what_is_finished_is_not_unpacked_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "imagenet"
    prepare_imagenet(source, target, expected=EXPECTED)
    for name in (TRAIN_TAR, VAL_TAR, DEVKIT):
        (source / name).unlink()
    assert prepare_imagenet(source, target, expected=EXPECTED) == EXPECTED


def test_wrong_counts_are_told_and_nothing_looks_finished(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "imagenet"
    with pytest.raises(UserError, match="train: 18 images in 6 classes, expected 1,281,167 in 1,000"):
        prepare_imagenet(source, target)
    assert [path.name for path in target.iterdir()] == [UNFINISHED]
    assert prepare_imagenet(source, target, expected=None) == EXPECTED
    with pytest.raises(UserError, match="expected 1,281,167"):
        prepare_imagenet(source, target)


@pytest.mark.parametrize("name", [TRAIN_TAR, VAL_TAR, DEVKIT])
def test_a_missing_or_cut_off_file_is_named(name: str, source: Path, tmp_path: Path) -> None:
    whole = (source / name).read_bytes()
    (source / name).write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UserError, match=f"{name}: (broken|no ILSVRC2012)") as raised:
        prepare_imagenet(source, tmp_path / "imagenet", expected=EXPECTED)
    assert "\n" not in str(raised.value)
    (source / name).unlink()
    with pytest.raises(UserError, match=f"{name}: not there"):
        prepare_imagenet(source, tmp_path / "other", expected=EXPECTED)
    assert not (tmp_path / "other").exists()
    (source / name).write_bytes(whole)
    assert prepare_imagenet(source, tmp_path / "imagenet", expected=EXPECTED) == EXPECTED
    check_prepared(tmp_path / "imagenet")


def test_no_member_leads_out_of_the_target(source: Path, tmp_path: Path) -> None:
    name = CLASSES[0]
    hostile = io.BytesIO()
    with tarfile.open(fileobj=hostile, mode="w") as archive:
        add(archive, f"../../../{name}_0.JPEG", jpeg(0))
        add(archive, f"/tmp/{name}_1.JPEG", jpeg(1))
        add(archive, f"deep/{name}_2.JPEG", jpeg(2))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"{name}_9.JPEG")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    members = {f"../{name}.tar": hostile.getvalue()} | {
        f"{other}.tar": class_tar(other) for other in CLASSES[1:]
    }
    (source / TRAIN_TAR).write_bytes(tar(members))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    prepare_imagenet(source, tmp_path / "imagenet", expected=EXPECTED)
    check_prepared(tmp_path / "imagenet")
    outside = {path for path in tmp_path.rglob("*") if path.is_file() and "imagenet" not in path.parts}
    assert outside == before


def test_the_command_says_what_it_made(source: Path, tmp_path: Path) -> None:
    from hvd_lb_cli.data.group import data

    target = str(tmp_path / "imagenet")
    refused = CliRunner().invoke(data, ["prepare-imagenet", str(source), target])
    assert isinstance(refused.exception, UserError)
    done = CliRunner().invoke(data, ["prepare-imagenet", str(source), target, "--allow-partial"])
    assert done.exit_code == 0, done.output
    assert "18 training and 12 validation images in 6 classes" in done.stdout
