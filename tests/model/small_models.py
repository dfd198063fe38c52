"""Real small parts for the tests of models, warm-ups and checkpoints: random models of several
families, a byte tokenizer, token rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 258


def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(**{**shape, "vocab_size": VOCAB, "pad_token_id": 256, **changes})
    ).eval()


def gpt2(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(
        GPT2Config(**shape, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
    ).eval()


def mixtral(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4, vocab_size=VOCAB)).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<pad>", "<eos>"])}, merges=[])
    )
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """The model and the tokenizer in a folder."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def token_rows(count: int, seed: int = 0, longest: int = 24) -> list[dict[str, list[int]]]:
    """Random rows of 5 to `longest` tokens, the first two not supervised."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(
            0, 256, (int(torch.randint(5, longest + 1, (1,), generator=draw)),), generator=draw
        ).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows
