"""Recipe digests of every stage of every method, preset and constraint, of every score and of a
comparison's trainings.

`python -m tests.golden.digests` writes them to digests.json. A digest is the name of work that
users have on disk: it changes on purpose only, with a new version of its stage in VERSIONS. What
belongs to a machine (kind of CPU, build of torch, the model's weights) is pinned.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest import mock

import numpy as np

from gradsift import methods
from gradsift.commands import budget as budgets
from gradsift.commands.compare.trials import Command, Test, Trial, Trials
from gradsift.commands.preflight import Inputs
from gradsift.commands.score import scores_recipe
from gradsift.commands.select.constraints import Constraints, build
from gradsift.commands.select.select import select_recipe
from gradsift.commands.session import opened
from gradsift.compute import machine
from gradsift.signals.backends import BACKENDS
from gradsift.stages.pipeline import Pipeline
from gradsift.types import Example, Message, Signal
from tests.conftest import SETTINGS, TEMPLATE, rows, write_rows
from tests.model.small_models import llama, tokenizer

FILE = Path(__file__).parent / "digests.json"
TEST_SET = [
    Example(
        "t",
        (
            Message("user", "one two three four five six seven"),
            Message("assistant", "a b c d e f g"),
        ),
        "test",
    )
]


def selectors() -> Iterator[tuple[str, str, Any]]:
    """(name with its preset, method, selector) of every method and preset, and of every variant of
    an option that changes the signals.
    """
    for name in methods.METHODS:
        cls = methods.load(name)
        presets = get_args(get_type_hints(cls).get("preset", type(None)))
        for preset in presets or (None,):
            yield (
                (f"{name} {preset}" if preset else name),
                name,
                methods.make(name, {"preset": preset} if preset else {}),
            )
    for name, options in (
        ("less", {"backend": "ekfac"}),
        ("less", {"transform": "none"}),
        ("gdig", {"backend": "kfac"}),
    ):
        yield f"{name} {options}", name, methods.make(name, options)


def constraints() -> dict[str, tuple[Constraints, str]]:
    """Constraints and budgets by name."""
    return {
        "none": (Constraints(), "10%"),
        "near": (build(near=0.95), "10%"),
        "near embeddings": (build(near=0.9, near_by="embeddings"), "10%"),
        "decontaminate": (build(decontaminate={"test": TEST_SET}), "10%"),
        "per group": (build(per_group=["back=2:50%"]), "10%"),
        "ids": (build(include_ids=["r001"], exclude_ids=["r002"]), "10%"),
        "tokens": (Constraints(), "500-tokens"),
    }


def _lines(pipeline: Pipeline, name: str, selector: Any) -> dict[str, Any]:
    found = {}
    for constraint, (limits, budget) in constraints().items():
        stages = pipeline.recipes(selector.needs() | limits.needs())
        select = select_recipe(pipeline, name, selector, budgets.parse(budget), limits, seed=3)
        found[constraint] = [f"{recipe.stage} {recipe.digest[:16]}" for recipe in (*stages, select)]
    # Only what a constraint adds or changes: the file stays readable.
    return {
        key: value if key == "none" else [line for line in value if line not in found["none"]]
        for key, value in found.items()
    }


def digests(folder: Path) -> dict[str, Any]:
    """The digests as digests.json holds them; `folder` is where the model and the rows are
    written.
    """
    model = folder / "model"
    llama().save_pretrained(model)
    words = tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(model)
    pool, target = (
        write_rows(folder / "pool.jsonl", rows(72)),
        write_rows(folder / "target.jsonl", rows(12, seed=9)),
    )
    found: dict[str, Any] = {}
    with (
        mock.patch.object(machine, "cpu_kind", return_value="golden"),
        mock.patch("torch.__version__", "golden"),
    ):
        for targets in ([], [target]):
            for modules in ("lora", "linear"):
                settings = {**SETTINGS, "gradients": {**SETTINGS["gradients"], "modules": modules}}
                arguments = {
                    "pool": pool,
                    "target": targets,
                    "model": str(model),
                    "settings": settings,
                    "pool_group": "kind",
                }
                with opened(Inputs(folder / "run", **arguments), keep=False) as pipeline:
                    pipeline.model_identity = {"kind": "golden"}
                    where = f"{modules}, {'with' if targets else 'without'} a target"
                    found[where] = dict(_entries(pipeline, bool(targets), modules))
    return found


def _entries(pipeline: Pipeline, targeted: bool, modules: str) -> Iterator[tuple[str, Any]]:
    for label, name, selector in selectors():
        if selector.target == ("none" if targeted else "required"):
            continue
        if modules == "linear" and any(signal.transform == "adam" for signal in selector.needs()):
            continue  # refused: the moments are those of the adapters
        try:
            yield label, _lines(pipeline, name, selector)
        except Exception as error:
            yield label, f"{type(error).__name__}"
    if targeted:
        for backend, line in BACKENDS.items():
            for checkpoints in ("last",) if line.curvature is not None else ("mean", "last"):
                signal = Signal(
                    "influence", transform=line.transform, checkpoints=checkpoints, backend=backend
                )  # type: ignore[arg-type]
                try:
                    yield (
                        f"score {backend} {checkpoints}",
                        [
                            scores_recipe(pipeline, signal, c).digest[:16]
                            for c in ("rows", "groups")
                        ],
                    )
                except Exception as error:
                    yield f"score {backend} {checkpoints}", f"{type(error).__name__}"
    trials, recipe = Trials(pipeline), pipeline.config.finetune
    some = np.arange(0, 40, 5, dtype=np.int64)
    for label, trial in {
        "untrained": Trial(some[:0], recipe),
        "trained": Trial(some, recipe.model_copy(update={"seed": 2, "steps": 9})),
        "weighted": Trial(some, recipe, np.linspace(0.5, 1.5, len(some))),
    }.items():
        tests = (Test("held", [], "0" * 32, ("loss", "exact")), Command("eval {model}"))  # type: ignore[arg-type]
        yield f"trial {label}", [trials.recipe(trial, test).digest[:16] for test in tests]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        FILE.write_text(json.dumps(digests(Path(scratch)), indent=0, sort_keys=True) + "\n")
