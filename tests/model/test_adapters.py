"""Adapters beside the plain ones: over the embedding or the head, with starts that edit the base,
and layers that peft refuses.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AfmoeConfig, AfmoeForCausalLM, MambaConfig, MambaForCausalLM

from gradsift.config import LoraSettings, WarmupSettings
from gradsift.errors import ConfigError, MismatchError
from gradsift.model.checkpoints import load_checkpoints, read_moments
from gradsift.model.layers import tracked_modules
from gradsift.model.lora import attach_lora, load_adapter, remove_lora
from gradsift.model.warmup import warm_up
from tests.model.small_models import VOCAB, llama, token_rows

# peft speaks of what it does with embeddings; what comes of it is asserted here
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
IDS = torch.arange(12)[None]
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}
STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "olora"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(folder: Path, seed: int = 0, *, tied: bool = False, **config: Any) -> Tensor:
    """Writes an adapter whose weights are not those it began with; returns its logits."""
    model = get_peft_model(
        llama(tie_word_embeddings=tied), LoraConfig(r=2, task_type="CAUSAL_LM", **config)
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(str(folder))
    return logits(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [*EMBEDDINGS, *STARTS])
def test_adapters_follow_each_other_on_one_base(kind: str, tied: bool, tmp_path: Path) -> None:
    config = {**EMBEDDINGS, **STARTS}[kind]
    first = trained(tmp_path / "a", 1, tied=tied, **config)
    second = trained(tmp_path / "b", 2, tied=tied, target_modules=["q_proj", "up_proj"])
    base = llama(tie_word_embeddings=tied)
    bare = logits(base)
    model = load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    model = load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    # a plain adapter afterwards is on the base that it was trained on
    model = load_adapter(model, tmp_path / "b")
    torch.testing.assert_close(logits(model), second, rtol=0, atol=0)
    assert tracked_modules(model)
    torch.testing.assert_close(logits(remove_lora(model)), bare, rtol=0, atol=0)


def test_an_embedding_that_is_not_the_bases_own_is_used_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, **EMBEDDINGS["embedding"])
    base = llama()
    bare = logits(base)
    with caplog.at_level(logging.WARNING, "gradsift"):
        load_adapter(llama(), tmp_path)
    assert not caplog.records
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    [name] = [n for n in weights if n.endswith("embed_tokens.base_layer.weight")]
    weights[name] += 1
    save_file(weights, file, {"format": "pt"})
    model = load_adapter(base, tmp_path)
    assert "brings its own" in caplog.text and "embed_tokens" in caplog.text
    official = PeftModel.from_pretrained(llama(), str(tmp_path))
    torch.testing.assert_close(logits(model), logits(official), rtol=0, atol=0)
    torch.testing.assert_close(logits(remove_lora(model)), bare, rtol=0, atol=0)
    weights[name] = weights[name][:-1].clone()
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(MismatchError, match=r"1 other shape: .*embed_tokens"):
        load_adapter(llama(), tmp_path)


def test_moments_of_an_adapter_over_the_head_are_named(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM", **EMBEDDINGS["head"]))
    rows = [{k: torch.tensor(v[:5]) for k, v in row.items()} for row in token_rows(12)]
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=10,
        save_steps=10,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    [checkpoint] = load_checkpoints(tmp_path / "out")
    moments = read_moments(checkpoint, base=llama())
    assert sorted(moments) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert any("lm_head" in name for name in moments)


def mamba() -> Any:
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    ).eval()


def afmoe() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "head_dim": 4,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
    return AfmoeForCausalLM(
        AfmoeConfig(vocab_size=VOCAB, num_hidden_layers=2, num_dense_layers=1, **sizes, **heads)
    ).eval()


@pytest.mark.parametrize(
    ("make", "targets"), [(mamba, "all-linear"), (mamba, "attention"), (afmoe, "attention")]
)
def test_targets_that_peft_refuses_are_one_line_whose_remedy_works(
    make: Any, targets: Any, tmp_path: Path
) -> None:
    model = make()
    names = [name for name, _ in model.named_modules()]
    settings = WarmupSettings(min_rows=4, min_steps=30, lora=LoraSettings(targets=targets))
    # what the clean-up after it finds must not hide the reason
    with pytest.raises(ConfigError, match="peft refuses the LoRA targets") as refused:
        warm_up(model, token_rows(8), settings, tmp_path, pad_id=0)
    assert [name for name, _ in model.named_modules()] == names
    said = str(refused.value)
    assert "\n" not in said and "[warmup.lora] targets = [" in said
    named = json.loads(said[said.index("targets = [") + len("targets = ") : said.rindex("]") + 1])
    assert tracked_modules(attach_lora(model, LoraSettings(r=2, targets=tuple(named))))
