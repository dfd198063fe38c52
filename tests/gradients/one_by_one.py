"""Tiny random models of each family, real rows of ids, and the naive twin of the engine: one
example at a time through autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gradsift.gradients.passes import GradientBatch

VOCAB = 101
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}

Row = dict[str, list[int]]


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_GROUPED))


def qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**_GROUPED))  # biases on q, k, v


def qwen3() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**_GROUPED, tie_word_embeddings=True))  # norms on q and k


def gemma2() -> nn.Module:
    softcaps = {
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
    }
    # tied embeddings
    return Gemma2ForCausalLM(Gemma2Config(**_GROUPED, **softcaps, attn_implementation="eager"))


def gemma3() -> nn.Module:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**_GROUPED, query_pre_attn_scalar=8, sliding_window=6)
    )


def mistral() -> nn.Module:
    return MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=6))


def olmo() -> nn.Module:
    grouped = {name: value for name, value in _GROUPED.items() if name != "head_dim"}
    # changes the outputs of q, k and v in place
    return OlmoForCausalLM(OlmoConfig(**grouped, clip_qkv=0.1))


def falcon() -> nn.Module:
    shape = {name: value for name, value in _SHAPE.items() if name != "intermediate_size"}
    # adds to its MLP's output in place
    return FalconForCausalLM(FalconConfig(**shape, ffn_hidden_size=48, alibi=False, bias=True))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def neox() -> nn.Module:
    # attention and feed-forward side by side
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE, max_position_embeddings=64))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2))


def qwen2_moe() -> nn.Module:
    grouped = {name: value for name, value in _GROUPED.items() if name != "head_dim"}
    sizes = {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    # a shared expert, and a gate on it, besides those that are routed to
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**grouped, **sizes))


# latent attention: keys and values are one low-rank head, which some layers see as [b, 1, t, r]
_LATENT = {
    **_SHAPE,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 64,
}


def deepseek_v2() -> nn.Module:
    return DeepseekV2ForCausalLM(DeepseekV2Config(**_LATENT))


def deepseek_v3() -> nn.Module:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**_LATENT))


def stretched(kind: str) -> nn.Module:
    """Rotary factors that are others in a batch with a row of over 12 tokens: Phi-3's, or a
    Llama's.
    """
    grouped = {
        name: value
        for name, value in _GROUPED.items()
        if name not in ("head_dim", "max_position_embeddings")
    }
    if kind == "dynamic":
        return LlamaForCausalLM(
            LlamaConfig(
                **grouped,
                rope_scaling={"rope_type": "dynamic", "factor": 4.0},
                max_position_embeddings=12,
            )
        )
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 4.0, 6.0, 8.0],
    }
    sizes = {
        "original_max_position_embeddings": 12,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 0,
    }
    return Phi3ForCausalLM(Phi3Config(**grouped, **sizes, rope_scaling=scaling))


_LATENT_LAYERS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Sequence[str]]] = {
    "llama": (llama, ("q_proj", "v_proj", "o_proj", "down_proj")),
    "qwen2": (qwen2, ("q_proj", "k_proj", "gate_proj")),
    "qwen3": (qwen3, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "gemma2": (gemma2, ("q_proj", "v_proj", "up_proj")),
    "gemma3": (gemma3, ("q_proj", "o_proj")),
    "mistral": (mistral, ("k_proj", "v_proj")),
    "olmo": (olmo, ("q_proj", "k_proj", "v_proj")),
    "falcon": (falcon, ("query_key_value", "dense_4h_to_h")),
    "gpt2": (gpt2, ("c_attn", "c_proj")),
    "neox": (neox, ("query_key_value", "dense_h_to_4h")),
    "mixtral": (mixtral, ("q_proj", "o_proj")),
    "qwen2-moe": (qwen2_moe, ("k_proj", "shared_expert.up_proj")),
    "deepseek-v2": (deepseek_v2, _LATENT_LAYERS),
    "deepseek-v3": (deepseek_v3, _LATENT_LAYERS),
}


def build(family: str, *, lora: bool) -> nn.Module:
    """A seeded model in evaluation mode; with lora=True its adapter has non-zero B, so that A has a
    gradient.
    """
    make, targets = FAMILIES[family]
    torch.manual_seed(0)
    model = make()
    if lora:
        fan_in_fan_out = family == "gpt2"
        model = get_peft_model(
            model,
            LoraConfig(
                r=4, lora_alpha=8, target_modules=list(targets), fan_in_fan_out=fan_in_fan_out
            ),
        )
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    return model.eval()


def make_rows(n: int = 11, seed: int = 0, longest: int = 24) -> list[Row]:
    """Rows of 4..longest tokens; the prompt of each is masked, one also in the middle and at the
    end.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(n):
        length = int(rng.integers(4, longest + 1))
        ids = rng.integers(0, VOCAB, length).tolist()
        start = int(rng.integers(0, length - 1))
        labels = [-100] * start + ids[start:]
        if k % 4 == 1 and length - start > 5:
            labels[-1] = labels[start + 2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def one_by_one(
    model: nn.Module, rows: Iterable[Row], weights: Sequence[Tensor]
) -> tuple[list[list[Tensor]], Tensor]:
    """(gradients [row][parameter], losses [row]) by torch.autograd.grad of the model's own loss,
    batch 1, no padding.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p in model.parameters():
        p.requires_grad_(any(p is w for w in weights))
    grads, losses = [], []
    for row in rows:
        out: Any = model(
            input_ids=torch.tensor([row["input_ids"]]),
            labels=torch.tensor([row["labels"]]),
            use_cache=False,
        )
        grads.append(list(torch.autograd.grad(out.loss, list(weights))))
        losses.append(out.loss.detach())
    for p, flag in flags:
        p.requires_grad_(flag)
    return grads, torch.stack(losses).float()


def collect(batches: Iterable[GradientBatch], n: int) -> GradientBatch:
    """All batches as one, in the order of the rows; fails unless every row came exactly once."""
    parts = list(batches)
    indices = np.concatenate([p.indices for p in parts])
    assert sorted(indices) == list(range(n))
    order = torch.from_numpy(np.argsort(indices))
    joined = [
        torch.cat([getattr(p, field) for p in parts])[order]
        for field in ("rows", "norms", "losses", "tokens")
    ]
    failed = tuple(k for p in parts for k in p.failed)
    return GradientBatch(
        np.arange(n), *joined, halvings=max(p.halvings for p in parts), failed=failed
    )
