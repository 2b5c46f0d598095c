"""Where the ranks of the torch engine find each other: a key-value store.

Ranks of an agent of ours have its rendezvous, which asks for a secret. Those that others have started have a store of
torch, which has no authentication (docs/security.md), on one address of the cluster. Whoever starts them may run it
beforehand, as torchrun does, and says so by torch's own variable; else the first rank of the address does.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import socket
import zlib
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import Store, TCPStore

from hvd_lb.errors import UserError
from hvd_lb.world.launched import Place
from hvd_lb.world.store import AgentStore

# As long as a cold start from a shared file system may take.
JOIN_SECONDS = 600
# Below the ports that systems give to connections.
_FIRST_PORT, _PORTS = 20_000, 10_000


def join(place: Place) -> tuple[Store, str]:
    """The store of this process's job, and this host's address towards it. UserError where there is none."""
    rendezvous = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR", "")
    if "/" in rendezvous:  # with a secret: horovodrun's own has none
        return _agents(rendezvous), socket.gethostname()
    host, port, serving = _meeting_point(place, os.environ)
    try:
        return _store(host, port, serving), _address_towards(host, port)
    except RuntimeError as error:
        raise UserError(
            f"rank {place.rank} of {place.size} ({place.launcher}) does not reach the others at {host}:{port} "
            f"({str(error).splitlines()[0]}): {_STALE}"
        ) from None


@functools.cache  # kept, as Python has to
def _agents(rendezvous: str) -> Store:
    told = os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS")  # what holds for Horovod's ranks holds for torch's
    return AgentStore(rendezvous, timedelta(seconds=int(told or JOIN_SECONDS)))


@functools.cache  # one for the worlds that a process makes one after another
def _store(host: str, port: int, serving: bool) -> Store:
    if serving:
        return _server(host, port)[0]
    return TCPStore(host, port, timeout=timedelta(seconds=JOIN_SECONDS), wait_for_workers=False)


_STALE = "is MASTER_ADDR right? Where its variables are left from another job, unset them"


def _meeting_point(place: Place, environment: Mapping[str, str]) -> tuple[str, int, bool]:
    """Address and port of the store, and whether this process runs it."""
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "")
    if host and port.isdecimal():
        return host, int(port), place.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    nodes = environment.get("SLURM_STEP_NODELIST")
    if place.launcher.startswith("srun") and nodes:
        # Tasks may be in another order than nodes, so it need not be rank 0.
        first = environment.get("SLURM_NODEID") == "0" and place.local_rank == 0
        job = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
        return host or first_node(nodes), _port_of(job), first
    local_sizes = (environment.get(name) for name in ("HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"))
    if str(place.size) in local_sizes:  # all are on this host
        names = ("HOROVOD_GLOO_RENDEZVOUS_PORT", "OMPI_MCA_orte_hnp_uri", "PMIX_NAMESPACE")
        job = next((environment[name] for name in names if name in environment), "")
        return "127.0.0.1", _port_of(job), place.rank == 0
    raise UserError(
        f"rank {place.rank} of {place.size} ({place.launcher}) does not know where the others are: set MASTER_ADDR to "
        "the host of rank 0 and MASTER_PORT to a free port there"
    )


def first_node(nodes: str) -> str:
    """The first name in Slurm's "h[1-3,7],g2"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", first)


def _port_of(job: str) -> int:
    """A port that all processes of a job choose alike, and those of another one hardly."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS


def _server(host: str, port: int) -> tuple[TCPStore, int]:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        try:
            listener = socket.create_server(address[:2], family=family, backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # else: the address of a service, not of this machine
                raise
            listener = socket.create_server(("", port), family=family, backlog=1024)
            host = "localhost"
    except OSError as error:
        raise UserError(
            f"the ranks cannot meet at {host}:{port} ({error.strerror}): set MASTER_PORT to a free port of that host"
        ) from None
    port = listener.getsockname()[1]
    timeout = timedelta(seconds=JOIN_SECONDS)
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    ), port


def _address_towards(host: str, port: int) -> str:
    """This machine's address as `host` would see it. Nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
