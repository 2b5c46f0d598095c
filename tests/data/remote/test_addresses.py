"""Addresses as users write them, and who asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_lb.data.remote import credentials as module
from hvd_lb.data.remote.address import Address, is_address, without_query
from hvd_lb.data.remote.credentials import credentials


@pytest.mark.parametrize(
    ("text", "shown", "key"),
    [
        ("s3://bucket", "s3://bucket", ""),
        ("S3://Bucket//a//b/", "s3://Bucket/a/b", "a/b"),
        ("s3://bucket/a b%20?#.tar", "s3://bucket/a b%20?#.tar", "a b%20?#.tar"),  # keys are any text
        ("https://host:8000/a%20b/c.tar?x=1", "https://host:8000/a%20b/c.tar", "a b/c.tar"),
        ("http://host/a#part", "http://host/a", "a"),
        ("http://[::1]:80/a", "http://[::1]:80/a", "a"),
    ],
)
def test_what_is_written_and_meant(text: str, shown: str, key: str) -> None:
    address = Address.of(text)
    assert (str(address), address.key) == (shown, key)
    assert Address.of(shown) == address
    assert str(address / "x") == f"{shown}/x"


def test_queries_are_those_of_the_folder() -> None:
    Address.of("https://host/a/train-{0..9}.tar?one")
    Address.of("https://host/a/deep/?two=2&b")
    assert Address.of("https://host/a/train-3.tar").query == "one"
    assert Address.of("https://host/a").query == "one"
    assert Address.of("https://host/a/deep/x.tar").query == "two=2&b"
    assert Address.of("https://host/ab/x.tar").query == ""
    assert Address.of("https://host2/a/x.tar").query == ""


def test_what_others_may_read() -> None:
    line = "train --data=https://h/x.tar?sig=SECRET&e=1 --val 'http://h/y?SECRET'"
    assert without_query(line) == "train --data=https://h/x.tar?… --val 'http://h/y?…'"
    assert without_query("what? --lr 0.1") == "what? --lr 0.1"


def test_a_file_that_is_called_so_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_address("s3://x")
    (tmp_path / "s3:" / "x").mkdir(parents=True)
    assert not is_address("s3://x")
    assert not is_address("train-0.tar")


def source(scheme: str = "s3") -> tuple[str, dict[str, object]]:
    found = credentials(scheme)
    return found.source, dict(found.config)


def test_the_providers_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert source() == ("no credentials", {"skip_signature": True})
    monkeypatch.setattr(module, "_on_their_machine", lambda: True)
    assert source() == ("this machine's role", {})
    folder = tmp_path / "home" / ".aws"
    folder.mkdir(parents=True)
    (folder / "credentials").write_text(
        "[default]\naws_access_key_id=A\naws_secret_access_key=B%1\n[other]\n"
    )
    (folder / "config").write_text("[default]\nregion=eu-west-1\n[profile sso]\nsso_session=x\n")
    keys = {"access_key_id": "A", "secret_access_key": "B%1", "region": "eu-west-1"}
    assert source() == ("profile 'default' of ~/.aws", keys)
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert "region" not in source()[1]  # the library takes it from there
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/token")
    assert source() == ("AWS_WEB_IDENTITY_TOKEN_FILE", {})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "C")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://e")
    assert source() == ("AWS_ACCESS_KEY_ID", {"endpoint": "http://e"})
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert source() == (
        "no credentials (AWS_SKIP_SIGNATURE)",
        {"endpoint": "http://e", "skip_signature": True},
    )


def test_a_profile_without_keys_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home" / ".aws").mkdir(parents=True)
    (tmp_path / "home" / ".aws" / "config").write_text("[profile sso]\nsso_session=x\n")
    monkeypatch.setenv("AWS_PROFILE", "sso")
    assert "profile 'sso' has no keys of its own: aws configure export-credentials" in source()[0]


def test_googles_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert source("gs") == ("no credentials", {"skip_signature": True})
    own = tmp_path / "home" / ".config" / "gcloud" / "application_default_credentials.json"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert source("gs") == ("~/.config/gcloud/application_default_credentials.json", {})
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/x.json")
    assert source("gs") == ("GOOGLE_APPLICATION_CREDENTIALS", {})
