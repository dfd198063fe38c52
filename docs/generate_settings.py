"""Writes docs/settings.md from the records of gradsift/config.py: `python docs/generate_settings.py`
(with --print: to stdout, for the test).
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, get_args

from gradsift.cli.flags import CALL, CONSTRAINT, FILE, FLAGS
from gradsift.config import Config, Settings

# Flags whose names are not those of the key, or that name the file of the section's own.
OWN_FLAGS = {
    "pool.group_field": "--pool-group",
    "pool.mapping": "--map",
    "pool.files.NAME.mapping": "--map",
    "target.format": "--target-format",
    "target.group_field": "--target-group",
    "target.mapping": "--target-map",
    "target.files.NAME.mapping": "--target-map",
    "model.name": "--model",
}
# What a key means, where no flag of its own says so: the key with its section, or for any section.
MEANINGS = {
    "format": "Row format, instead of detecting it.",
    "group_field": "Field of a row that is its group; none = the file's name.",
    "id_field": "Field of a row that is its id.",
    "mapping": "Our field = theirs.",
    "max_bad_rows": "Rows that may be unusable: a share, or a count.",
    "policy": "A row that is too long is cut at the end, or set aside.",
    "template": "Chat template (Jinja) in place of the tokenizer's own.",
    "name": "The model to be trained later, or a small relative of it.",
    "share": "Share of the pool that the warm-up trains on.",
    "min_rows": "Rows of the warm-up, at least.",
    "min_steps": "Optimiser steps of the warm-up, at least.",
    "epochs": "Passes over the rows.",
    "batch_size": "Rows per optimiser step.",
    "warmup.batch_size": "Rows per optimiser step; none = 16 below 10,000 pool rows, else 128.",
    "lr": "Peak learning rate.",
    "tuning.lr": "Peak learning rate; none = 1e-3 with LoRA, 2e-5 in full.",
    "scheduler": "How the learning rate falls: a name of transformers.",
    "warmup_ratio": "Share of the steps over which the learning rate rises.",
    "weight_decay": "Of AdamW.",
    "max_grad_norm": "Gradients longer than this are cut to it.",
    "checkpoints": "Equally spaced points of the warm-up that gradients can be taken at.",
    "warmup.weights": "How much each checkpoint counts; none = its mean learning rate.",
    "seed": "Of what is random in this section.",
    "r": "Rank of the adapter.",
    "alpha": "Scale of the adapter: alpha / r.",
    "dropout": "Dropout in the adapter while it trains.",
    "targets": "Layers with an adapter: q, k, v, o, all linear ones, or endings of names.",
    "modules": "Layers whose gradients are stored: LoRA's, all linear ones, or names.",
    "projection": "How gradients are brought to `dim` numbers.",
    "norms": "Norms of whole gradients, or of their projection (faster).",
    "adam_form": "Adam steps as the LESS paper writes them, or as its code forms them.",
    "adam_momentum": "false: Adam steps without the first moment.",
    "token_budget": "Padded tokens of one forward pass; a longer row goes alone.",
    "store_dtype": "Numbers of a stored row.",
    "fit_rows": "Pool rows that the curvature is fitted on.",
    "form": "How positions of a text enter the curvature.",
    "labels": "Labels of the fit: drawn from the model, or the rows' own.",
    "damping": "In units of a parameter's mean eigenvalue.",
    "absolute": "true: damping is the very number.",
    "style": "How damping is added to the factors.",
    "rank": "Of the target's preconditioned gradients; none = whole while they fit.",
    "target_batch": "Target rows that share a column of scores.",
    "mode": "Train every parameter, or a fresh adapter.",
    "steps": "Optimiser steps; none = as many as `epochs` passes need.",
    "bf16": "Products in bfloat16; weights, losses and the optimiser as they are.",
}

INTRO = """# Settings

Generated from the settings records by `python docs/generate_settings.py`.

Every key of a TOML file that `--config FILE.toml` names. A flag of the same name stands above the file, the file above the defaults. An
unknown key is an error that names the nearest one.

```toml
[pool]
mapping = {instruction = "question", output = "answer"}

[encode]
max_length = 2048

[warmup.lora]
r = 32
```
"""


def page() -> str:
    parts = [INTRO]
    for name, field in Config.model_fields.items():
        parts += section(name, field.annotation)
    return "\n".join(parts)


def section(name: str, record: Any) -> list[str]:
    """The table of one section, and those of the records in it."""
    words = " ".join((inspect.getdoc(record) or "").split())
    head = ["| key | value | default | flag | meaning |", "|---|---|---|---|---|"]
    parts = [f"## [{name}]", "", words, "", *head]
    inside: list[str] = []
    for key, field in record.model_fields.items():
        kind = field.annotation
        held = next((one for one in (kind, *get_args(kind)) if is_record(one)), None)
        if held is None:
            cells = [f"`{key}`", said(kind), shown(field.default), *told(name, key, field.default)]
            parts.append(f"| {' | '.join(cells)} |")
        else:
            own = f"{name}.{key}" + ("" if kind is held else ".NAME")
            parts.append(f"| `{key}` | a section `[{own}]` | | | |")
            inside += section(own, held)
    return [*parts, "", *inside]


def told(section: str, key: str, default: Any) -> tuple[str, str]:
    """The flag of a key, "" without one, and what the key means. Raises KeyError where nothing
    says so.
    """
    flag = next(
        (
            f
            for f in FLAGS
            if f.section not in (CALL, CONSTRAINT, FILE) and (f.section, f.name) == (section, key)
        ),
        None,
    )
    option = None if flag is None else flag.annotation.__metadata__[0]
    own = OWN_FLAGS.get(f"{section}.{key}")
    # typer keeps the first name of a flag where a default would stand
    names = [] if option is None else [option.default, *(option.param_decls or ())]
    name = own or next((n for n in names if str(n).startswith("--")), "")
    meaning = MEANINGS.get(f"{section}.{key}") or (option.help if option else MEANINGS[key])
    if default not in (None, "auto"):  # it has a column
        meaning = re.sub(r" \(default [^)]*\)$", "", meaning)
    meaning = meaning.replace("\\[", "[").replace("|", "\\|")
    return f"`{name.partition('/')[0]}`" if name else "", meaning


def is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Settings)


def said(kind: Any) -> str:
    """A type in the words of TOML."""
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if kind in words:
        return words[kind]
    text = str(kind)
    if text.startswith("dict"):
        return "table of texts"
    if text.startswith("typing.Literal"):
        return ", ".join(f'`"{value}"`' for value in get_args(kind))
    arguments = [one for one in get_args(kind) if one is not type(None)]
    if text.startswith("typing.Annotated"):
        return said(arguments[0])
    if re.match(r"(builtins\.)?tuple", text):
        # of any length, or of so many
        if Ellipsis in arguments:
            return f"list of {said(arguments[0])}s"
        return f"list of {len(arguments)} {said(arguments[0])}s"
    return " or ".join(dict.fromkeys(said(one) for one in arguments))


def shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f'`"{default}"`' if isinstance(default, str) else f"{default:g}"


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(page())
    else:
        (Path(__file__).parent / "settings.md").write_text(page(), encoding="utf-8")
