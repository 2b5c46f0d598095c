"""One link between two hosts, measured by one TCP stream in each direction: bytes per second, latency, what was lost.

It is what TCP gives on the interface that the ranks use. NCCL over InfiniBand takes another way, which only the
allreduce of `exchange` goes; and one stream may fill less than a link of 100 Gbit/s.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass

SECONDS = 0.3  #: of a stream in one direction
_TIMEOUT = 5.0  # of a link that is cut
_CHUNK = 1 << 20
_PINGS = 100
_TOKEN_BYTES = 16
_SETTLED = 0.25  # this share of a stream, while TCP finds its speed, does not count


@dataclass(frozen=True)
class Peer:
    """Where a host listens for others, and what they have to say first."""

    address: str
    port: int
    token: str


@dataclass
class Measured:
    """What one side of a link knows: what arrived here, and of what was sent the share that was sent again."""

    bytes_per_second: float | None = None  #: of what arrived; None: nothing did
    sent_again: float | None = None
    latency: float | None = (
        None  #: seconds in one direction, half of the shortest round; told by who calls first
    )
    problem: str = ""  #: why there is no connection


class Listener:
    """Where the others connect to, on one address of this host; who does not know the token is turned away."""

    def __init__(self, address: str):
        self._socket = socket.create_server((address, 0), backlog=64)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self.peer = Peer(address, self._socket.getsockname()[1], self._token.hex())

    def accept(self, seconds: float) -> socket.socket:
        """OSError when nobody comes within so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            connection, _ = self._socket.accept()
            connection.settimeout(_TIMEOUT)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(OSError):
                if secrets.compare_digest(_receive(connection, _TOKEN_BYTES), self._token):
                    return connection
            connection.close()

    def close(self) -> None:
        self._socket.close()


def measure_first(listener: Listener, other: Peer) -> Measured:
    """This side of a link, whose other side calls `measure_second` at the same time: it sends, then it receives."""
    result = Measured()
    _noting(result, lambda: _call(other, result, pings=True))
    # When nothing came through, the other side waits for it until then.
    _noting(result, lambda: _answer(listener, result, 3 * _TIMEOUT, pings=False))
    return result


def measure_second(listener: Listener, other: Peer) -> Measured:
    """The other side: first it receives, then it sends."""
    result = Measured()
    _noting(result, lambda: _answer(listener, result, _TIMEOUT, pings=True))
    _noting(result, lambda: _call(other, result, pings=False))
    return result


def _noting(result: Measured, step: Callable[[], None]) -> None:
    try:
        step()
    except OSError as error:
        result.problem = result.problem or (error.strerror or str(error) or type(error).__name__)


def _call(other: Peer, result: Measured, *, pings: bool) -> None:
    with closing(socket.create_connection((other.address, other.port), _TIMEOUT)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(bytes.fromhex(other.token))
        if pings:
            result.latency = _ping(connection) / 2
        result.sent_again = _send(connection)


def _answer(listener: Listener, result: Measured, seconds: float, *, pings: bool) -> None:
    with closing(listener.accept(seconds)) as connection:
        for _ in range(_PINGS if pings else 0):
            connection.sendall(_receive(connection, 1))
        result.bytes_per_second = _arriving(connection)


def _ping(connection: socket.socket) -> float:
    """The shortest of some rounds of one byte: longer ones waited for a core."""
    shortest = float("inf")
    for _ in range(_PINGS):
        began = time.perf_counter()
        connection.sendall(b"\0")
        _receive(connection, 1)
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


def _send(connection: socket.socket) -> float:
    """Send until the other side has enough; the share of it that TCP sent again."""
    chunk, sent, again = memoryview(bytes(_CHUNK)), 0, 0.0
    deadline = time.monotonic() + SECONDS + _TIMEOUT
    with suppress(BrokenPipeError, ConnectionResetError):
        while time.monotonic() < deadline:
            sent += connection.send(chunk)
            again = _sent_again(connection)
    return again / sent if sent else 0.0


def _sent_again(connection: socket.socket) -> float:
    """Bytes, by Linux' struct tcp_info: segments that were sent again, and their size."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    (size,) = struct.unpack_from("=I", info, 16)
    (segments,) = struct.unpack_from("=I", info, 100)
    return float(size * segments)


def _arriving(connection: socket.socket) -> float:
    """Bytes per second, once the stream has settled. What is still under way at the end is dropped."""
    buffer = bytearray(_CHUNK)
    _receive(connection, 1)
    began = time.perf_counter()
    counted, since = 0, None
    while True:
        length = connection.recv_into(buffer)
        now = time.perf_counter()
        if since is None and now >= began + _SETTLED * SECONDS:
            since = now  # what has just arrived took the time before
        elif since is not None:
            counted += length
        if not length or now >= began + SECONDS:
            break
    return counted / (now - since) if since is not None and now > since else 0.0


def _receive(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        if not (more := connection.recv(length - len(received))):
            raise ConnectionResetError("the other side closed the connection")
        received += more
    return received
