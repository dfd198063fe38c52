"""Hashed n-gram weights and instruction-following difficulty, against plain loops."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import xxhash

from gradsift.model.losses import row_losses
from gradsift.signals.ifd import alone, answer_losses
from gradsift.signals.ngrams import buckets, importance
from tests.model.small_models import llama

POOL = ["the cat sat on the mat", "def add(a, b): return a + b", "", "integral of x", "the dog"]
TARGET = ["def sub(a, b): return a - b", "return a"]


def naive(pool: list[str], target: list[str], count: int) -> list[float]:
    def grams(text: str) -> list[int]:
        words = text.replace("(", " ( ").replace("):", " ): ").replace(",", " , ").split()
        return [
            xxhash.xxh32_intdigest(g.encode()) % count
            for g in words + [" ".join(p) for p in itertools.pairwise(words)]
        ]

    ours, theirs = (
        Counter(g for t in pool for g in grams(t)),
        Counter(g for t in target for g in grams(t)),
    )
    a, b = sum(ours.values()), sum(theirs.values()) + 7
    return [
        sum(math.log((theirs[g] + 7 * ours[g] / a) / b) - math.log(ours[g] / a) for g in grams(t))
        for t in pool
    ]


def test_weights_are_those_of_plain_counting() -> None:
    found = importance(POOL, TARGET, 5000, prior=7)
    assert np.allclose(found, naive(POOL, TARGET, 5000))
    assert found[2] == 0 and int(importance(POOL, TARGET).argmax()) == 1


def test_a_target_equal_to_the_pool_weighs_nothing() -> None:
    assert np.allclose(importance(POOL, POOL), 0)


def test_buckets_hold_words_and_pairs_whatever_the_case() -> None:
    assert len(buckets("One two, three")) == 4 + 3
    assert buckets("One Two").tolist() == buckets("one two").tolist()
    assert buckets("我 们").max() < 10_000 and len(buckets("")) == 0


def test_difficulty_reads_the_answer_after_its_prompt_and_alone() -> None:
    model = llama()
    rows = [
        {"input_ids": [3, 5, 7, 9, 11], "labels": [-100, -100, 7, -100, 11]},
        {"input_ids": [4, 6, 8], "labels": [-100, 6, 8]},
    ]
    assert alone(rows[0], 1) == {"input_ids": [1, 7, 11], "labels": [-100, 7, 11]}
    assert alone(rows[0]) == {"input_ids": [7, 11], "labels": [7, 11]}
    for begin in (None, 4):
        found = answer_losses(model, rows, begin=begin)
        for i, row in enumerate(rows):
            given, without = (float(row_losses(model, [r]).mean) for r in (row, alone(row, begin)))
            assert found[i].tolist() == pytest.approx([given, without], abs=1e-6)
    assert float(found[1, 0]) == pytest.approx(
        float(found[1, 1]), abs=1e-6
    )  # its prompt is `begin`
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[7, 11]])).logits[0, 0].float()
    scored = -logits.log_softmax(0)[
        11
    ]  # without a token before it the answer's first is not scored
    assert float(answer_losses(model, rows[:1])[0, 1]) == pytest.approx(float(scored), abs=1e-6)
    nothing = [{"input_ids": [3, 5], "labels": [-100, -100]}]
    assert torch.isnan(answer_losses(model, nothing)).all()
