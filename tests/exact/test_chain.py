"""The chain of records: what is changed is found, what does not count does not."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from hvd_lb.exact.chain import Chain, ChainReport, examine_chain, next_link

Records = list[dict[str, Any]]


def told() -> Records:
    """Ten steps, digests after every fourth, an evaluation and a seal, as they are read from a file."""
    chain = Chain()
    records: Records = [
        {"kind": "begin", "step": -1, "recipe": {"seed": 0}, "data": "d", "plan": {"images": 3}}
    ]
    for step in range(10):
        position = {"epoch": 0, "step": step}
        records.append({"kind": "train", **position, "lr": 0.1, "loss": 2 / (step + 3), "data_wait": 0.5})
        records.append({"kind": "ranks", **position, "median": 0.1})
        if step % 4 == 3:
            records.append({"kind": "digest", **position, "weights": f"w{step}", "velocities": f"v{step}"})
    records.append({"kind": "eval", "epoch": 0, "step": 9, "loss": math.nan, "top1_error": 9.0, "images": 3})
    sealed = [chain.sealed(record) for record in records]
    sealed.append(chain.sealed(chain.seal() or {}))
    assert chain.seal() is None
    return [json.loads(json.dumps(record).replace("NaN", "null")) for record in sealed]


def test_whole() -> None:
    report = examine_chain(told())
    assert report.begin is not None
    assert [record["step"] for record in report.digests] == [3, 7]
    assert (report.broken, report.unsealed) == ([], 0)
    assert report.last == told()[-1]["chain"]
    assert len({record["chain"] for record in told() if "chain" in record}) == 3


def test_a_chain_begins_anew_whatever_was_told_before() -> None:
    """As by an older version, which had no chain."""
    begin, train = told()[:2]
    assert next_link(next_link("", train), begin) == next_link("", begin) != next_link("", train)


def broken(records: Records) -> list[tuple[int, int]]:
    return examine_chain(records).broken


@pytest.mark.parametrize("index", range(len(told())))
def test_each_record_that_is_changed_or_missing_is_found(index: int) -> None:
    records = told()
    kind, step = records[index]["kind"], records[index]["step"]
    rest = records[:index] + records[index + 1 :]
    if kind == "ranks":
        assert broken(rest) == []
        return
    if kind == "seal":
        assert examine_chain(rest).unsealed == 3
        records[index]["chain"] = records[index]["chain"][::-1]
        assert broken(records) == [(7, 9)]
        return
    after = max((s for s in (-1, 3, 7) if s < step), default=-1)
    last = min(s for s in (3, 7, 9) if s >= step)
    number = {"begin": "data", "train": "loss", "eval": "top1_error", "digest": "weights"}[kind]
    changed = [*records[:index], {**records[index], number: "x"}, *records[index + 1 :]]
    assert broken(changed) == [(after, last)]
    if kind == "begin":
        assert examine_chain(rest) == ChainReport(digests=[r for r in rest if r["kind"] == "digest"])
    else:  # without the digest that told it, the next one does
        assert broken(rest) == [
            (after, 7 if (kind, step) == ("digest", 3) else 9 if kind == "digest" else last)
        ]


def test_speed_is_in_no_link_and_what_is_added_is() -> None:
    records = told()
    assert broken([{**record, "data_wait": 0.1} for record in records]) == []
    assert broken([*records[:2], records[1], *records[2:]]) == [(-1, 3)]
    swapped = [records[0], records[3], records[2], records[1], *records[4:]]
    assert broken(swapped) == [(-1, 3)]


def test_a_chain_goes_on_where_its_records_end() -> None:
    records = [record for record in told() if record["kind"] != "seal"]
    for cut in range(1, len(records)):
        chain = Chain(records[:cut])
        again = records[:cut] + [
            chain.sealed({k: v for k, v in r.items() if k != "chain"}) for r in records[cut:]
        ]
        assert again == records


def test_a_chain_that_goes_on_after_a_change_leaves_the_break_where_it_is() -> None:
    records = told()[:12]
    assert [record["kind"] for record in records].count("digest") == 1
    records[1]["loss"] = 1.0
    chain = Chain(records)
    more = chain.sealed({"kind": "digest", "epoch": 0, "step": 4, "weights": "w"})
    assert broken([*records, more]) == [(-1, 3)]
