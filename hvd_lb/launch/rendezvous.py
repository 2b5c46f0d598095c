"""Horovod's rendezvous server, where Gloo's processes find each other, on one address of this machine alone.

Whoever reaches it can write into it (docs/security.md); Horovod's own way is to listen on all interfaces.
"""

from __future__ import annotations

from horovod.runner.http import http_server
from horovod.runner.util.network import find_port


def bind_rendezvous(address: str) -> None:
    """Let every server that this process starts from now on listen on `address` only."""

    def bound(server_factory):  # type: ignore[no-untyped-def]
        # Horovod calls it with ("", port): the empty name means all interfaces.
        return find_port(lambda any_address: server_factory((address, any_address[1])))

    http_server.find_port = bound
