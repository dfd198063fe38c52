"""Batches of rows: sorted by length, within a budget of padded tokens; and their padded tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gradsift.errors import DataError
from gradsift.types import IGNORE, Encoded


def token_batches(lengths: np.ndarray | Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Row indices in batches of similar length, longest first (ties by index): rows x longest <=
    token_budget, or one row.

    lengths [r]: tokens, an empty row counts as one. Of all ways to cut the sorted rows, the one
    with the fewest padded tokens, where a batch counts as `token_budget` / 25 tokens more: about
    what starting one costs. The batches depend on the arguments alone.
    """
    counts = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
    order = np.argsort(-counts, kind="stable")
    sizes, start_cost = counts[order].tolist(), max(1, token_budget // 25)
    n = len(sizes)
    # best[s]: cost of the rows from s on; cut[s]: where the batch that starts at s ends
    best, cut = [0] * (n + 1), [n] * (n + 1)
    for start in range(n - 1, -1, -1):
        longest = sizes[start]
        last = min(n, start + max(1, token_budget // longest))
        costs = [best[end] + longest * (end - start) for end in range(start + 1, last + 1)]
        low = min(range(len(costs)), key=lambda k: (costs[k], -k))
        best[start], cut[start] = costs[low] + start_cost, start + 1 + low
    batches, start = [], 0
    while start < n:
        batches.append(order[start : cut[start]])
        start = cut[start]
    return batches


def pad_batch(
    rows: Sequence[Encoded | Mapping[str, list[int]]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, labels), each int64 [b, t], padded on the right: pad_id, 0 and
    -100.
    """
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORE, dtype=torch.int64)
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        ids[i, :size] = torch.tensor(row["input_ids"], dtype=torch.int64)
        labels[i, :size] = torch.tensor(row["labels"], dtype=torch.int64)
        mask[i, :size] = 1
    return ids, mask, labels


def count_tokens(encoded: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens that can reach the loss, supervised tokens) of each row: a row counts up to the
    position before its last supervised token.
    """
    lengths, supervised = np.zeros(len(encoded), np.int64), np.zeros(len(encoded), np.int32)
    for n in range(len(encoded)):
        row = encoded[n]
        labels = np.asarray(row["labels"])
        if labels.ndim != 1 or np.ndim(row["input_ids"]) != 1:
            what = (
                f"row {n} holds {np.shape(row['input_ids'])} ids and {labels.shape} labels, not one"
                " list of each"
            )
            raise DataError(what, remedy="Give every row by itself, without a batch dimension.")
        if len(labels) and (
            labels.dtype.kind not in "iu" or bool(((labels < 0) & (labels != IGNORE)).any())
        ):
            raise DataError(
                f"row {n} has labels that are neither token ids nor {IGNORE}",
                remedy="Encode the pool again.",
            )
        if len(labels) != len(row["input_ids"]):
            raise DataError(
                f"row {n} has {len(row['input_ids'])} tokens and {len(labels)} labels",
                remedy="Encode the pool again.",
            )
        places = np.flatnonzero(labels[1:] != IGNORE)
        if len(places):
            lengths[n], supervised[n] = places[-1] + 1, len(places)
    return lengths, supervised


def plan_batches(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """The `token_batches` of the rows that have a token."""
    at = np.flatnonzero(lengths > 0)
    return [at[batch] for batch in token_batches(lengths[at], token_budget)]
