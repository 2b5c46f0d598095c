"""A packed data set, a web server that has it, and an S3 server."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from web_server import StaticServer, serving

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.prepare.pack import pack
from hvd_lb.data.remote import store

Make = Callable[..., Path]
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


@pytest.fixture
def packed(tmp_path: Path, make_dataset: Make) -> Path:
    """What `hvd-lb data pack` makes of 33 + 33 images, in some shards."""
    folder = tmp_path / "www" / "packed"
    pack(open_dataset(str(make_dataset(tmp_path / "set", 11))), folder, source="set", shard_bytes=30_000)
    return folder


@pytest.fixture
def web(packed: Path) -> Iterator[StaticServer]:
    with serving(packed.parent) as server:
        yield server


@pytest.fixture
def s3(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The packed folder as s3://pictures/some/packed at an S3 server; its URL."""
    moto = pytest.importorskip("moto.server")
    obstore = pytest.importorskip("obstore")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    bucket = store._connected("s3://pictures", "")
    from urllib.request import Request, urlopen

    urlopen(Request(f"http://{host}:{port}/pictures", method="PUT")).close()
    for path in packed.iterdir():
        obstore.put(bucket, f"some/packed/{path.name}", path.read_bytes())
    yield f"http://{host}:{port}"
    server.stop()
