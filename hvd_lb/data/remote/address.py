"""Addresses of objects and of the folders they lie in: s3://bucket/prefix, gs://, az://, https://host/path."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from hvd_lb.errors import UserError

SECRETS = "HVD_LB_URL_QUERIES"
"""The environment variable with the queries of signed URLs, by the folders they are for. Ranks get it with the job's
file, which its owner alone can read."""

_ADDRESS = re.compile(r"(s3|gs|az|https?)://([^/?#]*)/*([^?#]*)(?:\?([^#]*))?(?:#.*)?", re.IGNORECASE)
_BUCKET = re.compile(r"(s3|gs|az)://([^/]*)/*(.*)", re.IGNORECASE | re.DOTALL)  # where ? is a wildcard
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]+", re.IGNORECASE)


@dataclass(frozen=True)
class Address:
    """`server` is a bucket (s3://bucket) or a web server (https://host:port), `path` what lies there, without slashes
    at its ends and, of a URL, as it is written there. It is joined as a Path is, and has no secrets: it may be shown.
    """

    server: str
    path: str = ""

    @classmethod
    def of(cls, text: str) -> Address:
        """What a user wrote. The query of a signed URL is kept in the environment (`SECRETS`). UserError."""
        match = _BUCKET.fullmatch(text) or _ADDRESS.fullmatch(text)
        scheme, host, path, *rest = match.groups() if match else ("", "", "")
        if not host:
            raise UserError(f"{without_query(text)}: expected s3://BUCKET/…, gs://BUCKET/… or https://HOST/…")
        if "@" in host:
            raise UserError(
                f"{scheme}://…@{host.rpartition('@')[2]}: passwords in addresses are shown to others; give a signed "
                "URL, or make the files public inside your network"
            )
        address = cls(f"{scheme.lower()}://{host}", re.sub("//+", "/", path).strip("/"))
        if rest and rest[0]:
            folder = address if path.endswith("/") or not address.path else address.parent
            os.environ[SECRETS] = json.dumps({**_secrets(), f"{folder}/": rest[0]})
        return address

    @property
    def scheme(self) -> str:
        return self.server.partition(":")[0]

    @property
    def is_bucket(self) -> bool:
        """Whether the server can list what it has."""
        return not self.scheme.startswith("http")

    @property
    def key(self) -> str:
        """The object's name for its server."""
        return self.path if self.is_bucket else unquote(self.path)

    @property
    def query(self) -> str:
        """What a signed URL has after its question mark: a secret."""
        fitting = {folder: query for folder, query in _secrets().items() if f"{self}/".startswith(folder)}
        return fitting[max(fitting, key=len)] if fitting else ""

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2] or self.server.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        return Address(self.server, self.path.rpartition("/")[0])

    def __truediv__(self, name: str) -> Address:
        return Address(self.server, f"{self.path}/{name}" if self.path else name)

    def __str__(self) -> str:
        return f"{self.server}/{self.path}" if self.path else self.server


Place = Path | Address
"""Where data lie: on a file system, or at a server."""


def is_address(text: str) -> bool:
    """Whether it is of a kind that is read, and nothing here has that name."""
    return bool(re.match(r"(s3|gs|az|https?):/", text, re.IGNORECASE)) and not os.path.lexists(text)


def without_query(text: str) -> str:
    """A text, such as a word of a command line, as others may read it."""
    return _QUERY.sub(r"\1?…", text)


def _secrets() -> dict[str, str]:
    return dict(json.loads(os.environ.get(SECRETS) or "{}"))
