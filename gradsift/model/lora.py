"""LoRA adapters: attach, remove, load, save."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
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
from gradsift.types import counted

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_log = logging.getLogger("gradsift")

# What an adapter put in place of weights of its base model, which `remove_lora` gives back: PiSSA,
# OLoRA, CorDA and LoftQ take from the base what they give to the adapter, and an adapter may bring
# the embedding that it was trained on.
_LEAVE_BASE = ("gaussian", "orthogonal", "eva", "mica")  # starts that leave the base as it is
_Own = list[tuple[nn.Parameter, Tensor]]
_OWN: weakref.WeakKeyDictionary[PeftModel, _Own] = weakref.WeakKeyDictionary()


def attach_lora(model: PreTrainedModel, settings: LoraSettings | None = None) -> PeftModel:
    """`model` with fresh LoRA layers (in place, as peft does; `remove_lora` undoes it), in its
    present mode, only LoRA trainable.

    targets: "attention" (the linear layers inside attention modules: q, k, v, o or the family's
    fused ones), "all-linear" (every linear layer but the output head), or names as peft takes them.

    The initial weights depend on `settings.seed` and the model's shape alone; the caller's random
    state is left as it was. LoRA weights are float32 also on a half-precision base. Raises
    ConfigError when no layer fits `targets` or peft refuses one of them, MismatchError when there
    is LoRA already; the model is bare then.
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
    try:
        return _inject(model, config, settings.seed)
    except _REFUSALS as error:
        raise ConfigError(
            f"peft refuses the LoRA targets {json.dumps(settings.targets)} of"
            f" {type(model).__name__} ({' '.join(str(error).split())[:300]})",
            remedy=(
                "Name other layers, as [warmup.lora] targets ="
                f" {json.dumps(_acceptable(model, targets, str(error)))} in --config does."
            ),
        ) from error


# What peft raises for layers that it does not take, or not by themselves.
_REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, KeyError)


def _acceptable(model: nn.Module, targets: Iterable[str], refusal: str) -> list[str]:
    """The targets that peft's refusal does not speak of, else such linear layers, by last name."""
    linears = {n.rpartition(".")[2] for n in block_linears(model)}
    for names in (targets, linears):
        found = sorted(n for n in names if n.rpartition(".")[2] not in refusal)
        if found:
            return found
    return sorted(linears)


def _inject(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    training = model.training
    before = _as_they_are(model, config)
    # peft puts the model's own name here, and would warn of a base that has moved
    config.base_model_name_or_path = None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            peft = cast(PeftModel, get_peft_model(model, config))
        except Exception:
            _put_back(before)
            _strip(model)
            raise
    _OWN[peft] = [(p, own) for p, own in before if p.data.data_ptr() != own.data_ptr()]
    return cast(PeftModel, peft.train(training))


def _as_they_are(model: PreTrainedModel, config: LoraConfig) -> _Own:
    """The parameters and their values; copies of those that the adapter's start edits in place."""
    edits = (
        isinstance(config.init_lora_weights, str) and config.init_lora_weights not in _LEAVE_BASE
    )
    edited = {
        id(p)
        for name, module in model.named_modules()
        if edits and check_target_module_exists(config, name)
        for p in module.parameters()
    }
    return [
        (p, p.data.to("cpu", copy=True) if id(p) in edited else p.data) for p in model.parameters()
    ]


def _put_back(own: _Own) -> None:
    for parameter, data in own:
        parameter.data = data.to(parameter.device)


def _strip(model: nn.Module) -> None:
    """Takes off the adapter layers that peft put on before it gave up."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            parent, _, leaf = name.rpartition(".")
            bare = (
                module.get_base_layer()
                if isinstance(module, BaseTunerLayer)
                else module.original_module
            )
            setattr(model.get_submodule(parent), leaf, bare)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _require_bare(model: nn.Module) -> None:
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise MismatchError(
            "the model has adapter layers already",
            remedy="Take them off with remove_lora, or load the base model again.",
        )


def remove_lora(model: PeftModel) -> PreTrainedModel:
    """The base model without the LoRA layers, its own layers the same objects with the same weights
    as before. All its parameters are left frozen.
    """
    kept = {
        name: wrapper.original_module
        for name, wrapper in cast(Any, model).get_base_model().named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
    }
    base = cast(PreTrainedModel, cast(Any, model).unload())
    for name, original in kept.items():  # peft leaves the adapter's copies there
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, original.requires_grad_(False))
    _put_back(_OWN.pop(model, []))
    return base


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

    The base embedding or head that peft keeps in the file of an adapter over them is loaded too,
    and told where it is not the base's own. Strict: raises MismatchError that names missing keys,
    unexpected keys and other shapes, after which `base` is bare again; UserError for a folder
    without a safetensors adapter.
    """
    path = Path(path)
    config = read_adapter_config(path)
    weights = _adapter_weights(adapter_file(path))
    model = remove_lora(base) if isinstance(base, PeftModel) else base
    _require_bare(model)
    try:
        peft = _inject(model, config, seed=0)
    except _REFUSALS as error:  # peft finds none of the target modules, or refuses one
        what = (
            f"the adapter does not fit {type(model).__name__}"
            f" ({' '.join(str(error).split())[:300]})"
        )
        raise MismatchError(
            what, where=path, remedy="Give the adapter's own base model."
        ) from error
    inside = base_weights(peft, weights)
    own = {name: weights.pop(name) for name in inside}
    try:
        _check_keys(
            weights | own,
            adapter_state(peft) | {n: p.data for n, p in inside.items()},
            path,
        )
    except MismatchError:
        remove_lora(peft)
        raise
    _take_over(peft, {name: (inside[name], own[name]) for name in inside}, path)
    set_peft_model_state_dict(peft, weights)
    return cast(PeftModel, peft.eval())


def base_weights(model: PeftModel, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of the base model among `names`, as peft's files call them: where an adapter
    is over the embedding or the head, or the vocabulary was resized, peft saves those of the base.
    """
    embeddings = [
        layer
        for find in ("get_input_embeddings", "get_output_embeddings")
        if isinstance(layer := getattr(model, find, lambda: None)(), nn.Module)
    ]
    bare = {id(p) for layer in embeddings for p in layer.parameters()}
    known = {
        name: p
        for name, p in model.named_parameters(remove_duplicate=False)
        if id(p) in bare and "lora_" not in name and "modules_to_save" not in name
    }
    wanted = set(names) - adapter_state(model).keys()
    return {name: p for name, p in known.items() if name in wanted}


def _take_over(
    model: PeftModel, brought: Mapping[str, tuple[nn.Parameter, Tensor]], path: Path
) -> None:
    """Puts the adapter's own embedding in place of the base's where it is another one."""
    for name, (parameter, tensor) in brought.items():
        own = tensor.to(parameter.device, parameter.dtype)
        if torch.equal(own, parameter.data):
            continue
        _log.warning(
            "%s: the adapter brings its own %s, which is not the base model's; it is used",
            path,
            name,
        )
        _OWN[model].append((parameter, parameter.data))
        parameter.data = own


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
        "missing key": sorted(expected.keys() - found.keys()),
        "unexpected key": sorted(found.keys() - expected.keys()),
        "other shape": sorted(
            k for k in expected.keys() & found.keys() if found[k].shape != expected[k].shape
        ),
    }
    faults = "; ".join(
        f"{counted(len(names), kind)}: {some(names)}" for kind, names in kinds.items() if names
    )
    if faults:
        raise MismatchError(
            f"the adapter does not fit this model ({faults})",
            where=path,
            remedy="Give the adapter's own base model.",
        )
