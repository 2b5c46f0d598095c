"""A command line that is to run in another place: what the writers of job scripts and manifests are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hvd_lb.machine.placement import DeviceName


@dataclass(frozen=True)
class Submission:
    """`hvd-lb ARGUMENTS` on `processes` processes, `per_node` of them on each node (fewer on the last).

    `arguments` begin with "train" and are without those that say where to run (--launcher, --submit, --image, ...).
    `name` is the user's, in any characters: each system makes of it what its system allows.
    """

    arguments: tuple[str, ...]
    name: str
    device: DeviceName
    processes: int
    per_node: int
    output: Path
    data: Path | None = None  #: a folder that has to be there; None for named data such as "digits"
    recipe: Path | None = None  #: a file that has to be there; None for a preset
    image: str | None = None
    container_port: int = 12345  #: of the containers' sshd, on their hosts' network
    environment: Mapping[str, str] = field(default_factory=dict)
    elastic: bool = False  #: it goes on when nodes are lost

    @property
    def nodes(self) -> int:
        return -(-self.processes // self.per_node)
