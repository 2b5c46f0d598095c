"""Data sets at servers: the same to the bit as on a disk, each byte fetched once, and a line for all that is amiss."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tars import samples, write_tar
from web_server import StaticServer

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import Dataset
from hvd_lb.data.index.dataset import IndexedDataset, index_splits
from hvd_lb.data.remote import objects, store
from hvd_lb.data.remote.address import Address
from hvd_lb.data.spec import absolute_spec, data_folder
from hvd_lb.errors import UserError


def contents(data: Dataset, seed: int = 0) -> list[bytes]:
    """All images, in a random order."""
    return [
        split.read(np.array([image]))[0].tobytes()
        for split in (data.train, data.val)
        for image in np.random.default_rng(seed).permutation(len(split))
    ]


def ranges(packed: Path, folder: str) -> str:
    count = len(list(packed.glob("train-*.tar")))
    return f"{folder}/train-{{000000..{count - 1:06d}}}.tar"


def test_a_web_server_has_the_same_data_set(packed: Path, web: StaticServer) -> None:
    local = open_dataset(str(packed))
    for spec in (f"{web.url}/packed/", f"{web.url}/packed", f"{web.url}/packed/manifest.json"):
        remote = open_dataset(spec)
        assert remote.name == "packed"
        assert remote.fingerprint() == local.fingerprint()
        assert contents(remote) == contents(local)
        assert isinstance(remote, IndexedDataset)
        assert remote.train.most_threads == 256
    named = open_dataset(ranges(packed, f"{web.url}/packed"), val=f"{web.url}/packed/val-000000.tar")
    assert named.train.labels.tolist() == local.train.labels.tolist()
    assert named.train.name(3) == local.train.name(3).replace(str(packed), f"{web.url}/packed")


def test_a_bucket_has_the_same_data_set(packed: Path, s3: str) -> None:
    local = open_dataset(str(packed))
    for spec in (
        "s3://pictures/some/packed",
        ranges(packed, "s3://pictures/some/packed"),
        "S3://pictures/some/packed/train-*.tar",
    ):
        remote = open_dataset(spec)
        assert remote.fingerprint() == local.fingerprint()
        assert contents(remote) == contents(local)


def test_every_byte_is_fetched_once(packed: Path, web: StaticServer) -> None:
    spec = f"{web.url}/packed"
    contents(open_dataset(spec))
    sent = sum(request.sent for request in web.reads if request.path.endswith(".tar"))
    shards = list(packed.glob("*.tar"))
    assert sent <= sum(path.stat().st_size for path in shards) + len(shards)  # a byte to see what each is
    web.requests.clear()
    index_splits(spec)
    assert {request.path for request in web.requests} == {
        f"/packed/{path.name}" for path in packed.iterdir()
    } - {"/packed/classes.json"}
    present = open_dataset(spec)
    web.requests.clear()
    contents(present)
    contents(open_dataset(spec, expected=present.fingerprint()), seed=1)  # another process, another epoch
    assert [request for request in web.reads if request.path.endswith(".tar")] == []


@pytest.mark.parametrize("limit", ["", "0"])
def test_what_is_read_holds_its_own_bytes_only(
    limit: str, packed: Path, web: StaticServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the megabyte that it came in: read-ahead is bounded by the bytes of images."""
    monkeypatch.setenv("HVD_LB_DATA_CACHE", limit)
    data = open_dataset(f"{web.url}/packed")
    shutil.rmtree(os.environ["HVD_LB_CACHE"] + "/remote", ignore_errors=True)
    data = open_dataset(f"{web.url}/packed")
    for _ in range(2):  # from the server, from the cache
        (content,) = data.train.read(np.array([3]))
        held = content if content.base is None else content.base
        assert memoryview(held).nbytes == len(content)


def test_without_a_cache_exactly_the_images_are_fetched(
    packed: Path, web: StaticServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HVD_LB_DATA_CACHE", "0")
    data = open_dataset(f"{web.url}/packed")
    web.requests.clear()
    for _ in range(2):
        web.requests.clear()
        images = contents(data)
        assert sorted(request.sent for request in web.reads) == sorted(map(len, images))
    assert not (tmp_path / "cache" / "remote").exists()


def test_a_small_cache_keeps_the_first_shards(
    packed: Path, web: StaticServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = (packed / "train-000000.tar").stat().st_size
    monkeypatch.setenv("HVD_LB_DATA_CACHE", f"{(first + 1) / 1e3}kB")
    data = open_dataset(f"{web.url}/packed")
    contents(data)
    web.requests.clear()
    contents(data)
    assert {request.path for request in web.reads} == {
        f"/packed/{path.name}" for path in packed.glob("*.tar") if path.name != "train-000000.tar"
    }


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "short", "range"])
def test_what_passes_is_waited_out(fault: int | str, packed: Path, web: StaticServer) -> None:
    expected = contents(open_dataset(str(packed)))
    open_dataset(f"{web.url}/packed")
    shutil.rmtree(os.environ["HVD_LB_CACHE"] + "/remote")
    again = open_dataset(f"{web.url}/packed")
    web.faults = [fault, fault]
    assert contents(again) == expected
    assert not web.faults


def test_a_stalled_server_is_given_up_and_asked_again(
    packed: Path, web: StaticServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "TIMEOUT_SECONDS", 0.3)
    open_dataset(f"{web.url}/packed")
    shutil.rmtree(os.environ["HVD_LB_CACHE"] + "/remote")
    data = open_dataset(f"{web.url}/packed")
    web.faults = ["stall"]
    assert contents(data) == contents(open_dataset(str(packed)))
    monkeypatch.setenv("HVD_LB_DATA_CACHE", "0")
    web.faults, web.always, web.stall_seconds = [], "stall", 1.0
    with pytest.raises(UserError, match=r"\.tar: cannot be read \(no answer in 0.3 s, 3 times\)"):
        open_dataset(f"{web.url}/packed/train-000000.tar", val=f"{web.url}/packed/val-000000.tar")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (503, r"cannot be read \(503 Service Unavailable, 3 times\)"),
        (403, r"access denied \(403 Forbidden\) without a signed URL"),
        (404, r"is not there \(404 Not Found\)"),
        (400, r"cannot be read \(400 Bad Request\)"),
        (416, r"is shorter than it was, or empty \(416 Range Not Satisfiable\)"),
        ("cut", r"cannot be read \(the connection was cut, 3 times\)"),
        ("range", r"cannot be read \(another range than was asked for, 3 times\)"),
        ("whole", "ignores ranges"),
        ("to http://nobody.invalid/x", r"cannot be read \(no such host, 3 times\)"),
    ],
)
def test_what_stays_ends_the_run_with_the_object(
    fault: int | str, said: str, web: StaticServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVD_LB_DATA_CACHE", "0")
    data = open_dataset(f"{web.url}/packed")
    web.always = fault
    web.requests.clear()
    with pytest.raises(UserError, match=f"^{web.url}/packed/train-000000.tar: .*{said}") as raised:
        data.train.read(np.array([0]))
    assert "\n" not in str(raised.value)
    assert len(web.requests) == (3 if "3 times" in said else 1)


def test_fewer_bytes_than_were_asked_for_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the library makes of an answer."""
    address, answers = Address.of("s3://bucket/x"), [b"12", b"12345"]
    meta = {"e_tag": "x", "size": 99}
    answer = SimpleNamespace(get=lambda *_, **__: SimpleNamespace(meta=meta, bytes=lambda: answers.pop(0)))
    monkeypatch.setattr(store, "_store", lambda _: answer)
    assert store.part(address, 0, 5, store._state(meta)).tobytes() == b"12345"
    answers += [b"12"] * 3
    with pytest.raises(UserError, match=r"x: cannot be read \(fewer bytes than were asked for, 3 times\)"):
        store.part(address, 0, 5, store._state(meta))


def test_redirects_are_followed(packed: Path, web: StaticServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_DATA_CACHE", "0")
    data = open_dataset(f"{web.url}/packed")
    web.faults = [f"to {web.url}/packed/train-000000.tar"]
    assert (
        data.train.read(np.array([0]))[0].tobytes()
        == open_dataset(str(packed)).train.read(np.array([0]))[0].tobytes()
    )


def test_an_object_that_changes_is_seen(
    packed: Path, web: StaticServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVD_LB_DATA_CACHE", "0")
    data = open_dataset(f"{web.url}/packed")
    os.utime(packed / "train-000000.tar", (1, 1))  # the same bytes, another ETag
    with pytest.raises(UserError, match="train-000000.tar: was changed while in use"):
        data.train.read(np.array([0]))
    anew = open_dataset(f"{web.url}/packed")
    assert contents(anew) == contents(open_dataset(str(packed)))


def test_servers_without_etags_have_times(packed: Path, web: StaticServer) -> None:
    web.etags = False
    assert open_dataset(f"{web.url}/packed").fingerprint() == open_dataset(str(packed)).fingerprint()


def test_wrong_bytes_are_never_used(packed: Path, web: StaticServer) -> None:
    """Of the right length, with the right ETag: the checksum of the image tells, and the cache forgets them."""
    local = contents(open_dataset(str(packed)))
    open_dataset(f"{web.url}/packed")
    shutil.rmtree(os.environ["HVD_LB_CACHE"] + "/remote")
    data = open_dataset(f"{web.url}/packed")
    web.faults = ["wrong"]
    assert contents(data) == local
    web.always = "wrong"
    shutil.rmtree(os.environ["HVD_LB_CACHE"] + "/remote")
    data = open_dataset(f"{web.url}/packed")
    with pytest.raises(UserError, match="is another file than when it was indexed"):
        contents(data)


def test_a_signed_url_works_and_is_shown_to_nobody(
    packed: Path, web: StaticServer, capfd: pytest.CaptureFixture[str]
) -> None:
    web.secret = "sig=Top%2FSecret&se=1"
    spec = f"{web.url}/packed/?{web.secret}"
    data = open_dataset(spec)
    assert data.fingerprint() == open_dataset(str(packed)).fingerprint()
    shown = absolute_spec(ranges(packed, f"{web.url}/packed") + f"?{web.secret}")
    assert shown == ranges(packed, f"{web.url}/packed")
    assert json.loads(os.environ["HVD_LB_URL_QUERIES"]) == {f"{web.url}/packed/": web.secret}
    assert contents(open_dataset(shown, val=f"{web.url}/packed/val-000000.tar"))  # as a rank has it
    web.secret = "another"
    store._connected.cache_clear()
    shutil.rmtree(os.environ["HVD_LB_CACHE"] + "/remote")
    with pytest.raises(
        UserError, match="access denied .* with the query of a signed URL; has it expired"
    ) as raised:
        open_dataset(spec)
    kept = [path.read_bytes() for path in Path(os.environ["HVD_LB_CACHE"]).rglob("*") if path.is_file()]
    for text in (str(raised.value).encode(), capfd.readouterr().err.encode(), *kept):
        assert b"Secret" not in text


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{url}/empty", "has no manifest.json, and web servers list nothing; .*train-{000..127}.tar"),
        ("{url}/packed/train.csv", "lists of single images are read from file systems only"),
        ("{url}/packed/train-0.tar.gz", "compressed shards have no offsets"),
        ("{url}/packed/train-00009{{0..3}}.tar", r"train-000090.tar: is not there \(404 Not Found\)"),
        ("http://user:password@host/x.tar", r"http://…@host: passwords in addresses"),
        ("http:///x.tar", "expected s3://BUCKET/"),
        ("https:// host/x/train-0.tar", "https:// host: cannot be opened"),
        ("http://host:99999/x/train-0.tar", "http://host:99999: cannot be opened"),
        ("http://127.0.0.1:9/x/train-0.tar", r"cannot be read \(no connection, 3 times\)"),
        ("http://nobody.invalid/x/train-0.tar", r"cannot be read \(no such host, 3 times\)"),
    ],
)
def test_addresses_of_nothing(spec: str, said: str, web: StaticServer) -> None:
    with pytest.raises(UserError, match=said) as raised:
        open_dataset(spec.format(url=web.url), val_fraction=0.5)
    assert "\n" not in str(raised.value)
    assert "password@" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "s3://pictures/empty",
            "s3://pictures/empty: holds no train-NUMBER.tar; give what `hvd-lb data pack` wrote",
        ),
        ("s3://pictures/some/packed/train-9.tar", r"train-9.tar: is not there \(404 Not Found\)"),
        ("s3://pictures/some/packed/other-*.tar", r"s3://pictures/some/packed/other-\*.tar: no such file"),
        ("s3://no-such-bucket/x", r"s3://no-such-bucket/x: is not there \(404 Not Found, NoSuchBucket\)"),
    ],
)
def test_nothing_in_a_bucket(spec: str, said: str, s3: str) -> None:
    with pytest.raises(UserError, match=said):
        open_dataset(spec, val_fraction=0.5)


def test_who_was_refused_is_told(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store._connected.cache_clear()
    with pytest.raises(
        UserError,
        match=r"^s3://pictures/.*: access denied \(403 Forbidden.*\) with no credentials; ranks.*--env",
    ):
        open_dataset("s3://pictures/some/packed")
    (tmp_path / "home" / ".aws").mkdir(parents=True)
    (tmp_path / "home" / ".aws" / "credentials").write_text(
        "[own]\naws_access_key_id = key\naws_secret_access_key = secret\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "own")
    store._connected.cache_clear()
    assert isinstance(open_dataset("s3://pictures/some/packed"), IndexedDataset)


def test_without_the_library_one_line_says_what_to_install(
    web: StaticServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(
        UserError, match=r"^s3://b: reading from servers needs obstore; pip install 'hvd-lb\[remote\]'"
    ):
        open_dataset("s3://b/c")


def test_a_full_disk_ends_the_cache_and_nothing_else(
    packed: Path, web: StaticServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int, content: memoryview, offset: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hvd_lb.data.remote.blocks._write", full)
    monkeypatch.setattr("hvd_lb.data.remote.blocks._told", set())  # by other tests of this process
    assert contents(open_dataset(f"{web.url}/packed")) == contents(open_dataset(str(packed)))
    assert (
        capfd.readouterr().err.count("the cache of remote data takes no more (No space left on device)") == 1
    )


def test_where_data_lie(tmp_path: Path) -> None:
    assert data_folder("s3://bucket/x") is None
    assert absolute_spec("GS://bucket//x/") == "gs://bucket/x"
    assert absolute_spec("https://host/a%20b/") == "https://host/a%20b"


def test_shards_of_others_and_labels_by_name(tmp_path: Path, web: StaticServer) -> None:
    """Without a manifest, with large gaps, in spans that are smaller than the shard."""
    folder = tmp_path / "www" / "other"
    names = "abc"
    for split in ("train", "val"):
        write_tar(
            folder / f"x {split}-0.tar",
            [*samples(names, b"bee"), ("pad.bin", bytes(3_000_000)), *samples("d", b"ant")],
        )
    (folder / "classes.txt").write_text("bee\nant\n")
    local = open_dataset(str(folder / "x train-0.tar"), val=str(folder / "x val-0.tar"))
    spec = f"{web.url}/other/x%20train-0.tar"
    remote = open_dataset(spec, val=spec.replace("train", "val"))
    assert remote.fingerprint()[:33] == local.fingerprint()[:33]
    assert contents(remote) == contents(local)
    assert sum(request.sent for request in web.reads) < 2 * 2.2 * objects.SPAN
    assert remote.train.classes == ["bee", "ant"]
