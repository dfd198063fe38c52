"""`gradsift demo`: the whole job on a generated pool with a built-in model, offline, and the check that it worked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradsift import report
from gradsift.commands.compare.statistics import Compared, Interval, compare_subsets
from gradsift.commands.demo import playground
from gradsift.commands.select.select import Selection, select
from gradsift.compute.progress import Progress, silent
from gradsift.config import EncodeSettings, FinetuneSettings
from gradsift.data.encode import encode
from gradsift.data.pool import read_pool
from gradsift.model import tiny
from gradsift.model.finetune import heldout_loss
from gradsift.model.load import load_model, load_tokenizer

METHODS = ("less", "tagcos", "random")
BUDGET = "5%"
SETTINGS = {"gradients": {"dim": 1024, "shard_rows": 512}, "encode": {"max_length": 256}}
FINETUNE = FinetuneSettings(mode="full", epochs=4, batch_size=16, lr=1e-3)


@dataclass(frozen=True)
class Line:
    """One method's result on held-out rows of the target's family. `loss` in nats per supervised token, mean over seeds; `against`: its
    difference to random with a 95 % interval over seeds and test rows, None for random itself."""

    method: str
    loss: float
    against: Interval | None
    family_share: float
    noise_share: float
    rows: int


@dataclass(frozen=True)
class Demo:
    """What the demo found. `passed`: the targeted method finds its family and avoids noise, and training on its rows beats random."""

    lines: list[Line]
    base_loss: float
    selections: dict[str, Selection]
    seconds: float

    @property
    def passed(self) -> bool:
        """Family share at least 3x random's, noise share at most half of it, held-out loss below it."""
        by = {line.method: line for line in self.lines}
        less, random = by["less"], by["random"]
        return less.family_share >= 3 * random.family_share and less.noise_share <= random.noise_share / 2 and less.loss < random.loss

    def table(self) -> str:
        head = f"{'':<10}{'held-out loss':>15}{'against random (95 %)':>30}{'target family':>16}{'noise':>8}{'rows':>7}"
        body = []
        for line in self.lines:
            gap = line.against
            against = "" if gap is None else f"{gap.difference:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
            share = f"{line.family_share:>16.0%}{line.noise_share:>8.0%}{line.rows:>7}"
            body.append(f"{line.method:<10}{line.loss:>15.3f}{against:>30}{share}")
        body.append(f"{'untrained':<10}{self.base_loss:>15.3f}")
        paths = [f"{name:<10}{chosen.subset_path}\n{'':<10}{chosen.report}" for name, chosen in self.selections.items()]
        verdict = (
            "The targeted method beats random."
            if self.passed
            else "The targeted method does not beat random as it should: this is a fault."
        )
        return "\n".join([head, *body, "", *paths, "", f"{verdict} ({self.seconds:.0f} s)"])


def demo(run: str | Path, *, seed: int = 0, seeds: int = 3, progress: Progress | None = None) -> Demo:
    """Selects 5 % of the playground's pool with each of METHODS, fine-tunes the built-in model on each choice `seeds` times, and measures.

    The methods read neither `family` nor `noise`: those columns only score the choice. Random is drawn anew for every seed.
    """
    started, progress = time.perf_counter(), progress or silent()
    root = Path(run)
    files = playground.write_playground(root / "data", seed=seed)
    labels = [json.loads(line) for line in files.pool.read_text(encoding="utf-8").splitlines()]
    family = json.loads(files.target.read_text(encoding="utf-8").splitlines()[0])["family"]
    model = str(tiny.tiny_model(progress=_steps(progress, "steps", "training the built-in model, once")))
    selections, draws = {}, {}
    for method in METHODS:
        target = [files.target] if method == "less" else []
        draw = [
            select(
                method,
                pool=files.pool,
                target=target,
                budget=BUDGET,
                run=root / "run",
                model="tiny",
                seed=s,
                settings=SETTINGS,
                progress=progress,
            )
            for s in (range(seeds) if method == "random" else [0])
        ]
        selections[method], draws[method] = draw[0], draw
    base_loss, measured = _train(model, files, {m: [d.indices for d in ds] for m, ds in draws.items()}, seeds, progress)
    lines = [_line(found, draws[found.name], labels, family) for found in measured]
    result = Demo(lines, base_loss, selections, time.perf_counter() - started)
    _add_comparison(result)
    return result


def _steps(progress: Progress, unit: str, label: str) -> Callable[[int, int], None]:
    """A (done, total) callback that drives a progress bar."""
    before = [0]

    def step(done: int, total: int) -> None:
        if not before[0]:
            progress.start(total, unit, label)
        progress.advance(done - before[0])
        before[0] = done
        if done == total:
            progress.done()

    return step


def _train(
    model: str, files: playground.Paths, chosen: dict[str, list[np.ndarray]], seeds: int, progress: Progress
) -> tuple[float, list[Compared]]:
    """Held-out loss of the base, and of every method over the seeds (seed s trains on draw s where a method has several)."""
    tokenizer, settings = load_tokenizer(model), EncodeSettings.model_validate(SETTINGS["encode"])
    pool, test = (encode(read_pool([path]), tokenizer, settings) for path in (files.pool, files.test))

    def rows(draws: list[np.ndarray]) -> Callable[[int], list[dict[str, list[int]]]]:
        return lambda seed: [pool[int(i)] for i in sorted(draws[seed % len(draws)])]

    subsets = {method: rows(draws) for method, draws in chosen.items()}
    step = _steps(progress, "trainings", "training on each choice")
    measured = compare_subsets(model, subsets, test, FINETUNE, range(seeds), progress=step)
    return heldout_loss(load_model(model), test).loss, measured


def _line(found: Compared, draws: Sequence[Selection], labels: list[dict[str, Any]], family: str) -> Line:
    rows = [labels[int(i)] for draw in draws for i in draw.indices]
    own = sum(row["family"] == family for row in rows) / len(rows)
    noise = sum(row["noise"] != "none" for row in rows) / len(rows)
    return Line(found.name, found.loss, found.against, own, noise, len(draws[0]))


def _add_comparison(found: Demo) -> None:
    """Puts the measured table into every selection's report."""
    results = [
        report.Compared(
            name=line.method,
            kind="control" if line.method == "random" else "method",
            value=line.loss,
            rows=line.rows,
            note=f"{line.family_share:.0%} of the target's family, {line.noise_share:.0%} noise",
        )
        for line in found.lines
    ]
    results.append(report.Compared(name="untrained", kind="none", value=found.base_loss))
    comparison = report.Comparison(results=tuple(results), note="Mean over seeds, on held-out rows of the target's family.")
    for chosen in found.selections.values():
        data = report.ReportData.model_validate_json((chosen.folder / "report.json").read_bytes())
        report.write_report(data.model_copy(update={"comparison": comparison}), chosen.folder)
