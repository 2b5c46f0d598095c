"""Opening: regular files whole and in parts, and at once a line for what only looks like one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.files.opening import open_file, read_file, read_range
from hvd_lb.errors import UserError


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # its path may be too long for a socket's name
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


STRANGE: list[Callable[[Path], None]] = [
    os.mkfifo,
    make_socket,
    Path.mkdir,
    lambda path: path.symlink_to("/dev/zero"),
]


def test_files_are_read_whole_and_in_parts(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "x").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "link").symlink_to("x")
    assert read_file(tmp_path / "link").tobytes() == content
    assert read_file(tmp_path / "empty").shape == (0,)
    descriptor = open_file(tmp_path / "x")
    assert read_range(descriptor, 99_990, 7).tobytes() == content[99_990:99_997]
    assert read_range(descriptor, 99_990, 50).tobytes() == content[99_990:]
    assert read_range(descriptor, 200_000, 50).shape == (0,)
    os.close(descriptor)


def test_a_read_that_gives_less_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(0).bytes(1000)
    (tmp_path / "x").write_bytes(content)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, parts, at: whole(file, [parts[0][:7]], at))
    assert read_file(tmp_path / "x").tobytes() == content


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", STRANGE, ids=["pipe", "socket", "folder", "device"])
def test_what_is_no_regular_file_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x.jpg")
    before = len(os.listdir("/proc/self/fd"))
    for read in (open_file, read_file):
        with pytest.raises(UserError, match=r"x.jpg: is no file, but a pipe, a socket, a device or a folder"):
            read(tmp_path / "x.jpg")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, make_socket], ids=["pipe", "socket"])
def test_a_pipe_among_the_images_is_named(make: Callable[[Path], None], tmp_path: Path, make_dataset) -> None:
    folder = make_dataset(tmp_path / "set")
    make(folder / "train" / "bee" / "x.jpg")
    with pytest.raises(UserError, match=r"bee/x.jpg"):
        open_dataset(str(folder))


@pytest.mark.timeout(20)
def test_an_image_that_became_a_pipe_is_named(tmp_path: Path, make_dataset) -> None:
    train = open_dataset(str(make_dataset(tmp_path / "set"))).train
    path = Path(train.name(3))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{path.name}: "):
        train.read(np.array([3]))
