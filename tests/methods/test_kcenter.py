"""k-center on points of a line and against a naive twin."""

from __future__ import annotations

import pytest
import torch

from gradsift.methods import make
from gradsift.types import Signal
from tests.methods.vectors import choose, random_rows


def test_each_pick_is_the_row_farthest_from_those_before() -> None:
    rows = torch.nn.functional.normalize(random_rows(60, 5, 1), dim=1)
    picks = choose(make("kcenter"), rows, None, 20, seed=3).indices.tolist()
    for k in range(1, 20):
        distance = torch.cdist(rows.double(), rows[picks[:k]].double()).amin(dim=1)
        assert distance[picks[k]] == pytest.approx(float(distance.max()), abs=1e-6)


def test_the_seed_draws_the_first_row_and_budgets_nest() -> None:
    rows = random_rows(50, 4, 2)
    starts = {choose(make("kcenter"), rows, None, 1, seed=s).indices[0] for s in range(8)}
    assert len(starts) > 1
    assert (
        choose(make("kcenter"), rows, None, 6).indices.tolist()
        == choose(make("kcenter"), rows, None, 15).indices.tolist()[:6]
    )


def test_it_reads_embeddings_or_gradient_rows() -> None:
    assert make("kcenter").needs() == {Signal("embeddings")}
    assert make("kcenter", {"signal": "rows"}).needs() == {Signal("rows", transform="adam")}
    assert make("kcenter", {"signal": "rows", "transform": "none"}).needs() == {Signal("rows")}
