"""Horovod's rendezvous server, where Gloo's processes find each other, on one address of this machine alone.

Whoever reaches it can write into it (docs/security.md); Horovod's own way is to listen on all interfaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

# Horovod is imported where it is used: runs on one process need none.


def bind_rendezvous(address: str) -> None:
    """Let every server that this process starts from now on listen on `address` only."""
    from horovod.runner.http import http_server
    from horovod.runner.util.network import find_port

    def bound(server_factory):  # type: ignore[no-untyped-def]
        # Horovod calls it with ("", port): the empty name means all interfaces.
        return find_port(lambda any_address: server_factory((address, any_address[1])))

    http_server.find_port = bound


@contextmanager
def rendezvous(address: str, hosts: Sequence[tuple[str, int]], processes: int) -> Iterator[Mapping[str, str]]:
    """A server on `address` for `processes` on hosts with so many slots, filled in order; what their environment needs.

    Each process has to be told its rank besides, as HOROVOD_RANK and so on.
    """
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
    from horovod.runner.http import http_server

    bind_rendezvous(address)
    server = http_server.RendezvousServer()
    port = server.start()
    try:
        server.init(
            get_host_assignments([HostInfo(name, slots) for name, slots in hosts], processes, processes)
        )
        yield {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
        }
    finally:
        server.stop()
