"""BM25 against the formula written out."""

from __future__ import annotations

import math

import numpy as np
import torch

from gradsift.signals.bm25 import scores, words

POOL = [
    "the cat sat on the mat",
    "def add(a, b): return a + b",
    "",
    "The dog and the cat, the cat and the mat",
    "integral of x",
    "我们是朋友",
]
QUERIES = ["Cat on a mat; cat!", "return b", "", "nothing shared here", "我 the"]


def naive(pool: list[str], queries: list[str]) -> np.ndarray:
    rows = [words(text) for text in pool]
    n, mean = len(rows), sum(map(len, rows)) / len(rows)
    out = np.zeros((n, len(queries)))
    for j, query in enumerate(queries):
        for i, row in enumerate(rows):
            for word in words(query):
                df, tf = sum(word in other for other in rows), row.count(word)
                idf = math.log(1 + (n - df + 0.5) / (df + 0.5))
                out[i, j] += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(row) / mean))
    return out


def test_scores_are_the_formula() -> None:
    read: list[int] = []
    found = scores(iter(POOL), QUERIES, advance=read.append)
    assert found.dtype == torch.float32 and sum(read) == len(POOL)
    assert np.allclose(found, naive(POOL, QUERIES), atol=1e-6)
    assert (found[:, 2:4] == 0).all() and int(found[:, 0].argmax()) in (0, 3)


def test_scores_are_the_formula_on_random_texts() -> None:
    rng = np.random.default_rng(0)
    pool = [" ".join(rng.choice(list("abcdefgh"), size=rng.integers(0, 9))) for _ in range(50)]
    assert np.allclose(scores(pool, pool[:7]), naive(pool, pool[:7]), atol=1e-5)


def test_nothing_to_match_scores_nothing() -> None:
    assert scores([], ["a"]).shape == (0, 1) and scores(["a"], []).shape == (1, 0)
    assert scores(["a", "b"], ["", "?!"]).tolist() == [[0, 0], [0, 0]]


def test_words_ignore_case_and_marks_and_split_chinese() -> None:
    assert words("Don't STOP, x_1 naïve 3.5") == ["don", "t", "stop", "x_1", "naïve", "3", "5"]
    assert words("我们 GPT4吗") == ["我", "们", "gpt4", "吗"]
