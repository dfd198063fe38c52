"""The report in a real browser: it draws, it asks the network for nothing, and nothing that a row
says is run.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket

from gradsift.report import ReportData, write_report
from tests.report.test_report import EVIL, full

pytestmark = [pytest.mark.slow, pytest.mark.browser]

FLAGS = [
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--remote-allow-origins=*", "--remote-debugging-port=0"),
]


def find_chromium() -> str | None:
    named = os.environ.get("CHROMIUM")
    if named:
        return named if Path(named).exists() else None
    return next(
        (
            found
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (found := shutil.which(name))
        ),
        None,
    )


class Page:
    """One tab driven over the DevTools protocol; `events` keeps everything the browser said."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, timeout=30)
        self.events: list[dict[str, Any]] = []
        self.last = 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.last += 1
        self.socket.send(json.dumps({"id": self.last, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.last:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self.events.append(message)

    def js(self, expression: str) -> Any:
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, (
                f"never true in the page: {expression}; {self.complaints()}"
            )
            time.sleep(0.05)

    def open(self, path: Path, *, width: int = 1000, dark: bool = False) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        self.wait(
            f"location.href === {json.dumps(path.as_uri())} && document.readyState === 'complete'"
        )

    def of(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def complaints(self) -> list[Any]:
        """Exceptions, console messages and log entries (policy violations are log entries): a clean
        page has none at all.
        """
        self.js("new Promise(done => setTimeout(done, 50))")
        return (
            self.of("Runtime.exceptionThrown")
            + self.of("Runtime.consoleAPICalled")
            + self.of("Log.entryAdded")
        )

    def requests(self) -> list[str]:
        return [event["request"]["url"] for event in self.of("Network.requestWillBeSent")]

    def screenshot(self, path: Path, *, top: float = 0, height: float | None = None) -> None:
        """For people working on the page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {
            "x": 0,
            "y": top,
            "width": size["width"],
            "height": min(height or size["height"], size["height"] - top),
            "scale": 1,
        }
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(image["data"]))


def start(executable: str, profile: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A browser with an empty profile, and the address of its first tab."""
    process = subprocess.Popen(
        [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    port = profile / "DevToolsActivePort"
    end = time.monotonic() + 60
    while not (port.exists() and len(port.read_text().split()) == 2):
        assert process.poll() is None, (
            f"{executable} ended with {process.returncode} before it was ready"
        )
        assert time.monotonic() < end, f"{executable} was not ready after 60 s"
        time.sleep(0.05)
    number, path = port.read_text().split()
    hub = websocket.create_connection(f"ws://127.0.0.1:{number}{path}", timeout=30)
    hub.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
    answer = json.loads(hub.recv())
    hub.close()
    target = next(
        found["targetId"] for found in answer["result"]["targetInfos"] if found["type"] == "page"
    )
    return process, f"ws://127.0.0.1:{number}/devtools/page/{target}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    executable = find_chromium()
    if executable is None:
        reason = (
            "no Chromium: the report was NOT tried in a browser (install chromium, or set CHROMIUM"
            " to its path)"
        )
        if os.environ.get("GRADSIFT_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    process, address = start(executable, tmp_path_factory.mktemp("profile"))
    tab = Page(address)
    try:
        yield tab
    finally:
        tab.socket.close()
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ReportData], Path]:
    return lambda data: write_report(data, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def report(written: Callable[[ReportData], Path]) -> Path:
    return written(full())


DRAWN = "document.documentElement.dataset.charts === 'drawn'"
CHARTS = ["comparison", "groups", "scores", "map", "clusters", "lengths", "warmup"]


@pytest.mark.parametrize("width, dark", [(1000, False), (1000, True), (390, False)])
def test_the_page_draws_its_charts_and_asks_for_nothing(
    page: Page, report: Path, width: int, dark: bool
) -> None:
    page.open(report, width=width, dark=dark)
    page.wait(DRAWN)
    sizes = page.js(
        "[...document.querySelectorAll('[data-chart]')].map(place => { const box ="
        " place.querySelector('svg').getBoundingClientRect(); return [place.dataset.chart,"
        " box.width, box.height, place.querySelectorAll('svg path').length]})"
    )
    assert [name for name, *_ in sizes] == CHARTS
    room = min(width - 40, 760)
    assert all(0.9 * room < w <= room + 1 and h > 60 and marks > 3 for _, w, h, marks in sizes), (
        sizes
    )
    labels = page.js(
        "[...document.querySelectorAll('[data-chart] svg text')].map(label => label.textContent)"
    )
    assert not any("e+" in label or label in ("NaN", "undefined", "null") for label in labels), (
        labels
    )
    assert page.requests() == [report.as_uri(), "data:,"] or page.requests() == [report.as_uri()]
    assert page.complaints() == []


def test_a_phone_does_not_scroll_sideways(page: Page, report: Path) -> None:
    page.open(report, width=390)
    page.wait(DRAWN)
    page.js("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.js("document.documentElement.scrollWidth") <= 390


def test_bars_have_the_heights_of_the_counts(page: Page, report: Path) -> None:
    page.open(report)
    page.wait(DRAWN)
    data = full().scores
    assert data is not None
    heights = page.js(
        "[...document.querySelector('[data-chart=scores] svg"
        " .mark-rect').querySelectorAll('path')].map(bar => bar.getBBox().height)"
    )
    assert len(heights) == len(data.counts)
    tallest = max(range(len(heights)), key=heights.__getitem__)
    assert data.counts[tallest] == max(data.counts)
    for height, count in zip(heights, data.counts, strict=True):  # a square-root axis
        assert height / heights[tallest] == pytest.approx(
            (count / max(data.counts)) ** 0.5, abs=0.01
        )


def test_dark_and_light_use_different_colours(page: Page, report: Path) -> None:
    seen = []
    for dark in (False, True):
        page.open(report, dark=dark)
        page.wait(DRAWN)
        bar = "document.querySelector('[data-chart=scores] .mark-rect path')"
        seen.append(
            page.js(
                f"[getComputedStyle(document.body).backgroundColor, {bar}.getAttribute('fill')]"
            )
        )
    assert seen == [["rgb(253, 253, 252)", "#c3c9ce"], ["rgb(21, 24, 27)", "#4a535a"]]


def test_payloads_in_rows_are_text(page: Page, report: Path) -> None:
    page.open(report)
    page.wait(DRAWN)
    page.js("document.querySelectorAll('details').forEach(part => part.open = true)")
    page.js("new Promise(done => setTimeout(done, 200))")
    assert page.js("typeof window.__pwned") == "undefined"
    shown = page.js("document.body.innerText")
    assert "<script>window.__pwned=1</script>" in shown
    assert "{{7*7}}" in shown
    assert "U+202E" in shown
    assert not any(character in shown for character in "\u202e\u2066\x00")
    assert (
        page.js(
            "document.querySelectorAll('a, iframe, img, object, embed, [onerror], [onload]').length"
        )
        == 0
    )
    assert page.js("[...document.scripts].length") == 3
    assert page.complaints() == []


def test_the_tooltip_of_a_chart_is_text(page: Page, report: Path) -> None:
    page.open(report)
    page.wait(DRAWN)
    place = page.js(
        "(() => { const chart = document.querySelector('[data-chart=groups]');"
        " chart.scrollIntoView({block: 'center'}); const dots ="
        " [...chart.querySelectorAll('.mark-symbol')].pop().querySelectorAll('path'); const box ="
        " dots[dots.length - 1].getBoundingClientRect(); return [box.x + box.width / 2, box.y +"
        " box.height / 2] })()"
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0] - 2, y=place[1])
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    page.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    assert page.js("document.querySelector('#vg-tooltip-element').innerText").count("<script>") == 1
    assert (
        page.js(
            "document.querySelectorAll('#vg-tooltip-element script, #vg-tooltip-element"
            " img').length"
        )
        == 0
    )
    assert page.js("typeof window.__pwned") == "undefined"
    assert page.complaints() == []


def test_the_policy_stops_a_script_that_got_in(page: Page, report: Path) -> None:
    """Proves that the policy is alive: the same page with a foreign script added does not run
    it.
    """
    foreign = report.with_name("foreign.html")
    text = report.read_text(encoding="utf-8")
    added = "<script>window.__pwned = 1</script><img src=x onerror='window.__pwned = 2'><footer>"
    foreign.write_text(text.replace("<footer>", added), encoding="utf-8")
    page.open(foreign)
    page.wait(DRAWN)
    assert page.js("typeof window.__pwned") == "undefined"
    assert any(
        "Content Security Policy" in entry["entry"]["text"] for entry in page.of("Log.entryAdded")
    )
    assert page.js("fetch('data:,x').then(() => 'open', () => 'closed')") == "closed"
    trial = (
        "(() => { try { return new Function('return 1')() } catch (error) { return error.name }"
        " })()"
    )
    answer = page.call(
        "Runtime.evaluate", expression=trial, returnByValue=True, allowUnsafeEvalBlockedByCSP=False
    )
    assert answer["result"]["value"] == "EvalError"


def test_a_report_without_charts_has_no_script(
    page: Page, written: Callable[[ReportData], Path]
) -> None:
    data = full()
    bare = ReportData(title=EVIL, method=data.method, verdict=data.verdict)
    path = written(bare)
    page.open(path)
    assert page.js("document.scripts.length") == 0
    assert page.js("document.querySelector('.lead').textContent") == data.verdict[0].text
    assert path.stat().st_size < 40_000
    assert page.complaints() == []


MARKS = (
    "(kind => [...document.querySelectorAll('[data-chart=map] svg .mark-symbol')].map(layer =>"
    " [...layer.querySelectorAll('path')].map(mark => [mark.getAttribute('fill'),"
    " mark.getBoundingClientRect().x + mark.getBoundingClientRect().width / 2,"
    " mark.getBoundingClientRect().y + mark.getBoundingClientRect().height / 2])))()"
)
SHOWN = "document.querySelector('#map-row .role').textContent"


def test_the_map_draws_each_kind_in_its_own_colour(page: Page, report: Path) -> None:
    page.open(report)
    page.wait(DRAWN)
    pool, picked, target, chosen = page.js(MARKS)
    assert [len(layer) for layer in (pool, picked, target, chosen)] == [3, 2, 1, 0]
    assert [{mark[0] for mark in layer} for layer in (pool, picked, target)] == [
        {"#8a939b"},
        {"#0d7d72"},
        {"#b4452c"},
    ]
    # right of and above one another as their numbers are
    assert picked[0][1] < picked[1][1] and picked[0][2] < picked[1][2]


def test_a_click_on_the_map_shows_the_row(page: Page, report: Path) -> None:
    page.open(report)
    page.wait(DRAWN)
    assert page.js("document.querySelector('#map-row').innerText").startswith("Click a dot")
    page.js("document.querySelector('[data-chart=map]').scrollIntoView({block: 'center'})")
    _, x, y = page.js(MARKS)[2][0]
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=x + 2, y=y, button="left", clickCount=1)
    assert page.js(SHOWN).startswith("target row · a target row")
    told = page.js("document.querySelector('#map-row').innerText")
    assert "user: a target row" in told and "assistant: yes" in told and "3 more char" in told
    page.wait(f"{MARKS}[3].length === 1")
    ring = page.js(MARKS)[3][0]
    assert ring[1:] == pytest.approx([x, y], abs=1)
    page.js("document.querySelector('#map-row').scrollIntoView()")
    assert page.complaints() == []


def test_the_map_is_walked_by_keys(page: Page, report: Path) -> None:
    page.open(report)
    page.wait(DRAWN)
    page.js("document.querySelector('#map-keys').focus()")
    assert page.js("document.activeElement.getAttribute('aria-label')").startswith("Map of rows")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "PageDown", "PageDown", "PageDown", "End", "Home"):
        page.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        seen.append(page.js(SHOWN).split(" · ")[0])
    assert seen == ["pick 1", "pick 2", "target row", "pool row", "pool row", "pool row", "pick 1"]
    page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    told = page.js("document.querySelector('#map-row').innerText")
    assert "<script>window.__pwned=1</script>" in told and "[U+202E]" in told
    assert page.js("document.querySelectorAll('#map-row script, #map-row img').length") == 0
    assert page.js("typeof window.__pwned") == "undefined"
    assert page.complaints() == []
