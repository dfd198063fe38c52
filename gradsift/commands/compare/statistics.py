"""Intervals of differences between trainings, by a bootstrap over test rows and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from gradsift.commands.compare.results import MEAN, ArmResult, Results

DRAWS = 4000


@dataclass(frozen=True, eq=False)
class Measured:
    """The scores of one arm on one test: values [seeds, m] summed per row, and weights [m], so that
    the measure is values.sum / weights.sum (nats and supervised tokens for the loss; the row's
    score and 1 for the others).
    """

    values: np.ndarray
    weights: np.ndarray
    steps: int


def compare_measured(
    tests: Mapping[str, Mapping[str, Measured]],
    *,
    control: str,
    level: float,
    measure: str,
    equal: str,
    seed: int,
    draws: int = DRAWS,
) -> list[Results]:
    """Tables of one measure from test -> arm -> scores; with several tests, the mean of the tests
    first.

    Every arm but the control has its difference to the control, paired over test rows, with the
    percentile interval of `loss_draws`. With a single seed its luck cannot be seen, and the
    interval covers the test rows only.

    Args: tests: Scores of every arm on every test; the arms are the same, and the weights of a test
        are those of all arms. control: The arm that the differences are to. level: The share of
        draws that an interval covers, between 0 and 1. measure: Name of the measure. equal: What
        all trainings share, "steps" or "tokens". seed: Seed of the bootstrap. draws: How many draws
        the bootstrap takes.

    Returns:
        One table per test, the mean of several before them.

    Raises:
        ValueError: Shapes that do not fit, or a level out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    low, high = (1 - level) / 2, (1 + level) / 2
    arms = list(next(iter(tests.values())))
    first = next(iter(tests.values()))
    # The same trainings stand behind every test, so a draw resamples their seeds once; by name, so
    # that it does so in other tables too.
    shares = {
        arm: seed_shares(
            len(first[arm].values), draws, np.random.default_rng([seed, *arm.encode()])
        )
        for arm in arms
    }
    drawn, values = {}, {}
    for test, by_arm in tests.items():
        weights = next(iter(by_arm.values())).weights
        tables = {arm: measured.values for arm, measured in by_arm.items()}
        drawn[test] = loss_draws(
            tables, weights, shares, rng=np.random.default_rng([seed, *test.encode()])
        )
        values[test] = {arm: table.sum(axis=1) / weights.sum() for arm, table in tables.items()}
    if len(tests) > 1:
        drawn = {
            MEAN: {arm: np.mean([drawn[test][arm] for test in tests], axis=0) for arm in arms},
            **drawn,
        }
        values = {
            MEAN: {arm: np.mean([values[test][arm] for test in tests], axis=0) for arm in arms},
            **values,
        }
    results = []
    for test, by_arm in values.items():
        lines = []
        for arm in arms:
            value, per_seed = float(by_arm[arm].mean()), tuple(map(float, by_arm[arm]))
            line = ArmResult(arm, value, per_seed, first[arm].steps, draws=drawn[test][arm])
            if arm != control:
                least, most = map(
                    float, np.quantile(drawn[test][arm] - drawn[test][control], [low, high])
                )
                line = replace(
                    line, difference=value - float(by_arm[control].mean()), low=least, high=most
                )
            lines.append(line)
        results.append(Results(test, measure, equal, tuple(lines)))
    return results


def loss_draws(
    losses: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    shares: Mapping[str, np.ndarray],
    *,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Hierarchical bootstrap of several losses on one test set: name -> [draws] nats per supervised
    token.

    losses: name -> [seeds, m] nats per test row; tokens [m]: supervised tokens of the rows. Each
    draw resamples the test rows (the same for all names: an easy row is easy for everyone) and, for
    each name by itself, the seeds. Resampling k seeds alone gives a variance that is (k - 1) / k of
    what it should be, a third too little for three seeds; so a draw's deviations from the mean over
    seeds are widened by sqrt(k / (k - 1)) (Rao and Wu 1988, the rescaled bootstrap). Any statistic
    of the draws (a difference, a ratio, a mean over test sets) has the interval of its percentiles.
    `shares`: name -> [draws, seeds] of `seed_shares`; the same ones where the same trainings are
    tested on several sets.
    """
    m, draws = len(tokens), min(len(share) for share in shares.values())
    for name, table in losses.items():
        if table.ndim != 2 or table.shape[1] != m or not table.size:
            raise ValueError(
                f"losses [seeds, m] of {name} and tokens [m] do not fit: {table.shape},"
                f" {tokens.shape}"
            )
    parts: dict[str, list[np.ndarray]] = {name: [] for name in losses}
    for start in range(0, draws, 256):  # a block of draws at a time bounds the memory
        block = min(256, draws - start)
        rows = rng.multinomial(m, np.full(m, 1 / m), size=block)
        for name, table in losses.items():
            mean = table.mean(axis=0)
            means = mean + shares[name][start : start + block] @ (table - mean)
            parts[name].append((rows * means).sum(axis=1) / (rows @ tokens))
    return {name: np.concatenate(blocks) for name, blocks in parts.items()}


def seed_shares(k: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[draws, k]: the share of each of k seeds in a resample of them, widened as `loss_draws` says;
    zeros for a single seed.
    """
    if k == 1:
        return np.zeros((draws, 1))
    return math.sqrt(k / (k - 1)) * rng.multinomial(k, np.full(k, 1 / k), size=draws) / k
