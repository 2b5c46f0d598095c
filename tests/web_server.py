"""A static web server with ranges and ETags, that can be told to misbehave. For tests and benchmarks/remote.py."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Request:
    """What was asked for, and how much of it went out."""

    method: str
    path: str
    query: str
    first: int | None
    sent: int = 0


@dataclass
class StaticServer:
    """Serves the files of `folder`. `faults` are used up one for each GET of a tar file, the first first:

    a status (503), or `cut` (half of the body, then a reset), `short` (half of it, then a proper end), `stall`
    (nothing more comes), `whole` (200 and all of the file), `range` (a Content-Range of another place), `wrong`
    (other bytes of the right length), `to URL` (a redirect).
    """

    folder: Path
    latency: float = 0.0  #: seconds before each answer
    secret: str = ""  #: without this query everything is 403
    faults: list[int | str] = field(default_factory=list)
    always: int | str | None = None
    retry_after: int | None = None
    requests: list[Request] = field(default_factory=list)
    etags: bool = True
    stall_seconds: float = 5.0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def reads(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]

    def next_fault(self) -> int | str | None:
        with self.lock:
            return self.faults.pop(0) if self.faults else self.always


@contextmanager
def serving(folder: Path, **options: object) -> Iterator[StaticServer]:
    server = StaticServer(folder, **options)  # type: ignore[arg-type]

    class Handler(_Handler):
        static = server

    with _Server(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        try:
            yield server
        finally:
            http.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    static: StaticServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        static, parts = self.static, urlsplit(self.path)
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        request = Request(self.command, unquote(parts.path), parts.query, int(asked[1]) if asked else None)
        with static.lock:
            static.requests.append(request)
        if static.latency:
            time.sleep(static.latency)
        if static.secret and parts.query != static.secret:
            self._refuse(403)
            return
        path = static.folder / unquote(parts.path).lstrip("/")
        if not path.is_file():
            self._refuse(404)
            return
        fault = static.next_fault() if body and path.suffix == ".tar" else None
        if isinstance(fault, int):
            self._refuse(fault)
            return
        if fault is not None and fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault.removeprefix("to "))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, stat = path.read_bytes() if body and not asked else b"", path.stat()
        etag = f'"{hashlib.md5(f"{stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()}"'
        if static.etags and self.headers.get("If-Match", etag) not in (etag, "*"):
            self._refuse(412)
            return
        first, last = 0, stat.st_size - 1
        if asked and fault != "whole":
            first, last = int(asked[1]), min(int(asked[2]), last)
            if first > last:
                self._refuse(416)
                return
            shift = 1 if fault == "range" else 0
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first + shift}-{last + shift}/{stat.st_size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Last-Modified", self.date_time_string(int(stat.st_mtime)))
        if static.etags:
            self.send_header("ETag", etag)
        self.end_headers()
        if not body:
            return
        if not content:
            with path.open("rb") as file:
                file.seek(first)
                content = file.read(last - first + 1)
        if fault == "wrong":
            content = bytes(len(content))
        half = content[: len(content) // 2]
        with suppress(OSError):
            if fault in ("cut", "short", "stall"):
                self.wfile.write(half)
                self.wfile.flush()
                request.sent = len(half)
                self.close_connection = True
                if fault == "stall":
                    time.sleep(static.stall_seconds)
                if fault == "cut":  # a reset, not an orderly end
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                return
            request.sent = len(content)
            self.wfile.write(content)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if self.static.retry_after is not None:
            self.send_header("Retry-After", str(self.static.retry_after))
        self.send_header("Content-Length", "0")
        self.end_headers()


if __name__ == "__main__":
    with serving(Path(sys.argv[1]), latency=float(sys.argv[2])) as alone:
        print(alone.url, flush=True)
        threading.Event().wait()
