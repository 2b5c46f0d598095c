"""A page of charts and tables in one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hvd_lb.report.page.chart import Chart
from hvd_lb.report.run_directory import strict_json
from hvd_lb.report.text import printable


def page(
    title: str,
    *,
    lead: str = "",
    charts: Sequence[Chart] = (),
    sections: Sequence[tuple[str, str]] = (),
    refresh: float | None = None,
) -> str:
    """`sections` are (heading, HTML). With `refresh` an open page is loaded again after so many seconds."""
    templates = Environment(loader=PackageLoader("hvd_lb.report"), autoescape=True)
    drawn = [chart for chart in charts if any(series.x for series in chart.series)]
    content: dict[str, Any] = {
        "title": printable(title),
        "lead": lead,
        "charts": drawn,
        # A text in it may hold </script>.
        "data": Markup(strict_json([chart.content() for chart in drawn]).replace("<", "\\u003c")),
        "sections": [(heading, Markup(body)) for heading, body in sections],
        "refresh": json.dumps(refresh),
    }
    content["style"], content["script"] = (
        Markup(_source(templates, name)) for name in ("style.css", "charts.js")
    )
    return templates.get_template("page.html").render(content)


def _source(templates: Environment, name: str) -> str:
    assert templates.loader
    return templates.loader.get_source(templates, name)[0]


def rows(pairs: Sequence[tuple[str, str]]) -> str:
    """HTML of a table of (name, value)."""
    lines = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in pairs)
    return f"<table>{''.join(lines)}</table>"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """HTML of a table whose last `numbers` columns are numbers; it scrolls by itself where it is too wide."""

    def line(cells: Sequence[str], tag: str) -> str:
        from_here = len(cells) - numbers
        parts = (
            f"<{tag}{' class=number' if i >= from_here else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(parts)}</tr>"

    return f"<div class=wide><table>{line(heads, 'th')}{''.join(line(cells, 'td') for cells in lines)}</table></div>"


def folded(summary: str, text: str) -> str:
    """HTML of a long text that is shown when it is asked for."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
