"""Agent and head prove who they are to each other; what is not from the other side ends the connection."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from hvd_lb.launch.agent import connection as module
from hvd_lb.launch.agent.connection import Connection, ConnectionLost, Patience, answer, call

SECRET = bytes(range(32))
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def connected(
    head: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]],
    agent: Callable[[int], Awaitable[Any]],
) -> tuple[Any, Any]:
    """What the two sides gave, or the `ConnectionLost` that they raised."""

    async def run() -> tuple[Any, Any]:
        found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        writers = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            try:
                found.set_result(await head(reader, writer))
            except ConnectionLost as lost:
                writer.close()
                found.set_result(lost)

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            try:
                agents = await agent(server.sockets[0].getsockname()[1])
            except ConnectionLost as lost:
                agents = lost
            heads = await found
            for side in (*writers, *(agents if isinstance(agents, tuple) else (agents,))):
                if isinstance(side, asyncio.StreamWriter):
                    side.close()
                    with suppress(OSError):
                        await side.wait_closed()
                elif isinstance(side, Connection):
                    await side.close()
            return heads, agents

    return asyncio.run(run())


async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, Connection]:
    return await answer(reader, writer, SECRET)


def test_messages_go_both_ways_in_order() -> None:
    value = secrets.token_bytes(100_000)

    async def head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        name, connection = await answer(reader, writer, SECRET)
        heard = [await connection.receive() for _ in range(3)]
        connection.send("stop", why="ä")
        await connection.close()
        return name, heard

    async def agent(port: int) -> Any:
        connection = await call("127.0.0.1", port, SECRET, "h1")
        connection.send("put", value, key="a")
        connection.send("alive")
        connection.send("delete", key="a")
        await asyncio.sleep(0)
        connection.send("told", ranks={3: None})
        said = await connection.receive()
        with pytest.raises(ConnectionLost, match="connection ended"):
            await connection.receive()
        return connection, said

    heads, agents = connected(head, agent)
    assert heads == (
        "h1",
        [
            ({"kind": "put", "key": "a"}, value),
            ({"kind": "delete", "key": "a"}, b""),
            ({"kind": "told", "ranks": {"3": None}}, b""),
        ],
    )
    assert agents[1] == ({"kind": "stop", "why": "ä"}, b"")


def test_an_agent_that_does_not_know_the_secret_is_refused() -> None:
    heads, agents = connected(answered, lambda port: call("127.0.0.1", port, b"guessed", "h1"))
    assert "does not know the secret" in str(heads)
    assert isinstance(agents, ConnectionLost)


def test_a_head_that_does_not_know_the_secret_is_refused() -> None:
    async def head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(32))
        await reader.readexactly(1 + 2 + 64)
        writer.write(bytes(32))

    _, agents = connected(head, lambda port: call("127.0.0.1", port, SECRET, "h1"))
    assert "does not know the secret" in str(agents)


@pytest.mark.parametrize("sent", [b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", bytes(500), b"\xff" * 500])
def test_garbage_is_refused(sent: bytes) -> None:
    async def stranger(port: int) -> Streams:
        streams = await asyncio.open_connection("127.0.0.1", port)
        streams[1].write(sent)
        streams[1].write_eof()
        return streams

    heads, _ = connected(answered, stranger)
    assert isinstance(heads, ConnectionLost)


def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_SECONDS", 0.05)
    heads, _ = connected(answered, lambda port: asyncio.open_connection("127.0.0.1", port))
    assert "did not say who it is" in str(heads)


def test_silence_ends_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        _, connection = await answer(reader, writer, SECRET, 0.05)
        await connection.receive()

    heads, _ = connected(head, lambda port: call("127.0.0.1", port, SECRET, "h1"))
    assert "no word from it" in str(heads)


def test_the_time_in_which_both_sides_are_stopped_is_no_silence() -> None:
    async def head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        _, connection = await answer(reader, writer, SECRET, 1.0)
        heard = await connection.receive()
        await connection.close()
        return heard

    async def agent(port: int) -> Any:
        connection = await call("127.0.0.1", port, SECRET, "h1")
        await asyncio.sleep(0.2)
        time.sleep(2.0)  # nobody runs, as when a job is suspended
        await asyncio.sleep(0.2)
        connection.send("put", b"1")
        return connection

    heads, _ = connected(head, agent)
    assert heads == ({"kind": "put"}, b"1")


def tampered(change: Callable[[list[bytes]], list[bytes]]) -> Any:
    """What the head says of an agent's messages once they were changed on their way."""

    async def head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        _, connection = await answer(reader, writer, SECRET)
        return [await connection.receive() for _ in range(2)]

    async def agent(port: int) -> None:
        connection = await call("127.0.0.1", port, SECRET, "h1")
        connection.send("put", b"12345678", key="a")
        connection.send("put", b"abcdefgh", key="a")
        messages, connection._queue = connection._queue, []
        pairs = [b"".join(messages[i : i + 2]) for i in (0, 2)]
        connection._queue += change(pairs)
        await connection.close()

    return connected(head, agent)[0]


def test_a_message_that_was_altered_repeated_left_out_or_reordered_ends_a_connection() -> None:
    assert len(tampered(lambda messages: messages)) == 2
    changes: list[Callable[[list[bytes]], list[bytes]]] = [
        lambda messages: [messages[0].replace(b"12345678", b"12345679"), messages[1]],
        lambda messages: [messages[0], messages[0]],
        lambda messages: [messages[1]],
        lambda messages: [messages[1], messages[0]],
        lambda messages: [b"\xff" * 8 + messages[0]],
    ]
    for change in changes:
        assert isinstance(tampered(change), ConnectionLost)


@pytest.mark.parametrize("hang_timeout", [0.5, 1, 2, 5, 8, 60, 0])
def test_who_speaks_once_in_a_while_is_not_silent(hang_timeout: float) -> None:
    patience = Patience.of_elastic(hang_timeout)
    assert patience.silence > patience.of_agent >= 3 * patience.alive
