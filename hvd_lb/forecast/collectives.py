"""What an allreduce costs, in closed form: steps, bytes and additions, for each algorithm and any number of servers.

The α–β–γ model (Hockney; Thakur et al. 2005; the paper, section 4): a step takes α, a byte on the link β, a byte that
is added γ. Algorithms go in steps. In one step a server may send and receive at once, to and from several partners,
and the step takes as long as its busiest server. `messages` has the same algorithms as messages on arrays, which
prove these counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Link:
    """A way between two servers: seconds for each step (`alpha`), byte (`beta`) and byte that is added (`gamma`)."""

    alpha: float
    beta: float
    gamma: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Of one allreduce.

    `steps` follow each other. `wire` are the bytes of the busiest server in each of them, added up, and `added` the
    bytes of partial sums likewise. `sent` is what the busiest server sends in all: 2 (p − 1) / p · b at best.
    """

    steps: int = 0
    wire: float = 0.0
    added: float = 0.0
    sent: float = 0.0

    def seconds(self, link: Link) -> float:
        return link.alpha * self.steps + link.beta * self.wire + link.gamma * self.added


def ring(servers: int, size: float) -> Cost:
    """Reduce-scatter and allgather around a ring: 2 (p − 1) steps of b / p bytes."""
    p, b = servers, size
    return Cost(2 * (p - 1), 2 * (p - 1) / p * b, (p - 1) / p * b, 2 * (p - 1) / p * b)


def halving_doubling(servers: int, size: float) -> Cost:
    """Recursive halving, then doubling: 2 log2 p steps; binary blocks where p is no power of two.

    Blocks are the powers of two that p consists of, the largest first (Rabenseifner; the paper, section 4: two steps
    more). As soon as a block has scattered its sum it hands it to the next larger one, whose own reduce-scatter is then
    complete, so that all of this fits beside the largest block's. The way back is the mirror image.
    """
    blocks, b = binary_blocks(servers), size
    largest, more = blocks[0], len(blocks) - 1
    # What the busiest server sends in each step of the way there, and what it adds.
    wire = {step: b / 2**step for step in range(1, largest.bit_length())}
    added = dict(wire)
    for larger, smaller in pairwise(blocks):
        step = larger.bit_length()
        wire[step] = b / smaller
        added[step] = b / larger  # more than the largest block's own
    return Cost(
        2 * len(wire), 2 * sum(wire.values()), sum(added.values()), 2 * b - max(0, 2 - more) * b / largest
    )


def binary_blocks(servers: int) -> list[int]:
    """The powers of two that add up to it, the largest first."""
    return [1 << bit for bit in range(servers.bit_length() - 1, -1, -1) if servers >> bit & 1]


def tree(servers: int, size: float) -> Cost:
    """To the root of a binomial tree and back, the whole buffer at each level.

    It is the plain tree. NCCL's trees are pipelined: their bytes are close to a ring's.
    """
    levels = (servers - 1).bit_length()
    return Cost(2 * levels, 2 * levels * size, levels * size, levels * size)


def chain(gpus: int, size: float) -> Cost:
    """The paper's first and third phase by NCCL: a pipeline through the GPUs of a server, in as many slices as GPUs.

    To the first GPU, and back from it: 2 (2 g − 2) steps of b / g bytes.
    """
    if gpus == 1:
        return Cost()
    steps = 2 * gpus - 2
    return Cost(2 * steps, 2 * steps * size / gpus, steps * size / gpus, size if gpus == 2 else 2 * size)


def through_host(gpus: int, size: float) -> Cost:
    """The same phases for small buffers: every GPU copies to the host, which adds; and back. GPUs copy side by side."""
    if gpus == 1:
        return Cost()
    return Cost(2, 2 * size, (gpus - 1) * size, gpus * size)


Algorithm = Callable[[int, float], Cost]
ALGORITHMS: dict[str, Algorithm] = {"ring": ring, "halving-doubling": halving_doubling, "tree": tree}
SMALL_BUFFER = 256 << 10  #: bytes; smaller ones go through the host (the paper, section 4)


@dataclass(frozen=True)
class Hierarchy:
    """Servers with several GPUs: three phases, inside a server, between servers by `algorithm`, inside again.

    `inside` is the link of one GPU to another, `host` that of a GPU to its host's memory, for buffers below
    `small` bytes; without it, all go by `inside`.
    """

    gpus_per_server: int
    between: Link
    inside: Link
    host: Link | None = None
    small: int = SMALL_BUFFER

    def phases(self, algorithm: str, gpus: int, size: float) -> tuple[float, float]:
        """Seconds inside servers and between them, for a buffer of so many bytes summed over so many GPUs."""
        used = min(self.gpus_per_server, gpus)
        by_host = self.host is not None and size < self.small
        within = (
            through_host(used, size).seconds(self.host)
            if self.host is not None and by_host
            else chain(used, size).seconds(self.inside)
        )
        servers = -(-gpus // self.gpus_per_server)
        return within, ALGORITHMS[algorithm](servers, size).seconds(self.between)

    def seconds(self, algorithm: str, gpus: int, size: float) -> float:
        return sum(self.phases(algorithm, gpus, size))
