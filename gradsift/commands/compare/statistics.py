"""Intervals of differences between trainings, by a bootstrap over test rows and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gradsift.commands.compare.results import MEAN, Line, Results
from gradsift.config import FinetuneSettings
from gradsift.errors import ConfigError
from gradsift.model.finetune import EncodedSequence, finetune, heldout_loss
from gradsift.types import IGNORE

DRAWS = 4000


@dataclass(frozen=True, eq=False)
class Measured:
    """The scores of one arm on one test: values [seeds, m] summed per row, and weights [m], so that the measure is values.sum / weights.sum
    (nats and supervised tokens for the loss; the row's score and 1 for the others)."""

    values: np.ndarray
    weights: np.ndarray
    steps: int


def compare_measured(
    tests: Mapping[str, Mapping[str, Measured]], *, control: str, level: float, measure: str, equal: str, seed: int
) -> list[Results]:
    """Tables of one measure from test -> arm -> scores; with several tests, the mean of the tests first."""
    low, high = (1 - level) / 2, (1 + level) / 2
    arms = list(next(iter(tests.values())))
    first = next(iter(tests.values()))
    # The same trainings stand behind every test, so a draw resamples their seeds once; by name, so that it does so in other tables too.
    shares = {arm: seed_shares(len(first[arm].values), DRAWS, np.random.default_rng([seed, *arm.encode()])) for arm in arms}
    drawn, values = {}, {}
    for test, by_arm in tests.items():
        weights = next(iter(by_arm.values())).weights
        tables = {arm: found.values for arm, found in by_arm.items()}
        drawn[test] = loss_draws(tables, weights, rng=np.random.default_rng([seed, *test.encode()]), draws=DRAWS, shares=shares)
        values[test] = {arm: found.values.sum(axis=1) / weights.sum() for arm, found in by_arm.items()}
    if len(tests) > 1:
        drawn = {MEAN: {arm: np.mean([drawn[test][arm] for test in tests], axis=0) for arm in arms}, **drawn}
        values = {MEAN: {arm: np.mean([values[test][arm] for test in tests], axis=0) for arm in arms}, **values}
    results = []
    for test, by_arm in values.items():
        lines = []
        for arm in arms:
            value, per_seed, draws = float(by_arm[arm].mean()), tuple(map(float, by_arm[arm])), drawn[test][arm]
            line = Line(arm, value, per_seed, first[arm].steps, draws=draws)
            if arm != control:
                least, most = map(float, np.quantile(draws - drawn[test][control], [low, high]))
                line = replace(line, difference=value - float(by_arm[control].mean()), low=least, high=most)
            lines.append(line)
        results.append(Results(test, measure, equal, tuple(lines)))
    return results


@dataclass(frozen=True)
class Interval:
    """A difference of two losses (a - b, nats per supervised token; negative = a is better) and its bootstrap interval."""

    difference: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Compared:
    """One line of a comparison. `losses` float64 [seeds, m]: nats per test row; `loss`: nats per supervised token, mean over seeds;
    `against`: the difference to the control, None for the control itself. `rows`, `supervised` (tokens): of the first seed's subset;
    `steps`: optimiser steps of each training."""

    name: str
    rows: int
    supervised: int
    steps: int
    losses: np.ndarray
    loss: float
    against: Interval | None


def compare_subsets(
    model: str | Path,
    subsets: Mapping[str, EncodedSequence | Callable[[int], EncodedSequence]],
    test: EncodedSequence,
    settings: FinetuneSettings,
    seeds: Sequence[int],
    *,
    control: str = "random",
    level: float = 0.95,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Compared]:
    """Trains on every subset with every seed and tests: one line per subset, in the order given.

    A subset is encoded rows, or a function of the seed that returns them (a random control is drawn anew for every seed, so that its luck
    counts too). All trainings take the same number of optimiser steps: `settings.steps`, or what `epochs` passes over the largest subset
    need. `progress(done, trainings)` is called after every training. Each line but the control's has its difference to the control with
    the interval of `paired_interval`. Raises ConfigError when `control` is not among the subsets or there is no seed, and what `finetune`
    raises.
    """
    if control not in subsets or not seeds:
        raise ConfigError(f"a comparison needs at least one seed and a subset named {control!r}", remedy="Add the control to the subsets.")
    drawn = {name: [rows(seed) if callable(rows) else rows for seed in seeds] for name, rows in subsets.items()}
    steps = settings.steps_for(max(len(rows) for draws in drawn.values() for rows in draws))
    losses: dict[str, np.ndarray] = {}
    tokens, done = np.zeros(0, dtype=np.int64), 0
    for name, draws in drawn.items():
        sums = []
        for seed, rows in zip(seeds, draws, strict=True):
            tuned = finetune(model, rows, settings=settings.model_copy(update={"seed": seed, "steps": steps}), device=device)
            held = heldout_loss(tuned, test, settings.token_budget)
            tokens, done = held.tokens, done + 1
            sums.append(held.sums)
            if progress is not None:
                progress(done, len(seeds) * len(drawn))
        losses[name] = np.stack(sums)
    lines = []
    for name, draws in drawn.items():
        rng = np.random.default_rng(settings.seed)
        against = None if name == control else paired_interval(losses[name], losses[control], tokens, rng=rng, level=level)
        supervised = sum(label != IGNORE for i in range(len(draws[0])) for label in draws[0][i]["labels"][1:])
        loss = float(losses[name].mean(axis=0).sum() / tokens.sum())
        lines.append(Compared(name, len(draws[0]), supervised, steps, losses[name], loss, against))
    return lines


def paired_interval(
    losses_a: np.ndarray, losses_b: np.ndarray, tokens: np.ndarray, *, rng: np.random.Generator, level: float = 0.95, draws: int = 4000
) -> Interval:
    """The difference of two losses, paired over test rows, with the interval of `loss_draws`.

    losses_a [seeds a, m], losses_b [seeds b, m]: nats per test row; tokens [m]: supervised tokens of the rows. With a single seed its luck
    cannot be seen, and the interval covers the test rows only. Low and high are percentiles of the draws.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    drawn = loss_draws({"a": losses_a, "b": losses_b}, tokens, rng=rng, draws=draws)
    low, high = np.quantile(drawn["a"] - drawn["b"], [(1 - level) / 2, (1 + level) / 2])
    difference = (losses_a.mean(axis=0) - losses_b.mean(axis=0)).sum() / tokens.sum()
    return Interval(float(difference), float(low), float(high), level)


def loss_draws(
    losses: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    *,
    rng: np.random.Generator,
    draws: int = 4000,
    shares: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Hierarchical bootstrap of several losses on one test set: name -> [draws] nats per supervised token.

    losses: name -> [seeds, m] nats per test row; tokens [m]: supervised tokens of the rows. Each draw resamples the test rows (the same for
    all names: an easy row is easy for everyone) and, for each name by itself, the seeds. Resampling k seeds alone gives a variance that is
    (k - 1) / k of what it should be, a third too little for three seeds; so a draw's deviations from the mean over seeds are widened by
    sqrt(k / (k - 1)) (Rao and Wu 1988, the rescaled bootstrap). Any statistic of the draws (a difference, a ratio, a mean over test sets)
    has the interval of its percentiles. `shares`: name -> what `seed_shares` returned, where the same trainings are tested on several sets.
    """
    m = len(tokens)
    if shares is None:
        shares = {name: seed_shares(len(table), draws, rng) for name, table in losses.items()}
    for name, table in losses.items():
        if table.ndim != 2 or table.shape[1] != m or not table.size:
            raise ValueError(f"losses [seeds, m] of {name} and tokens [m] do not fit: {table.shape}, {tokens.shape}")
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in losses}
    for start in range(0, draws, 256):  # a block of draws at a time bounds the memory
        block = min(256, draws - start)
        rows = rng.multinomial(m, np.full(m, 1 / m), size=block)
        for name, table in losses.items():
            mean = table.mean(axis=0)
            means = mean + shares[name][start : start + block] @ (table - mean)
            drawn[name].append((rows * means).sum(axis=1) / (rows @ tokens))
    return {name: np.concatenate(parts) for name, parts in drawn.items()}


def seed_shares(k: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[draws, k]: the share of each of k seeds in a resample of them, widened as `loss_draws` says; zeros for a single seed."""
    if k == 1:
        return np.zeros((draws, 1))
    return math.sqrt(k / (k - 1)) * rng.multinomial(k, np.full(k, 1 / k), size=draws) / k
