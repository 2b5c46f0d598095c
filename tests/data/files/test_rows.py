"""Names in one piece are the names."""

from __future__ import annotations

import pytest

from hvd_lb.data.files.rows import Names

WORDS = [b"ant/1.png", b"", b"bee/\xff.jpg", b"x"]


def test_names_in_one_piece_are_the_names() -> None:
    names = Names.of(iter(WORDS))
    assert list(names) == [names[position] for position in range(4)] == WORDS
    assert names[-1] == b"x"
    assert names[1:3] == WORDS[1:3]
    assert names.lengths.tolist() == [9, 0, 9, 1]
    for position in (4, -5):
        with pytest.raises(IndexError):
            names[position]


def test_parts_are_joined_in_order() -> None:
    parts = [Names.of(WORDS[:1]), Names.of([]), Names.of(WORDS[1:])]
    assert list(Names.joined(parts)) == WORDS
    assert list(Names.joined([])) == []
