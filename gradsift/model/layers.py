"""Which modules of a model carry gradient rows: linear layers, LoRA layers, and how much of the
model they cover.

A module's name is its name in `model.named_modules()`; its parameter is `<name>.weight`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsift.errors import ConfigError, UnknownName
from gradsift.types import counted

# Attention layers of the families whose attention module is not called ...Attention or ...Attn.
_ATTENTION_LEAVES = frozenset(
    {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv_proj",
        "query_key_value",
        "Wqkv",
        "c_attn",
        "out_proj",
    }
)

# Below this share of the trainable parameters a selection is warned of.
LEAST_COVERAGE = 0.5

# By this flag bitsandbytes, on some CPUs, repacks a 4-bit layer the first time that it runs without
# a gradient; products of the repacked weights carry no gradient, and say nothing: what is below
# such a layer would be differentiated as though the layer were not there.
REPACKS = "support_avx512bf16_for_cpu"


def is_quantised(module: nn.Module) -> bool:
    """True for a layer whose weights are packed integers (bitsandbytes, GPTQ, AWQ, HQQ), told
    without importing any of those.
    """
    if any(hasattr(module, name) for name in ("qweight", "W_q")):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear, GPT-2's Conv1D and a quantised stand-in for nn.Linear; not for peft's
    wrapper around one.
    """
    if isinstance(module, nn.Linear | Conv1D):
        return True
    shaped = hasattr(module, "in_features") and hasattr(module, "out_features")
    return shaped and not isinstance(module, BaseTunerLayer) and is_quantised(module)


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers of the blocks, by name: not the output head (nor what peft wrapped in it),
    not the LoRA layers, not what peft keeps of a layer that it trains in full.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    under_head = {id(m) for m in head.modules()} if isinstance(head, nn.Module) else set()
    apart = re.compile(r"(^|\.)(lora_|original_module(\.|$))")
    return {
        n: m
        for n, m in model.named_modules()
        if is_linear(m) and id(m) not in under_head and not apart.search(n)
    }


def lora_targets(model: nn.Module, targets: str) -> list[str]:
    """The shortest names that peft, which matches by suffix, resolves to exactly the layers that
    "attention" or "all-linear" means.
    """
    blocks = block_linears(model)
    if targets == "attention":
        inside = tuple(
            f"{n}."
            for n, m in model.named_modules()
            if re.search(r"Attention|Attn", type(m).__name__)
        )
        wanted = {n for n in blocks if n.startswith(inside)} or {
            n for n in blocks if n.rpartition(".")[2] in _ATTENTION_LEAVES
        }
    elif targets == "all-linear":
        wanted = set(blocks)
    else:
        raise UnknownName("LoRA target", targets, ["attention", "all-linear"])
    if not wanted:
        raise ConfigError(
            f"found no {targets} layers in {type(model).__name__}",
            remedy="Name the layers: targets=('q_proj', 'v_proj').",
        )
    others = [n for n, _ in model.named_modules() if n not in wanted]
    names: set[str] = set()
    for name in sorted(wanted):
        parts = name.split(".")
        suffixes = [".".join(parts[-k:]) for k in range(1, len(parts) + 1)]
        names.add(
            next(s for s in suffixes if not any(n == s or n.endswith(f".{s}") for n in others))
        )
    return sorted(names)


def tracked_modules(
    model: nn.Module, modules: Literal["linear"] | str | Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The modules whose weight gradients are read, by name, in the model's own order.

    None: the lora_A / lora_B layers with a trainable weight (plain linear layers also on a
    quantised base). "linear": every linear layer of the blocks (nn.Linear, Conv1D), not the head,
    not LoRA. Names, endings of names ("mlp.down_proj") or globs: those linear layers, by their
    names in the base model or as they are wrapped.

    Raises ConfigError when nothing is there, when a weight is quantised, for DoRA, whose layers do
    not see the activations that a hook reads, or for 4-bit layers on a CPU that cut the gradient;
    UnknownName for a pattern that matches nothing.
    """
    _refuse_repacking(model)
    if modules is None:
        return _lora_layers(model)
    if modules == "linear":
        found = block_linears(model)
    else:
        linears = {n: m for n, m in model.named_modules() if is_linear(m)}
        patterns = [modules] if isinstance(modules, str) else list(modules)
        for pattern in patterns:
            if not any(_is_named(n, pattern) for n in linears):
                raise UnknownName("module", pattern, map(_plain, linears))
        found = {n: m for n, m in linears.items() if any(_is_named(n, p) for p in patterns)}
    if not found:
        raise ConfigError("no linear layers to read", remedy="Name the modules.")
    packed = [n for n, m in found.items() if is_quantised(m)]
    if packed:
        raise ConfigError(
            counted(len(packed), "weight is quantised and has", "weights are quantised and have")
            + f" no gradient: {some(packed)}",
            remedy="Read LoRA (modules=None).",
        )
    _refuse_shared(model, found)
    return found


def _plain(name: str) -> str:
    """A layer's name in the base model, without what peft put around it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _is_named(name: str, pattern: str) -> bool:
    if "lora_" in name and "lora_" not in pattern:  # a glob of the base model's layers
        return False
    plain = _plain(name)
    return any(
        fnmatch.fnmatchcase(text, form)
        for text in (name, plain)
        for form in (pattern, f"*.{pattern}")
    )


def _refuse_shared(model: nn.Module, tracked: Mapping[str, nn.Module]) -> None:
    """A weight that a layer beside the tracked ones uses too: that use would be missing from its
    gradient.
    """
    names = {id(module.weight): name for name, module in tracked.items()}
    inside = {id(module) for module in tracked.values()}
    for other, module in model.named_modules():
        for parameter in module.parameters(recurse=False) if id(module) not in inside else ():
            if id(parameter) in names:
                what = f"shares its weight with {other}, whose part of the gradient is not read"
                remedy = (
                    f"Leave it out, or name both layers if {other} is linear (an embedding cannot"
                    " be read)."
                )
                raise ConfigError(what, where=names[id(parameter)], remedy=remedy)


def _refuse_repacking(model: nn.Module) -> None:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (
            getattr(module, REPACKS, False)
            and isinstance(weight, Tensor)
            and weight.device.type == "cpu"
        ):
            raise ConfigError(
                "bitsandbytes repacks this 4-bit layer on the CPU, and no gradient passes through"
                " it then",
                where=name,
                remedy=(
                    f"Load the model with gradsift.model.load_model, or set {REPACKS} = False on"
                    " its 4-bit layers before they run."
                ),
            )


def _lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    frozen = False
    for name, layer in model.named_modules():
        # A ParamWrapper (LoRA on a bare parameter) folds its weights into that parameter and never
        # calls its lora_A.
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, ParamWrapper):
            continue
        if any(getattr(layer, "use_dora", {}).values()):
            raise ConfigError(
                "a DoRA layer uses its weights outside of a layer call",
                where=name,
                remedy="Train plain LoRA.",
            )
        if layer.merged:
            raise ConfigError(
                "its adapter is merged into the base weight and not called",
                where=name,
                remedy="Call model.unmerge_adapter().",
            )
        for part in ("lora_A", "lora_B"):
            for adapter, linear in getattr(layer, part, {}).items():
                if isinstance(linear, nn.Linear) and linear.weight.requires_grad:
                    found[f"{name}.{part}.{adapter}"] = linear
                frozen |= isinstance(linear, nn.Linear) and not linear.weight.requires_grad
    if not found:
        load = "Load the adapter with PeftModel.from_pretrained(..., is_trainable=True)."
        remedy = load if frozen else "Attach or load an adapter, or read modules='linear'."
        raise ConfigError(
            f"the model has no trainable LoRA layers{': its adapter is frozen' if frozen else ''}",
            remedy=remedy,
        )
    return found


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True)
class CoverageRow:
    """One kind of layer: its name without layer numbers, how many, weight shapes, parameters, and
    their share of what is trainable.
    """

    kind: str
    modules: int
    shapes: tuple[tuple[int, ...], ...]
    parameters: int
    share: float


@dataclass(frozen=True)
class Coverage:
    """How much of the model the gradient rows see.

    `share` = tracked_parameters / trainable_parameters. When layers other than LoRA are read, all
    parameters of the base model count as trainable. `uncovered`: trainable parameters beside the
    LoRA layers, and fused expert parameters, that no row sees. `experts`: the names of
    mixture-of-experts modules. `quantised`: the number of layers with packed weights. `rotary`: see
    `length_switch`.
    """

    modules: int
    tracked_parameters: int
    trainable_parameters: int
    share: float
    rows: tuple[CoverageRow, ...]
    experts: tuple[str, ...]
    uncovered: tuple[str, ...]
    quantised: int
    rotary: tuple[str, int] | None = None

    def summary(self) -> dict[str, Any]:
        """The table as plain JSON."""
        return {
            **asdict(self),
            "rows": [asdict(row) | {"shapes": [list(s) for s in row.shapes]} for row in self.rows],
            "moe": self.moe,
        }

    @property
    def moe(self) -> bool:
        """True when the model has mixture-of-experts layers."""
        return bool(self.experts)


def coverage(
    model: nn.Module, modules: Literal["linear"] | str | Sequence[str] | None = None
) -> Coverage:
    """What `tracked_modules(model, modules)` covers, as a table. Raises as `tracked_modules`
    does.
    """
    tracked = tracked_modules(model, modules)
    seen = {id(p) for m in tracked.values() if isinstance(p := m.weight, Tensor)}
    parameters = dict(model.named_parameters())
    trainable = {
        n: p
        for n, p in parameters.items()
        if (p.requires_grad if modules is None else "lora_" not in n)
    }
    total = sum(p.numel() for p in trainable.values())
    fused = _fused_experts(model)
    kinds: dict[str, list[Tensor]] = {}
    for name, module in tracked.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        kinds.setdefault(_kind(name), []).append(weight)
    rows = tuple(
        CoverageRow(
            kind,
            len(ws),
            tuple(sorted({tuple(w.shape) for w in ws})),
            count := sum(w.numel() for w in ws),
            count / total,
        )
        for kind, ws in kinds.items()
    )
    covered = sum(row.parameters for row in rows)
    missed = [n for n, p in trainable.items() if id(p) not in seen] if modules is None else []
    return Coverage(
        modules=len(tracked),
        tracked_parameters=covered,
        trainable_parameters=total,
        share=covered / total,
        rows=rows,
        experts=tuple(n for n, m in model.named_modules() if n.rpartition(".")[2] == "experts"),
        uncovered=tuple(dict.fromkeys([*missed, *fused])),
        quantised=sum(is_linear(m) and is_quantised(m) for m in model.modules()),
        rotary=length_switch(model),
    )


def thin_coverage(found: Mapping[str, Any]) -> str | None:
    """What to say where gradient rows see less than half of what trains, with names of what they do
    not see; None where they see more.

    Args:
        found: A `Coverage.summary()`.
    """
    if found["share"] >= LEAST_COVERAGE:
        return None
    said = (
        f"gradients see {found['share']:.1%} of the {found['trainable_parameters']:,} parameters"
        " that train"
    )
    left_out = found["uncovered"]
    return f"{said}; not seen: {some(left_out, 3)}" if left_out else said


def length_switch(model: nn.Module) -> tuple[str, int] | None:
    """(kind, tokens) of rotary position factors that become others in a batch whose longest row has
    more than so many tokens ("longrope" of Phi-3, "dynamic" NTK scaling): a shorter row beside it
    is then not read as it is alone. None for a model whose factors are fixed.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for one in (found, *(value for value in found.values() if isinstance(value, Mapping))):
        # for the whole model, or by kind of layer
        kind = one.get("rope_type") or one.get("type")
        if kind in ("longrope", "dynamic"):
            own = one.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            return kind, int(own or text.max_position_embeddings)
    return None


def _kind(name: str) -> str:
    """q_proj.lora_A for base_model.model.model.layers.3.self_attn.q_proj.lora_A.default: what stays
    when numbers and wrappers go.
    """
    adapter = re.fullmatch(r"(?:.*\.)?([^.]+)\.(lora_[AB])\.[^.]+", name)
    if adapter:
        return f"{adapter[1]}.{adapter[2]}"
    return ".".join(
        part for part in name.split(".")[-2:] if not part.isdigit() and part != "base_layer"
    )


def _fused_experts(model: nn.Module) -> list[str]:
    """Parameters that hold all experts of a layer [experts, out, in]: no linear layer, so neither
    LoRA nor gradient rows see them.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if "expert" in f"{name}.{type(module).__name__}".lower():
            found += [
                f"{name}.{n}" for n, p in module.named_parameters(recurse=False) if p.ndim == 3
            ]
    return found
