"""Loading models and adapters: what is refused, what is deterministic, and which layers are
read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from gradsift.config import LoraSettings
from gradsift.errors import (
    ConfigError,
    DataError,
    IntegrityError,
    MismatchError,
    UnknownName,
    UserError,
)
from gradsift.model.layers import coverage, tracked_modules
from gradsift.model.load import load_model, load_tokenizer, model_identity
from gradsift.model.lora import adapter_state, attach_lora, load_adapter, remove_lora
from tests.model.small_models import gpt2, llama, mixtral, saved, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = attach_lora(llama(), LoraSettings(r=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


# ---- loading ----


def test_a_folder_gives_the_model_that_was_saved(folder: Path) -> None:
    loaded = load_model(str(folder))
    assert not loaded.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), llama().state_dict().values(), strict=True)
    )
    assert (
        load_tokenizer(str(folder))("gradsift!")["input_ids"]
        == tokenizer()("gradsift!")["input_ids"]
    )


def test_bfloat16_and_unknown_dtype(folder: Path) -> None:
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UnknownName, match="float32"):
        load_model(str(folder), dtype="float23")


def test_a_built_in_name_is_made_on_first_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradsift.model.tiny.tiny_model", lambda: folder)
    assert load_model("tiny").num_parameters() == llama().num_parameters()
    assert model_identity("tiny") == model_identity(str(folder))


def test_pickled_weights_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(llama().state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*save_pretrained"):
        load_model(str(tmp_path / "m"))


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(str(tmp_path / "m"))


def test_damaged_weights_are_an_integrity_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    whole = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError):
        load_model(str(tmp_path / "m"))


def test_a_name_that_is_nowhere_says_what_to_do_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf download some-lab/some-model"):
        load_model("some-lab/some-model")
    with pytest.raises(UserError, match="no such model folder"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "aqlm"},
        {"quant_method": "hqq", "quant_config": {}},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ],
)
def test_quantised_weights_without_their_library_are_one_line(
    quantised: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantised})
    )
    with pytest.raises((ConfigError, DataError)) as refused:
        load_model(str(tmp_path / "q"))
    if isinstance(refused.value, DataError):
        pytest.skip("the library is installed here")
    said = str(refused.value)
    assert quantised["quant_method"] in said and "unquantised weights" in said and "\n" not in said


def test_a_library_that_is_not_installed_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a library that is not installed.*--attention"):
        load_model(str(folder), attention="flash_attention_2")


def test_what_is_wrong_with_a_folder_is_not_sent_to_the_hub(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError, match="cannot load what is in this folder") as refused:
        load_tokenizer(str(tmp_path / "m"))
    assert "hf " not in str(refused.value) and "tokenizer.save_pretrained" in str(refused.value)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "tomorrow's"}))
    with pytest.raises(UserError, match="upgrade transformers") as refused:
        load_model(str(tmp_path / "m"))
    assert "hf " not in str(refused.value)


def test_remote_code_needs_a_pinned_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", "v1"):
        with pytest.raises(ConfigError, match="--revision COMMIT"):
            load_model("some-lab/some-model", trust_remote_code=True, revision=revision)


def test_code_in_a_model_folder_does_not_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
    }
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="own code"):
        load_model(str(tmp_path / "m"))
    assert not (tmp_path / "ran").exists()


# ---- identity ----


def test_identity_is_of_bytes_not_of_places(folder: Path, tmp_path: Path, adapter: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("notes")
    assert model_identity(str(tmp_path / "elsewhere")) == model_identity(str(folder))
    with (tmp_path / "elsewhere" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert model_identity(str(tmp_path / "elsewhere")) != model_identity(str(folder))
    shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {
        "base_model_name_or_path": "/elsewhere",
        "peft_version": "0",
        "target_modules": config["target_modules"][::-1],
    }
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    assert model_identity(str(tmp_path / "other")) == model_identity(str(adapter))
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    assert model_identity(str(tmp_path / "other")) != model_identity(str(adapter))


# ---- LoRA ----


def adapted(model: nn.Module) -> set[str]:
    return {
        n.split(".lora_A")[0].removeprefix("base_model.model.")
        for n in tracked_modules(model)
        if "lora_A" in n
    }


def test_attention_targets_of_each_family() -> None:
    for make, leaves in (
        (llama, "self_attn.{q,k,v,o}_proj"),
        (gpt2, "attn.c_attn attn.c_proj"),
        (mixtral, "self_attn.{q,k,v,o}_proj"),
    ):
        names = (
            [leaves.replace("{q,k,v,o}", x) for x in "qkvo"] if "{" in leaves else leaves.split()
        )
        stem = "transformer.h" if make is gpt2 else "model.layers"
        assert adapted(attach_lora(make())) == {
            f"{stem}.{i}.{leaf}" for i in range(2) for leaf in names
        }


def test_all_linear_and_named_targets() -> None:
    assert len(adapted(attach_lora(llama(), LoraSettings(targets="all-linear")))) == 14
    assert adapted(attach_lora(llama(), LoraSettings(targets=("up_proj",)))) == {
        f"model.layers.{i}.mlp.up_proj" for i in range(2)
    }
    model = llama()
    with pytest.raises(ConfigError, match="nothing_proj"):
        attach_lora(model, LoraSettings(targets=("nothing_proj",)))
    assert attach_lora(model)  # the refusal left the model bare


def test_lora_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int, process_seed: int) -> dict[str, torch.Tensor]:
        base = llama()
        torch.manual_seed(process_seed)
        before = torch.get_rng_state()
        model = attach_lora(base, LoraSettings(seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        return adapter_state(model)

    first, second, other = weights(3, 7), weights(3, 99), weights(4, 7)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if "lora_A" in n)


def test_lora_on_a_half_precision_base_is_float32() -> None:
    model = attach_lora(llama().to(torch.bfloat16))
    assert {m.weight.dtype for m in tracked_modules(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_taking_lora_off_gives_the_base_back() -> None:
    base = llama()
    layers = dict(base.named_modules())
    bare = remove_lora(attach_lora(base))
    assert bare is base
    assert {n: id(m) for n, m in bare.named_modules()} == {n: id(m) for n, m in layers.items()}
    with pytest.raises(MismatchError, match="adapter layers already"):
        attach_lora(base) and attach_lora(base)


def test_an_adapter_loads_as_it_was_saved_and_replaces_the_last_one(adapter: Path) -> None:
    model = load_adapter(llama(), adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    again = load_adapter(model, adapter)
    for loaded in (model, again):
        assert not loaded.training
        state = adapter_state(again)
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[n], weights[n]) for n in weights)
    assert all(m.weight.requires_grad for m in tracked_modules(again).values())
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        f"{n}.weight" for n in tracked_modules(again)
    }


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_an_adapter_that_does_not_fit_is_refused_by_key(adapter: Path, fault: str) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    key = sorted(weights)[3]
    if fault == "missing":
        del weights[key]
    elif fault == "unexpected":
        weights[key := key.replace("layers.0", "layers.7")] = torch.zeros(1)
    else:
        weights[key] = torch.zeros(3, 3)
    save_file(weights, adapter / "adapter_model.safetensors")
    base = llama()
    with pytest.raises(MismatchError, match=fault) as caught:
        load_adapter(base, adapter)
    assert key in str(caught.value)
    assert attach_lora(base)


def test_other_adapters_are_refused(adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(MismatchError, match="IA3"):
        load_adapter(llama(), adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        load_adapter(llama(), adapter)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapter(llama(), tmp_path)


def test_an_adapter_of_another_base_is_refused(adapter: Path) -> None:
    with pytest.raises(MismatchError, match="does not fit"):
        load_adapter(llama(num_hidden_layers=3), adapter)
    with pytest.raises(MismatchError, match="does not fit GPT2LMHeadModel"):
        load_adapter(gpt2(), adapter)


# ---- tracked modules, coverage ----


def test_linear_layers_without_head_and_embedding() -> None:
    assert len(tracked_modules(llama(), "linear")) == 14
    assert "lm_head" not in tracked_modules(llama(), "linear")
    assert sorted({n.rpartition(".")[2] for n in tracked_modules(gpt2(), "linear")}) == [
        "c_attn",
        "c_fc",
        "c_proj",
    ]
    assert all(
        n.endswith("base_layer") or "mlp" in n
        for n in tracked_modules(attach_lora(llama()), "linear")
    )


def test_names_and_globs() -> None:
    mlp = [f"model.layers.1.mlp.{k}_proj" for k in ("gate", "up", "down")]
    assert list(tracked_modules(llama(), ["*.1.mlp.*", "lm_head"])) == [*mlp, "lm_head"]
    with pytest.raises(UnknownName, match="q_proj"):
        tracked_modules(llama(), ["model.layers.0.self_attn.q_prjo"])
    with pytest.raises(ConfigError, match="no trainable LoRA"):
        tracked_modules(llama())


def test_frozen_lora_is_not_tracked_and_dora_is_refused() -> None:
    model = attach_lora(llama())
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    assert all(".lora_B." in n for n in tracked_modules(model))
    dora: Any = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ConfigError, match="DoRA"):
        tracked_modules(dora)


def test_a_weight_that_something_else_uses_too_is_refused() -> None:
    """Of a head tied to the embedding only the head's part would be read: a wrong gradient that
    nothing tells from a right one.
    """
    tied: Any = llama(tie_word_embeddings=True)
    for modules in (["lm_head"], ["*"]):
        with pytest.raises(
            ConfigError, match=r"lm_head.*shares its weight with model.embed_tokens"
        ):
            tracked_modules(tied, modules)
    assert "lm_head" not in tracked_modules(tied, "linear")
    assert "lm_head" in tracked_modules(llama(), ["*"])


def test_what_peft_puts_around_the_head_is_the_head() -> None:
    wrapped: Any = get_peft_model(llama(), LoraConfig(target_modules=["lm_head", "q_proj"]))
    assert not [n for n in tracked_modules(wrapped, "linear") if "lm_head" in n]
    kept: Any = get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "o_proj"])
    )
    names = list(tracked_modules(kept, "linear"))
    assert not [n for n in names if "lm_head" in n or "original_module" in n]
    assert len([n for n in names if "o_proj" in n]) == 2


def test_an_adapter_that_cannot_be_read_says_why() -> None:
    merged: Any = attach_lora(llama())
    merged.merge_adapter()
    with pytest.raises(ConfigError, match="merged") as told:
        tracked_modules(merged)
    assert "unmerge_adapter" in str(told.value)
    merged.unmerge_adapter()
    assert tracked_modules(merged)
    frozen = attach_lora(llama()).requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen") as told:
        tracked_modules(frozen)
    assert "is_trainable=True" in str(told.value)


class PackedLinear(nn.Linear):
    """The shape of a 4-bit layer: an nn.Linear whose weight is a column of packed bytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(
            torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
        )


def test_lora_on_a_quantised_base_is_tracked_and_its_packed_weights_are_not() -> None:
    base = llama()
    for layer in base.model.layers:
        layer.mlp.up_proj = PackedLinear(layer.mlp.up_proj)
    model = attach_lora(base, LoraSettings(targets=("q_proj", "up_proj")))
    assert len(tracked_modules(model)) == 8
    assert coverage(model).quantised == 2
    with pytest.raises(ConfigError, match=r"quantised.*up_proj"):
        tracked_modules(model, "linear")


def test_coverage_counts_parameters() -> None:
    seen = coverage(attach_lora(llama(), LoraSettings(r=4)))
    # per layer: q and o 32 -> 32, k and v 32 -> 16, each r x in and out x r
    each = 2 * (4 * 32 + 32 * 4) + 2 * (4 * 32 + 16 * 4)
    assert (seen.modules, seen.tracked_parameters, seen.trainable_parameters, seen.share) == (
        16,
        2 * each,
        2 * each,
        1.0,
    )
    assert sum(row.modules for row in seen.rows) == 16
    assert seen.rows[0].kind == "q_proj.lora_A"
    assert seen.rows[0].shapes == ((4, 32),)
    linear = coverage(llama(), "linear")
    assert linear.trainable_parameters == llama().num_parameters()
    assert (
        linear.share
        == sum(p.numel() for n, p in llama().named_parameters() if "_proj" in n)
        / llama().num_parameters()
    )
    assert json.loads(json.dumps(seen.summary()))["rows"][0]["kind"] == "q_proj.lora_A"
    assert not seen.moe


def test_coverage_names_what_no_row_sees() -> None:
    model: Any = get_peft_model(
        llama(attention_bias=True), LoraConfig(target_modules=["q_proj"], r=4, bias="all")
    )
    seen = coverage(model)
    assert seen.share < 1
    assert any(n.endswith("q_proj.base_layer.bias") for n in seen.uncovered)


def test_fused_experts_are_named_as_not_covered() -> None:
    seen = coverage(attach_lora(mixtral()))
    assert seen.moe
    assert [n.rpartition(".")[2] for n in seen.uncovered] == ["gate_up_proj", "down_proj"] * 2
    assert all("experts" in n for n in (*seen.experts, *seen.uncovered))
    wrapped: Any = get_peft_model(
        mixtral(),
        LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], r=2),
    )
    assert all("q_proj" in n for n in tracked_modules(wrapped))
    assert coverage(wrapped).share < 1
