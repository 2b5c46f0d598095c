"""A rendezvous for processes that something else starts, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from hvd_lb.launch.agent.rendezvous import ANY, Rendezvous


@contextmanager
def rendezvous(address: str) -> Iterator[Mapping[str, str]]:
    """Open on `address`, with backlog for all; gives what the environment of each process needs.

    Each has to be told its rank besides, as HOROVOD_RANK and so on.
    """
    loop = asyncio.new_event_loop()

    async def open_() -> Rendezvous:
        return Rendezvous(address)

    thread = threading.Thread(target=loop.run_forever, name="rendezvous", daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(open_(), loop).result()
    try:
        yield server.environment(ANY)
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
