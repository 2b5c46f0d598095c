"""Hosts that have passed the preflight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvd_lb.launch.hosts import Host, assign
from hvd_lb.machine.cpu import computes_by
from hvd_lb.machine.placement import NAME_MORE, DeviceName, Placement, check_processes


@dataclass(frozen=True)
class Cluster:
    """Hosts that are ready, their slots known, and how they reach each other."""

    hosts: list[Host]
    device: DeviceName
    cores: dict[str, int]
    interfaces: dict[str, str]
    interface: str  #: of this machine, where the rendezvous is
    address: str  #: of that
    mpirun: bool
    more: str = NAME_MORE  #: how to get more slots
    gpus: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  #: the names of each host's, as ranks take them
    cpus: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  #: each host's `describe_cpu`

    @property
    def slots(self) -> int:
        return sum(host.slots or 0 for host in self.hosts)

    def placement(
        self, *, gpus: int, processes: int | None, threads: int | None, group: int = 1
    ) -> Placement:
        """Processes and threads for `gpus` virtual workers on these hosts; UserError when they cannot be had.

        No process gets less than a `group` of them.
        """
        wanted = processes or min(-(-gpus // group), self.slots)
        check_processes(wanted, gpus, group)
        hosts = assign(self.hosts, wanted, self.more)
        share = min(self.cores[host.name] // (host.slots or 1) for host in hosts)
        return Placement(
            self.device,
            wanted,
            threads or max(1, share),
            tuple(host.name for host in hosts),
            gpus=tuple(name for host in hosts for name in self._gpus(host)),
            first_host=self.cpus.get(hosts[0].name, {}),
            hardware=self.hardware(hosts),
        )

    def hardware(self, hosts: Sequence[Host]) -> dict[str, dict[str, Any]]:
        """What `computes_by` gives of each of these."""
        return {host.name: computes_by(self.cpus.get(host.name, {}), self._gpus(host)) for host in hosts}

    def _gpus(self, host: Host) -> Sequence[str]:
        """Those that its ranks take."""
        return self.gpus.get(host.name, ())[: host.slots] if self.device == "cuda" else ()
