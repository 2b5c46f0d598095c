"""Who asks a bucket: what the environment says, as the providers' own programs understand it, else nobody."""

from __future__ import annotations

import configparser
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_METADATA = ("169.254.169.254", 80)  # of AWS and Google alike: tells a machine of theirs its role
_METADATA_SECONDS = 1.0

_AWS_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_AWS_NATIVE = (  # what the library looks for by itself
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_GOOGLE_NATIVE = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
)
_GOOGLE_FILE = "~/.config/gcloud/application_default_credentials.json"
_ANONYMOUS = "no credentials"


@dataclass(frozen=True)
class Credentials:
    """`source` says where they are from, for messages; `config` is what the library does not find by itself."""

    source: str
    config: Mapping[str, str | bool]


def credentials(scheme: str) -> Credentials:
    """For s3, gs or az; of the last the library finds all."""
    if scheme == "s3":
        return _of_aws()
    if scheme == "gs":
        return _of_google()
    return Credentials("AZURE_STORAGE_… variables", {})


def _of_aws() -> Credentials:
    config: dict[str, str | bool] = {}
    endpoint = next((os.environ[name] for name in _AWS_ENDPOINTS if os.environ.get(name)), None)
    if endpoint:
        config["endpoint"] = endpoint
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("true", "1"):
        return Credentials(f"{_ANONYMOUS} (AWS_SKIP_SIGNATURE)", {**config, "skip_signature": True})
    if name := _first(_AWS_NATIVE):
        return Credentials(name, config)
    profile = os.environ.get("AWS_PROFILE", "default")
    keys, settings = _aws_profile(profile)
    if "region" in settings and not _first(("AWS_REGION", "AWS_DEFAULT_REGION")):
        config["region"] = settings["region"]
    if "aws_access_key_id" in keys and "aws_secret_access_key" in keys:
        config["access_key_id"] = keys["aws_access_key_id"]
        config["secret_access_key"] = keys["aws_secret_access_key"]
        if "aws_session_token" in keys:
            config["session_token"] = keys["aws_session_token"]
        return Credentials(f"profile {profile!r} of ~/.aws", config)
    if _on_their_machine():
        return Credentials("this machine's role", config)
    why = f"; profile {profile!r} has no keys of its own: aws configure export-credentials --format env"
    return Credentials(_ANONYMOUS + (why if settings else ""), {**config, "skip_signature": True})


def _aws_profile(name: str) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """A profile as both files in ~/.aws have it, and as ~/.aws/config has it; empty where there is none."""
    files = (
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"),
    )
    found: list[dict[str, str]] = []
    for file, section in zip(files, (name, name if name == "default" else f"profile {name}"), strict=True):
        parser = configparser.RawConfigParser()
        try:
            parser.read(os.path.expanduser(file), "utf-8")
        except (configparser.Error, UnicodeError):
            parser.clear()
        found.append(dict(parser[section]) if parser.has_section(section) else {})
    secret, settings = found
    return {**settings, **secret}, settings


def _of_google() -> Credentials:
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        url = emulator if "://" in emulator else f"http://{emulator}"
        return Credentials(f"{_ANONYMOUS} (STORAGE_EMULATOR_HOST)", {"base_url": url, "skip_signature": True})
    if name := _first(_GOOGLE_NATIVE):
        return Credentials(name, {})
    if Path(_GOOGLE_FILE).expanduser().is_file():
        return Credentials(_GOOGLE_FILE, {})
    if _on_their_machine():
        return Credentials("this machine's service account", {})
    return Credentials(_ANONYMOUS, {"skip_signature": True})


def _first(names: tuple[str, ...]) -> str | None:
    return next((name for name in names if os.environ.get(name)), None)


def _on_their_machine() -> bool:
    try:
        socket.create_connection(_METADATA, _METADATA_SECONDS).close()
    except OSError:
        return False
    return True
