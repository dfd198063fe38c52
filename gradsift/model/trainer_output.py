"""Read the checkpoints that a plain transformers Trainer wrote: the adapter, `optimizer.pt`, and
the learning rates of its log.

`optimizer.pt` names its parameters by position. The positions follow from how Trainer builds its
two groups (decayed parameters, then the others, each in `named_parameters` order), so the names are
rebuilt on a copy of the model without weights and every shape is checked; what does not fit in
exactly one way is refused. torch.load runs with weights_only=True: a pickle that would run code is
not run.
"""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer

from gradsift.errors import IntegrityError, MismatchError, UserError
from gradsift.model.layers import some
from gradsift.model.load import locate
from gradsift.model.lora import (
    ADAPTER_WEIGHTS,
    adapter_state,
    base_weights,
    read_adapter_config,
)
from gradsift.store.atomic import read_json
from gradsift.types import Checkpoint

OPTIMIZER, SCHEDULER, TRAINER = "optimizer.pt", "scheduler.pt", "trainer_state.json"
WHOLE = "optimizer.bin"
PLAIN = (
    "Take plain gradients (-o transform=none), or train again with gradsift.TrajectoryCallback,"
    " which keeps the moments by name."
)
_log = logging.getLogger("gradsift")


def checkpoints(folders: Sequence[Path], *, where: Path) -> list[Checkpoint]:
    """One Checkpoint per adapter folder, with the learning rates of the run's log. `folders` in
    step order.

    Raises UserError when there is no adapter, MismatchError for full-model or sharded folders,
    IntegrityError for one that was cut short.
    """
    for folder in folders:
        _require_adapter(folder, where)
    states = [_trainer_state(folder) for folder in folders]
    steps = [int(s.get("global_step", 0)) if s else 0 for s in states]
    rates = _rates(folders, steps, states)
    return [
        Checkpoint(f, step, lr, mean)
        for f, step, (lr, mean) in zip(folders, steps, rates, strict=True)
    ]


def _require_adapter(folder: Path, where: Path) -> None:
    if (folder / ADAPTER_WEIGHTS).is_file():
        return
    sharded = _sharded(folder)
    if sharded:
        raise MismatchError(
            f"{sharded} is part of a sharded (DeepSpeed or FSDP) checkpoint",
            where=folder,
            remedy="Save the adapter whole.",
        )
    if any(folder.glob("model*.safetensors")):
        raise MismatchError(
            "a checkpoint of the whole model",
            where=folder,
            remedy="Train LoRA, or give it as --model.",
        )
    if (folder / "adapter_model.bin").is_file():
        raise UserError(
            "the adapter is pickled (adapter_model.bin)",
            where=folder,
            remedy="Save it again: save_pretrained writes safetensors.",
        )
    raise UserError(
        f"no {ADAPTER_WEIGHTS} in {folder.name}",
        where=where,
        remedy="Give a warm-up folder or a Trainer's output_dir with LoRA.",
    )


def _sharded(folder: Path) -> str | None:
    """The name of a file or folder that only DeepSpeed or FSDP writes."""
    for pattern in (
        "global_step*",
        "*_optim_states.pt",
        "zero_to_fp32.py",
        "pytorch_model_fsdp*",
        "optimizer_[0-9]*",
    ):
        for path in sorted(folder.glob(pattern)):
            return path.name
    return None


def _trainer_state(folder: Path) -> dict[str, Any] | None:
    state = read_json(folder / TRAINER)
    if state is None and (folder / OPTIMIZER).is_file():
        raise IntegrityError(
            f"has {OPTIMIZER} but no {TRAINER}: cut short while it was written",
            where=folder,
            remedy="Delete this checkpoint.",
        )
    return state


# ---- learning rates ----


def _rates(
    folders: Sequence[Path], steps: Sequence[int], states: Sequence[dict[str, Any] | None]
) -> list[tuple[float, float]]:
    """(learning rate, mean learning rate since the previous checkpoint) of each: from the log, else
    from the scheduler, else all 1.
    """
    logged: dict[int, float] = {}
    for state in states:
        for entry in (state or {}).get("log_history", []):
            if "learning_rate" in entry and math.isfinite(entry["learning_rate"]):
                logged[int(entry["step"])] = float(entry["learning_rate"])
    if logged and steps[0] > 0:
        at = sorted(logged)
        rate = [logged[s] for s in at]
        means = []
        for before, step in zip([0, *steps], steps, strict=False):
            own = np.interp(np.arange(before + 1, step + 1), at, rate)
            means.append((float(own[-1]), float(own.mean())))
        if any(mean > 0 for _, mean in means):
            return means
    scheduled = [_scheduled(folder) for folder in folders]
    if all(s is not None for s in scheduled):
        ends = [cast(tuple[float, float], s) for s in scheduled]
        starts = [ends[0][0], *(last for _, last in ends[:-1])]
        _log.warning(
            "%s: no learning rates in the log; means taken between the scheduler's values at the"
            " checkpoints",
            folders[0].parent,
        )
        return [(last, (start + last) / 2) for start, (_, last) in zip(starts, ends, strict=True)]
    if len(folders) > 1:
        _log.warning(
            "%s: no learning rates in the log or the scheduler; the checkpoints weigh the same",
            folders[0].parent,
        )
    return [(1.0, 1.0)] * len(folders)


def _scheduled(folder: Path) -> tuple[float, float] | None:
    """(initial, present) learning rate of scheduler.pt; None where there is none."""
    if not (folder / SCHEDULER).is_file():
        return None
    state = _load(folder / SCHEDULER)
    try:
        return float(state["base_lrs"][0]), float(state["_last_lr"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return None


# ---- optimizer state ----


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = (
            "holds more than tensors and numbers, and is not loaded"
            f" ({str(error).splitlines()[0][:120]})"
        )
        raise MismatchError(what, where=path, remedy=PLAIN) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise IntegrityError(
            f"cannot be read ({str(error).splitlines()[0][:120]})",
            where=path,
            remedy="Copy the checkpoint again.",
        ) from error


def moments_of(
    name: str, state: Mapping[str, Any], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """(first, second) moment of one parameter, float32; zeros when no gradient reached it. Raises
    MismatchError for another optimizer.
    """
    if not state:
        return torch.zeros(shape), torch.zeros(shape)
    if any(key in state for key in ("state1", "state2", "absmax1", "qmap1")):
        raise MismatchError(
            f"8-bit (bitsandbytes) optimizer state for {name}",
            remedy=f"Train with optim='adamw_torch'. {PLAIN}",
        )
    if "exp_avg" not in state or "exp_avg_sq" not in state:
        raise MismatchError(
            f"no Adam moments for {name} (found {', '.join(map(str, state)) or 'nothing'})",
            remedy=PLAIN,
        )
    m, v = state["exp_avg"], state["exp_avg_sq"]
    for moment in (m, v):
        if type(moment) not in (Tensor, nn.Parameter):
            raise MismatchError(
                f"the moments of {name} are {type(moment).__name__}: sharded or quantised",
                remedy=PLAIN,
            )
        if tuple(moment.shape) != shape:
            raise MismatchError(
                f"a moment of {name} has shape {list(moment.shape)}, the parameter {list(shape)}",
                remedy=PLAIN,
            )
    return m.detach().float().cpu(), v.detach().float().cpu()


def read_optimizer(
    folder: Path, base: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], int, tuple[float, float], float]:
    """(first moments, second moments, updates seen, betas, eps) of a Trainer's `optimizer.pt`, by
    parameter name.

    Raises MismatchError where there is none, where it is sharded or 8-bit, or where positions fit
    names in no way or in more than one.
    """
    path = folder / OPTIMIZER
    if not path.is_file():
        sharded = _sharded(folder)
        if sharded:
            what = f"the optimizer state is sharded ({sharded})"
        elif (folder / WHOLE).is_file():
            what = (
                f"the optimizer state is in {WHOLE}, as accelerate and FSDP write it, and not in a"
                f" Trainer's {OPTIMIZER}"
            )
        else:
            what = f"no {OPTIMIZER}: the adapter was saved without optimizer state"
        raise MismatchError(what, where=folder, remedy=PLAIN)
    saved = _load(path)
    try:
        groups, states = list(saved["param_groups"]), dict(saved["state"])
        order = [int(i) for group in groups for i in group["params"]]
        names = _names(folder, groups, base)
        m, v = {}, {}
        for index, (name, shape) in zip(order, names, strict=True):
            m[name], v[name] = moments_of(name, states.get(index, {}), shape)
        steps = max((int(s.get("step", 0)) for s in states.values()), default=0)
        return (
            m,
            v,
            steps,
            (float(groups[0]["betas"][0]), float(groups[0]["betas"][1])),
            float(groups[0]["eps"]),
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise MismatchError(
            f"is not the state of an Adam optimizer ({error!r})", where=path, remedy=PLAIN
        ) from error


def _names(
    folder: Path, groups: Sequence[Mapping[str, Any]], base: nn.Module | None
) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter in the order of the optimizer's groups."""
    model = _skeleton(folder, base)
    _check_adapter(folder, model)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    decayed = set(cast(Any, Trainer).get_decay_parameter_names(None, model))
    expected = [[n for n in shapes if n in decayed], [n for n in shapes if n not in decayed]]
    sizes = [len(group["params"]) for group in groups]
    if sizes == [len(e) for e in expected] or (sizes == [len(shapes)] and not expected[1]):
        return [(n, shapes[n]) for e in expected for n in e]
    raise MismatchError(
        f"cannot tell which moments belong to which parameter: groups of {sizes} parameters, the"
        f" model gives {[len(e) for e in expected]}",
        where=folder / OPTIMIZER,
        remedy=PLAIN,
    )


def _skeleton(folder: Path, base: nn.Module | None) -> PeftModel:
    """The adapter on its base model, without weights (meta device)."""
    config = read_adapter_config(folder)
    if isinstance(base, PreTrainedModel | PeftModel):
        settings: Any = base.config
    else:
        name = config.base_model_name_or_path
        try:
            if not name:
                raise UserError("the adapter does not name its base model")
            path, revision = locate(name, None, False)
            settings = AutoConfig.from_pretrained(path, revision=revision or "main")
        except (UserError, OSError, ValueError) as error:
            what = f"the base model is needed to name the moments in {OPTIMIZER} ({error})"
            raise MismatchError(
                what, where=folder, remedy=f"Pass it: read_moments(checkpoint, base=model). {PLAIN}"
            ) from error
    config.base_model_name_or_path = None
    with torch.device("meta"):
        return cast(
            PeftModel,
            get_peft_model(
                AutoModelForCausalLM.from_config(settings), config, low_cpu_mem_usage=True
            ),
        )


def _check_adapter(folder: Path, model: PeftModel) -> None:
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            found = {
                n: list(file.get_slice(n).get_shape()) for n in cast(Iterable[str], file.keys())
            }
    except SafetensorError as error:
        raise IntegrityError(
            f"cannot be read ({error})",
            where=folder / ADAPTER_WEIGHTS,
            remedy="Copy the checkpoint again.",
        ) from error
    known = adapter_state(model) | {n: p.data for n, p in base_weights(model, found).items()}
    expected = {n: list(t.shape) for n, t in known.items()}
    other = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if other:
        what = f"the adapter does not fit the base model at {some(other)}"
        raise MismatchError(what, where=folder, remedy="Give the adapter's own base model.")
