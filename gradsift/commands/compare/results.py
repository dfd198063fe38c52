"""What a comparison found: one line per way of choosing rows, with intervals, as a table, as JSON,
as Markdown and for the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gradsift import report
from gradsift.compute.progress import duration

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from gradsift.commands.select.select import Selection

MEAN = "mean of the tests"


@dataclass(frozen=True)
class Arm:
    """One way of choosing rows. kind: "method", "control", "full" (the whole pool) or "none" (the
    base model, untrained). rows, tokens (supervised, of one pass): of the first seed's draw;
    seconds: what choosing took, all stages counted, 0 for what costs nothing; marked: the share of
    those rows that carry the oracle's mark, None without an oracle.

    draws: the pool rows of every draw, each ascending, one draw per seed or a single one for all;
    selection: where the choice of the first draw is written, None for rows that no method chose.
    Neither is part of a summary.
    """

    name: str
    kind: str
    rows: int
    tokens: int
    seconds: float
    marked: float | None = None
    draws: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)
    selection: Selection | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ArmResult:
    """An arm's result. value: mean over seeds; difference: to the control, with its interval [low,
    high] (None for the control itself). draws [DRAWS]: bootstrap draws of the value, for statistics
    of several arms; not part of a summary.
    """

    arm: str
    value: float
    per_seed: tuple[float, ...]
    steps: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    draws: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Results:
    """The lines of one test and measure. equal: what all trainings share, "steps" or "tokens"."""

    test: str
    measure: str
    equal: str
    lines: tuple[ArmResult, ...]

    @property
    def lower_is_better(self) -> bool:
        return self.measure == "loss"

    def line(self, arm: str) -> ArmResult:
        return next(line for line in self.lines if line.arm == arm)


@dataclass(frozen=True)
class Comparison:
    """All that `gradsift compare` found. settings: what was trained and how; overlap: pool rows
    left out because they share 13 words with a test; cost: minutes of choosing and training;
    folder: where comparison.md is.
    """

    control: str
    level: float
    arms: tuple[Arm, ...]
    tables: tuple[Results, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    overlap: int = 0
    cost: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    # where it is kept; no part of a summary
    folder: Path | None = field(default=None, compare=False, repr=False)

    def table(
        self, test: str | None = None, measure: str = "loss", equal: str | None = None
    ) -> Results:
        """The table of a test (default: the mean of the tests, or the only one) and a way of equal
        training (default: the first). Raises KeyError.
        """
        wanted = test or (MEAN if any(t.test == MEAN for t in self.tables) else self.tables[0].test)
        equal = equal or self.tables[0].equal
        for table in self.tables:
            if (table.test, table.measure, table.equal) == (wanted, measure, equal):
                return table
        raise KeyError(f"no table of {wanted}, {measure}, equal {equal}")

    @property
    def marks(self) -> bool:
        """Whether an oracle has marked rows."""
        return any(arm.marked is not None for arm in self.arms)

    def summary(self) -> dict[str, Any]:
        plain = replace(
            self,
            arms=tuple(replace(arm, draws=(), selection=None) for arm in self.arms),
            folder=None,
        )
        summary = asdict(plain)
        del summary["folder"]
        for arm in summary["arms"]:
            del arm["draws"], arm["selection"]
        for table in summary["tables"]:
            for line in table["lines"]:
                del line["draws"]
        return json.loads(json.dumps(summary))

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Comparison:
        """The comparison behind a `summary`."""
        tables = tuple(
            Results(
                t["test"],
                t["measure"],
                t["equal"],
                tuple(
                    ArmResult(**{**line, "per_seed": tuple(line["per_seed"])})
                    for line in t["lines"]
                ),
            )
            for t in data["tables"]
        )
        made = {
            **data,
            "arms": tuple(Arm(**arm) for arm in data["arms"]),
            "tables": tables,
            "notes": tuple(data["notes"]),
        }
        return cls(**made)

    def lines(self) -> list[str]:
        """What the terminal shows."""
        lines: list[str] = []
        for table in self.tables:
            lines += [*self._heading(table), *self._body(table), ""]
        lines += [f"cost      {text}" for text in self.spent()]
        lines += [f"note      {text}" for text in ("* = the interval leaves out 0", *self.notes)]
        return lines + [f"{kind:<10}{path}" for kind, path in self.paths()]

    def paths(self) -> list[tuple[str, Path]]:
        """What was written: the comparison, then the report and the chosen rows of each method."""
        found = [] if self.folder is None else [("compared", self.folder / "comparison.md")]
        for arm in self.arms:
            if arm.kind == "method" and arm.selection is not None:
                found += [
                    ("report", arm.selection.report),
                    ("subset", arm.selection.subset_path),
                ]
        return list(dict.fromkeys(found))

    def spent(self) -> list[str]:
        """What a training takes, on a choice and on everything, and what choosing took: a sentence
        each, none where no time is kept.
        """
        if not self.cost:
            return []
        one, every = (
            duration(60 * self.cost[f"training{on}_minutes"]) for on in ("", "_on_everything")
        )
        training = f"a training takes {one} on average over the arms (equal {self.tables[0].equal})"
        training += f"; on everything, for as many passes, about {every}"
        chosen = [f"{arm.name} {duration(arm.seconds)}" for arm in self.arms if arm.seconds >= 1]
        choosing = f"choosing took, what arms share counted for each: {', '.join(chosen)}"
        return [training, *([choosing] if chosen else [])]

    def _heading(self, table: Results) -> list[str]:
        better = "lower is better" if table.lower_is_better else "higher is better"
        same = (
            "the same optimiser steps"
            if table.equal == "steps"
            else "the same number of tokens, prompts counted"
        )
        width = max(len(arm.name) for arm in self.arms) + 2
        wide = max(9, len(table.measure) + 2)
        against = f"against {self.control} ({self.level:.0%})"
        head = f"{'':<{width}}{table.measure:>{wide}}{against:>34}"
        head += f"{'rows':>9}{'tokens':>10}{'steps':>7}"
        head += f"{'marked':>9}" if self.marks else ""
        return [f"{table.test}: {table.measure} ({better}), {same}", head]

    def _body(self, table: Results) -> list[str]:
        width, arms = (
            max(len(arm.name) for arm in self.arms) + 2,
            {arm.name: arm for arm in self.arms},
        )
        wide, body = max(9, len(table.measure) + 2), []
        for line in sorted(
            table.lines, key=lambda line: line.value if table.lower_is_better else -line.value
        ):
            arm, against = arms[line.arm], ""
            if line.difference is not None:
                mark = "*" if line.certain else " "
                against = f"{line.difference:+.4f} ({line.low:+.4f} to {line.high:+.4f}){mark}"
            marked = f"{_share(arm):>9}" if self.marks else ""
            body.append(
                f"{arm.name:<{width}}{line.value:>{wide}.4f}{against:>34}{arm.rows:>9,}{arm.tokens:>10,}{line.steps:>7,}{marked}"
            )
        return body

    def markdown(self) -> str:
        lines = []
        for table in self.tables:
            better = "lower" if table.lower_is_better else "higher"
            same = "steps" if table.equal == "steps" else "tokens, prompts counted"
            lines.append(f"**{table.test}**, {table.measure} ({better} is better), equal {same}\n")
            marked, rule = (" marked |", "---:|") if self.marks else ("", "")
            lines.append(
                f"| | {table.measure} | against {self.control} ({self.level:.0%} interval) | rows |"
                f" tokens | steps |{marked}"
            )
            lines.append(f"|---|---:|---:|---:|---:|---:|{rule}")
            arms = {arm.name: arm for arm in self.arms}
            for line in sorted(
                table.lines, key=lambda line: line.value if table.lower_is_better else -line.value
            ):
                against = (
                    ""
                    if line.difference is None
                    else f"{line.difference:+.4f} ({line.low:+.4f} to {line.high:+.4f})"
                )
                arm = arms[line.arm]
                marked = f" {_share(arm)} |" if self.marks else ""
                lines.append(
                    f"| {line.arm} | {line.value:.4f} | {against} | {arm.rows:,} | {arm.tokens:,} |"
                    f" {line.steps:,} |{marked}"
                )
            lines.append("")
        lines += [f"Cost: {text}.\n" for text in self.spent()]
        return "\n".join(lines)

    def panel(self) -> report.Comparison:
        """The report's panel: the first table."""
        table = self.table()
        kinds = {arm.name: arm for arm in self.arms}
        control = table.line(self.control).value
        results = tuple(
            report.Compared(
                name=line.arm,
                kind=kinds[line.arm].kind,  # type: ignore[arg-type]
                value=line.value,
                low=None if line.low is None else control + line.low,
                high=None if line.high is None else control + line.high,
                seeds=len(line.per_seed),
                rows=kinds[line.arm].rows,
            )
            for line in table.lines
        )
        note = (
            f"{table.test}, equal {table.equal}; intervals ({self.level:.0%}) are of the difference"
            f" to {self.control}, over seeds and test rows."
        )
        what = "held-out loss (nats per token)" if table.measure == "loss" else table.measure
        return report.Comparison(
            measure=what, lower_is_better=table.lower_is_better, results=results, note=note
        )


def _share(arm: Arm) -> str:
    return "" if arm.marked is None else f"{arm.marked:.0%}"
