"""What a log or a terminal is told."""

from __future__ import annotations

import io
import pickle
import sys

import pytest

from gradsift.compute import progress
from gradsift.compute.progress import Bars, Lines, Silent, Told, duration, pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_give_rate_and_time_left_in_the_unit() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, every=10, clock=clock)
    lines.start(100_000, "tokens", "gradients")
    for _ in range(40):
        clock.now += 0.5
        lines.advance(1000)
    lines.done()
    assert stream.getvalue().splitlines() == [
        "gradients: 2,000 of 100,000 tokens, 2,000 tokens/s, 49 s left",
        "gradients: 22,000 of 100,000 tokens, 2,000 tokens/s, 39 s left",
        "gradients: 40,000 tokens in 20 s",
    ]


def test_short_stages_are_quiet_and_notes_are_not() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, clock=clock)
    lines.start(5, "rows")
    lines.advance(5)
    lines.note("[red]2 rows[/red] quarantined")
    lines.start(0, "rows", "reading")
    clock.now += 2
    lines.advance(3)
    lines.done()
    lines.done()
    assert stream.getvalue().splitlines() == [
        "[red]2 rows[/red] quarantined",
        "reading: 3 rows, 2 rows/s",
        "reading: 3 rows in 2 s",
    ]


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0 s"), (59.6, "1 min 00 s"), (190, "3 min 10 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bars_write_to_stderr_and_print_markup_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    bars.start(10, "tokens", "gradients [bold]")
    bars.advance(10)
    bars.note("see [link]")
    bars.done()
    out, err = capsys.readouterr()
    assert out == ""
    assert "gradients [bold]" in err
    assert "100%" in err
    assert "see [link]" in err


def test_a_stream_that_is_no_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress.auto(), Lines)
    assert isinstance(progress.silent(), Silent)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(progress.auto(), Bars)


def test_the_pace_of_slow_things_is_seconds_for_each() -> None:
    assert pace(1234.5, "tokens") == "1,234 tokens/s" and pace(1.0, "rows") == "1 rows/s"
    assert pace(0.02, "trainings") == "50 s each" and pace(1 / 90, "trainings") == "1 min 30 s each"
    assert pace(0.0, "tokens") == "0 tokens/s"


def test_choosing_tells_its_rounds_and_changes_no_result() -> None:
    now, lines = [0.0], io.StringIO()
    told = Told(map, Lines(lines), every=10, clock=lambda: now[0])

    def slow(x: int) -> int:
        now[0] += 4
        return x * x

    assert list(told(slow, range(3))) == [0, 1, 4] and list(told(slow, iter(range(3)))) == [0, 1, 4]
    assert lines.getvalue().splitlines() == [
        "choosing: round 1, 3 of 3 parts, 12 s",
        "choosing: round 2, 3 of 3 parts, 24 s",
    ]
    assert pickle.loads(pickle.dumps(told)) is map
