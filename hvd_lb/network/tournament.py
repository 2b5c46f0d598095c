"""Each with each other once, all at the same time: the circle method of tournaments."""

from __future__ import annotations


def rounds(players: int) -> list[list[tuple[int, int]]]:
    """Pairs (a, b), a < b, of the players 0 … players − 1; in a round nobody is in two. One round less than players.

    With an odd number one sits out in each round, and there is a round more.
    """
    seats = list(range(players + players % 2))
    found = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats), strict=False)
        found.append([(min(pair), max(pair)) for pair in pairs if max(pair) < players])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found
