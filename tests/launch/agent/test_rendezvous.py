"""Horovod's rendezvous over real sockets, asked as Horovod's client asks."""

from __future__ import annotations

import http.client
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from hvd_lb.launch.agent import rendezvous as module


@pytest.fixture
def address(rendezvous: Any) -> str:
    """Of a rendezvous in a thread, without the name of a client."""
    told: str = rendezvous.environment()["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
    return told.removesuffix("/0")


def ask(
    address: str, method: str, scope: str, key: str, body: bytes = b"", client: str = "0"
) -> tuple[int, bytes]:
    """By Horovod's URL: "http://" + ADDR + ":" + PORT + "/" + scope + "/" + key."""
    url = urlsplit(f"http://{address}/{client}:4711/{scope}/{key}")
    connection = http.client.HTTPConnection(url.netloc, timeout=20)
    try:
        connection.request(method, url.path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def raw(address: str, sent: bytes) -> bytes:
    host, port = address.partition("/")[0].split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(sent)
        received = b""
        with suppress(ConnectionResetError):
            while more := client.recv(65536):
                received += more
        return received


def test_what_is_put_is_got(address: str) -> None:
    value = bytes(range(256)) * 2000
    assert ask(address, "PUT", "global", "3", value) == (200, b"")
    assert ask(address, "GET", "global", "3", client="1") == (200, value)
    assert ask(address, "PUT", "global", "0") == (200, b"")
    assert ask(address, "GET", "global", "0", client="1") == (200, b"")


def test_a_get_is_held_until_the_key_is_there(address: str) -> None:
    with ThreadPoolExecutor(64) as pool:
        waiting = [pool.submit(ask, address, "GET", "global", "0", client=str(rank)) for rank in range(64)]
        assert ask(address, "PUT", "global", "0", b"there") == (200, b"")
        assert {future.result() for future in waiting} == {(200, b"there")}


def test_a_get_is_not_held_for_ever(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(module, "_HOLD_SECONDS", 0.05)
    assert ask(address, "GET", "global", "0") == (404, b"")
    assert ask(address, "PUT", "global", "0", b"x") == (200, b"")
    assert ask(address, "GET", "global", "0") == (200, b"x")


def test_all_keys_are_got_at_once_when_all_are_there(address: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, address, "GET", "global", "*3", client=str(rank)) for rank in range(3)]
        for key, value in (("2", b"\n-1\n"), ("0", b"there"), ("1", b"")):
            assert not any(future.done() for future in waiting)
            assert ask(address, "PUT", "global", key, value) == (200, b"")
        assert {future.result() for future in waiting} == {(200, b"5\nthere0\n4\n\n-1\n")}
    assert ask(address, "GET", "global", "*2") == (200, b"5\nthere0\n")


def test_after_a_while_those_that_are_there(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """So that whoever waits can say who is missing."""
    monkeypatch.setattr(module, "_HOLD_SECONDS", 0.05)
    assert ask(address, "PUT", "global", "1", b"there") == (200, b"")
    assert ask(address, "GET", "global", "*3") == (200, b"-1\n5\nthere-1\n")
    assert ask(address, "GET", "other", "*1") == (200, b"-1\n")


@pytest.mark.parametrize("size", ["", "x", "-1", "1000000"])
def test_a_number_of_keys_that_is_none(address: str, size: str) -> None:
    assert ask(address, "GET", "global", f"*{size}")[0] == 400


def test_who_waits_for_all_keys_hears_that_the_generation_is_over(rendezvous: Any, address: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, address, "GET", "global", "*2")
        while not rendezvous.server.requests:
            time.sleep(0.01)
        rendezvous.end(0)
        assert waiting.result() == (410, b"")


def test_a_second_meeting_never_sees_what_is_left_of_the_first(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Rank 1 is done with the first one and meets again, before rank 0 has taken its address back."""
    monkeypatch.setattr(module, "_HOLD_SECONDS", 0.05)
    for rank in "01":
        ask(address, "PUT", "global", f"rank_{rank}", b"name", client=rank)
        ask(address, "PUT", "global", rank, b"old", client=rank)
    assert ask(address, "DELETE", "global", "1", client="1") == (200, b"")
    assert ask(address, "GET", "global", "0", client="1") == (404, b"")
    assert ask(address, "DELETE", "global", "0", client="0") == (200, b"")
    ask(address, "PUT", "global", "0", b"new", client="0")
    assert ask(address, "GET", "global", "0", client="1") == (200, b"new")
    assert ask(address, "GET", "other", "0", client="1") == (404, b"")


def test_what_was_deleted_takes_no_room(address: str) -> None:
    ask(address, "PUT", "global", "rank_0", b"name")
    ask(address, "PUT", "global", "0", b"x")
    ask(address, "DELETE", "global", "0")
    # The first meeting again, as one that has not met yet sees it.
    ask(address, "PUT", "global", "probe", b"", client="1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_HOLD_SECONDS", 0.05)
        assert ask(address, "GET", "global", "0", client="1")[0] == 404
        assert ask(address, "GET", "global", "rank_0", client="1")[0] == 404


def test_who_does_not_know_the_secret_can_neither_read_nor_write(address: str) -> None:
    ask(address, "PUT", "global", "0", b"x")
    host = address.partition("/")[0]
    for secret in ("", "guessed", "é"):
        assert raw(host, f"GET /{secret}/0:1/global/0 HTTP/1.1\r\n\r\n".encode()).split()[1] in (
            b"403",
            b"400",
        )
    assert ask(f"{host}/guessed", "PUT", "global", "0", b"y")[0] == 403
    assert ask(address, "GET", "global", "0") == (200, b"x")


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n\r\n",
        b"\xff\xfe\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /a/b/c/d/e/f HTTP/1.1\r\n\r\n",
        b"PUT /a/b HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT /a/b HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"PUT /a/b HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"GET /" + b"a" * 20000,
    ],
)
def test_garbage_is_a_bad_request(address: str, sent: bytes) -> None:
    answer = raw(address, sent)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert ask(address, "PUT", "global", "0", b"x") == (200, b"")


def test_another_method_is_none(address: str) -> None:
    assert ask(address, "POST", "global", "0", b"x")[0] == 405


def test_a_slow_client_holds_up_nobody(address: str) -> None:
    host, port = address.partition("/")[0].split(":")
    secret = address.partition("/")[2]
    request = f"PUT /{secret}/0:1/global/0 HTTP/1.1\r\nContent-Length: 4\r\n\r\nabcd".encode()
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(request[:10])
        assert ask(address, "PUT", "global", "1", b"x") == (200, b"")
        for byte in request[10:]:
            slow.sendall(bytes([byte]))
        assert slow.recv(1000).startswith(b"HTTP/1.1 200")
    assert ask(address, "GET", "global", "0") == (200, b"abcd")


def test_a_slow_client_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(module, "_REQUEST_SECONDS", 0.05)
    assert raw(address, b"GET /") == b""


def test_more_connections_than_horovods_own_server_lets_wait(address: str) -> None:
    host, port = address.partition("/")[0].split(":")
    secret = address.partition("/")[2]
    request = f"PUT /{secret}/0:1/global/0 HTTP/1.1\r\nContent-Length: 0\r\n\r\n".encode()
    clients = [socket.create_connection((host, int(port)), timeout=20) for _ in range(500)]
    try:
        for client in clients:
            client.sendall(request)
        assert all(client.recv(1000).startswith(b"HTTP/1.1 200") for client in clients)
    finally:
        for client in clients:
            client.close()
