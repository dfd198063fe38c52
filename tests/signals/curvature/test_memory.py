"""Curvature and its scores where memory runs out in the middle of a backward pass: half of a batch
may then be in the sums already.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradsift.errors import OutOfMemory
from gradsift.signals.curvature.exact import prepare_targets, score_pool
from gradsift.signals.curvature.fit import fit
from gradsift.signals.curvature.passes import CurvaturePass, Layer
from tests.signals.curvature.naive import base, close, gather, make_rows

LONG = {"input_ids": list(range(3, 43)), "labels": list(range(3, 43))}


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third layer that is shown runs out of memory for more than two rows, and for any of 39
    tokens.
    """
    show = CurvaturePass.show

    def limited(self: CurvaturePass, rows: Any, visit: Any, draw: Any = None) -> Tensor:
        shown: list[str] = []

        def seen(layer: Layer, x: Tensor, d: Tensor, lengths: list[int]) -> None:
            shown.append(layer.name)
            if len(shown) == 3 and (len(rows) > 2 or max(len(r.ids) for r in rows) >= 39):
                raise torch.cuda.OutOfMemoryError("out of memory")
            visit(layer, x, d, lengths)

        return show(self, rows, seen, draw)

    monkeypatch.setattr(CurvaturePass, "show", limited)


@pytest.mark.parametrize("form", ["expand", "expand-sum", "reduce"])
def test_a_fit_leaves_out_the_row_that_never_fits_and_counts_no_row_twice(
    form: Any, request: pytest.FixtureRequest
) -> None:
    model, rows = base(), make_rows(9)
    expected = fit(model, rows, modules="linear", form=form, shard_rows=4, token_budget=1000)
    request.getfixturevalue("scarce")
    found = fit(
        model,
        [*rows[:5], LONG, *rows[5:]],
        modules="linear",
        form=form,
        shard_rows=5,
        token_budget=1000,
    )
    assert found.tensors.keys() == expected.tensors.keys()
    for name in (name for name in expected.tensors if name[:2] in ("A/", "G/", "eA", "eG")):
        assert close(found.tensors[name], expected.tensors[name], 1e-4), name
    for name in found.names:  # whatever the signs of the eigenvectors
        assert close(found.eigen(name).values.sum(), expected.eigen(name).values.sum(), 1e-4), name


def test_a_fit_of_rows_none_of_which_fits_is_an_error(scarce: None) -> None:
    with pytest.raises(OutOfMemory, match="no row of the fit"):
        fit(base(), [LONG, LONG], modules="linear")


@pytest.mark.parametrize("target_batch", [1, 2])
def test_a_target_row_that_never_fits_is_left_out_as_if_it_had_not_been_given(
    target_batch: int, request: pytest.FixtureRequest
) -> None:
    model, pool, target = base(), make_rows(8), make_rows(6, seed=1)
    options: dict[str, Any] = {
        "modules": "linear",
        "target_batch": target_batch,
        "token_budget": 1000,
    }
    expected = gather(
        score_pool(model, pool, prepare_targets(model, target, None, **options), modules="linear"),
        8,
    )
    request.getfixturevalue("scarce")
    prepared = prepare_targets(model, [*target[:3], LONG, *target[3:]], None, **options)
    assert prepared.left_out == (3,)
    assert [i for members in prepared.members for i in members] == [0, 1, 2, 4, 5, 6]
    found = gather(
        score_pool(model, [*pool, LONG], prepared, modules="linear", token_budget=1000), 9
    )
    assert close(found[:8], expected, 1e-4)
    assert bool(found[8].isnan().all())
    with pytest.raises(OutOfMemory, match="no target is left"):
        prepare_targets(model, [LONG], None, **options)
