"""Hashed 1- and 2-grams: how much likelier a row's words are in the target than in the pool."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import xxhash

BUCKETS = 10_000
_TOKEN = re.compile(r"\w+|[^\w\s]+")


def buckets(text: str, count: int = BUCKETS) -> np.ndarray:
    """int64 [grams]: the bucket of every word and pair of neighbouring words of `text`, lower-cased; a run of punctuation is a word."""
    tokens = _TOKEN.findall(text.lower())
    grams = tokens + [f"{a} {b}" for a, b in zip(tokens, tokens[1:], strict=False)]
    return np.fromiter((xxhash.xxh32_intdigest(gram.encode("utf-8", "backslashreplace")) % count for gram in grams), np.int64, len(grams))


def importance(pool: Iterable[str], target: Iterable[str], count: int = BUCKETS) -> np.ndarray:
    """Log importance weights [n] of the pool's texts: sum over a row's grams of log p_target - log p_pool, each with one count added to
    every bucket. A row without words weighs 0.

    Source: DSIR (arXiv 2302.03169), section 3.
    """
    rows = [buckets(text, count) for text in pool]
    ours, theirs = np.ones(count), np.ones(count)
    for row in rows:
        ours += np.bincount(row, minlength=count)
    for text in target:
        theirs += np.bincount(buckets(text, count), minlength=count)
    gain = np.log(theirs / theirs.sum()) - np.log(ours / ours.sum())
    return np.array([gain[row].sum() for row in rows])
