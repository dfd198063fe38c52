"""`gradsift demo`: a `compare` over a generated pool with the built-in model, offline, and the
check that it worked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.commands.compare.compare import BASE, compare
from gradsift.commands.compare.request import CONTROL
from gradsift.commands.compare.results import Arm, Comparison
from gradsift.commands.demo import playground
from gradsift.compute.progress import Progress, silent
from gradsift.model import tiny
from gradsift.model.load import TINY
from gradsift.report import ReportData, write_report

TARGETED = "less"
METHODS = (TARGETED, "tagcos")
BUDGET = "5%"
SETTINGS: dict[str, dict[str, Any]] = {
    "gradients": {"dim": 1024, "shard_rows": 512},
    "encode": {"max_length": 256},
    "warmup": {"epochs": 4},
    "finetune": {"mode": "full", "epochs": 4, "batch_size": 16, "lr": 1e-3},
}


@dataclass(frozen=True)
class Shares:
    """Of an arm's rows, over all its draws: the share of the target's family, and the share of
    noise.
    """

    family: float
    noise: float


@dataclass(frozen=True)
class Demo:
    """The demo's result.

    Attributes:
        comparison: METHODS and random, tested on held-out rows of the target's family.
        shares: For every arm that chose rows, what those are by the labels of the playground.
        seconds: Wall seconds of the whole job.
    """

    comparison: Comparison
    shares: Mapping[str, Shares]
    seconds: float

    @property
    def passed(self) -> bool:
        """Family share at least 3x random's, noise share at most half of it, held-out loss below
        it.
        """
        less, random, table = self.shares[TARGETED], self.shares[CONTROL], self.comparison.table()
        pure = less.family >= 3 * random.family and less.noise <= random.noise / 2
        return pure and table.line(TARGETED).value < table.line(CONTROL).value

    def table(self) -> str:
        """The table, the paths of the selections, and the verdict, for the terminal."""
        head = f"{'':<10}{'held-out loss':>15}{'against random (95 %)':>30}"
        head += f"{'target family':>16}{'noise':>8}{'rows':>7}"
        body, paths = [], []
        for arm in self.comparison.arms:
            result = self.comparison.table().line(arm.name)
            if arm.name not in self.shares:
                body.append(f"{arm.name:<10}{result.value:>15.3f}")
                continue
            against = ""
            if result.difference is not None:
                against = f"{result.difference:+.3f} ({result.low:+.3f} to {result.high:+.3f})"
            share = self.shares[arm.name]
            counts = f"{share.family:>16.0%}{share.noise:>8.0%}{arm.rows:>7}"
            body.append(f"{arm.name:<10}{result.value:>15.3f}{against:>30}{counts}")
            if arm.selection is not None:
                paths.append(
                    f"{arm.name:<10}{arm.selection.subset_path}\n{'':<10}{arm.selection.report}"
                )
        verdict = (
            "The targeted method beats random."
            if self.passed
            else "The targeted method does not beat random as it should: this is a fault."
        )
        return "\n".join([head, *body, "", *paths, "", f"{verdict} ({self.seconds:.0f} s)"])


def demo(
    run: str | Path, *, seed: int = 0, seeds: int = 3, progress: Progress | None = None
) -> Demo:
    """Compares METHODS and random on the playground: 5 % of its pool, the built-in model, `seeds`
    trainings of each.

    No method reads the labels `family` and `noise`: they only say afterwards which rows were
    chosen. Random is drawn anew for every seed.

    Args:
        run: The folder to work in: the generated files under data/, the run under run/.
        seed: Seed of the generated pool.
        seeds: Trainings of each arm.
        progress: Where progress is told; None = nowhere.

    Returns:
        The result, with its own check of success, `passed`.

    Raises:
        GradsiftError: As `compare`.
    """
    started, progress = time.perf_counter(), progress or silent()
    root = Path(run)
    files = playground.write_playground(root / "data", seed=seed)
    tiny.tiny_model(progress=_steps(progress, "steps", "training the built-in model, once"))
    comparison = compare(
        METHODS,
        pool=files.pool,
        target=files.target,
        test=files.test,
        budget=BUDGET,
        run=root / "run",
        model=TINY,
        seeds=seeds,
        controls=[],
        equal="steps",
        settings=SETTINGS,
        progress=progress,
    )
    labels = [json.loads(line) for line in files.pool.read_text(encoding="utf-8").splitlines()]
    family = json.loads(files.target.read_text(encoding="utf-8").splitlines()[0])["family"]
    shares = {arm.name: _shares(arm, labels, family) for arm in comparison.arms if arm.name != BASE}
    _add_shares(comparison, shares)
    return Demo(comparison, shares, time.perf_counter() - started)


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


def _shares(arm: Arm, labels: Sequence[Mapping[str, Any]], family: str) -> Shares:
    rows = [labels[int(i)] for draw in arm.draws for i in draw]
    own = sum(row["family"] == family for row in rows) / len(rows)
    return Shares(own, sum(row["noise"] != "none" for row in rows) / len(rows))


def _add_shares(comparison: Comparison, shares: Mapping[str, Shares]) -> None:
    """Notes the shares of every arm in the comparison that each selection's report shows."""
    notes = {
        name: f"{share.family:.0%} of the target's family, {share.noise:.0%} noise"
        for name, share in shares.items()
    }
    panel = comparison.panel()
    results = tuple(
        result.model_copy(update={"note": notes.get(result.name, result.note)})
        for result in panel.results
    )
    noted = panel.model_copy(update={"results": results})
    for arm in comparison.arms:
        if arm.selection is not None:
            data = ReportData.model_validate_json(
                (arm.selection.folder / "report.json").read_bytes()
            )
            write_report(data.model_copy(update={"comparison": noted}), arm.selection.folder)
