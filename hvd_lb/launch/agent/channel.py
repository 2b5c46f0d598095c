"""A rank's line to the agent of its host, which both hold as long as they live.

The rank tells small things through it (`tell`), of which the newest of each kind reaches RUN/logs/ranks.json within
seconds; and by its end it knows that the agent is gone. Ranks that mpirun or srun started have none: then nothing is
told, and the pipe of their stderr tells of the launcher's end.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

#: The variable with the number of the inherited socket.
DESCRIPTOR = "HVD_LB_AGENT_FD"
MOST_BYTES = 1 << 14  #: of what is told at once, as JSON

_line: socket.socket | None = None


def open_line() -> None:
    """Take the line that this process has inherited, if any, and end this process when its other end is gone."""
    global _line
    number = os.environ.pop(DESCRIPTOR, None)
    if number is not None:
        _line = socket.socket(fileno=int(number))
        _line.set_inheritable(False)
    end_without(os.dup(sys.stderr.fileno()) if _line is None else _line.fileno())


def tell(kind: str, **values: Any) -> None:
    """Tell the agent something in JSON. It replaces what was told of that kind; costs microseconds and never waits.

    ValueError for more than MOST_BYTES.
    """
    if _line is None:
        return
    message = json.dumps({"kind": kind, **values}).encode()
    if len(message) > MOST_BYTES:
        raise ValueError(f"{kind}: {len(message)} bytes to tell, expected at most {MOST_BYTES}")
    with suppress(OSError):  # the agent is busy and misses it, or gone
        _line.send(message, socket.MSG_DONTWAIT)


def end_without(stream: int) -> None:
    """End this process when nobody holds the other end of `stream` any more: its launcher was killed, or cut off.

    A broken pipe or socket reports that without being written to; a file or a terminal never does.
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(stream, 0)
        while not poll.poll():
            pass
        os._exit(1)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()
