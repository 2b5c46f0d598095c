from itertools import combinations

import pytest

from hvd_lb.network.tournament import rounds


@pytest.mark.parametrize("players", range(34))
def test_each_meets_each_once_and_nobody_two_at_a_time(players: int) -> None:
    found = rounds(players)
    assert len(found) == (0 if not players else players - 1 + players % 2)
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(players), 2))
    for pairs in found:
        busy = [player for pair in pairs for player in pair]
        assert len(busy) == len(set(busy)) >= players - players % 2
