"""Where ranks of the torch engine meet, and what they are told when they cannot."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from hvd_lb.errors import UserError
from hvd_lb.world import rendezvous
from hvd_lb.world.launched import Place
from hvd_lb.world.store import AgentStore

SRUN = {"SLURM_STEP_NODELIST": "h[07-9,12],g1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2"}


def meeting_point(place: Place, environment: dict[str, str]) -> tuple[str, int, bool]:
    return rendezvous._meeting_point(place, environment)


def test_torchs_own_variables_come_first() -> None:
    told = {"MASTER_ADDR": "h1", "MASTER_PORT": "29500", **SRUN}
    assert meeting_point(Place("srun", 0, 4, 0), told) == ("h1", 29500, True)
    assert meeting_point(Place("srun", 1, 4, 1), told) == ("h1", 29500, False)
    served = told | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert meeting_point(Place("torchrun", 0, 4, 0), served) == ("h1", 29500, False)


def test_tasks_of_srun_meet_on_the_first_node() -> None:
    host, port, serves = meeting_point(Place("srun", 2, 4, 0), SRUN | {"SLURM_NODEID": "0"})
    assert (host, serves) == ("h07", True)
    assert 20_000 <= port < 30_000
    assert meeting_point(Place("srun", 0, 4, 1), SRUN | {"SLURM_NODEID": "0"}) == (host, port, False)
    assert meeting_point(Place("srun", 1, 4, 0), SRUN | {"SLURM_NODEID": "1"}) == (host, port, False)
    other_step = SRUN | {"SLURM_STEP_ID": "3", "SLURM_NODEID": "0"}
    assert meeting_point(Place("srun", 2, 4, 0), other_step)[1] != port


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("h1", "h1"),
        ("h1,h2", "h1"),
        ("a-b[003-7]", "a-b003"),
        ("r[1-2]n[08,10]", "r1n08"),
        ("c[5,7-9],d1", "c5"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert rendezvous.first_node(nodes) == first


def test_processes_of_one_host_meet_on_the_loopback() -> None:
    place = Place("mpirun", 0, 2, 0)
    assert meeting_point(place, {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})[0::2] == ("127.0.0.1", True)
    with pytest.raises(
        UserError, match=r"rank 0 of 2 \(mpirun\) does not know where the others are: set MASTER_ADDR"
    ):
        meeting_point(place, {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


def test_the_store_listens_on_its_address_alone() -> None:
    served, port = rendezvous._server("127.0.0.1", 0)
    store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=10), wait_for_workers=False)
    store.set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5).close()
    del served


def test_ranks_of_an_agent_have_its_rendezvous_whatever_else_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "h1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1:4711/secret/0")
    assert isinstance(rendezvous.join(Place("horovodrun", 0, 2, 0))[0], AgentStore)
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")  # as horovodrun says it
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(UserError, match="set MASTER_PORT to a free port of that host"):
            rendezvous.join(Place("horovodrun", 0, 2, 0))


def test_a_port_that_is_taken_is_said() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match="set MASTER_PORT to a free port of that host"),
    ):
        rendezvous._server("127.0.0.1", taken.getsockname()[1])


def test_an_address_that_is_not_this_machines_is_served_on_all() -> None:
    store, port = rendezvous._server("192.0.2.1", 0)  # as that of a Kubernetes service
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    del store


def test_ranks_of_an_agent_wait_for_each_other_as_long_as_horovods(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place("horovodrun", 0, 2)
    for number, (told, seconds) in enumerate({None: 600, "1800": 1800}.items()):
        monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", f"127.0.0.1:1/secret/{number}")
        if told:
            monkeypatch.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", told)
        store = rendezvous.join(place)[0]
        assert isinstance(store, AgentStore)
        assert store.timeout.total_seconds() == seconds
