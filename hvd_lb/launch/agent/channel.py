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
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: The variable with the number of the inherited socket.
DESCRIPTOR = "HVD_LB_AGENT_FD"
MOST_BYTES = 1 << 14  #: of what is told at once, as JSON
#: Of what an agent says to a rank: in it are the hosts of a job.
MOST_BYTES_DOWN = 1 << 17
#: What is told of these kinds goes to the head at once.
AT_ONCE = ("awaits", "begun", "finished", "leaving", "notice", "wrong")

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


def say(kind: str, **values: Any) -> None:
    """As `tell`, but it waits until the agent takes it; for what is AT_ONCE."""
    if _line is not None:
        with suppress(OSError):  # the agent is gone, and soon this process
            _line.send(json.dumps({"kind": kind, **values}).encode())


def hear(heard: Callable[[dict[str, Any]], None]) -> None:
    """Have a thread call `heard` with all that the agent says to this rank from here on."""
    line = _line
    if line is None:
        raise RuntimeError("this process has no agent")

    def listen() -> None:
        with suppress(OSError):
            while message := line.recv(MOST_BYTES_DOWN):
                heard(json.loads(message))

    threading.Thread(target=listen, name="agent", daemon=True).start()


def hand_on_line() -> dict[str, str]:
    """What the environment of a program has to hold that takes this one's place, and with it the line."""
    if _line is None:
        raise RuntimeError("this process has no agent")
    os.set_inheritable(_line.fileno(), True)
    return {DESCRIPTOR: str(_line.fileno())}


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
