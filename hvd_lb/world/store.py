"""The rendezvous of this host's agent (`launch.agent.rendezvous`) as a store of torch.

It is asked by HTTP, on the loopback, and answers who knows its secret; what is put there agents hand on to each other
by connections of which every message is proven. Gloo and NCCL write a key once. So what was read is remembered, and
there is nothing here that would change a value: `add`, `compare_set` and `delete_key` are errors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from http.client import HTTPConnection, HTTPException
from urllib.parse import quote

from torch.distributed import DistStoreError, Store

from hvd_lb.errors import ExchangeError

# What is of torch has a scope of its own, beside those of Horovod.
_SCOPE = "torch"
_ANSWER_SECONDS = 60.0  # for an agent that may be busy
_LEAST_SECONDS = 0.01


class AgentStore(Store):
    """`told` is the address by which Horovod would find the agent. Any thread may call, C++'s too.

    Python has to keep this object as long as C++ uses it. `DistStoreError` where a key does not come in time, as from
    torch's own stores; `ExchangeError` where none will come, as the generation is over or the agent has ended.
    """

    timeout: timedelta  # torch's stubs say nothing of it

    def __init__(self, told: str, patience: timedelta):
        super().__init__()
        self.set_timeout(patience)
        self._agent, _, self._path = told.partition("/")
        self._known: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # C++ gives bytes
        if self._ask("PUT", key, value) is None:
            raise ExchangeError(f"the agent of this host has not taken {key} in {_ANSWER_SECONDS:.0f} s")

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._known[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        until = time.monotonic() + (timeout or self.timeout).total_seconds()
        for key in keys:
            while key not in self._known:
                value = self._ask("GET", key, seconds=until - time.monotonic())
                if value is not None:
                    self._known[key] = value
                elif time.monotonic() >= until:
                    raise DistStoreError(f"{key} was not set in time")

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._known or self._ask("HEAD", key) is not None for key in keys)

    def clone(self) -> AgentStore:
        return self

    def _ask(
        self, method: str, key: str, value: bytes = b"", seconds: float = _ANSWER_SECONDS
    ) -> bytes | None:
        """What the agent answers; None where a key is not there after so many seconds, or those that it waits."""
        agent = HTTPConnection(self._agent, timeout=max(seconds, _LEAST_SECONDS))
        try:
            agent.request(method, f"/{self._path}/{_SCOPE}/{quote(key, safe='')}", value)
            answer = agent.getresponse()
            status, found = answer.status, answer.read()
        except TimeoutError:
            status, found = 404, b""
        except (OSError, HTTPException) as error:
            raise ExchangeError(f"the agent of this host does not answer ({error})") from None
        finally:
            agent.close()
        match status:
            case 200:
                return found
            case 404:
                return None
            case 410:
                raise ExchangeError("the generation is over before all ranks have met")
        raise ExchangeError(f"the agent of this host refuses {method} of {key} ({status})")
