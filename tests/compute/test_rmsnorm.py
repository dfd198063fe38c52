"""RMSNorm in few passes against the layers that it stands for, and which those are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from gradsift.compute.cpu import rmsnorm
from gradsift.compute.cpu.rmsnorm import in_few_passes, rms_norms


def seeded(norm: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    nn.init.uniform_(norm.weight, -1, 1)  # type: ignore[arg-type]
    return norm.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaRMSNorm(24),
        lambda: Qwen3RMSNorm(24, eps=1e-2),
        lambda: nn.RMSNorm(24, eps=1e-6),
    ],
)
def test_outputs_and_gradients_are_the_layers_own(
    make: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rmsnorm, "CHUNK", 24 * 4)  # chunks of four rows, the last of two
    norm = seeded(make(), dtype)
    assert rms_norms([norm]) == [norm]
    x, grad = torch.randn(2, 3, 5, 24).to(dtype).transpose(1, 2), torch.randn(2, 5, 3, 24).to(dtype)
    x.requires_grad_()
    out, expected = in_few_passes(norm, norm.forward)(x), norm(x)
    rounding: dict[str, Any] = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    )
    torch.testing.assert_close(out, expected, **rounding)
    for mine, theirs in zip(
        torch.autograd.grad(out, x, grad), torch.autograd.grad(expected, x, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **rounding)


class OddRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states).tanh()


def test_a_layer_that_computes_something_else_keeps_its_forward() -> None:
    # gemma: 1 + w
    others = [seeded(m) for m in (Gemma2RMSNorm(24), OddRMSNorm(24), nn.LayerNorm(24, bias=False))]
    assert rms_norms(others) == []


def test_what_is_not_plain_goes_to_the_layers_own_forward() -> None:
    norm = seeded(LlamaRMSNorm(24))
    x = torch.randn(3, 24).double()
    assert torch.equal(in_few_passes(norm, norm.forward)(x), norm(x))
