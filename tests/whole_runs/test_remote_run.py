"""A run from a server is the disk's, to the bit; it goes on at either place, and a signed URL's query is nowhere."""

from __future__ import annotations

import stat
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from real_runs import Start, finish
from web_server import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("obstore") is None, reason="needs obstore"),
]

RUN = (
    "--gpus",
    4,
    "--per-gpu-batch",
    8,
    "--processes",
    1,
    "--reproducible",
    "--device",
    "cpu",
    "--model",
    "resnet8",
)
QUERY = "sig=Top%2FSecret"


def test_a_server_gives_the_disks_run(
    start: Start, hvd_lb: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    finish(start("data", "pack", "digits", tmp_path / "www" / "packed", "--shard-size", "500kB"))
    disk, both = tmp_path / "disk", tmp_path / "both"
    with serving(tmp_path / "www", secret=QUERY) as web:
        url = f"{web.url}/packed?{QUERY}"
        finish(start("train", "--data", tmp_path / "www" / "packed", *RUN, "--steps", 8, "--output", disk))
        web.faults = [503, "cut", "short"]
        told = finish(start("train", "--data", url, *RUN, "--steps", 4, "--output", both))
        telling = [path for path in files_but(tmp_path / "www") if b"Secret" in path.read_bytes()]
        web.secret = "expired"
        told += finish(start("data", "info", url), status=2)
    assert "access denied (403 Forbidden)" in told[-1]
    assert not any("Secret" in text for text in told)
    assert telling == [both / "logs" / "job.json"]
    assert stat.S_IMODE(telling[0].stat().st_mode) == 0o600
    finish(start("train", "--data", tmp_path / "www" / "packed", *RUN, "--steps", 8, "--output", both))
    said = hvd_lb("compare", disk, both)
    assert said.out.splitlines()[-1] == "bitwise identical", said.out


def files_but(folder: Path) -> list[Path]:
    """All beside `folder`, but what is in it."""
    return [path for path in folder.parent.rglob("*") if path.is_file() and not path.is_relative_to(folder)]
