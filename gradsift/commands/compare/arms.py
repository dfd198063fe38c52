"""The ways of choosing rows that are compared: methods, and the controls that keep them honest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradsift import methods
from gradsift.commands import budget as budgets
from gradsift.commands.compare.request import CONTROL
from gradsift.commands.select.constraints import Constraints
from gradsift.commands.select.constraints import build as build_constraints
from gradsift.commands.select.select import Selection, select_in
from gradsift.errors import ConfigError, UserError
from gradsift.stages.pipeline import Pipeline
from gradsift.store.artifact import Artifact
from gradsift.store.tensors import read_tensors
from gradsift.types import Selector


@dataclass(frozen=True, eq=False)
class ArmRows:
    """The rows of an arm: `draws` of pool rows (each ascending), one per seed or a single one for
    all.
    """

    name: str
    kind: str
    draws: tuple[np.ndarray, ...]
    weights: np.ndarray | None = None
    seconds: float = 0.0
    selection: Selection | None = None

    def rows(self, seed: int) -> np.ndarray:
        return self.draws[seed % len(self.draws)]


@dataclass(frozen=True, eq=False)
class Arms:
    """Makes choices over one pool. `overlap`: pool rows that no arm may have; `seeds`: one draw of
    the random arms for each.
    """

    pipeline: Pipeline
    budget: budgets.Budget
    overlap: np.ndarray
    seeds: list[int]

    @property
    def usable(self) -> np.ndarray:
        """Pool rows that may be trained on: encoded, and sharing nothing with a test."""
        good = self.pipeline.encoded("pool").codes == 0
        good[self.overlap] = False
        return np.flatnonzero(good)

    def selected(
        self,
        name: str,
        method: str,
        selector: Selector,
        *,
        kind: str = "method",
        seeds: Sequence[int] = (0,),
    ) -> list[ArmRows]:
        """The choice of a method; a second one with its weights where it gives any."""
        pool = self.pipeline.sides["pool"]
        pipeline = self.pipeline if selector.target != "none" else self.pipeline.over(pool)
        limits = (
            build_constraints(exclude_ids=[pool.ids[int(row)] for row in self.overlap])
            if len(self.overlap)
            else Constraints()
        )
        made = [select_in(pipeline, method, selector, self.budget, limits, seed) for seed in seeds]
        draws = tuple(np.sort(selection.indices) for selection in made)
        seconds = self._spent(pipeline, selector, made[0])
        choices = [ArmRows(name, kind, draws, seconds=seconds, selection=made[0])]
        weights = read_tensors(made[0].folder / "subset.safetensors").get("weights")
        if weights is not None:
            ordered = weights.numpy()[np.argsort(made[0].indices)]
            choices.append(
                ArmRows(f"{name} (weighted)", kind, draws[:1], ordered, seconds, made[0])
            )
        return choices

    def _spent(self, pipeline: Pipeline, selector: Selector, made: Selection) -> float:
        artifacts = [pipeline.stored(recipe) for recipe in pipeline.recipes(selector.needs())] + [
            Artifact.load(made.folder)
        ]
        return sum(
            float(artifact.stats.get("wall_seconds", 0))
            for artifact in artifacts
            if artifact is not None
        )

    def control(self, name: str, reference: ArmRows) -> list[ArmRows]:
        if name == "full":
            return [ArmRows(name, "full", (self.usable,))]
        if name == "length-matched":
            draws = tuple(self._matched(reference.rows(0), seed) for seed in self.seeds)
            return [ArmRows(f"random, long as {reference.name}", "control", draws)]
        seeds = self.seeds if name == CONTROL else (0,)
        return self.selected(name, name, methods.make(name), kind="control", seeds=seeds)[:1]

    def _matched(self, chosen: np.ndarray, seed: int, bins: int = 40) -> np.ndarray:
        """As many rows as `chosen`, drawn at random within each of `bins` classes of answer length
        (equally filled by the pool).
        """
        usable, lengths = self.usable, self.pipeline.encoded("pool").supervised
        edges = np.unique(np.quantile(lengths[usable], np.linspace(0, 1, bins + 1)[1:-1]))
        of, wanted = np.digitize(lengths[usable], edges), np.digitize(lengths[chosen], edges)
        rng = np.random.default_rng([seed, len(chosen)])
        drawn = [
            rng.choice(usable[of == c], int((wanted == c).sum()), replace=False)
            for c in np.unique(wanted)
        ]
        return np.sort(np.concatenate(drawn))

    def marked(self, text: str) -> np.ndarray:
        """The usable rows whose FIELD is VALUE, of "FIELD=VALUE". Raises ConfigError, UserError
        where there are none.
        """
        field, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(
                f"--oracle {text}: not FIELD=VALUE", remedy="Write it as --oracle source=gsm8k."
            )
        pool = self.pipeline.sides["pool"]
        marked = np.array(
            [row for row in self.usable.tolist() if str(pool.record(row).get(field)) == value],
            dtype=np.int64,
        )
        if not len(marked):
            raise UserError(
                f"--oracle {text}: no row of the pool that may be chosen has that value",
                remedy="Look at the rows with `gradsift inspect`.",
            )
        return marked

    def oracle(self, name: str, marked: np.ndarray, count: int) -> ArmRows:
        """`count` rows drawn for every seed among those `marked`; where they are fewer, all of them
        and random others: the same steps on a handful of rows would say how a handful is
        overfitted.
        """
        others = np.setdiff1d(self.usable, marked)
        short = min(max(count - len(marked), 0), len(others))
        drawn = []
        for seed in self.seeds:
            rng = np.random.default_rng([seed, 7])
            taken = rng.choice(marked, min(count, len(marked)), replace=False)
            drawn.append(
                np.sort(
                    np.concatenate([taken, rng.choice(others, short, replace=False)])
                    if short
                    else taken
                )
            )
        return ArmRows(name, "control", tuple(drawn))
