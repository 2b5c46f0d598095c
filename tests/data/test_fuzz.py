"""1,000 broken JPEG and PNG files through index, `verify` and training: no crash, no hang, bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from broken import mutants
from loader_cases import KINDS

pytestmark = pytest.mark.slow

COUNT = 1000
MOST_MEMORY = 2_500_000_000
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for number, (name, content) in enumerate(mutants(COUNT)):
        path = root / ("val" if number % 7 == 6 else "train") / "ab"[number // 12 % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.fixture(scope="module", params=KINDS)
def seen(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = str(tmp_path_factory.mktemp("cache"))
    ended = subprocess.run(
        [sys.executable, HERE / "fuzz_run.py", folder, request.param],
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        cwd=HERE.parents[1],
        env={**os.environ, "HVD_LB_CACHE": cache, "PYTHONPATH": str(HERE.parents[1])},
        timeout=400,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_every_position_is_served_and_every_case_told_once(seen: dict[str, Any]) -> None:
    assert sum(seen["images"].values()) == COUNT
    for of, split in (("train", "train"), ("eval", "val")):
        told = [record["image"] for record in seen["bad"] if record["of"] == of]
        assert sorted(told) == seen["failed"][split]
        places = {
            (record["step"], record["worker"], record["position"])
            for record in seen["bad"]
            if record["of"] == of
        }
        assert len(places) == len(told)
    bad = {split: set(failed) for split, failed in seen["failed"].items()}
    assert all(
        record["stand_in"] not in bad["val" if record["of"] == "eval" else "train"] for record in seen["bad"]
    )
    assert seen["evaluated"] == seen["images"]["val"] - len(bad["val"])
    assert seen["finite"]


def test_memory_is_bounded(seen: dict[str, Any]) -> None:
    """Bombs of 30,000 × 30,000 pixels and headers of up to 60,000 × 60,000 are among the files."""
    assert seen["peak"] < MOST_MEMORY


def test_what_is_whole_is_used_and_what_is_broken_is_not(seen: dict[str, Any], folder: Path) -> None:
    for split in ("train", "val"):
        names = sorted(path.relative_to(folder / split) for path in (folder / split).glob("*/*"))
        ways = [name.stem.partition("-")[2] for name in names]
        failed = {ways[image] for image in seen["failed"][split]}
        assert failed >= {"empty", "random_bytes", "bomb", "cut_short"}
        assert "whole" not in failed
        assert all(
            image in seen["failed"][split]
            for image, way in enumerate(ways)
            if way in ("empty", "random_bytes", "bomb")
        )
