"""The connection of a host's agent with the head: both sides prove who they are, and every message whose it is.

Both know the secret of the job. The head sends 32 random bytes; the agent answers with its host's name, 32 bytes of its
own and an HMAC of all that; the head answers with another HMAC. A key for each direction follows from the same bytes,
so no message can be altered, repeated, left out or sent back. Nothing is encrypted.

A message is a JSON object and bytes (a value of the rendezvous, deflated): two lengths, the two parts, and their HMAC.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import secrets
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

HANDSHAKE_SECONDS = 10.0  #: for who connects to prove who he is
_CLOSE_SECONDS = 5.0
_LOOKS = 10  # at how long it has been silent
_LEAST_SILENCE = 6.0  # each side speaks once a second, and a loaded machine keeps it from that
_BYTES = 32  # of a nonce, and of an HMAC-SHA256
_LENGTHS = struct.Struct("!II")
_COUNT = struct.Struct("!Q")
_MOST_HEADER, _MOST_BODY = 1 << 20, 1 << 24


class ConnectionLost(Exception):
    """Says in a few words why nothing more will come."""


@dataclass(frozen=True)
class Patience:
    """Seconds after which the head takes a silent agent for lost, and between two words of each side."""

    silence: float = 60.0
    alive: int = 5

    @classmethod
    def of_elastic(cls, hang_timeout: float) -> Self:
        """So that a host that is cut off is lost before those that wait for its ranks are thought to hang; 0: never.

        That is as far as silence can be told from a slow word.
        """
        silence = max(_LEAST_SILENCE, min(cls.silence, 0.75 * (hang_timeout or math.inf)))
        return cls(silence, max(1, min(cls.alive, int(silence / 12))))

    @property
    def of_agent(self) -> float:
        """Seconds of silence after which an agent ends its ranks: before others take their places."""
        return max(self.silence - 2 * self.alive, self.silence / 2)


class Connection:
    """Messages to and from the other side."""

    def __init__(
        self,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        send_key: bytes,
        receive_key: bytes,
        silence: float,
    ):
        self._reader, self._writer = streams
        self._send_key, self._receive_key, self._silence = send_key, receive_key, silence
        self._sent = self._received = 0
        self._queue: list[bytes] = []

    def send(self, kind: str, body: bytes = b"", **fields: Any) -> None:
        """Goes out with all that is sent in this turn of the event loop; to a lost side it goes nowhere."""
        header = json.dumps({"kind": kind, **fields}).encode()
        message = _LENGTHS.pack(len(header), len(body)) + header + body
        if not self._queue:
            asyncio.get_running_loop().call_soon(self._flush)
        self._queue += [message, _hmac(self._send_key, _COUNT.pack(self._sent), message)]
        self._sent += 1

    def _flush(self) -> None:
        if not self._writer.is_closing():
            self._writer.write(b"".join(self._queue))
        self._queue.clear()

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next message, of which `alive` is none. `ConnectionLost` at the end, after silence, for a wrong HMAC."""
        while True:
            try:
                header, body = await self._within_silence()
            except TimeoutError:
                raise ConnectionLost(f"no word from it for {self._silence:.0f} s") from None
            except (asyncio.IncompleteReadError, OSError):
                raise ConnectionLost("its connection ended") from None
            if header["kind"] != "alive":
                return header, body

    async def _within_silence(self) -> tuple[dict[str, Any], bytes]:
        """TimeoutError after silence. Time in which this process was stopped, as the other side may be, is none."""
        task = asyncio.create_task(self._message())
        try:
            for _ in range(_LOOKS):
                await asyncio.wait({task}, timeout=self._silence / _LOOKS)
                if task.done():
                    return task.result()
            raise TimeoutError
        finally:
            task.cancel()

    async def _message(self) -> tuple[dict[str, Any], bytes]:
        lengths = await self._reader.readexactly(_LENGTHS.size)
        header_length, body_length = _LENGTHS.unpack(lengths)
        if header_length > _MOST_HEADER or body_length > _MOST_BODY:
            raise ConnectionLost("a message from it is too long")
        parts = await self._reader.readexactly(header_length + body_length)
        proof = await self._reader.readexactly(_BYTES)
        expected = _hmac(self._receive_key, _COUNT.pack(self._received), lengths, parts)
        if not hmac.compare_digest(proof, expected):
            raise ConnectionLost("a message is not from it")
        self._received += 1
        return json.loads(parts[:header_length]), parts[header_length:]

    async def close(self) -> None:
        """Once what was sent has left."""
        self._flush()
        self._writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._writer.wait_closed()

    def drop(self) -> None:
        """At once: the other side hears of it with whatever it sends next."""
        self._writer.transport.abort()


async def answer(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    secret: bytes,
    silence: float = Patience.silence,
) -> tuple[str, Connection]:
    """The head's side: the host whose agent has connected. `ConnectionLost` for whoever does not know the secret."""
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            challenge = secrets.token_bytes(_BYTES)
            writer.write(challenge)
            (length,) = await reader.readexactly(1)
            answered = await reader.readexactly(length + _BYTES)
            proof = await reader.readexactly(_BYTES)
            seen = challenge + answered
            if not hmac.compare_digest(proof, _hmac(secret, b"agent", seen)):
                raise ConnectionLost("it does not know the secret of this job")
            host = answered[:length].decode()
            writer.write(_hmac(secret, b"head", seen))
    except (asyncio.IncompleteReadError, OSError, TimeoutError) as error:
        raise ConnectionLost(f"it did not say who it is ({type(error).__name__})") from None
    return host, Connection(
        (reader, writer), _hmac(secret, b"to agent", seen), _hmac(secret, b"to head", seen), silence
    )


async def call(
    address: str, port: int, secret: bytes, host: str, silence: float = Patience.silence
) -> Connection:
    """The agent's side. `ConnectionLost` where no head answers, or one that does not know the secret."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(address, port), HANDSHAKE_SECONDS)
    except (OSError, TimeoutError) as error:
        raise ConnectionLost(f"no head at {address} port {port}: {error.strerror or 'no answer'}") from None
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            challenge = await reader.readexactly(_BYTES)
            name = host.encode()
            answered = name + secrets.token_bytes(_BYTES)
            seen = challenge + answered
            writer.write(bytes([len(name)]) + answered + _hmac(secret, b"agent", seen))
            if not hmac.compare_digest(await reader.readexactly(_BYTES), _hmac(secret, b"head", seen)):
                raise ConnectionLost("it does not know the secret of this job")
    except (asyncio.IncompleteReadError, OSError, TimeoutError):
        writer.close()
        raise ConnectionLost(f"{address} port {port} does not answer as a head") from None
    except ConnectionLost:
        writer.close()
        raise
    keys = _hmac(secret, b"to head", seen), _hmac(secret, b"to agent", seen)
    return Connection((reader, writer), *keys, silence)


def _hmac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), "sha256")
