"""An agent's rendezvous as a store of torch: what Gloo and NCCL ask of it, and strangers."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import DistStoreError, PrefixStore

from hvd_lb.errors import ExchangeError
from hvd_lb.world.store import AgentStore

PATIENCE = timedelta(seconds=20)
SHORT = timedelta(seconds=0.2)


def store(rendezvous: Any, generation: int = 0, patience: timedelta = PATIENCE) -> AgentStore:
    told = rendezvous.environment(0, generation)["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
    return AgentStore(told, patience)


def test_what_is_set_is_got_through_torchs_own_prefixes(rendezvous: Any) -> None:
    one, other = store(rendezvous), store(rendezvous)
    value = bytes(range(256)) * 500
    for key, said in (("gloo/0/1", value), ("a key, of 100 % \n?#é", b""), ("0", b"\0\r\n\r\n")):
        PrefixStore("a", PrefixStore("b", one)).set(key, said)
        there = PrefixStore("b/a", other)
        assert there.check([key])
        there.wait([key], SHORT)
        assert there.get(key) == said
        assert there.multi_get([key, key]) == [said, said]
    assert not PrefixStore("a", one).check(["0"])


def test_who_waits_has_it_when_it_is_there(rendezvous: Any) -> None:
    there = store(rendezvous)
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(store(rendezvous).wait, ["0", "1"]) for _ in range(16)]
        for key in "10":
            time.sleep(0.05)
            assert not any(one.done() for one in waiting)
            there.set(key, b"")
        for one in waiting:
            one.result(10)


def test_patience_ends(rendezvous: Any) -> None:
    there, patient = store(rendezvous, patience=SHORT), store(rendezvous)
    there.set("0", b"")
    with pytest.raises(DistStoreError, match="1 was not set in time"):
        there.wait(["0", "1"])
    with pytest.raises(DistStoreError, match="/1 was not set in time"):
        PrefixStore("", patient).wait(["1"], SHORT)
    with pytest.raises(DistStoreError, match="1 was not set in time"):
        there.get("1")


def test_a_wait_that_is_longer_than_a_request_is_held_goes_on(
    rendezvous: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvd_lb.launch.agent.rendezvous._HOLD_SECONDS", 0.05)
    there = store(rendezvous)
    threading.Timer(0.3, there.set, ("0", b"late")).start()
    assert store(rendezvous).get("0") == b"late"


def test_who_waits_in_a_generation_that_is_over_has_an_error(rendezvous: Any) -> None:
    threading.Timer(0.1, rendezvous.end, (0,)).start()
    for _ in range(2):
        with pytest.raises(ExchangeError, match="the generation is over"):
            store(rendezvous).get("0")
    store(rendezvous, 1).set("0", b"next")
    assert store(rendezvous, 1).get("0") == b"next"


def test_an_agent_that_is_gone_is_said(rendezvous: Any) -> None:
    told = rendezvous.environment()["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
    with pytest.raises(ExchangeError, match="the agent of this host does not answer"):
        AgentStore("127.0.0.1:1/secret/0", PATIENCE).get("0")
    where, _, client = told.split("/")
    with pytest.raises(ExchangeError, match="the agent of this host refuses GET of 0 .403"):
        AgentStore(f"{where}/another/{client}", PATIENCE).get("0")


def test_nothing_changes_a_value(rendezvous: Any) -> None:
    """Each agent has values of its own: sums of what several add, say, would need one that decides."""
    there = store(rendezvous)
    for change in (
        lambda: there.add("0", 1),
        lambda: there.compare_set("0", "a", "b"),
        lambda: there.delete_key("0"),
    ):
        with pytest.raises(RuntimeError):
            change()
