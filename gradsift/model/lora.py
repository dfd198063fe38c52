"""LoRA adapters: attach, remove, load, save."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gradsift.config import LoraSettings
from gradsift.errors import ConfigError, IntegrityError, MismatchError, UserError
from gradsift.model.layers import block_linears, lora_targets, some
from gradsift.store.tensors import read_tensors

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def attach_lora(model: PreTrainedModel, settings: LoraSettings | None = None) -> PeftModel:
    """`model` with fresh LoRA layers (in place, as peft does; `remove_lora` undoes it), in its
    present mode, only LoRA trainable.

    targets: "attention" (the linear layers inside attention modules: q, k, v, o or the family's
    fused ones), "all-linear" (every linear layer but the output head), or names as peft takes them.

    The initial weights depend on `settings.seed` and the model's shape alone; the caller's random
    state is left as it was. LoRA weights are float32 also on a half-precision base. Raises
    ConfigError when no layer fits `targets`, MismatchError when there is LoRA already.
    """
    settings = settings or LoraSettings()
    _require_bare(model)
    targets = (
        lora_targets(model, settings.targets)
        if isinstance(settings.targets, str)
        else list(settings.targets)
    )
    chosen = [
        m for n, m in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets)
    ]
    if not chosen:
        raise ConfigError(
            f"no layer of {type(model).__name__} is named {' or '.join(map(repr, targets))}",
            remedy=(
                f"Layers: {some(sorted({n.rpartition('.')[2] for n in block_linears(model)}), 12)}."
            ),
        )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
        fan_in_fan_out=all(isinstance(m, Conv1D) for m in chosen),
    )
    return _inject(model, config, settings.seed)


def _inject(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    training = model.training
    # peft puts the model's own name here, and would warn of a base that has moved
    config.base_model_name_or_path = None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        peft = get_peft_model(model, config)
    return cast(PeftModel, peft.train(training))


def _require_bare(model: nn.Module) -> None:
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise MismatchError(
            "the model has adapter layers already",
            remedy="Take them off with remove_lora, or load the base model again.",
        )


def remove_lora(model: PeftModel) -> PreTrainedModel:
    """The base model without the LoRA layers, its own layers the same objects as before. All its
    parameters are left frozen.
    """
    return cast(PreTrainedModel, cast(Any, model).unload())


def adapter_json(path: Path) -> dict[str, Any]:
    if not (path / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"no {ADAPTER_CONFIG} in this folder", where=path, remedy="Give a peft adapter folder."
        )
    try:
        return dict(json.loads((path / ADAPTER_CONFIG).read_bytes()))
    except (ValueError, TypeError) as error:
        raise IntegrityError(
            f"not a JSON object ({error})",
            where=path / ADAPTER_CONFIG,
            remedy="Copy the adapter again.",
        ) from error


def adapter_file(path: Path) -> Path:
    if not (path / ADAPTER_WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            remedy = (
                "Load it where you trust it and save it again: save_pretrained writes safetensors."
            )
            raise UserError("the adapter is pickled (adapter_model.bin)", where=path, remedy=remedy)
        raise UserError(
            f"no {ADAPTER_WEIGHTS} in this folder",
            where=path,
            remedy="Give a complete peft adapter folder.",
        )
    return path / ADAPTER_WEIGHTS


def read_adapter_config(path: str | Path) -> LoraConfig:
    """The LoRA settings of an adapter folder. Raises MismatchError for an adapter of another
    kind.
    """
    path = Path(path)
    kind = adapter_json(path).get("peft_type")
    if kind != "LORA":
        raise MismatchError(
            f"the adapter is of kind {kind!r}, not LORA", where=path, remedy="Train a LoRA adapter."
        )
    config = cast(LoraConfig, LoraConfig.from_pretrained(str(path)))
    config.inference_mode = False  # else peft freezes the very weights whose gradients are wanted
    return config


def load_adapter(base: PreTrainedModel | PeftModel, path: str | Path) -> PeftModel:
    """`base` with the LoRA adapter of a peft folder, in eval mode, LoRA trainable and float32. A
    PeftModel loses its present adapter first.

    Strict: raises MismatchError that names missing keys, unexpected keys and other shapes, after
    which `base` is bare again; UserError for a folder without a safetensors adapter.
    """
    path = Path(path)
    config = read_adapter_config(path)
    weights = _adapter_weights(adapter_file(path))
    model = remove_lora(base) if isinstance(base, PeftModel) else base
    _require_bare(model)
    try:
        peft = _inject(model, config, seed=0)
    except ValueError as error:  # peft finds none of the target modules
        what = f"the adapter does not fit {type(model).__name__} ({error})"
        raise MismatchError(
            what, where=path, remedy="Give the adapter's own base model."
        ) from error
    try:
        _check_keys(weights, adapter_state(peft), path)
    except MismatchError:
        remove_lora(peft)
        raise
    set_peft_model_state_dict(peft, weights)
    return cast(PeftModel, peft.eval())


def _adapter_weights(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            checked = "xxh3" in (opened.metadata() or {})
        return read_tensors(file) if checked else load_file(file)
    except SafetensorError as error:
        raise IntegrityError(
            f"cannot be read ({error})", where=file, remedy="Copy the adapter again."
        ) from error


def adapter_state(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's weights under the names of peft's files (without the adapter's name)."""
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def _check_keys(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    kinds = {
        "missing keys": sorted(expected.keys() - found.keys()),
        "unexpected keys": sorted(found.keys() - expected.keys()),
        "other shapes": sorted(
            k for k in expected.keys() & found.keys() if found[k].shape != expected[k].shape
        ),
    }
    faults = "; ".join(
        f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names
    )
    if faults:
        raise MismatchError(
            f"the adapter does not fit this model ({faults})",
            where=path,
            remedy="Give the adapter's own base model.",
        )
