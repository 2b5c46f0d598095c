"""The lines of metrics.jsonl, read and written back."""

import json
from pathlib import Path
from typing import Any


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rewrite(run: Path, records: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
