"""report.html: a run on one page that needs nothing else, to be sent to a colleague."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment, PackageLoader

from hvd_lb.report.metrics import read_metrics
from hvd_lb.report.plots import plot_curves
from hvd_lb.report.run_directory import RunDirectory, replace_text


def write_report(run: RunDirectory, title: str, steps_per_epoch: int, figures: list[tuple[str, str]]) -> None:
    """Draw curves.png and write report.html from the run directory; `figures` are (name, value with unit)."""
    records = read_metrics(run.metrics)
    plot_curves(records, steps_per_epoch, title, run.curves)
    template = Environment(loader=PackageLoader("hvd_lb.report"), autoescape=True).get_template("report.html")
    content: dict[str, Any] = {
        "title": title,
        "figures": figures,
        "curves": base64.b64encode(run.curves.read_bytes()).decode(),
        "evaluations": [record for record in records if record["kind"] == "eval"],
        "recipe": run.recipe.read_text("utf-8"),
        "environment": run.environment.read_text("utf-8"),
    }
    replace_text(run.report, template.render(content))
