"""The engine as a caller sees it: invariances, restored models, rows it cannot use, memory that
runs out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradsift.compute.batches import plan_batches
from gradsift.errors import ConfigError, DataError, MismatchError, UnknownName
from gradsift.gradients.adam import Adam
from gradsift.gradients.last_layer import find_tail, same_without
from gradsift.gradients.objectives import cross_entropy
from gradsift.gradients.passes import extract, output_dim
from gradsift.gradients.projection import Projection
from gradsift.model.layers import tracked_modules
from tests import tolerances as tol
from tests.gradients.one_by_one import build, collect, make_rows, one_by_one
from tests.model.small_models import mixtral

SKETCH = Projection(64)
TWO_SIDED = Projection((4, 4), kind="rademacher", per_module=True)


def check_close(one: Tensor, other: Tensor) -> None:
    assert torch.nn.functional.cosine_similarity(one, other).min() > tol.ROW_COSINE
    torch.testing.assert_close(one.norm(dim=1), other.norm(dim=1), rtol=tol.NORM_RTOL, atol=0)


def moments(model: nn.Module, seed: int = 0) -> Adam:
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: p.shape for n, p in model.named_parameters() if "lora_" in n}
    m = {n: torch.randn(s, generator=generator) * 1e-2 for n, s in shapes.items()}
    v = {n: torch.rand(s, generator=generator) * 1e-3 for n, s in shapes.items()}
    return Adam(m, v, step=7)


@pytest.mark.parametrize("lora", [True, False])
def test_batch_size_padding_and_order_do_not_matter(lora: bool) -> None:
    model, rows = build("llama", lora=lora), make_rows(17)
    options: dict[str, Any] = (
        {"projection": SKETCH} if lora else {"projection": TWO_SIDED, "modules": "linear"}
    )
    alone = collect(extract(model, rows, token_budget=1, **options), len(rows))
    for budget in (50, 200, 5000):
        batched = collect(extract(model, rows, token_budget=budget, **options), len(rows))
        check_close(batched.rows, alone.rows)
        torch.testing.assert_close(batched.norms, alone.norms, rtol=tol.NORM_RTOL, atol=0)
        torch.testing.assert_close(batched.losses, alone.losses, rtol=tol.LOSS_RTOL, atol=0)
        assert torch.equal(batched.tokens, alone.tokens)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = collect(
        extract(model, [rows[k] for k in order], token_budget=200, **options), len(rows)
    )
    check_close(shuffled.rows, alone.rows[torch.from_numpy(order)])


def test_the_same_call_gives_the_same_bytes() -> None:
    model, rows = build("qwen3", lora=True), make_rows()
    first, second = (
        collect(extract(model, rows, projection=SKETCH, transform=moments(model)), len(rows))
        for _ in range(2)
    )
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.norms, second.norms)


def test_adam_rows_are_the_transform_of_autograd_gradients_and_norms_are_not() -> None:
    model, rows = build("llama", lora=True), make_rows()
    tracked, adam = tracked_modules(model), moments(model)
    grads, _ = one_by_one(model, rows, [m.weight for m in tracked.values()])  # type: ignore[misc]
    bound = SKETCH.bind({n: tuple(m.weight.shape) for n, m in tracked.items()})  # type: ignore[misc,union-attr]
    state = bound.start(len(rows))
    for k, name in enumerate(tracked):
        bound.add(state, name, adam.materialised(name, torch.stack([g[k] for g in grads])))
    got = collect(extract(model, rows, projection=SKETCH, transform=adam), len(rows))
    torch.testing.assert_close(got.rows, bound.finish(state), rtol=1e-3, atol=1e-3)
    norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in grads])
    torch.testing.assert_close(got.norms, norms, rtol=tol.NORM_RTOL, atol=0)


class RankOne:
    """grad * row * col, given as factors."""

    def __init__(self, model: nn.Module) -> None:
        torch.manual_seed(1)
        weights = {n: m.weight for n, m in tracked_modules(model, "linear").items()}
        self.kept = {
            n: (torch.rand(w.shape[0]) + 0.5, torch.rand(w.shape[1]) + 0.5)
            for n, w in weights.items()
        }  # type: ignore[union-attr]

    def materialised(self, name: str, grad: Tensor) -> Tensor:
        row, col = self.kept[name]
        return grad * row[:, None] * col

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        return self.kept[name]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_transform_that_factors_gives_the_same_rows_either_way(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = build(family, lora=False), make_rows()
    transform = RankOne(model)
    factored = collect(
        extract(model, rows, projection=TWO_SIDED, transform=transform, modules="linear"), len(rows)
    )
    monkeypatch.setattr(RankOne, "factors", lambda self, name: None)
    formed = collect(
        extract(model, rows, projection=TWO_SIDED, transform=transform, modules="linear"), len(rows)
    )
    check_close(factored.rows, formed.rows)
    torch.testing.assert_close(factored.norms, formed.norms, rtol=tol.NORM_RTOL, atol=0)


@pytest.mark.parametrize("lora", [True, False])
def test_bf16_rows_point_where_fp32_rows_do(lora: bool) -> None:
    model, rows = build("llama", lora=lora), make_rows()
    options: dict[str, Any] = (
        {"projection": Projection(4096)} if lora else {"projection": TWO_SIDED, "modules": "linear"}
    )
    exact = collect(extract(model, rows, **options), len(rows))
    rounded = collect(extract(model.bfloat16(), rows, **options), len(rows))
    assert rounded.rows.dtype == rounded.norms.dtype == rounded.losses.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact.rows, rounded.rows).min() > tol.BF16_COSINE
    torch.testing.assert_close(exact.norms, rounded.norms, rtol=tol.BF16_NORM_RTOL, atol=0)


def state_of(model: nn.Module) -> tuple[Any, ...]:
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    ]
    flags = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return (
        hooks,
        flags,
        [m.training for m in model.modules()],
        [sorted(m.__dict__) for m in model.modules()],
        grads,
    )


def in_odd_state() -> nn.Module:
    model = build("llama", lora=True).train()
    model.get_submodule("base_model.model.model.norm").eval()
    for p in list(model.parameters())[::3]:
        p.requires_grad_(not p.requires_grad)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "lora_" in name)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


def test_the_model_is_what_it_was_after_every_batch_a_close_and_an_error() -> None:
    model, rows = in_odd_state(), make_rows()
    before = state_of(model)
    batches = extract(model, rows, projection=SKETCH, token_budget=40)
    for _ in range(3):
        next(batches)
        assert state_of(model) == before
        assert torch.is_grad_enabled()
    batches.close()  # type: ignore[attr-defined]
    assert state_of(model) == before
    with pytest.raises(IndexError):
        list(
            extract(
                model, [*rows, {"input_ids": [1, 10**6, 2], "labels": [1, 1, 2]}], projection=SKETCH
            )
        )
    assert state_of(model) == before
    with torch.no_grad():
        collect(extract(model, rows, projection=SKETCH), len(rows))
        assert not torch.is_grad_enabled()
    assert state_of(model) == before


def test_dropout_is_off() -> None:
    model, rows = build("gpt2", lora=False), make_rows()  # GPT-2 has dropout 0.1 by default
    calm = collect(extract(model, rows, projection=SKETCH, modules="linear"), len(rows))
    trained = collect(extract(model.train(), rows, projection=SKETCH, modules="linear"), len(rows))
    assert torch.equal(calm.rows, trained.rows)
    assert model.training


def test_rows_without_supervised_tokens_are_zero() -> None:
    model, rows = build("llama", lora=True), make_rows(4)
    silent = [
        {"input_ids": [5, 6, 7], "labels": [-100] * 3},
        {"input_ids": [5, 6, 7], "labels": [5, -100, -100]},  # the first token is never predicted
        {"input_ids": [], "labels": []},
    ]
    got = collect(extract(model, [*rows, *silent], projection=SKETCH), 7)
    for values in (got.rows, got.norms, got.losses, got.tokens):
        assert (values[:4] != 0).any(-1 if values.dim() > 1 else 0).all()
        assert (values[4:] == 0).all()
    assert got.tokens.dtype == torch.int32
    assert list(extract(model, [], projection=SKETCH)) == []


def test_a_malformed_row_is_named() -> None:
    with pytest.raises(DataError, match="row 1 has 3 tokens and 2 labels"):
        list(
            extract(
                build("llama", lora=True),
                [make_rows(1)[0], {"input_ids": [1, 2, 3], "labels": [1, 2]}],
                projection=SKETCH,
            )
        )


def test_a_batch_in_place_of_a_row_is_not_read_as_silence() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])  # what a tokenizer gives with return_tensors="pt"
    with pytest.raises(DataError, match=r"row 0 holds .* not one list of each"):
        list(
            extract(
                build("llama", lora=True), [{"input_ids": ids, "labels": ids}], projection=SKETCH
            )
        )  # type: ignore[dict-item]
    for labels in ([-1, 2, 3], [1.0, 2.0, 3.0]):
        with pytest.raises(DataError, match="row 0 has labels"):
            list(
                extract(
                    build("llama", lora=True),
                    [{"input_ids": [1, 2, 3], "labels": labels}],
                    projection=SKETCH,
                )
            )  # type: ignore[dict-item]


@pytest.mark.parametrize("lora", [False, True])
def test_layers_are_named_as_in_the_base_model(lora: bool) -> None:
    model = build("llama", lora=lora)
    for names in (["q_proj"], "*.q_proj", ["layers.0.self_attn.q_proj", "model.layers.[12].*.q_*"]):
        found = [name.partition("model.layers.")[2] for name in tracked_modules(model, names)]
        plain = [name.removesuffix(".base_layer") for name in found]
        assert plain == [f"{i}.self_attn.q_proj" for i in range(3)]
    first = tracked_modules(model, ["layers.0.self_attn.q_proj"])
    assert len(first) == 1 and "layers.0." in next(iter(first))


def test_faults_of_the_call_come_before_any_work() -> None:
    model, rows = build("llama", lora=True), make_rows(2)
    with pytest.raises(ConfigError, match="token_budget is 0"):
        extract(model, rows, projection=SKETCH, token_budget=0)
    with pytest.raises(UnknownName):
        extract(model, rows, projection=SKETCH, modules=["nothing.like.it"])
    with pytest.raises(MismatchError, match="lora_A"):
        extract(model, rows, projection=SKETCH, transform=Adam({}, {}, step=1))
    with pytest.raises(ConfigError, match="LoRA"):
        extract(build("llama", lora=False), rows, projection=SKETCH)
    with pytest.raises(UnknownName):
        extract(model, rows, projection=SKETCH, norms="none")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("factored", [False, True])
def test_sketched_norms_are_right_on_average_and_rows_are_the_same(factored: bool) -> None:
    model, rows = build("llama", lora=False), make_rows()
    options: dict[str, Any] = {
        "transform": RankOne(model) if factored else None,
        "modules": "linear",
    }
    whole = collect(extract(model, rows, projection=TWO_SIDED, **options), len(rows))
    squares = torch.empty(200, len(rows), dtype=torch.float64)
    for seed in range(len(squares)):
        projection = Projection((4, 4), seed, "rademacher", per_module=True)
        squares[seed] = (
            collect(
                extract(model, rows, projection=projection, norms="sketched", **options), len(rows)
            ).norms.double()
            ** 2
        )
    errors = (squares.mean(0) - whole.norms.double() ** 2).abs() / (
        squares.std(0) / len(squares) ** 0.5
    )
    assert errors.max() < tol.STANDARD_ERRORS
    sketched = collect(
        extract(model, rows, projection=TWO_SIDED, norms="sketched", **options), len(rows)
    )
    torch.testing.assert_close(
        sketched.rows, whole.rows, rtol=tol.GRADIENT_RTOL, atol=tol.GRADIENT_ATOL
    )
    if not factored:
        torch.testing.assert_close(
            sketched.norms, sketched.rows.norm(dim=1), rtol=tol.NORM_RTOL, atol=0
        )


def test_sketched_norms_still_tell_a_gradient_of_zero_and_one_that_is_not_finite() -> None:
    model, rows = build("llama", lora=False), make_rows(4)
    options: dict[str, Any] = {"projection": TWO_SIDED, "modules": "linear", "norms": "sketched"}
    with torch.no_grad():
        head = model.get_output_embeddings().weight  # type: ignore[operator]
        kept = head.clone()
        head.zero_()
        assert collect(extract(model, rows, **options), len(rows)).norms.tolist() == [0.0] * len(
            rows
        )
        head.copy_(kept)[0, 0] = torch.inf
        assert not collect(extract(model, rows, **options), len(rows)).norms.isfinite().any()


def test_where_gradients_are_formed_norms_are_exact_in_either_case() -> None:
    model, rows = build("llama", lora=True), make_rows()
    exact, other = (
        collect(extract(model, rows, projection=SKETCH, norms=n), len(rows))
        for n in ("exact", "sketched")
    )  # type: ignore[arg-type]
    assert torch.equal(exact.norms, other.norms)


@contextmanager
def memory_for(
    model: nn.Module, tokens: int, error: Callable[[], Exception]
) -> Iterator[list[int]]:
    """While this lasts, a forward pass over more than `tokens` padded tokens runs out of memory;
    yields the sizes tried.
    """
    tried: list[int] = []

    def refuse(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tried.append(kwargs["input_ids"].numel())
        if tried[-1] > tokens:
            raise error()

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        lambda: RuntimeError(
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
        ),
        lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate"
            " memory"
        ),
        lambda: MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch_and_says_so(
    error: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = build("llama", lora=True), make_rows(12)
    plenty = collect(extract(model, rows, projection=SKETCH, token_budget=500), len(rows))
    assert plenty.halvings == 0
    with caplog.at_level(logging.WARNING, "gradsift"), memory_for(model, 60, error) as tried:
        scarce = collect(extract(model, rows, projection=SKETCH, token_budget=500), len(rows))
    check_close(scarce.rows, plenty.rows)
    assert scarce.halvings >= 1
    assert scarce.failed == ()
    assert "halved" in caplog.text
    assert sum(size > 60 for size in tried) <= 4  # what follows keeps to the size that fits


def test_a_row_that_never_fits_is_nan_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, rows = build("llama", lora=True), make_rows(8)
    rows[3] = {"input_ids": list(range(40)), "labels": list(range(40))}
    expected = collect(extract(model, rows, projection=SKETCH), len(rows))
    with (
        caplog.at_level(logging.WARNING, "gradsift"),
        memory_for(model, 30, lambda: RuntimeError("out of memory")),
    ):
        got = collect(extract(model, rows, projection=SKETCH, token_budget=100), len(rows))
    assert got.failed == (3,)
    assert got.rows[3].isnan().all()
    assert got.norms[3].isnan()
    assert got.losses[3].isnan()
    assert got.tokens[3] == 39
    assert "row 3 (39 tokens) does not fit" in caplog.text
    others = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    check_close(got.rows[others], expected.rows[others])


def test_other_errors_are_not_taken_for_memory() -> None:
    model = build("llama", lora=True)
    with (
        memory_for(model, 0, lambda: RuntimeError("something else")),
        pytest.raises(RuntimeError, match="something else"),
    ):
        list(extract(model, make_rows(3), projection=SKETCH))


@pytest.mark.parametrize("budget", [1, 64, 1024])
def test_batches_hold_every_row_once_within_the_budget(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(0, 200, 300)
    batches = plan_batches(lengths, budget)
    assert sorted(np.concatenate(batches)) == np.flatnonzero(lengths).tolist()
    assert all(len(b) == 1 or len(b) * lengths[b].max() <= budget for b in batches)
    assert all(
        np.array_equal(a, b) for a, b in zip(batches, plan_batches(lengths, budget), strict=True)
    )


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_equals_autograd(in_place: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(300, 2000) * 20).to(dtype)
    targets, weights = torch.randint(0, 2000, (300,)), torch.rand(300)
    leaf = logits.float().requires_grad_()
    expected = nn.functional.cross_entropy(leaf, targets, reduction="none")
    (expected * weights).sum().backward()
    nll, grad = cross_entropy(logits, targets, weights, in_place=in_place)
    assert (grad.data_ptr() == logits.data_ptr()) == in_place
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        grad.float(), leaf.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6
    )


def test_the_last_feed_forward_is_found_and_checked() -> None:
    llama, ids = build("llama", lora=False), torch.arange(20)[None]
    assert find_tail(llama) is llama.get_submodule("model.layers.2.mlp")
    gpt2 = build("gpt2", lora=True)
    assert find_tail(gpt2) is gpt2.get_submodule("base_model.model.transformer.h.2.mlp")
    assert find_tail(mixtral()) is None  # a router is not position-wise linear algebra
    assert same_without(llama, find_tail(llama), llama.get_output_embeddings(), ids)  # type: ignore[arg-type,operator]
    below = llama.get_submodule("model.layers.1.mlp")
    assert not same_without(llama, below, llama.get_output_embeddings(), ids)  # type: ignore[arg-type,operator]


def test_output_dim() -> None:
    model = build("llama", lora=True)
    assert output_dim(model, SKETCH) == 64
    assert output_dim(model, TWO_SIDED) == 16 * len(tracked_modules(model))
    assert output_dim(model, Projection(None, kind="identity"), "linear") == sum(
        m.weight.numel()  # type: ignore[union-attr,operator]
        for m in tracked_modules(model, "linear").values()
    )
