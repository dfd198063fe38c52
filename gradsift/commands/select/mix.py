"""A part of the budget by the method's scores, the rest drawn from what is left."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np

from gradsift.types import Selector, Signals, Subset

DRAWN = "drawn"  # the note that says of every row whether it was drawn: 1, 0, or -1 where unknown


def mixed(
    selector: Selector, signals: Signals, budget: int, share: Fraction, rng: np.random.Generator
) -> Subset:
    """The method's choice for `share` of `budget` rows (rounded half up), then rows drawn evenly
    from all others.

    The draws depend on the generator's seed alone, not on what the method took from it. A drawn row
    has no gain (NaN), and the mean training weight of the method's own rows where they have any.

    Args:
        selector: the method.
        signals: what it reads, over n rows.
        budget: rows in all.
        share: of them by score, above 0 and below 1.
        rng: of the selection.

    Returns:
        A subset of at most `budget` rows, the method's first. Its note `DRAWN`, int8 [n].
    """
    order = rng.spawn(1)[0].permutation(signals.n)
    scored = int(share * budget + Fraction(1, 2))
    own = None if signals.share is None else signals.share * share
    found = Subset(np.empty(0, dtype=np.int64), gains=np.empty(0))
    if scored:
        found = selector.select(replace(signals, share=own), scored, rng=rng)
    picks = np.asarray(found.indices, dtype=np.int64)
    drawn = order[~np.isin(order, picks)][: budget - scored]
    told = np.zeros(signals.n, dtype=np.int8)
    told[drawn] = 1
    weights = None
    if found.weights is not None:
        own_weights = np.asarray(found.weights, dtype=np.float64)
        mean = own_weights.mean() if len(own_weights) else 1.0
        weights = np.concatenate([own_weights, np.full(len(drawn), mean)])
    gains = None
    if found.gains is not None:
        gains = np.concatenate([np.asarray(found.gains, dtype=np.float64), [np.nan] * len(drawn)])
    return Subset(np.concatenate([picks, drawn]), gains, weights, {**found.notes, DRAWN: told})
