"""report.html: a run on one page that needs nothing else, to be sent to a colleague."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment, PackageLoader

from hvd_lb.report.run_directory import RunDirectory, replace_text
from hvd_lb.report.text import figure, printable


def write_report(
    run: RunDirectory,
    title: str,
    figures: list[tuple[str, str]],
    records: list[dict[str, Any]],
    curves: bytes | None,
) -> None:
    """Write report.html; `figures` are (name, value with unit), `curves` a PNG if there is one."""
    pages = Environment(loader=PackageLoader("hvd_lb.report"), autoescape=True)
    pages.filters["figure"] = figure
    content: dict[str, Any] = {
        "title": printable(title),
        "figures": figures,
        "curves": base64.b64encode(curves).decode() if curves else "",
        "evaluations": [record for record in records if record.get("kind") == "eval"],
        "recipe": run.recipe.read_text("utf-8"),
        "environment": run.environment.read_text("utf-8"),
    }
    replace_text(run.report, pages.get_template("report.html").render(content))
