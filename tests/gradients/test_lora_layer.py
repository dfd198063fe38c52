"""LoRA layers in one step: the same numbers as peft's own forward, and only where that is all that
a layer does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gradsift.gradients import capture
from gradsift.gradients.lora_layer import low_rank_layers
from gradsift.gradients.passes import extract
from gradsift.gradients.projection import Projection
from gradsift.model.layers import tracked_modules
from tests import tolerances as tol
from tests.gradients.one_by_one import build, collect, make_rows

WHOLE = Projection(None, kind="identity")


def layers(model: nn.Module) -> int:
    return len(low_rank_layers(model, tracked_modules(model)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_pefts_own_forward(
    family: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build(family, lora=True)
    if checkpointed:
        model.gradient_checkpointing_enable()
    rows = make_rows()
    assert layers(model) > 0
    fused = collect(extract(model, rows, projection=WHOLE, token_budget=100), len(rows))
    monkeypatch.setattr(capture, "low_rank_layers", lambda model, tracked: [])
    plain = collect(extract(model, rows, projection=WHOLE, token_budget=100), len(rows))
    torch.testing.assert_close(
        fused.rows, plain.rows, rtol=tol.GRADIENT_RTOL, atol=tol.GRADIENT_ATOL
    )
    torch.testing.assert_close(fused.norms, plain.norms, rtol=tol.NORM_RTOL, atol=0)
    torch.testing.assert_close(fused.losses, plain.losses, rtol=tol.LOSS_RTOL, atol=0)


def test_a_hook_of_somebody_else_is_called() -> None:
    model, rows, seen = build("llama", lora=True), make_rows(3), []
    tracked = tracked_modules(model)
    handle = next(iter(tracked.values())).register_forward_hook(
        lambda module, args, out: seen.append(out.shape)
    )
    watched = collect(extract(model, rows, projection=WHOLE), len(rows))
    handle.remove()
    assert seen
    alone = collect(extract(model, rows, projection=WHOLE), len(rows))
    torch.testing.assert_close(
        watched.rows, alone.rows, rtol=tol.GRADIENT_RTOL, atol=tol.GRADIENT_ATOL
    )


@pytest.mark.parametrize(
    "options", [{"lora_bias": True}, {"fan_in_fan_out": True, "target_modules": ["c_attn"]}]
)
def test_layers_that_do_more_keep_their_forward(options: dict[str, Any]) -> None:
    model = build("gpt2" if "fan_in_fan_out" in options else "qwen2", lora=False)
    model = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], **options}))
    tracked = tracked_modules(model)
    assert tracked and low_rank_layers(model, tracked) == []


def test_adapters_that_are_off_merged_or_several_keep_their_forward() -> None:
    model: Any = build("llama", lora=True)
    whole = layers(model)
    assert whole == 3 * 4
    model.base_model.disable_adapter_layers()
    tracked = {
        n: m for n, m in model.named_modules() if n.endswith((".lora_A.default", ".lora_B.default"))
    }
    assert low_rank_layers(model, tracked) == []
    model.base_model.enable_adapter_layers()
    assert len(low_rank_layers(model, {n: m for n, m in tracked.items() if "lora_A" in n})) == 0
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    assert layers(model) == whole - 3
    model.base_model.set_adapter("default")
    model.merge_adapter()
    assert low_rank_layers(model, tracked) == []
