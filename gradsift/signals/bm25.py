"""BM25: how well the words of a pool row match those of a target row."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

K1, B = 1.2, 0.75
# a character of Chinese or Japanese is a word; elsewhere a run of letters, digits and underscores
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


def words(text: str) -> list[str]:
    """The words of a text, lower-cased, in order."""
    return _WORD.findall(text.lower())


def scores(
    pool: Iterable[str],
    queries: Sequence[str],
    *,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """BM25 of every text of the pool for every query.

    score = sum over the query's words, repeats included, of
    idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / mean length)),
    idf = log(1 + (n - df + 1/2) / (df + 1/2)), with k1 = 1.2 and b = 0.75.

    Only words of the queries are kept: 8 bytes, and 20 more while scores are formed, for each
    different word that a row shares with any query. An index of our own, since libraries
    keep every word and return the best rows of a query, where turns and constraints need all
    scores.

    Source: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework"; the idf is that of
    Lucene, which is never negative.

    Args:
        pool: n texts, read once.
        queries: m texts.
        advance: called with the number of texts read.

    Returns:
        fp32 [n, m], at least 0; 0 where no word is shared. It takes 4 n m bytes.
    """
    asked = [Counter(words(query)) for query in queries]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(w for q in asked for w in q))}
    ends, columns, counts, lengths = array("q", [0]), array("i"), array("i"), array("i")
    for text in pool:
        found = words(text)
        for word, count in Counter(found).items():
            if (column := vocabulary.get(word)) is not None:
                columns.append(column)
                counts.append(count)
        ends.append(len(columns))
        lengths.append(len(found))
        if advance:
            advance(1)
    n, m = len(lengths), len(queries)
    if not vocabulary or not n:
        return torch.zeros(n, m)
    where, column = np.asarray(ends), np.asarray(columns, dtype=np.int64)
    tf, length = np.asarray(counts, dtype=np.float32), np.asarray(lengths, dtype=np.float32)
    df = np.bincount(column, minlength=len(vocabulary))
    idf = np.log1p((n - df + 0.5) / (df + 0.5)).astype(np.float32)
    norm = K1 * (1 - B + B * length / max(float(length.mean()), 1e-9))
    weights = tf * (K1 + 1) / (tf + np.repeat(norm, np.diff(where)))
    query = np.zeros((len(vocabulary), m), dtype=np.float32)
    for j, bag in enumerate(asked):
        for word, count in bag.items():
            query[vocabulary[word], j] = count
    # the sum over a row's words of weight times the word's line of the table
    return torch.nn.functional.embedding_bag(
        torch.from_numpy(column),
        torch.from_numpy(query * idf[:, None]),
        torch.from_numpy(where),
        per_sample_weights=torch.from_numpy(weights),
        mode="sum",
        include_last_offset=True,
    )
