"""What lies in a class folder: links that bring in other images, and files that are none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.sources.class_folder import ClassFolder
from hvd_lb.errors import UserError

Make = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, make_dataset: Make) -> Path:
    return make_dataset(tmp_path / "set")


def counts(folder: Path) -> list[int]:
    return np.bincount(open_dataset(str(folder)).train.labels).tolist()


def test_links_to_images_elsewhere_are_followed(folder: Path, tmp_path: Path, make_classes: Make) -> None:
    make_classes(tmp_path / "pool", {"more": 3, "dogs": 2})
    (folder / "train" / "ant" / "more").symlink_to("../../../pool/more")
    (folder / "train" / "bee" / "one.png").symlink_to(tmp_path / "pool" / "dogs" / "0.png")
    (folder / "train" / "dog").symlink_to(tmp_path / "pool" / "dogs")
    assert counts(folder) == [7, 5, 4, 2]


def test_a_folder_whose_name_only_begins_like_another_one_s_is_another_one(
    folder: Path, make_classes: Make
) -> None:
    make_classes(folder / "val-more", {"pool": 2})
    make_classes(folder / "train-more", {"pool": 3})
    (folder / "train" / "ant" / "linked").symlink_to("../../val-more/pool")
    (folder / "train" / "bee" / "linked").symlink_to("../../train-more/pool")
    train, val = folder / "train", (str(folder / "val"),)
    assert [sum(of.images for of in ClassFolder(train, name, val).folders()) for name in ("ant", "bee")] == [
        6,
        7,
    ]


def test_a_set_of_links_only(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    for split in ("train", "val"):
        (linked / split).mkdir(parents=True)
        for label in ("ant", "bee"):
            (linked / split / label).symlink_to(folder / split / label)
    (tmp_path / "whole").mkdir()
    for split in ("train", "val"):
        (tmp_path / "whole" / split).symlink_to(linked / split)
    assert counts(linked) == counts(tmp_path / "whole") == [4, 4]


@pytest.mark.parametrize("target", [".", "..", "deeper", "/", "loop"])
def test_links_that_lead_back_into_the_class_bring_nothing_twice(target: str, folder: Path) -> None:
    deeper = folder / "train" / "ant" / "deeper"
    deeper.mkdir()
    os.link(folder / "train" / "ant" / "0.png", deeper / "x.png")
    place = {"/": folder / "train" / "ant", "deeper": deeper, "loop": deeper / "loop"}.get(target, target)
    if target == "loop":
        (deeper / "loop").symlink_to("../deeper")
    else:
        (deeper / "link" if target in ".." else folder / "train" / "ant" / "link").symlink_to(place)
    assert counts(folder) == [5, 4, 4]


def test_a_circle_outside_of_the_set_ends(folder: Path, tmp_path: Path, make_classes: Make) -> None:
    make_classes(tmp_path / "pool", {"one": 1, "two": 1})
    (tmp_path / "pool" / "one" / "two").symlink_to("../two")
    (tmp_path / "pool" / "two" / "one").symlink_to("../one")
    (folder / "train" / "ant" / "one").symlink_to(tmp_path / "pool" / "one")
    assert counts(folder) == [6, 4, 4]


MISLEADING = {
    "train/ant/all": ("..", "leads to a folder above it"),
    "train/ant/deep/all": ("../..", "leads to a folder above it"),
    "train/bee/set": ("../..", "leads to a folder above it"),
    "train/bee/out": ("../../..", "leads to a folder above it"),
    "train/all": (".", "leads to a folder above it"),
    "train/every": ("..", "leads to a folder above it"),
    "train/ant/bees": ("../bee", "leads into another class"),
    "train/ant/val": ("../../val/ant", "leads to images of val/"),
    "train/ant/v": ("../../val", "leads to images of val/"),
    "train/ant/v.png": ("../../val/ant/0.png", "leads to images of val/"),
    "train/dog": ("../val/ant", "leads to images of val/"),
    "train/wasp": ("bee", "leads into another class"),
    "train/ant/b.png": ("../bee/0.png", "leads into another class"),
    "val/ant/train": ("../../train/ant", "leads to images of train/"),
    "val/ant/t.png": ("../../train/ant/0.png", "leads to images of train/"),
}


@pytest.mark.parametrize("link", MISLEADING)
def test_links_that_bring_in_other_images_are_refused(link: str, folder: Path) -> None:
    target, reason = MISLEADING[link]
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(target)
    with pytest.raises(UserError, match=f"set/{link}: {reason}.*remove the link"):
        open_dataset(str(folder))


def test_links_are_seen_through_the_folders_on_their_way(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(folder)
    (folder / "train" / "ant" / "v.png").symlink_to(tmp_path / "data" / "val" / "ant" / "0.png")
    with pytest.raises(UserError, match="train/ant/v.png: leads to images of val/"):
        open_dataset(str(folder))


def test_where_links_lead_is_looked_up_once_a_folder(
    tmp_path: Path, make_classes: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_classes(tmp_path / "pool", {"all": 30})
    (tmp_path / "set" / "ant").mkdir(parents=True)
    for path in (tmp_path / "pool" / "all").iterdir():
        (tmp_path / "set" / "ant" / path.name).symlink_to(f"../../pool/all/{path.name}")
    looked: list[str] = []
    real = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: looked.append(path) or real(path))
    (found,) = ClassFolder(tmp_path / "set", "ant", ("/elsewhere",)).folders()
    assert found.images == 30
    assert len(looked) == 3  # the class, the pool and the root


def test_classes_may_be_links_to_what_is_hidden_beside_them(folder: Path) -> None:
    (folder / "train" / ".store").mkdir()
    for name in ("ant", "bee"):
        (folder / "train" / name).rename(folder / "train" / ".store" / name)
        (folder / "train" / name).symlink_to(f".store/{name}")
    assert counts(folder) == [4, 4, 4]


def test_a_class_whose_link_leads_nowhere_is_not_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "README.md").symlink_to("nowhere")
    assert counts(folder) == [4, 4, 4]
    (folder / "train" / "dog").symlink_to(tmp_path / "pool" / "dog")
    with pytest.raises(
        UserError, match=r"train/dog: leads to nothing \(.*pool/dog\), so a class may be missing"
    ):
        open_dataset(str(folder))


def test_a_linked_folder_whose_link_leads_to_its_own_parent_is_refused(
    folder: Path, tmp_path: Path, make_classes: Make
) -> None:
    make_classes(tmp_path / "pool", {"dog": 2, "wolf": 2})
    (tmp_path / "pool" / "dog" / "all").symlink_to("..")
    (folder / "train" / "dog").symlink_to(tmp_path / "pool" / "dog")
    with pytest.raises(UserError, match="train/dog/all: leads to a folder above it"):
        open_dataset(str(folder))


def test_a_link_out_of_a_linked_class_back_to_the_set_is_refused(
    folder: Path, tmp_path: Path, make_classes: Make
) -> None:
    make_classes(tmp_path / "pool", {"dog": 2})
    (tmp_path / "pool" / "dog" / "set").symlink_to(folder)
    (folder / "train" / "dog").symlink_to(tmp_path / "pool" / "dog")
    with pytest.raises(UserError, match="train/dog/set: leads to a folder above it"):
        open_dataset(str(folder))


def test_a_link_to_what_holds_the_validation_images_is_refused(
    folder: Path, tmp_path: Path, make_classes: Make
) -> None:
    make_classes(tmp_path / "pool" / "checked", {"ant": 2})
    (folder / "train" / "ant" / "pool").symlink_to(tmp_path / "pool")
    with pytest.raises(UserError, match="train/ant/pool: leads to images of checked/"):
        open_dataset(str(folder), val=str(tmp_path / "pool" / "checked"))


def test_a_validation_split_that_is_the_training_split_is_refused(folder: Path) -> None:
    (folder / "val").rename(folder / "other")
    (folder / "val").symlink_to("train")
    with pytest.raises(UserError, match="val: is what is trained on"):
        open_dataset(str(folder))


def test_what_is_called_an_image_and_is_no_file_is_named(folder: Path) -> None:
    os.mkfifo(folder / "train" / "ant" / "pipe.jpg")
    with pytest.raises(UserError, match=r"train/ant/pipe.jpg: is no file"):
        open_dataset(str(folder))


def test_a_link_to_itself_is_named(folder: Path) -> None:
    (folder / "train" / "ant" / "self").symlink_to("self")
    with pytest.raises(UserError, match="train/ant/self: cannot be read"):
        open_dataset(str(folder))


def test_what_is_hidden_or_made_by_systems_is_ignored_and_counted_once(folder: Path) -> None:
    for place in (folder, folder / "train", folder / "train" / "ant"):
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
            (place / name).mkdir()
            (place / name / "0.png").write_bytes((folder / "train" / "ant" / "0.png").read_bytes())
        for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._0.png"):
            (place / name).write_bytes(b"x")
    data = open_dataset(str(folder))
    assert data.train.classes == ["ant", "bee", "cat"]
    assert np.bincount(data.train.labels).tolist() == [4, 4, 4]
    (note,) = data.notes
    assert note.startswith("train: hidden or made by systems, and ignored: 14, such as .DS_Store")
    assert open_dataset(str(folder)).notes == data.notes


def test_the_index_beside_the_data_is_no_stranger(tmp_path: Path, make_classes: Make) -> None:
    make_classes(tmp_path / "set", {"ant": 4, "bee": 4})
    (tmp_path / "set" / ".hvd-lb-index").mkdir()
    for _ in range(2):
        assert open_dataset(str(tmp_path / "set"), val_fraction=0.5).notes == ()
