"""What opening a data set costs: a synthetic index of 10⁸ images, and a real folder beside torchvision's ImageFolder.

`python benchmarks/index.py [IMAGES [FILES]]` (100,000,000 and 20,000) writes an index of IMAGES rows, 60 bytes each, in
a temporary folder (TMPDIR says where) and opens it in processes of their own: one that has to make the fingerprint, a
rank, and a launching process. It prints seconds and growth of resident memory, and how much of that is the process's
own (the rest are pages of the file, shared by all). Then it indexes FILES small JPEGs as a folder and as shards, and
opens them again; torchvision's ImageFolder and PIL's headers are the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

CLASSES, VAL = 1000, 50_000
BATCHES = 300
_CHUNK = 1_000_000
_NAME = 12
_LONG_AGO = 10**18


def main(images: int, files: int) -> None:
    with tempfile.TemporaryDirectory(prefix="hvd-lb-index-") as temporary:
        folder = Path(temporary)
        os.environ["HVD_LB_CACHE"] = str(folder / "cache")
        if images:
            synthetic(folder, images)
        if files:
            real(folder, files)


def synthetic(folder: Path, images: int) -> None:
    began = time.perf_counter()
    write_index(folder, images)
    print(f"{images:,} images: index written in {time.perf_counter() - began:,.0f} s")
    for who in ("first", "rank", "launching process"):
        subprocess.run([sys.executable, __file__, "open", str(folder / "data"), who], check=True)


def write_index(folder: Path, images: int) -> None:
    """Class folders without files, and an index that says otherwise."""
    from hvd_lb.data.files.rows import Table
    from hvd_lb.data.index import store
    from hvd_lb.data.sources.folders import FolderSource
    from hvd_lb.data.sources.source import file_state

    for split, count in (("train", images), ("val", VAL)):
        root = folder / "data" / split
        for label in range(CLASSES):
            (root / f"{label:04d}").mkdir(parents=True)
        names = [".", *(f"{label:04d}" for label in range(CLASSES))]
        for name in names:
            os.utime(root / name, ns=(_LONG_AGO, _LONG_AGO))
        source = FolderSource(root, folder / "data", split)
        index = store.cached(source) / store.folder_name(f"{count:032x}")
        index.mkdir(parents=True)
        rows = write_rows(index, count)
        sample = store.facts_of(Table(names[1:], rows[: min(count, 1000)], np.zeros(0, np.uint8), [], None))
        counts = [
            len(range(label * count // CLASSES, (label + 1) * count // CLASSES)) for label in range(CLASSES)
        ]
        facts = {**asdict(sample), "images": count, "counts": counts, "kinds": {"JPEG": count}}
        (index / "facts.json").write_text(json.dumps(facts))
        store.write_watched(index, [file_state(root, name) for name in names])


def write_rows(index: Path, count: int) -> np.ndarray:
    from hvd_lb.data.files.rows import ROW

    rows = np.lib.format.open_memmap(index / "rows.npy", "w+", ROW, (count,))
    names = np.lib.format.open_memmap(index / "names.npy", "w+", np.uint8, (count * _NAME,))
    for start in range(0, count, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, count))
        part = rows[start : start + len(ids)]
        part["label"], part["name_at"] = ids * CLASSES // count, ids * _NAME
        part["size"], part["width"], part["height"] = 100_000 + ids % 977, 300 + ids % 401, 300 + ids % 307
        part["shard"], part["name_bytes"], part["orientation"], part["kind"] = -1, _NAME, 1, 1
        names[start * _NAME : (start + len(ids)) * _NAME] = ord("x")
    rows.flush()
    return rows


def resident() -> np.ndarray:
    """MB of this process: all, and its own."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return np.array([int(lines[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "RssAnon")])


def grown(before: np.ndarray) -> str:
    return "{:+.1f} MB ({:+.1f} its own)".format(*(resident() - before))


def open_it(folder: str, who: str) -> None:
    """In a process of its own: what opening adds to its memory."""
    from hvd_lb.data.dataset import open_dataset
    from hvd_lb.data.index.dataset import IndexedDataset
    from hvd_lb.plan.samples import SamplePlan

    expected = (
        None if who != "rank" else next(Path(os.environ["HVD_LB_CACHE"]).rglob("fingerprint-*")).read_text()
    )
    before, began = resident(), time.perf_counter()
    data = open_dataset(folder, expected=expected)
    assert isinstance(data, IndexedDataset)
    opened = time.perf_counter()
    data.fingerprint()
    known, opening, after = time.perf_counter(), grown(before), resident()
    for batch in np.random.default_rng(0).integers(len(data.train), size=(BATCHES, 32)):
        used = [of[batch] for of in (data.train.labels, data.train.widths, data.train.heights)]
        assert all(of.all() for of in used[1:])
        data.train.index.forget()  # as reading the images does
    SamplePlan(len(data.train), 256, 32, seed=0).image_ids(1, 100, 7)
    plan = time.perf_counter()
    figures = f"opened in {opened - began:.3f} s, fingerprint in {known - opened:.3f} s, {opening}"
    print(
        f"  {who}: {figures}; {BATCHES} random batches of 32 and a plan in {plan - known:.3f} s, {grown(after)}"
    )


def real(folder: Path, files: int) -> None:
    from PIL import Image
    from torchvision.datasets import ImageFolder

    from hvd_lb.data.dataset import open_dataset
    from hvd_lb.data.prepare.pack import pack

    root = folder / "real"
    for split, count in (("train", files), ("val", 100)):
        for label in range(100):
            (root / split / f"{label:03d}").mkdir(parents=True)
        for i in range(count):
            picture = Image.effect_noise((64 + i % 50, 48), 40)
            picture.save(root / split / f"{i % 100:03d}" / f"{i}.jpg")

    def sizes() -> list[tuple[int, int]]:
        return [Image.open(path).size for path, _ in ImageFolder(str(root / "train")).samples]

    print(f"{files:,} JPEGs in 100 folders")
    listed, peer = seconds(lambda: ImageFolder(str(root / "train"))), seconds(sizes)
    first, again = seconds(lambda: open_dataset(str(root))), seconds(lambda: open_dataset(str(root)))
    known = open_dataset(str(root)).fingerprint()
    rank = seconds(lambda: open_dataset(str(root), expected=known))
    pack(open_dataset(str(root)), folder / "shards", source="real", shard_bytes=5_000_000)
    scan, rescan = (seconds(lambda: open_dataset(str(folder / "shards"))) for _ in range(2))
    print(
        f"  torchvision: ImageFolder {listed:.2f} s, with sizes by PIL {peer:.2f} s ({files / peer:,.0f} images/s)"
    )
    print(f"  folder: first time {first:.2f} s ({files / first:,.0f} images/s, {peer / first:.2f} x PIL's speed), "
          f"again {again:.3f} s, rank {rank:.4f} s ({listed / rank:,.0f} x ImageFolder's speed)")  # fmt: skip
    print(
        f"  shards: first time {scan:.2f} s ({files / scan:,.0f} images/s, {peer / scan:.2f} x), again {rescan:.4f} s"
    )


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    if sys.argv[1:2] == ["open"]:
        open_it(*sys.argv[2:])
    else:
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("images", nargs="?", type=int, default=100_000_000)
        parser.add_argument("files", nargs="?", type=int, default=20_000)
        main(**vars(parser.parse_args()))
