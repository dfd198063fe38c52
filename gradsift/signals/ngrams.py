"""Hashed 1- and 2-grams: how much likelier a row's words are in the target than in the pool."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import numpy as np
import xxhash

BUCKETS = 10_000
PRIOR = 1000.0  # grams
_TOKEN = re.compile(r"\w+|[^\w\s]+")


def buckets(text: str, count: int = BUCKETS) -> np.ndarray:
    """int64 [grams]: the bucket of every word and pair of neighbouring words of `text`,
    lower-cased; a run of punctuation is a word.
    """
    tokens = _TOKEN.findall(text.lower())
    grams = tokens + [f"{a} {b}" for a, b in itertools.pairwise(tokens)]
    return np.fromiter(
        (
            xxhash.xxh32_intdigest(gram.encode("utf-8", "backslashreplace")) % count
            for gram in grams
        ),
        np.int64,
        len(grams),
    )


def importance(
    pool: Iterable[str], target: Iterable[str], count: int = BUCKETS, prior: float = PRIOR
) -> np.ndarray:
    """Log importance weights [n] of the pool's texts: sum over a row's grams of log p_target - log
    p_pool. A row without words weighs 0.

    p_pool: shares of the buckets. p_target: the same, with `prior` grams spread as in the pool
    added to the target's own, so that a small target says little about words it does not hold, and
    one like the pool weighs every row 0. Source: DSIR (arXiv 2302.03169), section 3.
    """
    rows = [buckets(text, count) for text in pool]
    ours, theirs = np.zeros(count), np.zeros(count)
    for row in rows:
        ours += np.bincount(row, minlength=count)
    for text in target:
        theirs += np.bincount(buckets(text, count), minlength=count)
    p = ours / max(ours.sum(), 1)
    q = (theirs + prior * p) / (theirs.sum() + prior)
    seen = ours > 0
    gain = np.zeros(count)
    gain[seen] = np.log(q[seen]) - np.log(p[seen])
    return np.array([gain[row].sum() for row in rows])
