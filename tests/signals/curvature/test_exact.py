"""Influence streamed through a fitted curvature on small real models, against dense gradients and
dense inverses; TRAK.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradsift.errors import ConfigError, DataError, MismatchError, UserError
from gradsift.gradients.passes import extract
from gradsift.gradients.projection import Projection
from gradsift.signals.curvature import exact
from gradsift.signals.curvature.exact import (
    influence_scores,
    prepare_targets,
    rank_agreement,
    score_pool,
)
from gradsift.signals.curvature.fit import fit
from gradsift.signals.curvature.passes import pass_row
from gradsift.signals.influence import trak_target
from gradsift.store.rows import RowStore
from gradsift.types import IGNORE
from tests.signals.curvature.naive import (
    MODELS,
    Naive,
    base,
    close,
    gather,
    make_rows,
    naive_scores,
)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("style", ["ekfac", "kfac", "pi", "none"])
def test_scores_are_those_of_dense_gradients(kind: str, style: str) -> None:
    make, modules = MODELS[kind]
    model, pool, target = make(), make_rows(9), make_rows(4, seed=1)
    curvature = fit(model, pool, modules=modules)
    inverse = {
        "ekfac": lambda: curvature.inverse(),
        "kfac": lambda: curvature.inverse(corrected=False),
        "pi": lambda: curvature.inverse(style="pi"),
        "none": lambda: None,
    }[style]()
    expected = naive_scores(
        inverse, Naive(model, curvature.names, pool), Naive(model, curvature.names, target)
    )
    for budget in (1, 50, 1000):
        found = gather(
            influence_scores(model, pool, target, inverse, modules=modules, token_budget=budget), 9
        )
        assert close(found, expected), budget
    dots = gather(influence_scores(model, pool, pool, inverse, modules=modules), 9)
    assert bool((dots.diagonal() >= 0).all())  # T2.6


def test_scores_are_g_times_the_dense_inverse_of_the_curvature() -> None:
    model, pool = base(), make_rows(6)
    name = "model.layers.1.mlp.down_proj"
    curvature = fit(model, pool, modules=[name], accumulate="float64")
    e = curvature.eigen(name)
    basis = torch.kron(e.left.double(), e.right.double())
    dense = basis @ torch.diag(e.values.double().flatten()) @ basis.t()
    damping = 0.1 * float(e.values.double().mean())
    grads = torch.stack(Naive(model, [name], pool).grads[name]).flatten(1)
    expected = grads @ torch.linalg.solve(
        dense + damping * torch.eye(len(dense), dtype=torch.float64), grads.t()
    )
    assert close(
        gather(influence_scores(model, pool, pool, curvature.inverse(), modules=[name]), 6),
        expected,
    )


def test_inner_products_of_projected_rows_agree_without_projection() -> None:
    """The projected backend is the same quantity: identity rows of the pool against preconditioned
    identity rows of the targets.
    """
    model, pool, target = base(), make_rows(6), make_rows(3, seed=1)
    inverse = fit(model, pool, modules="linear").inverse()
    flat = Projection(None, kind="identity")
    sides = []
    for rows, transform in ((pool, None), (target, inverse)):
        out = torch.zeros(len(rows), 0)
        for batch in extract(model, rows, projection=flat, modules="linear", transform=transform):
            out = torch.zeros(len(rows), batch.rows.shape[1]) if out.shape[1] == 0 else out
            out[torch.from_numpy(batch.indices)] = batch.rows
        sides.append(out)
    assert close(
        gather(influence_scores(model, pool, target, inverse, modules="linear"), 6),
        sides[0] @ sides[1].t(),
    )


def test_target_batches_are_token_weighted_means() -> None:
    model, pool, target = base(), make_rows(6), make_rows(5, seed=1)
    curvature = fit(model, pool, modules="linear")
    inverse = curvature.inverse()
    tokens = [sum(x != -100 for x in r["labels"][1:]) for r in target]
    single = naive_scores(
        inverse, Naive(model, curvature.names, pool), Naive(model, curvature.names, target)
    )
    expected = torch.stack(
        [
            sum(tokens[i] * single[:, i] for i in part) / sum(tokens[i] for i in part)
            for part in ((0, 1), (2, 3), (4,))
        ],
        dim=1,
    )  # type: ignore[arg-type]
    pairs = gather(
        influence_scores(model, pool, target, inverse, modules="linear", target_batch=2), 6
    )
    assert close(pairs, expected)
    lost = prepare_targets(model, target, inverse, modules="linear", target_batch=2, drop_last=True)
    assert lost.members == ((0, 1), (2, 3))
    assert close(gather(score_pool(model, pool, lost, modules="linear"), 6), expected[:, :2])


def test_t26_duplicated_seeds_keep_the_filter_and_more_seeds_shrink_it() -> None:
    model, pool, target = base(), make_rows(40), make_rows(3, seed=1)
    inverse = fit(model, pool, modules="linear").inverse()

    def kept(seeds: list[dict[str, list[int]]]) -> set[int]:
        found = gather(
            influence_scores(model, pool, seeds, inverse, modules="linear", token_budget=200), 40
        )
        return set((found > 0).all(1).nonzero().flatten().tolist())

    assert kept(target) == kept([*target, target[0], target[2], target[0]])
    assert kept(target) <= kept(target[:2]) <= kept(target[:1])
    assert 0 < len(kept(target[:1])) < 40


@pytest.mark.parametrize("held", [0, 6, 1000])
@pytest.mark.parametrize("kind", MODELS)
def test_t27_full_rank_is_dense_and_lower_rank_is_its_compression(
    kind: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, modules = MODELS[kind]
    model, pool, target = make(), make_rows(11), make_rows(4, seed=1)
    curvature = fit(model, pool, modules=modules)
    inverse = curvature.inverse()
    monkeypatch.setattr(exact, "MANY", 1)
    size = 4 * sum(r * c for r, c in curvature.shapes.values())
    monkeypatch.setattr(exact, "HELD", held * size)
    naive = Naive(model, curvature.names, pool), Naive(model, curvature.names, target)
    expected = naive_scores(inverse, *naive)
    for rank in (None, 24):
        assert close(
            gather(
                influence_scores(
                    model, pool, target, inverse, modules=modules, rank=rank, token_budget=50
                ),
                11,
            ),
            expected,
        )
    prepared = prepare_targets(model, target, inverse, modules=modules, rank=2)
    assert prepared.rank == 2
    low = torch.zeros(11, 4, dtype=torch.float64)
    for name in curvature.names:
        whole = inverse.apply_inverse(name, torch.stack(naive[1].grads[name]))
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        best = (u[:, :, :2] * s[:, None, :2]) @ vh[:, :2]
        if min(whole.shape[1:]) > 2:
            left, right = prepared.low[name]
            made = left.double() @ right.double().transpose(1, 2)
            assert float((made - whole).norm()) <= 1.01 * float(
                (best - whole).norm()
            ) + 1e-6 * float(whole.norm())
            assert prepared.kept[name] == pytest.approx(
                float((best.norm(dim=(1, 2)) / whole.norm(dim=(1, 2))).square().min()), rel=1e-2
            )
            whole = made
        low += torch.stack(naive[0].grads[name]).flatten(1) @ whole.flatten(1).t()
    for budget in (1, 50):
        assert close(
            gather(score_pool(model, pool, prepared, modules=modules, token_budget=budget), 11), low
        )


@pytest.mark.parametrize("by_tokens", [False, True])
def test_low_rank_scores_agree_both_ways(by_tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool, target = base(), make_rows(8), make_rows(5, seed=1)
    inverse = fit(model, pool, modules="linear").inverse()
    prepared = prepare_targets(model, target, inverse, modules="linear", rank=3)
    expected = gather(score_pool(model, pool, prepared, modules="linear"), 8)
    monkeypatch.setattr(exact, "cheaper_by_tokens", lambda *sizes: by_tokens)
    monkeypatch.setattr(exact, "CHUNK", {"cpu": 1000})
    assert close(gather(score_pool(model, pool, prepared, modules="linear"), 8), expected, 1e-5)


def test_rank_is_chosen_by_memory_and_chunks_do_not_matter(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, pool, target = (
        base(hidden_size=64, intermediate_size=96),
        make_rows(8),
        make_rows(5, seed=1),
    )
    curvature = fit(model, pool, modules="linear")
    inverse = curvature.inverse()
    size = 4 * sum(r * c for r, c in curvature.shapes.values())
    assert prepare_targets(model, target, inverse, modules="linear", memory=5 * size).rank is None
    with caplog.at_level("INFO"):
        small = prepare_targets(model, target, inverse, modules="linear", memory=2 * size)
    assert small.rank == 32
    assert "kept at rank 32" in caplog.text
    large = prepare_targets(model, target, inverse, modules="linear", rank=32)
    both = [gather(score_pool(model, pool, t, modules="linear"), 8) for t in (small, large)]
    assert close(both[0], both[1])
    agreement = rank_agreement(model, pool, target, inverse, rank=32, modules="linear")
    assert agreement.shape == (5,)
    assert bool((agreement > 0.5).all())
    plain = rank_agreement(model, pool, target, None, rank=32, modules="linear")
    # a row of 20 tokens has a gradient of rank 20; its preconditioned gradient has not
    assert torch.allclose(plain, torch.ones(5))


def test_silent_rows_score_zero_and_broken_ones_nan() -> None:
    model, pool = base(), make_rows(4)
    pool = [
        {"input_ids": [i % 63 for i in r["input_ids"]], "labels": [min(x, 62) for x in r["labels"]]}
        for r in pool
    ]
    inverse = fit(model, pool, modules="linear").inverse()
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = torch.nan  # type: ignore[operator,union-attr]
    silent, broken = (
        {"input_ids": [1, 2], "labels": [-100, -100]},
        {"input_ids": [63, 63, 63], "labels": [1, 2, 3]},
    )
    found = gather(
        influence_scores(model, [*pool, silent, broken], pool[:2], inverse, modules="linear"), 6
    )
    assert bool(torch.isfinite(found[:5]).all())
    assert bool((found[4] == 0).all())
    assert bool(found[5].isnan().all())
    with pytest.raises(DataError, match="target row 1 has no supervised token"):
        influence_scores(model, pool, [pool[0], silent], inverse, modules="linear")
    with pytest.raises(DataError, match="target row 1 has a gradient that is not finite"):
        influence_scores(model, pool, [pool[0], broken], inverse, modules="linear")


def test_a_batch_that_runs_out_of_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = base(), make_rows(8)
    expected = gather(influence_scores(model, pool, pool[:2], None, modules="linear"), 8)
    show = exact.CurvaturePass.show

    def limited(self: Any, rows: Any, *args: Any) -> Tensor:
        if len(rows) > 2 or any(r.index == 5 for r in rows):
            raise torch.cuda.OutOfMemoryError("out of memory")
        return show(self, rows, *args)

    prepared = prepare_targets(model, pool[:2], None, modules="linear")
    monkeypatch.setattr(exact.CurvaturePass, "show", limited)
    found = gather(score_pool(model, pool, prepared, modules="linear", token_budget=100), 8)
    assert bool(found[5].isnan().all())
    others = [n for n in range(8) if n != 5]
    assert close(found[others], expected[others], 1e-5)


def test_mistakes_are_told() -> None:
    model, rows = base(), make_rows(4)
    inverse = fit(model, rows, modules=["*down_proj"]).inverse()
    with pytest.raises(MismatchError, match="has no curvature"):
        influence_scores(model, rows, rows, inverse, modules="linear")
    with pytest.raises(ConfigError, match="target_batch 0"):
        influence_scores(model, rows, rows, None, modules="linear", target_batch=0)
    with pytest.raises(DataError, match="no targets"):
        influence_scores(
            model, rows, rows[:1], None, modules="linear", target_batch=2, drop_last=True
        )
    prepared = prepare_targets(model, rows, None, modules=["*down_proj"])
    with pytest.raises(MismatchError, match="no gradient of"):
        score_pool(model, rows, prepared, modules="linear")


def test_a_row_ends_where_it_is_told() -> None:
    r = pass_row([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}], 0, 3)
    assert r.ids.tolist() == [5, 6, 7]
    assert r.targets.tolist() == [6, 7, IGNORE]


# --- TRAK


def test_trak_with_an_invertible_matrix_is_the_hat_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    features, mix = (
        torch.randn(12, 12, generator=generator),
        torch.randn(3, 12, generator=generator),
    )
    scores_ = features @ trak_target(features, mix @ features).t()  # X (X^T X)^-1 X^T Q = Q
    assert torch.allclose(scores_, mix.t(), atol=1e-3)


def test_trak_is_ridge_regression_over_any_rows(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pool, target = torch.randn(3000, 8, generator=generator), torch.randn(4, 8, generator=generator)
    gram = pool.double().t() @ pool.double()
    for ridge, relative in ((0.0, False), (5.0, False), (0.1, True)):
        added = ridge * (float(gram.diagonal().mean()) if relative else 1.0)
        expected = torch.linalg.solve(gram + added * torch.eye(8), target.double().t()).t()
        assert close(trak_target(pool, target, ridge, relative=relative), expected, 1e-5)
    store = RowStore.create(
        tmp_path / "rows", recipe_digest="0" * 64, ids=[str(n) for n in range(3000)], dim=8, spec={}
    )
    for shard, where in enumerate(store.shards):
        part = pool[where]
        ones = torch.ones(len(part))
        store.write(shard, part, norms=ones, losses=ones, tokens=ones.int())
    assert close(
        trak_target(store, target), torch.linalg.solve(gram, target.double().t()).t(), 1e-2
    )
    with pytest.raises(ConfigError, match="not invertible"):
        trak_target(pool[:3], target)
    with pytest.raises(UserError, match="8 dimensions and target rows 4"):
        trak_target(pool, target[:, :4])
    shutil.rmtree(tmp_path / "rows")
