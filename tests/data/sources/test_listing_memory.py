"""What a look at a source takes in memory: little more than the names, also on the way."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from hvd_lb.data.sources.folders import FolderSource
from hvd_lb.data.sources.lists import ListSource
from hvd_lb.data.sources.source import Source

CLASSES, EACH = 100, 60
FILES = CLASSES * EACH


@pytest.mark.slow
def test_listing_takes_few_bytes_a_file_besides_its_name(tmp_path: Path) -> None:
    """It took 155 for a folder and 470 for a list. 22 and 43 for 20,000 files, of which some are for all of them."""
    paths = [f"c{number:02}/{file:06}.png" for number in range(CLASSES) for file in range(EACH)]
    for number in range(CLASSES):
        (tmp_path / "set" / f"c{number:02}").mkdir(parents=True)
    for path in paths:
        (tmp_path / "set" / path).touch()
    records = "".join(f"{path},{path[:3]}\n" for path in paths)
    (tmp_path / "set.csv").write_text("path,label\n" + records.replace("c", "set/c"))
    folder, listed = FolderSource(tmp_path / "set", tmp_path, "set"), ListSource(tmp_path / "set.csv")
    assert beyond_names(folder, sum(map(len, paths))) < 64
    assert beyond_names(listed, sum(len(f"set/{path}") for path in paths)) < 100


def beyond_names(source: Source, names: int) -> float:
    """Bytes a file at most, without those of the names."""
    source.listing()
    tracemalloc.start()
    source.listing()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (peak - names) / FILES
