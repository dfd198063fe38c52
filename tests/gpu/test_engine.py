"""The engine, the curvature and the main job on a CUDA device, against the same on the CPU.
Skipped, aloud, where there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradsift
from gradsift.gradients.adam import Adam, FactoredAdam
from gradsift.gradients.passes import GradientBatch, extract
from gradsift.gradients.projection import Projection
from gradsift.methods import make
from gradsift.model.layers import tracked_modules
from gradsift.model.load import load_model
from gradsift.model.lora import attach_lora, load_adapter
from gradsift.model.losses import row_losses
from gradsift.signals.curvature.exact import influence_scores
from gradsift.signals.curvature.fit import fit
from gradsift.store.rows import RowStore
from gradsift.types import Signals
from tests import tolerances as tol
from tests.conftest import SETTINGS
from tests.gradients.one_by_one import build, collect, make_rows
from tests.model.small_models import llama, token_rows

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
    ),
]
TWO_SIDED = Projection((4, 4), kind="rademacher", per_module=True)


def check_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(
        a.cpu(), b.cpu(), rtol=tol.GPU_RTOL, atol=tol.GPU_ATOL * float(b.abs().max())
    )


def options(model: nn.Module, kind: str) -> dict[str, Any]:
    modules = None if kind.startswith("lora") else "linear"
    generator = torch.Generator().manual_seed(0)
    m, v = {}, {}
    for name, module in tracked_modules(model, modules).items():
        shape = module.weight.shape  # type: ignore[union-attr]
        m[f"{name}.weight"] = torch.randn(shape, generator=generator) * 1e-3  # type: ignore[arg-type]
        v[f"{name}.weight"] = torch.rand(shape, generator=generator) * 1e-4 + 1e-5  # type: ignore[arg-type]
    made: dict[str, dict[str, Any]] = {
        "lora": dict(projection=Projection(64)),
        "lora adam": dict(projection=Projection(256), transform=Adam(m, v, 20)),
        "lora dense": dict(projection=Projection(64, kind="rademacher")),
        "linear": dict(projection=TWO_SIDED),
        "linear sketch": dict(projection=Projection(64)),
        "linear factored adam": dict(projection=TWO_SIDED, transform=FactoredAdam(v, 20)),
    }
    return {**made[kind], "modules": modules, "token_budget": 64}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize(
    "kind", ["lora", "lora adam", "lora dense", "linear", "linear sketch", "linear factored adam"]
)
def test_rows_on_a_gpu_are_those_of_the_cpu(family: str, kind: str) -> None:
    model, rows = build(family, lora=kind.startswith("lora")), make_rows()
    chosen = options(model, kind)
    expected = collect(extract(model, rows, **chosen), len(rows))
    got = collect(extract(copy.deepcopy(model).to(DEVICE), rows, **chosen), len(rows))
    assert got.rows.device.type == got.norms.device.type == "cpu"
    assert torch.equal(got.tokens, expected.tokens)
    for field in ("rows", "norms", "losses"):
        check_close(getattr(got, field), getattr(expected, field))


@pytest.mark.parametrize("kind", ["lora", "linear"])
def test_bf16_rows_on_a_gpu_point_where_fp32_rows_do(kind: str) -> None:
    model, rows = build("llama", lora=kind == "lora"), make_rows()
    chosen = options(model, kind) | {
        "projection": Projection(4096) if kind == "lora" else TWO_SIDED
    }
    expected = collect(extract(model, rows, **chosen), len(rows))
    got = collect(
        extract(copy.deepcopy(model).to(DEVICE, torch.bfloat16), rows, **chosen), len(rows)
    )
    assert torch.cosine_similarity(got.rows, expected.rows).min() > tol.BF16_COSINE
    torch.testing.assert_close(got.norms, expected.norms, rtol=tol.BF16_NORM_RTOL, atol=0)


@pytest.fixture
def memory_limit() -> Iterator[Any]:
    """A function that lets the process hold so many bytes of the device, until the test ends."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory

    def limit(size: float) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))

    yield limit
    limit(total)


def peak(batches: Iterator[GradientBatch], n: int) -> tuple[GradientBatch, int]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return collect(batches, n), torch.cuda.max_memory_reserved()


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_rows(memory_limit: Any) -> None:
    model = llama(
        hidden_size=256,
        intermediate_size=1024,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=1024,
    ).to(DEVICE)
    ids = torch.randint(0, 256, (16, 512), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def run(budget: int) -> tuple[GradientBatch, int]:
        return peak(
            extract(model, rows, projection=Projection(256), modules="linear", token_budget=budget),
            len(rows),
        )

    run(512)  # what libraries keep for themselves is there afterwards
    (one, least), (_, most) = run(512), run(16 * 512)
    assert most > 2 * least
    memory_limit((least + most) / 2)
    cut, _ = run(16 * 512)
    assert cut.halvings > 0
    assert not cut.failed
    check_close(cut.rows, one.rows)
    memory_limit(torch.cuda.memory_allocated() + (2 << 20))
    none, _ = run(512)
    assert len(none.failed) == 16
    assert bool(none.rows.isnan().all())


def test_curvature_and_scores_on_a_gpu_are_those_of_the_cpu() -> None:
    model, rows = build("llama", lora=False), make_rows(16)
    found = []
    for one in (model, copy.deepcopy(model).to(DEVICE)):
        fitted = fit(one, rows, modules="linear", token_budget=64)
        parts = list(
            influence_scores(
                one, rows, rows[:4], fitted.inverse(), modules="linear", token_budget=64
            )
        )
        order = torch.cat([torch.as_tensor(indices) for indices, _ in parts]).argsort()
        found.append(
            (
                {n: fitted.factors(n) for n in fitted.names},
                torch.cat([scores for _, scores in parts])[order],
            )
        )
    (factors, scores), (others, on_gpu) = found
    for name, pair in factors.items():
        for a, b in zip(others[name], pair, strict=True):
            check_close(a, b)
    # eigenvectors of equal values may turn
    torch.testing.assert_close(on_gpu, scores, rtol=0.02, atol=0.02 * float(scores.abs().max()))


def test_losses_on_a_gpu_are_those_of_the_cpu() -> None:
    model, rows = build("llama", lora=False), make_rows()
    expected = row_losses(model, rows).mean
    check_close(row_losses(copy.deepcopy(model).to(DEVICE), rows).mean, expected)


@pytest.mark.parametrize("method", ["less", "tagcos"])
def test_the_main_job_on_a_gpu(
    method: str, tmp_path: Path, pool_file: Path, target_file: Path, model_folder: Path
) -> None:
    settings: Mapping[str, Any] = {**SETTINGS, "model": {"device": DEVICE}}
    more: dict[str, Any] = (
        {"target": target_file} if method == "less" else {"options": {"clusters": 4}}
    )

    def select() -> Any:
        return gradsift.select(
            method,
            pool=pool_file,
            model=str(model_folder),
            run=tmp_path / "run",
            budget="25%",
            settings=settings,
            **more,
        )

    first, again = select(), select()
    assert len(first) == 18
    assert first.ids == again.ids
    assert all(timing.reused for timing in again.timings)
    stores = [
        RowStore.open(path.parent, verify=True)
        for path in sorted((tmp_path / "run").glob("gradients-*/store.json"))
    ]
    assert stores
    for store in stores:
        assert bool(store.usable.all())
        assert torch.allclose(
            store[0 : len(store)].float().norm(dim=1), torch.ones(len(store)), atol=1e-3
        )


def test_tagcos_follows_the_device_of_its_rows() -> None:
    rows = torch.nn.functional.normalize(
        torch.randn(300, 24, generator=torch.Generator().manual_seed(0)), dim=1
    )
    selector = make("tagcos", {"clusters": 5})
    (signal,) = selector.needs()
    for place in (rows, rows.to(DEVICE)):
        chosen = selector.select(Signals({signal: place}, n=300), 40, rng=np.random.default_rng(0))
        assert len(set(chosen.indices.tolist())) == 40


def test_an_adapter_and_a_model_are_loaded_on_to_the_device(
    tmp_path: Path, model_folder: Path
) -> None:
    model = attach_lora(load_model(str(model_folder), device=DEVICE))
    model.save_pretrained(tmp_path)
    loaded, rows = (
        load_adapter(load_model(str(model_folder), device=DEVICE), tmp_path),
        token_rows(4),
    )
    assert {p.device.type for p in loaded.parameters()} == {DEVICE}
    made = [
        collect(extract(one, rows, projection=Projection(64)), len(rows)) for one in (model, loaded)
    ]
    check_close(made[1].rows, made[0].rows)
