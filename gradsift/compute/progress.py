"""How far a stage is: throughput and time left in tokens (or whatever its unit is), on stderr."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from transformers.utils import logging as hf_logging

from gradsift.compute.threads import Watch


class Progress(Protocol):
    """What stages report to. One stage at a time; `start` ends the one before."""

    def start(self, total: int, unit: str, label: str = "") -> None:
        """A stage of `total` units ("tokens", "rows") begins; a total of 0 = not known."""
        ...

    def advance(self, k: int = 1) -> None:
        """k more units are done."""
        ...

    def note(self, text: str) -> None:
        """A line for the user that stays on the screen."""
        ...

    def done(self) -> None:
        """The stage has ended."""
        ...


class Silent:
    """Reports nothing."""

    def start(self, total: int, unit: str, label: str = "") -> None: ...
    def advance(self, k: int = 1) -> None: ...
    def note(self, text: str) -> None: ...
    def done(self) -> None: ...


class Watched:
    """Another progress, with a note where the machine becomes busy while threads spin."""

    def __init__(self, progress: Progress, watch: Watch) -> None:
        self._progress, self._watch = progress, watch

    def start(self, total: int, unit: str, label: str = "") -> None:
        self._progress.start(total, unit, label)

    def advance(self, k: int = 1) -> None:
        self._progress.advance(k)
        if (said := self._watch.look()) is not None:
            self.note(said)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def done(self) -> None:
        self._progress.done()


class Lines:
    """Plain lines for logs: one after the first second of a stage, then one every `every` seconds,
    and one at its end.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._every, self._clock = stream, every, clock
        self._label: str | None = None

    def start(self, total: int, unit: str, label: str = "") -> None:
        self.done()
        self._total, self._unit, self._label, self._count = total, unit, label or "working", 0
        self._began = self._clock()
        self._next = self._began + 1.0

    def advance(self, k: int = 1) -> None:
        if self._label is None:
            return
        self._count += k
        now = self._clock()
        if now >= self._next:
            self._next = now + self._every
            self.note(self._state(now))

    def note(self, text: str) -> None:
        print(text, file=self._stream or sys.stderr, flush=True)

    def done(self) -> None:
        if self._label is None:
            return
        seconds = self._clock() - self._began
        if seconds >= 1.0:
            self.note(f"{self._label}: {self._count:,} {self._unit} in {duration(seconds)}")
        self._label = None

    def _state(self, now: float) -> str:
        rate = self._count / max(now - self._began, 1e-9)
        text = f"{self._label}: {self._count:,}"
        if self._total:
            text += f" of {self._total:,}"
        text += f" {self._unit}, {pace(rate, self._unit)}"
        if self._total and self._count:
            text += f", {duration(max(self._total - self._count, 0) / rate)} left"
        return text


class Bars:
    """A bar per stage on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar: Any = None
        self._task: Any = None
        atexit.register(self.done)  # an error must not leave the terminal without its cursor

    def start(self, total: int, unit: str, label: str = "") -> None:
        from rich import progress as rich_progress
        from rich.text import Text

        class Rate(rich_progress.ProgressColumn):
            def render(self, task: rich_progress.Task) -> Any:
                rate = task.finished_speed or task.speed
                return Text("" if rate is None else pace(rate, unit))

        class Left(rich_progress.ProgressColumn):
            def render(self, task: rich_progress.Task) -> Any:
                if task.finished:
                    return Text(duration(task.finished_time or 0.0))
                left = task.time_remaining
                return Text("" if left is None else f"{duration(left)} left")

        self.done()
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.TextColumn("{task.percentage:>3.0f}%"),
            Rate(),
            Left(),
            console=self._console,
            speed_estimate_period=120,  # a batch may take seconds, a shard minutes
        )
        self._task = self._bar.add_task(label or "working", total=total or None)
        self._bar.start()

    def advance(self, k: int = 1) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, k)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def done(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Told:
    """A `map` that tells how far choosing is: rules do blocks of rows, or clusters, with it, one
    round after the other, and how many rounds there will be is not known. A line every `every`
    seconds, from the first `every` on. The results are those of `inner`.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        progress: Progress,
        *,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner, self._progress, self._every, self._clock = inner, progress, every, clock
        self._rounds, self._began = 0, clock()
        self._next = self._began + every

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        given = list(items)
        self._rounds += 1
        return self._tell(self._inner(function, given), self._rounds, len(given))

    def _tell(self, results: Iterable[Any], number: int, total: int) -> Iterator[Any]:
        for done, result in enumerate(results, start=1):
            if (now := self._clock()) >= self._next:
                self._next = now + self._every
                self._progress.note(
                    f"choosing: round {number:,}, {done:,} of {total:,} parts,"
                    f" {duration(now - self._began)}"
                )
            yield result

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_map, ()  # sent to a worker, where there is nobody to tell


def _plain_map() -> Any:
    return map


def pace(rate: float, unit: str) -> str:
    """1,200 tokens/s, or 50 s each where one takes longer than a second."""
    return f"{rate:,.0f} {unit}/s" if rate >= 1 or not rate else f"{duration(1 / rate)} each"


def duration(seconds: float) -> str:
    """42 s, 3 min 10 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def silent() -> Progress:
    """Reports nothing."""
    return Silent()


def auto() -> Progress:
    """Bars where stderr is a terminal, plain lines elsewhere."""
    return Bars() if sys.stderr.isatty() else Lines()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or load reports from transformers, whose settings are left as they were."""
    bar, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
