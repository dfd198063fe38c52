"""Attention of short rows against the formula written out in fp64, and what models it is given to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gradsift import attention
from gradsift.attention import attention_configs, causal_attention, short_rows
from tests.parity.parts import build


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    share, t = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ value


def drawn(groups: int, t: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of two rows and four heads as layers make them, and an output gradient; values are wider than keys."""
    torch.manual_seed(t)
    shapes = ((4, 12), (groups, 12), (groups, 20), (4, 20))
    return [torch.randn(2, t, heads, width).to(dtype).transpose(1, 2) for heads, width in shapes]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("t", [1, 7, 97, 150])
def test_outputs_and_gradients_are_those_of_the_formula(groups: int, t: int) -> None:
    sides = drawn(groups, t, torch.float32)
    ours, exact = ([a.detach().to(dtype).requires_grad_() for a in sides[:3]] for dtype in (torch.float32, torch.float64))
    out, expected = causal_attention(*ours, 0.3), dense(*exact, 0.3)  # type: ignore[call-arg]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(out, ours, sides[3]), torch.autograd.grad(expected, exact, sides[3].double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_16_bit_inputs_are_rounded_once() -> None:
    sides = drawn(2, 40, torch.bfloat16)
    ours, exact = ([a.detach().to(dtype).requires_grad_() for a in sides[:3]] for dtype in (torch.bfloat16, torch.float64))
    out, expected = causal_attention(*ours, 0.3), dense(*exact, 0.3)  # type: ignore[call-arg]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)
    for mine, theirs in zip(torch.autograd.grad(out, ours, sides[3]), torch.autograd.grad(expected, exact, sides[3].double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2**-8, atol=1e-4)


def outputs(model: Any, t: int) -> Tensor:
    torch.manual_seed(0)
    return model(input_ids=torch.randint(0, 101, (2, t)), use_cache=False).logits.detach()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "neox"])
def test_a_model_computes_what_it_did(family: str) -> None:
    model: Any = build(family, lora=False).bfloat16()
    configs = attention_configs(model.modules())
    with short_rows(configs):
        assert AttentionInterface()[model.config._attn_implementation] is attention._forward
        short, long = outputs(model, 20), outputs(model, 40)
    assert model.config._attn_implementation == "sdpa"
    exact = outputs(model, 20)
    assert (short - exact).abs().max() < 2**-4 * exact.abs().max()
    assert torch.equal(long, outputs(model, 40))  # more than four times a head's width of 8: torch's own


def test_masks_are_left_to_torch() -> None:
    model: Any = build("llama", lora=False).bfloat16()
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    with short_rows(attention_configs(model.modules())):
        got = model(input_ids=torch.arange(5)[None], attention_mask=mask).logits
    assert torch.equal(got, model(input_ids=torch.arange(5)[None], attention_mask=mask).logits)


def test_single_precision_is_left_to_torch() -> None:
    model = build("llama", lora=False)
    with short_rows(attention_configs(model.modules())):
        got = outputs(model, 20)
    assert torch.equal(got, outputs(model, 20))


def test_an_error_or_another_choice_leaves_the_config_as_it_was() -> None:
    model: Any = build("llama", lora=False)
    with pytest.raises(IndexError), short_rows(attention_configs(model.modules())):
        model(input_ids=torch.tensor([[10**6]]))
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with short_rows(attention_configs(model.modules())):
        assert model.config._attn_implementation == "eager"
    assert attention_configs(nn.Sequential(nn.Linear(2, 2)).modules()) == []
