"""Attention of short rows against the formula written out in fp64, and what models it is given
to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import FalconConfig, FalconForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradsift.compute.cpu import attention
from gradsift.compute.cpu.attention import causal_attention, is_helped, short_rows
from gradsift.gradients.passes import extract
from gradsift.gradients.projection import Projection
from gradsift.model.layers import tracked_modules
from gradsift.model.losses import token_nats
from tests import tolerances as tol
from tests.gradients.one_by_one import build


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    share, t = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(
        torch.ones(t, t).triu(1).bool(), -torch.inf
    )
    return scores.softmax(-1) @ value


def drawn(groups: int, t: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of two rows and four heads as layers make them, and an output
    gradient; values are wider than keys.
    """
    torch.manual_seed(t)
    shapes = ((4, 12), (groups, 12), (groups, 20), (4, 20))
    return [torch.randn(2, t, heads, width).to(dtype).transpose(1, 2) for heads, width in shapes]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("t", [1, 7, 97, 150])
def test_outputs_and_gradients_are_those_of_the_formula(groups: int, t: int) -> None:
    sides = drawn(groups, t, torch.float32)
    ours, exact = (
        [a.detach().to(dtype).requires_grad_() for a in sides[:3]]
        for dtype in (torch.float32, torch.float64)
    )
    out, expected = causal_attention(*ours, 0.3), dense(*exact, 0.3)  # type: ignore[call-arg]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(out, ours, sides[3]),
        torch.autograd.grad(expected, exact, sides[3].double()),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_16_bit_inputs_are_rounded_once() -> None:
    sides = drawn(2, 40, torch.bfloat16)
    ours, exact = (
        [a.detach().to(dtype).requires_grad_() for a in sides[:3]]
        for dtype in (torch.bfloat16, torch.float64)
    )
    out, expected = causal_attention(*ours, 0.3), dense(*exact, 0.3)  # type: ignore[call-arg]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(out, ours, sides[3]),
        torch.autograd.grad(expected, exact, sides[3].double()),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=2**-8, atol=1e-4)


def outputs(model: Any, t: int) -> Tensor:
    torch.manual_seed(0)
    return model(input_ids=torch.randint(0, 101, (2, t)), use_cache=False).logits.detach()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "neox"])
def test_a_model_computes_what_it_did(family: str) -> None:
    model: Any = build(family, lora=False).bfloat16()
    usual, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []
    with short_rows(is_helped(list(model.modules()))), patched(calls):
        short, long = outputs(model, 20), outputs(model, 40)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual and set(calls) == {20}
    exact = outputs(model, 20)
    assert (short - exact).abs().max() < 2**-4 * exact.abs().max()
    # more than four times a head's width of 8: torch's own
    assert torch.equal(long, outputs(model, 40))


@contextmanager
def patched(calls: list[int]) -> Iterator[None]:
    """Notes how long the rows are that come to the row-by-row attention."""
    own = attention.causal_attention

    def noting(query: Tensor, *rest: Any) -> Tensor:
        calls.append(query.shape[2])
        return own(query, *rest)

    attention.causal_attention = noting  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.causal_attention = own


def falcon(dtype: torch.dtype) -> Any:
    """A model that asks its config, by name, which of its own ways to take."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_hidden_size=64,
    )
    model: Any = FalconForCausalLM(
        FalconConfig(**sizes, alibi=False, multi_query=True, new_decoder_architecture=False)
    )
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_asks_its_config_what_to_compute_is_told_the_truth(dtype: torch.dtype) -> None:
    model = falcon(dtype)
    with short_rows(is_helped(list(model.modules()))):
        assert model.config._attn_implementation == "sdpa"
        got = outputs(model, 20)
    assert torch.equal(got, outputs(model, 20))
    rows = [{"input_ids": list(range(1, 21)), "labels": [-100] * 10 + list(range(11, 21))}]
    batch = next(iter(extract(model.float(), rows, projection=Projection(64), modules="linear")))
    model.requires_grad_(True)
    ids = torch.tensor([rows[0]["input_ids"]])
    torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, 9:-1], ids[0, 10:]).backward()
    tracked = [m.weight.grad for m in tracked_modules(model, "linear").values()]
    assert float(batch.norms[0]) == pytest.approx(
        float(torch.stack([g.norm() for g in tracked]).norm()), rel=1e-4
    )


def test_masks_are_left_to_torch() -> None:
    model: Any = build("llama", lora=False).bfloat16()
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    with short_rows(True):
        got = model(input_ids=torch.arange(5)[None], attention_mask=mask).logits
    assert torch.equal(got, model(input_ids=torch.arange(5)[None], attention_mask=mask).logits)


def test_single_precision_is_left_to_torch() -> None:
    model, calls = build("llama", lora=False), []
    assert not is_helped(list(model.modules())) and is_helped(list(model.bfloat16().modules()))
    model = build("llama", lora=False)
    with short_rows(True), patched(calls):
        assert torch.equal(outputs(model, 20), outputs(model, 20))
    assert not calls


def test_mixed_precision_is_autocast_s_own() -> None:
    """The same loss and the same gradients of a training step, up to the rounding of bf16."""
    rows = [{"input_ids": list(range(1, 21)), "labels": [-100] * 10 + list(range(11, 21))}]
    found, calls = [], []  # the plain way comes second and adds no call
    for wanted in (True, False):
        model: Any = build("llama", lora=False).requires_grad_(True)
        with short_rows(wanted), torch.autocast("cpu", torch.bfloat16), patched(calls):
            nats = token_nats(model, rows)[0]
        nats.sum().backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
        assert bool(calls) and not torch.is_autocast_enabled("cpu")
    assert calls == [20] * model.config.num_hidden_layers
    assert torch.cosine_similarity(found[0], found[1], dim=0) > tol.BF16_COSINE
    assert float(found[0].norm()) == pytest.approx(float(found[1].norm()), rel=tol.BF16_NORM_RTOL)


def test_an_error_leaves_what_was_there_and_somebodys_own_function_is_used() -> None:
    usual, model = ALL_ATTENTION_FUNCTIONS["sdpa"], build("llama", lora=False)
    with pytest.raises(IndexError), short_rows(True):
        model(input_ids=torch.tensor([[10**6]]))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
    seen: list[int] = []

    def own(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[1].shape[2])
        return usual(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with short_rows(True):
            outputs(model, 20)
        assert seen and ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
