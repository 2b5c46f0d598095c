"""A packed data set, a web server that has it, and an S3 server."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from image_files import photo
from real_runs import until
from web_server import StaticServer, serving

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.prepare.pack import pack
from hvd_lb.data.remote import store

_FAST = (0.001, 0.002)


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No credentials but those of the test, and nothing asked of the machine that runs it."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "HVD_LB_URL", "HVD_LB_DATA_CACHE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HVD_LB_URL_QUERIES", "{}")  # restored, whatever a test makes of it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("hvd_lb.data.remote.credentials._on_their_machine", lambda: False)
    monkeypatch.setattr(store, "OPEN_AGAIN_SECONDS", _FAST)
    monkeypatch.setattr(store, "READ_AGAIN_SECONDS", _FAST)
    store._connected.cache_clear()
    yield
    store._connected.cache_clear()


@pytest.fixture(scope="session")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `hvd-lb data pack` makes of 33 + 33 images, in some shards."""
    folder = tmp_path_factory.mktemp("packed")
    for split, name, i in itertools.product(("train", "val"), ("ant", "bee", "cat"), range(11)):
        place = folder / "set" / split / name / (f"{i}.JPEG" if i % 2 else f"{i}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        photo(20 + i, 30, i).save(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVD_LB_CACHE", str(folder / "cache"))
        pack(open_dataset(str(folder / "set")), folder / "packed", source="set", shard_bytes=30_000)
    return folder / "packed"


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    """A copy of it: WWW/packed."""
    return Path(shutil.copytree(packed_once, tmp_path / "www" / "packed"))


@pytest.fixture
def web(packed: Path) -> Iterator[StaticServer]:
    with serving(packed.parent) as server:
        yield server


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an empty one."""
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    until(partial(listens, host, port), 30, every=0.05)
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, packed: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The packed folder as s3://pictures/some/packed at an S3 server; its URL."""
    obstore = pytest.importorskip("obstore")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    urlopen(Request(f"{s3_server}/moto-api/reset", method="POST")).close()
    urlopen(Request(f"{s3_server}/pictures", method="PUT")).close()
    bucket = store._connected("s3://pictures", "")
    for path in packed.iterdir():
        obstore.put(bucket, f"some/packed/{path.name}", path.read_bytes())
    return s3_server
