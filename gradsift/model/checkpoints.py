"""Checkpoints of a LoRA run on disk: the adapter, Adam's moments by parameter name, and the
learning rates.

A checkpoint folder written here holds `adapter_model.safetensors` and `adapter_config.json` (peft's
own format), `moments.safetensors` ("m.<name>" and "v.<name>", float32) and, written last,
`checkpoint.json`: a folder without it is not a checkpoint. Nothing is pickled. Folders that a
transformers Trainer wrote are read too, see `trainer_output`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from gradsift.errors import ConfigError, DataError, IntegrityError, MismatchError, UserError
from gradsift.model import trainer_output
from gradsift.model.layers import some
from gradsift.model.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_state
from gradsift.store.atomic import make_folder, read_json, write_atomic
from gradsift.store.canonical import canonical_json
from gradsift.store.tensors import read_tensors, write_tensors
from gradsift.types import Checkpoint, counted

STATE, MOMENTS = "checkpoint.json", "moments.safetensors"
LEAST_STEPS = 10
_SCHEMA = 1


@dataclass(frozen=True)
class AdamState:
    """Adam's state for every trainable parameter, by parameter name ("....weight"). `step`: updates
    that the moments have seen.
    """

    m: dict[str, Tensor]
    v: dict[str, Tensor]
    step: int
    betas: tuple[float, float]
    eps: float


# ---- write ----


def optimizer_state(model: nn.Module, optimizer: Any) -> tuple[AdamState, dict[str, Any]]:
    """Adam's moments of `model`'s trainable parameters, matched by identity of the parameter, never
    by position; and the group's settings.

    `optimizer` may be wrapped (accelerate). Names are those that `load_adapter` gives: no wrapper
    prefixes, adapter "default". A parameter that no gradient has reached yet has zero moments, as
    Adam would start it. Raises MismatchError for an optimizer without Adam's moments in full
    precision per parameter (8-bit, sharded, another rule), for a parameter it does not know, and
    for another shape.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    adapter = _active_adapter(model)
    names = {
        id(p): _canonical_name(n, adapter) for n, p in model.named_parameters() if p.requires_grad
    }
    managed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = sorted(n for i, n in names.items() if i not in managed)
    if left_out:
        raise MismatchError(
            f"the optimizer does not hold {counted(len(left_out), 'trainable parameter')}:"
            f" {some(left_out)}",
            remedy=_REMEDY,
        )
    m, v, steps = {}, {}, [0]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise MismatchError(
                    f"the optimizer holds a parameter {list(parameter.shape)} of another model",
                    remedy=_REMEDY,
                )
            name, state = names[id(parameter)], optimizer.state.get(parameter, {})
            m[name], v[name] = trainer_output.moments_of(name, state, tuple(parameter.shape))
            steps.append(int(state.get("step", 0)))
    first = optimizer.param_groups[0]
    settings = {"weight_decay": float(first["weight_decay"]), "optimizer": type(optimizer).__name__}
    return AdamState(m, v, max(steps), _pair(first["betas"]), float(first["eps"])), settings


def _pair(betas: Sequence[float]) -> tuple[float, float]:
    return float(betas[0]), float(betas[1])


_REMEDY = (
    "Train with plain AdamW (optim='adamw_torch') and without sharding, or take plain gradients (-o"
    " transform=none)."
)


def _active_adapter(model: nn.Module) -> str:
    inner = unwrapped(model)
    active = inner.active_adapter
    return active if isinstance(active, str) else active[0]


def unwrapped(model: nn.Module) -> PeftModel:
    """The PeftModel inside torch.compile's and DistributedDataParallel's wrappers. Raises
    MismatchError when there is none.
    """
    while not isinstance(model, PeftModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise MismatchError(
                f"{type(model).__name__} has no LoRA adapter",
                remedy="Train a LoRA adapter (peft_config=..., or get_peft_model).",
            )
        model = inner
    return model


def _canonical_name(name: str, adapter: str) -> str:
    name = re.sub(r"^(?:module\.)+", "", name.replace("_orig_mod.", ""))
    return re.sub(
        rf"(\.(?:lora_[A-Za-z_]+|modules_to_save))\.{re.escape(adapter)}(?=\.|$)",
        r"\1.default",
        name,
    )


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Any,
    *,
    step: int,
    rates: list[float],
    note: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Writes one checkpoint folder; `rates` are the learning rates of the steps since the previous
    checkpoint, the last one this step's.

    Raises DataError when weights or moments are not finite; ResourceError or DiskFull from the
    disk; as `optimizer_state` otherwise.
    """
    state, settings = optimizer_state(model, optimizer)
    peft = unwrapped(model)
    adapter = _active_adapter(model)
    weights = {n: t.detach() for n, t in adapter_state(peft, adapter).items()}
    tensors = {f"m.{n}": t for n, t in state.m.items()} | {f"v.{n}": t for n, t in state.v.items()}
    broken = sorted(n for n, t in (weights | tensors).items() if not bool(torch.isfinite(t).all()))
    if broken:
        remedy = "Lower the learning rate, or look for rows with an extreme loss."
        raise DataError(
            f"training diverged by step {step}:"
            f" {counted(len(broken), 'tensor is', 'tensors are')} not finite"
            f" ({some(broken)})",
            where=folder,
            remedy=remedy,
        )
    make_folder(folder)
    (folder / STATE).unlink(missing_ok=True)
    # Moments first: moments without a state mark a half-written folder, an adapter alone could be
    # anyone's.
    files = {
        MOMENTS: write_tensors(folder / MOMENTS, tensors, {"format": "pt", "step": str(step)}),
        ADAPTER_WEIGHTS: write_tensors(folder / ADAPTER_WEIGHTS, weights, {"format": "pt"}),
    }
    write_atomic(folder / ADAPTER_CONFIG, canonical_json(_adapter_config(peft, adapter)))
    checkpoint = Checkpoint(folder, step, rates[-1], sum(rates) / len(rates))
    record = {
        "schema": _SCHEMA,
        "step": step,
        "lr": checkpoint.lr,
        "mean_lr": checkpoint.mean_lr,
        "rates": rates,
        "betas": list(state.betas),
        "eps": state.eps,
        "optimizer_steps": state.step,
        "files": files,
        **settings,
        **(note or {}),
    }
    write_atomic(folder / STATE, canonical_json(record))
    return checkpoint


def _adapter_config(model: PeftModel, adapter: str) -> dict[str, Any]:
    """peft's record of the adapter with sets in order, and without a folder name, which means
    nothing on another machine.
    """
    config = {
        k: sorted(v) if isinstance(v, set) else v
        for k, v in model.peft_config[adapter].to_dict().items()
    }
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).exists():
        config["base_model_name_or_path"] = None
    return config | {"inference_mode": True}


# ---- read ----


def load_checkpoints(folder: str | Path) -> list[Checkpoint]:
    """The checkpoints of a LoRA run in step order: a warm-up's, a TrajectoryCallback's, a Trainer's
    output folder, or one adapter folder.

    Half-written checkpoints of ours (no checkpoint.json) are passed over. Raises UserError when
    there is none, MismatchError for full-model and sharded checkpoints, IntegrityError for damaged
    records.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            "no such folder",
            where=folder,
            remedy="Give the folder of a warm-up, or a Trainer's output_dir.",
        )
    found = sorted(
        (int(p.name[11:]), p)
        for p in folder.glob("checkpoint-*")
        if p.is_dir() and p.name[11:].isdigit()
    )
    children = [
        path
        for path in [p for _, p in found] or [folder]
        if (path / STATE).is_file() or not (path / MOMENTS).exists()
    ]
    if not children:
        raise UserError(
            "only half-written checkpoints", where=folder, remedy="Run the training again."
        )
    ours = [path for path in children if (path / STATE).is_file()]
    if ours:
        return [_read_state(path) for path in ours]
    return trainer_output.checkpoints(children, where=folder)


def _read_state(folder: Path) -> Checkpoint:
    record = _record(folder)
    try:
        return Checkpoint(
            folder, int(record["step"]), float(record["lr"]), float(record["mean_lr"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"lacks a field ({error})", where=folder / STATE, remedy="Run the warm-up again."
        ) from error


def _record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / STATE)
    if record is None:
        raise IntegrityError(
            "is not a JSON object", where=folder / STATE, remedy="Run the warm-up again."
        )
    if record.get("schema") != _SCHEMA:
        what = f"has schema {record.get('schema')!r}; this gradsift reads {_SCHEMA}"
        raise MismatchError(what, where=folder / STATE, remedy="Upgrade gradsift.")
    return record


def read_adam_state(
    checkpoint: Checkpoint, *, base: nn.Module | None = None, force: bool = False
) -> AdamState:
    """Adam's state at a checkpoint, every moment by parameter name, float32.

    base: the base model, needed only for a Trainer's `optimizer.pt` whose adapter does not say
    where its base model is: that file has moments by position, and the positions follow from the
    model. Raises MismatchError where there is no usable optimizer state, or when the moments have
    seen fewer than 10 updates (`force` accepts that; so did a warm-up that was forced);
    IntegrityError for damaged files.
    """
    folder = checkpoint.path
    if (folder / STATE).is_file():
        record = _record(folder)
        tensors = read_tensors(folder / MOMENTS)
        m = {n[2:]: t for n, t in tensors.items() if n.startswith("m.")}
        v = {n[2:]: t for n, t in tensors.items() if n.startswith("v.")}
        if m.keys() != v.keys():
            raise IntegrityError(
                "first and second moments are not of the same parameters", where=folder / MOMENTS
            )
        state = AdamState(
            m, v, int(record["optimizer_steps"]), _pair(record["betas"]), float(record["eps"])
        )
        force = force or bool(record.get("forced"))
    else:
        m, v, step, betas, eps = trainer_output.read_optimizer(folder, base)
        state = AdamState(m, v, step, betas, eps)
    if state.step < LEAST_STEPS and not force:
        raise MismatchError(
            f"Adam's moments have seen {counted(state.step, 'update')}, and fewer than"
            f" {LEAST_STEPS} make them"
            " noise",
            where=folder,
            remedy="Warm up longer, take plain gradients (-o transform=none), or pass force.",
        )
    return state


def read_moments(
    checkpoint: Checkpoint, *, base: nn.Module | None = None, force: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """{parameter name: (first moment, second moment)}, as `read_adam_state`."""
    state = read_adam_state(checkpoint, base=base, force=force)
    return {name: (state.m[name], state.v[name]) for name in state.m}


def check_length(steps: int, checkpoints: int, force: bool) -> list[int]:
    """The steps of `checkpoints` equally spaced checkpoints, the last at the last step.

    Raises ConfigError for fewer steps than checkpoints, and (without `force`) when the first would
    see fewer than 10 updates.
    """
    if steps < checkpoints:
        raise ConfigError(
            f"{counted(steps, 'training step is', 'training steps are')} fewer than"
            f" {counted(checkpoints, 'checkpoint')}",
            remedy="Train longer, or set fewer checkpoints.",
        )
    at = [round(steps * k / checkpoints) for k in range(1, checkpoints + 1)]
    if at[0] < LEAST_STEPS and not force:
        raise ConfigError(
            f"the first of {checkpoints} checkpoints would be at step {at[0]}, and Adam's moments"
            f" are noise before step {LEAST_STEPS}",
            remedy=(
                f"Train {LEAST_STEPS * checkpoints} steps or more (min_steps), set fewer"
                " checkpoints, or force it for plain gradients."
            ),
        )
    return at
