"""The page of runs in a real browser, Debian's chromium, which is asked by DevTools' protocol over a pipe."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real_runs import SMALL, until
from test_page import make_run

from hvd_lb.report.page.chart import Chart, Mark, Series
from hvd_lb.report.page.page import page
from hvd_lb.report.page.runs import runs_page

pytestmark = pytest.mark.long
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DESK, PHONE = (1280, 900), (360, 740)


class Browser:
    """One tab. What a page says in error, and addresses that it asks for, are kept."""

    def __init__(self, profile: Path):
        assert CHROMIUM
        (from_here, self._to), (self._from, to_here) = os.pipe(), os.pipe()
        kept = [from_here, to_here]

        def third_and_fourth() -> None:
            copies = [os.dup(number) for number in kept]  # above 4, whatever these are
            for copy, number in zip(copies, (3, 4), strict=True):
                os.dup2(copy, number)

        self.process = subprocess.Popen(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
                *("--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=third_and_fourth,
            close_fds=False,
        )
        for number in kept:
            os.close(number)
        self._read, self._number, self._session = b"", 0, {}  # type: ignore[var-annotated]
        self.errors: list[str] = []
        self.asked: list[str] = []
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=tab, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._number:
                assert "error" not in told, told
                return told["result"]  # type: ignore[no-any-return]
            self._note(told)

    def _next(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self._read:
            assert select.select([self._from], [], [], seconds)[0], "the browser says nothing"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)  # type: ignore[no-any-return]

    def _note(self, event: dict[str, Any]) -> None:
        method, content = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(content["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" or (
            method == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning")
        ):
            self.errors.append(json.dumps(content))
        elif method == "Network.requestWillBeSent":
            self.asked.append(content["request"]["url"])

    def value(self, expression: str) -> Any:
        """Of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, file: Path, size: tuple[int, int] = DESK, scheme: str = "light") -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1,
            mobile=size == PHONE,
        )  # fmt: skip
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=file.as_uri())
        until(lambda: self.value(f"document.readyState == 'complete' && location.href == '{file.as_uri()}'"))

    def mouse(self, kind: str, x: float, y: float) -> None:
        pressed = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


# Of each chart its title, how many lines, dots and bands are drawn, and whether lines and texts can be seen as a whole.
DRAWN = """[...document.querySelectorAll("#charts figure")].map((figure) => {
  const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
  const inside = [...svg.querySelectorAll("path, circle, text")].every((node) => {
    const of = node.getBoundingClientRect();
    return of.left >= box.left - 4 && of.right <= box.right + 4 && of.top >= box.top - 4 && of.bottom <= box.bottom + 4;
  });
  const lines = [...svg.querySelectorAll("path")].filter((path) => /^M[0-9., L M-]+/.test(path.getAttribute("d")));
  const bad = svg.outerHTML.match(/NaN|Infinity|undefined/);
  return {title: figure.querySelector("b").textContent, lines: lines.length, inside, bad: bad && bad[0],
    dots: svg.querySelectorAll("circle").length, bands: svg.querySelectorAll("polygon").length,
    paint: lines.length && getComputedStyle(lines[0]).stroke};
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE])
def test_charts_are_drawn(browser: Browser, size: tuple[int, int], scheme: str, tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name).path for name in ("a", "b")]
    (tmp_path / "page.html").write_text(runs_page(folders))
    browser.open(tmp_path / "page.html", size, scheme)
    charts = {chart["title"]: chart for chart in browser.value(DRAWN)}
    assert len(charts) == 7
    for title, chart in charts.items():
        assert chart["inside"], chart
        assert chart["bad"] is None, chart
        assert chart["lines"] or chart["dots"], chart
        assert chart["paint"] == {"light": "rgb(9, 105, 218)", "dark": "rgb(88, 166, 255)"}[scheme], title
    assert charts["Loss"]["lines"] >= 2  # of two runs
    assert charts["Validation error"]["dots"] == 4
    # It scrolls from top to bottom only, in the colours of the scheme.
    assert browser.value("document.documentElement.scrollWidth") <= size[0]
    back = browser.value("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    assert browser.errors == []
    # Of the page itself, whose icon is in it.
    assert [url for url in browser.asked if not url.startswith(("data:", "about:"))] == [
        (tmp_path / "page.html").as_uri()
    ]


def test_values_are_shown_and_all_charts_are_zoomed(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(runs_page([make_run(tmp_path / "a").path]))
    browser.open(tmp_path / "page.html")
    where = "[...document.querySelectorAll('figure')].find((f) => f.textContent.startsWith('Gradient norm'))"
    browser.value(f"{where}.scrollIntoView()")
    box = browser.value(f"{where}.querySelector('svg').getBoundingClientRect().toJSON()")
    y = box["top"] + 60

    def x(share: float) -> float:
        return float(box["left"] + share * box["width"])

    def tip() -> str:
        return str(
            browser.value(f"{where}.querySelector('.tip').hidden || {where}.querySelector('.tip').innerText")
        )

    browser.mouse("mouseMoved", x(0.99), y)
    assert "epoch 2" in tip()
    assert "22" in tip()  # of the last step, which the run tells
    axis = "[...document.querySelectorAll('svg')].map((svg) => svg.textContent)"
    before = browser.value(axis)
    browser.mouse("mousePressed", x(0.5), y)
    browser.mouse("mouseMoved", x(0.7), y)
    browser.mouse("mouseReleased", x(0.7), y)
    zoomed = browser.value(axis)
    assert all(a != b for a, b in zip(before, zoomed, strict=True))
    browser.value(f"{where}.querySelector('svg').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="0", text="0")
    assert browser.value(axis) == before
    # A line is hidden by its name.
    browser.value("document.querySelector('button.key').click()")
    assert browser.value("document.querySelector('button.key').ariaPressed") == "false"
    assert browser.errors == []


def test_bars_over_a_logarithmic_axis(browser: Browser, tmp_path: Path) -> None:
    """As in a sweep's Figure 1."""
    series = Series(
        "linear", [64, 512, 4096], [12.7, 13.6, 30.0], [12.5, 13.0, 25.0], [12.9, 14.2, 35.0], bars=True
    )
    chart = Chart("one", "Figure 1", "minibatch", "error (%)", [series], [Mark(512, "noise")], log_x=True)
    (tmp_path / "page.html").write_text(page("a sweep", charts=[chart]))
    browser.open(tmp_path / "page.html")
    [drawn] = browser.value(DRAWN)
    assert (drawn["inside"], drawn["bad"], drawn["dots"], drawn["lines"]) == (True, None, 3, 1 + 3)
    assert "4,096" in browser.value("document.querySelector('svg').textContent")
    assert browser.errors == []


def test_numbers_at_the_ends_of_what_a_number_holds(browser: Browser, tmp_path: Path) -> None:
    """Neighbours among numbers, between which no tick can be; some of many without a neighbour; one step; a spike."""
    every_third = [None if step % 3 else 2.0 for step in range(90)]
    charts = [
        Chart("near", "near", "epoch", "norm", [Series("a", [*range(8)], [1e16, 1e16 + 2] * 4)]),
        Chart("few", "few", "epoch", "loss", [Series("a", [*range(90)], every_third)]),
        Chart("one", "one", "epoch of one", "loss", [Series("a", [0.05], [1.0])]),
        Chart("spike", "spike", "epoch", "loss", [Series("a", [0, 1, 2], [1.0, 1e37, 2.0])]),
    ]
    (tmp_path / "page.html").write_text(page("a run", charts=charts))
    browser.open(tmp_path / "page.html")
    near, few, one, spike = browser.value(DRAWN)
    assert browser.errors == []
    assert (near["lines"], near["dots"]) == (1, 8)
    assert few["dots"] == 30
    texts = browser.value(
        "[...document.querySelectorAll('svg')].map((of) => [...of.querySelectorAll('text')].map((t) => t.textContent))"
    )
    assert not [text for text in texts[2] if text.startswith("-")]
    assert "1e+37" in texts[3]
    assert one["dots"]
    assert spike["lines"]


def test_an_open_page_follows_a_run(
    browser: Browser, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """`report --watch`: the page is written again and loads itself again, with more of the run, until that ends."""
    run = tmp_path / "run"
    training = start(
        *(
            "simulate",
            *SMALL,
            "--run",
            "--gpus",
            4,
            "--per-gpu-batch",
            32,
            "--epochs",
            1000,
            "--log-every",
            1,
        ),
        *("--output", run),
    )
    until(lambda: (run / "metrics.jsonl").exists() and '"train"' in (run / "metrics.jsonl").read_text())
    file = tmp_path / "page.html"
    watching = start("report", run, "--watch", "--every", 1, "--output", file)
    until(file.exists)
    browser.open(file)
    points = (
        "document.readyState == 'complete' && document.getElementById('data') && "
        "JSON.parse(document.getElementById('data').textContent).find((c) => c.key == 'loss').series[0].x.length"
    )
    until(lambda: browser.value(points))
    first = browser.value(points) or 0
    until(lambda: (browser.value(points) or 0) > first)
    training.terminate()
    training.communicate(timeout=60)
    said, _ = watching.communicate(timeout=60)
    assert (watching.returncode, said.splitlines()[-1]) == (0, f"1 run: {file}")
    # While it loads itself again there may be no body for a moment.
    until(lambda: "interrupted by SIGTERM" in browser.value("document.body?.innerText ?? ''"))
    time.sleep(2.5)
    # What has ended is not loaded again.
    asked = len(browser.asked)
    time.sleep(2.5)
    browser.value("1")
    assert len(browser.asked) == asked
    assert browser.value(DRAWN)
    assert browser.errors == []
