"""Embeddings against pooling one row at a time, on real layers of two families; and their store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradsift.data.encode import EncodedRows
from gradsift.signals.embeddings import embed, hidden_size
from gradsift.stages.work import EmbeddingWork
from gradsift.store.packing import NO_TOKEN
from gradsift.store.rows import RowStore
from tests.gradients.one_by_one import gpt2, llama

LENGTHS = (5, 17, 1, 9, 30, 17, 2)


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param()


def rows(seed: int = 0) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        {"input_ids": ids, "labels": [-100] * (size // 2) + ids[size // 2 :]}
        for size in LENGTHS
        for ids in [made(rng, size)]
    ]


def made(rng: np.random.Generator, size: int) -> list[int]:
    return rng.integers(1, 101, size=size).tolist()


@torch.no_grad()
def naive(model: Any, row: dict[str, list[int]]) -> Tensor:
    """The model's own last hidden states, one row, weights 1, 2, 3, ... in float64."""
    model.eval()
    states = (
        model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
        .hidden_states[-1][0]
        .double()
    )
    weights = torch.arange(1, len(states) + 1, dtype=torch.float64)
    return (weights[:, None] * states).sum(0) / weights.sum()


def test_embeddings_are_those_of_one_row_at_a_time(model: nn.Module) -> None:
    expected = torch.stack([naive(model, row) for row in rows()])
    assert hidden_size(model) == 32
    torch.testing.assert_close(embed(model, rows()).double(), expected, rtol=1e-4, atol=1e-5)


def test_padding_and_batches_change_nothing(model: nn.Module) -> None:
    alone, together = (
        embed(model, rows(), token_budget=1),
        embed(model, rows(), token_budget=10_000),
    )
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        embed(model, rows(), pad_id=7), embed(model, rows(), pad_id=0), rtol=0, atol=0
    )


def test_the_model_is_left_as_it_was_and_the_head_sees_one_position(model: Any) -> None:
    model.train()
    widths: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _, args, out: widths.append(out.shape[1])
    )
    seen: list[int] = []
    embed(model, rows(), token_budget=40, advance=seen.append)
    handle.remove()
    assert model.training and set(widths) == {1}
    assert sum(seen) == sum(LENGTHS) and not model.get_output_embeddings()._forward_pre_hooks


def test_a_store_of_embeddings_holds_unit_rows_and_leaves_out_what_was_not_encoded(
    model: nn.Module, tmp_path: Path
) -> None:
    given = rows()
    lengths = np.array(LENGTHS, dtype=np.int32)
    lengths[3] = 0
    flat = [token for i, row in enumerate(given) if i != 3 for token in row["input_ids"]]
    codes = np.array([0, 0, 0, 1, 0, 0, 0], dtype=np.uint8)
    supervised = np.where(codes == 0, np.maximum(lengths // 2, 1), 0).astype(np.int32)
    encoded = EncodedRows(
        np.array(flat, dtype=np.int32), np.array(flat, dtype=np.int32), lengths, supervised, codes
    )
    ids = [f"r{i}" for i in range(7)]
    store = RowStore.create(
        tmp_path, recipe_digest="0" * 64, ids=ids, dim=32, spec={}, shard_rows=3
    )
    work = EmbeddingWork(lambda: model, dim=32, pad_id=0)()
    for shard in reversed(store.missing()):
        store.keep(shard, work(encoded.part(store.shards[shard])).tensors)
    assert not store.missing()
    assert store.codes.tolist() == [0, 0, 0, NO_TOKEN, 0, 0, 0]
    expected = torch.stack([naive(model, row) for row in given]).float()
    expected[3] = 0
    torch.testing.assert_close(
        store[0:7].float(), torch.nn.functional.normalize(expected, dim=1), rtol=2e-3, atol=2e-4
    )
    torch.testing.assert_close(store.scales, expected.norm(dim=1), rtol=1e-3, atol=1e-5)
