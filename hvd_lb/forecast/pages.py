"""A forecast as files: forecast.json, forecast.png, forecast.html, and the step as a Chrome trace."""

from __future__ import annotations

import base64
import io
import json
import os
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from hvd_lb.errors import UserError
from hvd_lb.forecast.predict import Forecast
from hvd_lb.forecast.step import Span, trace_events
from hvd_lb.forecast.words import rows
from hvd_lb.recipe_file import read_named
from hvd_lb.report.run_directory import replace_bytes, replace_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BYTES = 16 << 20
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }} img {{ max-width: 100%; }}
th, td {{ text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }}
</style></head><body><h1>{title}</h1><table>{table}</table>
<img alt="efficiency by number of GPUs, and the timeline of a step" src="data:image/png;base64,{picture}">
</body></html>
"""


def write_forecast(folder: Path, forecast: Forecast, notes: list[tuple[str, str]]) -> list[Path]:
    """All four, into a folder that is made; `notes` are further rows of the page. OSError where they do not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(forecast)
    title = f"{forecast.model} on {forecast.gpus:,} GPUs of {forecast.cluster}"
    table = "".join(
        f"<tr><th>{escape(topic)}</th><td>{escape(text)}</td></tr>"
        for topic, text in [*rows(forecast), *notes]
    )
    page = _PAGE.format(title=escape(title), table=table, picture=base64.b64encode(picture).decode("ascii"))
    spans = tuple(Span(*span) for span in forecast.spans)
    files = {
        "forecast.json": forecast.model_dump_json(indent=1) + "\n",
        "forecast.html": page,
        "step-trace.json": json.dumps(trace_events(spans)) + "\n",
    }
    for name, text in files.items():
        replace_text(folder / name, text)
    replace_bytes(folder / "forecast.png", picture)
    return [folder / name for name in (*files, "forecast.png")]


def read_forecast(path: Path) -> Forecast:
    """What `write_forecast` wrote; UserError in one line for anything else."""
    try:
        return Forecast.model_validate_json(read_named(path, _MOST_BYTES))
    except OSError as error:
        raise UserError(f"forecast {path} cannot be read: {error.strerror}") from None
    except ValidationError:
        raise UserError(
            f"forecast {path} is none: expected the forecast.json that `hvd-lb simulate --cluster … --output` writes"
        ) from None


def draw(forecast: Forecast) -> bytes:
    """A PNG: efficiency over GPUs by algorithm, with the interval of the chosen one, above the timeline of a step."""
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams["text.parse_math"] = False
        figure = Figure(figsize=(9, 7), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(3, 2))
        _scaling(above, forecast)
        _timeline(below, forecast)
        figure.suptitle(
            f"{forecast.model} on {forecast.cluster}: {forecast.gpus:,} GPUs, n = {forecast.per_gpu_batch}"
        )
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _scaling(axes: Axes, forecast: Forecast) -> None:
    for number, (name, points) in enumerate(forecast.scaling.items()):
        gpus = [point.gpus for point in points]
        colour = f"C{number}"
        axes.plot(
            gpus, [100 * point.efficiency.value for point in points], marker=".", label=name, color=colour
        )
        if name == forecast.algorithm:
            low = [100 * point.efficiency.low for point in points]
            high = [100 * point.efficiency.high for point in points]
            axes.fill_between(gpus, low, high, alpha=0.2, color=colour, label=f"{name}, 90 %")
    if forecast.paper:
        first_gpus, first = forecast.paper[0]
        start = next(
            (
                point.efficiency.value
                for point in forecast.scaling[forecast.algorithm]
                if point.gpus == first_gpus
            ),
            1.0,
        )
        within = [point for point in forecast.paper if point[0] <= forecast.gpus]
        axes.plot(
            [gpus for gpus, _ in within],
            [100 * start * first / seconds for _, seconds in within],
            "k*--",
            label="the paper (from its 8 GPUs on)",
        )
    axes.set_xscale("log", base=2)
    ticks = [point.gpus for point in forecast.scaling[forecast.algorithm]]
    axes.set_xticks(ticks, [f"{gpus:,}" for gpus in ticks])
    axes.set_ylim(0, 105)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("efficiency (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")


def _timeline(axes: Axes, forecast: Forecast) -> None:
    lanes = [lane for lane in ("loader", "network", "device") if any(of[0] == lane for of in forecast.spans)]
    colours = {"forward": "C0", "backward": "C1", "update": "C2", "bucket": "C4", "images": "C5"}
    for lane, name, start, end in forecast.spans:
        colour = colours.get(name.split()[0], "lightgrey")
        bars = [(1000 * start, 1000 * (end - start))]
        axes.broken_barh(bars, (lanes.index(lane) - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.5)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlabel("a step of the slowest GPU (ms)")
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlim(left=0)
