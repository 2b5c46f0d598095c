"""The lines of metrics.jsonl, read and written back."""

import json
from pathlib import Path
from typing import Any

from hvd_lb.exact.chain import Chain

Record = dict[str, Any]


def lines(run: Path) -> list[Record]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rewrite(run: Path, records: list[Record]) -> None:
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def sealed_anew(records: list[Record]) -> list[Record]:
    """With links that are right, as who forges a run would write them."""
    chain = Chain()
    return [chain.sealed(record) for record in records]
