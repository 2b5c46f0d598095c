"""The rendezvous of both engines, an HTTP server where processes find each other, for those who know a secret.

Horovod's client (common/gloo/http_store.cc) pastes address, port, scope and key into a URL and knows no authentication;
but its address may go on with a path, `127.0.0.1:4711/SECRET/CLIENT`, in which case the port lands behind CLIENT. It
asks for one key at a time, on a new connection, again every 10 ms after a 404: so a GET is held here until its key is
there. Each member of a scope puts the keys `N` and `rank_N`, gets those of the others, and deletes N when all are
connected. That may happen again in the same process, so the keys of a client belong to its first, second, … meeting in
a scope: old addresses are never taken for new ones, however late they are deleted elsewhere. In an elastic job they
are counted anew in each generation, and who still asks in one that is over gets an error.

The Horovod that docker/build-horovod.sh builds asks for the keys 0 … p−1 at once, by the name `*p` (horovod.patch): so
a member of a scope makes three requests there, however many there are. Such a GET is held until all are there; when
it has been held long enough, it gets those that are.

The torch engine (`world.store`) asks in the same way, in a scope of its own, in which nothing is deleted.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections import defaultdict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

_HOLD_SECONDS = 10.0  # Horovod looks at its clock between two requests
_REQUEST_SECONDS = 10.0  # for a client to send its request, or to take its answer
_BACKLOG = 1024
_AT_ONCE = 128  # connections taken before other events have their turn
_RECEIVE = 1 << 18
_MOST_HEAD, _MOST_VALUE = 1 << 13, 1 << 24
_MOST_DIGITS = 6  # of a number of ranks
_REASONS = {
    200: b"OK",
    400: b"Bad Request",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    410: b"Gone",
}

Publish = Callable[[str, bytes | None], None]
"""Is told of a key that a client put (its value) or deleted (None)."""


class Rendezvous:
    """Listens on `address` alone, on a free port. Made and used in a running event loop."""

    def __init__(self, address: str = "127.0.0.1", publish: Publish = lambda key, value: None):
        self._publish = publish
        self._secret = secrets.token_urlsafe(24)
        self._values: dict[str, bytes] = {}
        self._held: dict[str, dict[socket.socket, asyncio.TimerHandle]] = defaultdict(dict)
        self._missing: dict[str, set[str]] = {}  # of which keys a held GET of all has to wait
        self._meetings: dict[tuple[str, str], int] = defaultdict(int)
        self._generation = 0  # the first one that is not over
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._listener = socket.create_server((address, 0), backlog=_BACKLOG)
        self._listener.setblocking(False)
        # Most requests are then there in whole when their connection is.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, int(_REQUEST_SECONDS))
        self._loop.add_reader(self._listener, self._accept)
        self.requests = 0  #: so far

    def environment(self, client: str, generation: int = 0) -> dict[str, str]:
        """What Horovod has to find in the environment of `client`, a name of its own for each, in a generation."""
        address, port = self._listener.getsockname()
        name = f"{client}.{generation}" if generation else client
        return {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": f"{address}:{port}/{self._secret}/{name}",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
        }

    def set(self, key: str, value: bytes | None) -> None:
        """A key as it is elsewhere; None: it is there no more."""
        if value is None or self._is_over(key):
            self._values.pop(key, None)
            return
        self._values[key] = value
        self._release(key, 200, value)
        for name, missing in list(self._missing.items()):
            missing.discard(key)
            if not missing:
                self._release(name, 200, self._all(name))

    def end(self, generation: int) -> None:
        """That generation, and all before, are over: their keys are forgotten, and who waits for one gets an error."""
        self._generation = max(self._generation, generation + 1)
        for key in [key for key in (*self._values, *self._held) if self._is_over(key)]:
            self._values.pop(key, None)
            self._release(key, 410)

    def _is_over(self, key: str) -> bool:
        return int(key.partition("/")[0]) < self._generation

    def close(self) -> None:
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for held in self._held.values():
            for client, timer in held.items():
                timer.cancel()
                client.close()
        for task in self._tasks:
            task.cancel()

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptor is free: those that wait are taken later
                self._loop.remove_reader(self._listener)
                self._loop.call_later(0.1, self._loop.add_reader, self._listener, self._accept)
                return
            client.setblocking(False)
            try:
                received = client.recv(_RECEIVE)
                request = _parse(received)
            except BlockingIOError:
                self._start(self._read(client, b""))
            except OSError:
                client.close()
            except ValueError:
                self._answer(client, 400)
            else:
                if request:
                    self._handle(client, *request)
                else:
                    self._start(self._read(client, received))

    async def _read(self, client: socket.socket, received: bytes) -> None:
        """A request that comes in parts."""
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                while (request := _parse(received)) is None:
                    more = await self._loop.sock_recv(client, _RECEIVE)
                    if not more:
                        raise ValueError("the request ends early")
                    received += more
        except ValueError:
            self._answer(client, 400)
        except (OSError, TimeoutError, asyncio.CancelledError):
            client.close()
        else:
            self._handle(client, *request)

    def _handle(self, client: socket.socket, method: str, path: str, body: bytes) -> None:
        self.requests += 1
        parts = path.split("/")
        if len(parts) != 5:
            self._answer(client, 400)
            return
        _, secret, name, scope, key = parts
        if not hmac.compare_digest(secret.encode(), self._secret.encode()):
            self._answer(client, 403)
            return
        name = name.partition(":")[0]
        generation = name.partition(".")[2] or "0"
        if not generation.isdecimal():
            self._answer(client, 400)
            return
        meeting = f"{generation}/{scope}/{self._meetings[name, scope]}"
        full = f"{meeting}/{key}"
        if self._is_over(full):
            self._answer(client, 410)
            return
        match method:
            case "GET" if key.startswith("*"):
                self._get_all(client, full, key[1:])
            case "GET" if full in self._values:
                self._answer(client, 200, self._values[full])
            case "GET":
                self._hold(client, full)
            case "HEAD":
                self._answer(client, 200 if full in self._values else 404)
            case "PUT":
                self._change(full, body)
                self._answer(client, 200)
            case "DELETE":
                self._change(full, None)
                self._change(f"{meeting}/rank_{key}", None)
                self._meetings[name, scope] += 1
                self._answer(client, 200)
            case _:
                self._answer(client, 405)

    def _change(self, key: str, value: bytes | None) -> None:
        self.set(key, value)
        self._publish(key, value)

    def _get_all(self, client: socket.socket, name: str, size: str) -> None:
        if not size.isdecimal() or len(size) > _MOST_DIGITS:
            self._answer(client, 400)
        elif missing := {key for key in _keys(name) if key not in self._values}:
            self._missing[name] = missing
            self._hold(client, name)
        else:
            self._answer(client, 200, self._all(name))

    def _all(self, name: str) -> bytes:
        """Of each key the length of its value, -1 if it is not there; a newline; the value."""
        values = [self._values.get(key) for key in _keys(name)]
        return b"".join(b"-1\n" if value is None else b"%d\n%b" % (len(value), value) for value in values)

    def _hold(self, client: socket.socket, key: str) -> None:
        def give_up() -> None:
            del self._held[key][client]
            if key in self._missing:
                self._answer(client, 200, self._all(key))
            else:
                self._answer(client, 404)
            if not self._held[key]:
                self._release(key, 404)

        self._held[key][client] = self._loop.call_later(_HOLD_SECONDS, give_up)

    def _release(self, key: str, status: int, value: bytes = b"") -> None:
        """Answer those who wait for this key; there may be none."""
        self._missing.pop(key, None)
        for client, timer in self._held.pop(key, {}).items():
            timer.cancel()
            self._answer(client, status, value)

    def _answer(self, client: socket.socket, status: int, body: bytes = b"") -> None:
        head = b"HTTP/1.1 %d %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        data = head % (status, _REASONS[status], len(body)) + body
        sent = 0
        with suppress(OSError):  # it is gone; or it takes its time, and gets the rest as it does
            sent = client.send(data)
        if sent == len(data):
            client.close()
        else:
            self._start(self._send(client, data[sent:]))

    async def _send(self, client: socket.socket, data: bytes) -> None:
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_REQUEST_SECONDS):
                await self._loop.sock_sendall(client, data)
        client.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _keys(name: str) -> list[str]:
    """Those that `MEETING/*SIZE` stands for."""
    meeting, _, size = name.rpartition("*")
    return [f"{meeting}{number}" for number in range(int(size))]


def _parse(received: bytes) -> tuple[str, str, bytes] | None:
    """Method, path and body of a request; None while a part is missing. ValueError for what is none."""
    head, end, body = received.partition(b"\r\n\r\n")
    if len(head) > _MOST_HEAD:
        raise ValueError("the head is too long")
    if not end:
        return None
    line, *headers = head.decode("ascii").split("\r\n")
    method, path, version = line.split(" ")
    if not version.startswith("HTTP/"):
        raise ValueError("this is not HTTP")
    fields = (header.partition(":") for header in headers)
    lengths = [int(value) for name, _, value in fields if name.lower() == "content-length"]
    length = lengths[0] if lengths else 0
    if not 0 <= length <= _MOST_VALUE:
        raise ValueError("the body is too long")
    return (method, path, body[:length]) if len(body) >= length else None
