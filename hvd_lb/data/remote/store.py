"""Objects of S3, Google Cloud Storage, Azure and web servers, by ranges of bytes and with patience, through obstore.

Every answer is compared with what was asked for: its range, its length, and the object's ETag. So what comes is a
piece of the very object that was indexed, or an error that names it.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from hvd_lb.data.remote.address import Address, without_query
from hvd_lb.data.remote.credentials import credentials
from hvd_lb.errors import UserError

T = TypeVar("T")

#: How long is waited before each further try to open something, and to read from what was opened.
OPEN_AGAIN_SECONDS = (0.2, 0.8, 3.0)
READ_AGAIN_SECONDS = (*OPEN_AGAIN_SECONDS, 6.0, 12.0, 24.0)
TIMEOUT_SECONDS = 30.0
"""For one answer. A megabyte takes so long at 35 kB/s."""

_CONNECT_SECONDS = 5.0
_STATUS = re.compile(r"status code: (\d+)([ A-Za-z]*)")
_CODE = re.compile(r"<Code>(\w+)</Code>")  # what S3 says beside the status
_AGAIN = {408, 425, 429}
_DENIED, _GONE, _SHORTER = {401, 403}, {404, 410}, 416


@dataclass(frozen=True)
class ObjectState:
    """Which object it is: bytes, and a number of 63 bits that changes with its ETag, else with its time of change."""

    size: int
    tag: int


class Missing(UserError):
    """There is no such object."""


class Denied(UserError):
    """The server does not give it."""


def state(address: Address) -> ObjectState:
    """What an object is now. Missing, Denied, UserError."""
    store = _store(address)
    if address.is_bucket:
        return _state(_patiently(address, OPEN_AGAIN_SECONDS, lambda: store.head(address.key)))
    # A signed URL is often for GET alone, and so it is seen at once whether the server knows ranges.
    first = {"range": (0, 1)}
    return _state(_patiently(address, OPEN_AGAIN_SECONDS, lambda: store.get(address.key, options=first).meta))


def names_in(folder: Address) -> list[str]:
    """The names of the objects that lie in a folder of a bucket, without those in deeper ones. Denied, UserError."""
    store = _store(folder)
    listed = _patiently(folder, OPEN_AGAIN_SECONDS, lambda: store.list_with_delimiter(folder.key or None))
    return [str(found["path"]).rpartition("/")[2] for found in listed["objects"]]


def content(address: Address) -> bytes:
    """All of a small object. Missing, Denied, UserError."""
    store = _store(address)
    return _patiently(address, OPEN_AGAIN_SECONDS, lambda: bytes(store.get(address.key).bytes()))


def part(address: Address, start: int, stop: int, known: ObjectState) -> np.ndarray:
    """uint8 (stop − start,): those bytes of the object that `known` was. UserError where it is another now."""
    store = _store(address)

    def read() -> np.ndarray:
        answer = store.get(address.key, options={"range": (start, stop)})
        if _state(answer.meta) != known:
            raise UserError(
                f"{address}: was changed while in use (its ETag or size is another); begin again with the objects as "
                "they are now, and write new ones under new names"
            )
        found = np.frombuffer(answer.bytes(), np.uint8)
        if len(found) != stop - start:
            raise _Short
        return found

    return _patiently(address, READ_AGAIN_SECONDS, read)


class _Short(Exception):
    """Fewer bytes than were asked for."""


def _state(meta: Mapping[str, Any]) -> ObjectState:
    mark = meta["e_tag"] or meta["last_modified"].isoformat()
    digest = hashlib.blake2b(mark.encode(), digest_size=8).digest()
    return ObjectState(int(meta["size"]), int.from_bytes(digest, "little") >> 1 or 1)


def _store(address: Address) -> Any:
    return _connected(address.server, "" if address.is_bucket else address.query)


@lru_cache
def _connected(server: str, query: str) -> Any:
    """The library's client, one for all objects of a server. UserError where the library is not installed."""
    try:
        import obstore.store as stores
    except ImportError as error:
        raise UserError(
            f"{server}: reading from servers needs obstore; pip install 'hvd-lb[remote]' here and where ranks run"
        ) from error
    options: Any = {
        "allow_http": True,
        "timeout": timedelta(seconds=TIMEOUT_SECONDS),
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
    }
    retry: Any = {"max_retries": 0}  # done here, for broken bodies too
    try:
        if server.startswith("http"):
            return stores.HTTPStore.from_url(
                f"{server}?{query}" if query else server, client_options=options, retry_config=retry
            )
        config: Any = dict(credentials(server.partition(":")[0]).config)
        return stores.from_url(server, config=config, client_options=options, retry_config=retry)
    except Exception as error:
        raise UserError(f"{server}: cannot be opened ({_reason(error)})") from error


def _patiently(address: Address, waits: tuple[float, ...], ask: Callable[[], T]) -> T:
    """What `ask` returns, asked again after what may pass. Missing, Denied, UserError."""
    for seconds in (*waits, None):
        try:
            return ask()
        except UserError:
            raise
        except Exception as error:  # the library's own types and Python's
            refused = _refusal(address, error)
            if refused is not None:
                raise refused from None  # its text has the whole URL
            if seconds is None:
                raise UserError(
                    f"{address}: cannot be read ({_reason(error)}, {len(waits) + 1} times)"
                ) from None
            time.sleep(seconds * random.uniform(0.75, 1.25))  # so that threads do not all come back at once
    raise AssertionError


def _refusal(address: Address, error: Exception) -> UserError | None:
    """What asking again would not change."""
    if type(error).__name__ == "NotSupportedError":
        return UserError(
            f"{address}: this server ignores ranges, so nothing can be read from within; copy the shards, or take "
            "another server"
        )
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in _GONE:
        return Missing(f"{address}: is not there ({_reason(error)})")
    if status in _DENIED:
        return Denied(f"{address}: access denied ({_reason(error)}) {_who(address)}")
    if status == _SHORTER:
        return UserError(
            f"{address}: is shorter than it was, or empty ({_reason(error)}); begin again with the objects as they are "
            "now, and write new ones under new names"
        )
    if status is None or status >= 500 or status in _AGAIN:
        return None
    return UserError(f"{address}: cannot be read ({_reason(error)}) {_who(address)}")


def _who(address: Address) -> str:
    if not address.is_bucket:
        return "with the query of a signed URL; has it expired?" if address.query else "without a signed URL"
    source = credentials(address.scheme).source
    hosts = "ranks on other hosts get variables by --env NAME"
    region = ", the region by AWS_REGION" if address.scheme == "s3" else ""
    return f"with {source}; {hosts}{region}"


def _status(error: Exception) -> int | None:
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def _reason(error: Exception) -> str:
    """In a few words, without the URL that the library's text has."""
    text = str(error)
    if found := _STATUS.search(text):
        code = _CODE.search(text)
        return f"{found[1]}{found[2].rstrip()}" + (f", {code[1]}" if code else "")
    if isinstance(error, _Short):
        return "fewer bytes than were asked for"
    for sign, meaning in (
        ("without LOCATION", "the bucket is in another region"),
        ("dns error", "no such host"),
        ("TimedOut", f"no answer in {TIMEOUT_SECONDS:g} s"),
        ("Requested", "another range than was asked for"),
        ("ConnectionReset", "the connection was cut"),
        ("kind: Connect", "no connection"),
        ("Interrupted", "the connection was cut"),
        ("kind: Body", "the connection was cut"),
        ("InvalidCertificate", "its certificate is not trusted"),
    ):
        if sign in text:
            return meaning
    return without_query(text.partition("\n")[0])
