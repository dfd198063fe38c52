"""What every stage needs: the run, the settings, the rows of both sides, the executor, the
model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from gradsift.compute import machine, ray
from gradsift.compute.executor import Executor
from gradsift.compute.progress import Progress, silent
from gradsift.compute.stopping import Stopping
from gradsift.config import Config
from gradsift.data.encode import EncodedRows, encode, tokenizer_identity
from gradsift.data.pool import Pool
from gradsift.errors import IntegrityError
from gradsift.gradients.passes import Modules
from gradsift.gradients.projection import Projection, projection_of
from gradsift.model import load
from gradsift.model.checkpoints import load_checkpoints
from gradsift.model.layers import tracked_modules
from gradsift.model.load import from_settings, model_identity, quantiser, tokenizer_from_settings
from gradsift.model.lora import load_adapter
from gradsift.model.warmup import warm_up
from gradsift.stages import checks
from gradsift.stages.recipe import Recipe, Timing
from gradsift.stages.work import ModelSource, nothing
from gradsift.store.artifact import REPAIR, Artifact
from gradsift.store.run import Run
from gradsift.store.tensors import file_hash, folder_hash
from gradsift.types import Checkpoint, Signal

T = TypeVar("T", bound="Context")


def in_force(config: Config) -> Config:
    """The settings with the model's device and number format decided where they say "auto".

    Raises as `gradsift.model.load.in_force`.
    """
    model = load.in_force(config.model, elsewhere=config.machine.executor == "ray")
    return config if model is config.model else config.model_copy(update={"model": model})


class Context:
    """One run over a pool and perhaps a target set: makes artifacts by recipe, each once, and keeps
    the cost of each.

    Use inside `run.lock()`. `timings`: one line per stage asked for, in order.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        pool: Pool,
        target: Pool | None = None,
        *,
        warmup_from: Path | None = None,
        executor: Executor | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.run, self.config, self.warmup_from = run, in_force(config), warmup_from
        self.timings: list[Timing] = []
        self._sound: set[str] = set()
        self.sides: dict[str, Pool] = {
            "pool": pool,
            **({"target": target} if target is not None else {}),
        }
        self.progress = progress or silent()
        self.threads = machine.settle(config.machine.threads)
        self.executor = executor or ray.executor_of(self.config, self.threads, self.progress.note)
        self.tokenizer = tokenizer_from_settings(config.model)
        self.model_identity = model_identity(config.model.name, config.model.revision)
        self._encoded: dict[str, EncodedRows] = {}
        self._model: Any = None

    def over(self: T, pool: Pool, target: Pool | None = None) -> T:
        """The same run, settings and model over other rows. Costs share one list."""
        other = copy.copy(self)
        other.sides = {"pool": pool, **({"target": target} if target is not None else {})}
        other._encoded = {}
        return other

    # --- artifacts

    def checked(self, artifact: Artifact) -> Artifact:
        """`artifact`, whose files were compared with its manifest once in this process. Raises
        IntegrityError naming the file.
        """
        if artifact.path.name not in self._sound:
            for name, stated in artifact.manifest["files"].items():
                if file_hash(artifact.file(name)) != stated:
                    raise IntegrityError(
                        "is not the file that the manifest names",
                        where=artifact.path / name,
                        remedy=REPAIR,
                    )
            self._sound.add(artifact.path.name)
        return artifact

    def make(self, recipe: Recipe, fill: Callable[[Artifact], None]) -> Artifact:
        """The complete artifact of a recipe: what is there, or what `fill` makes of the open
        folder.
        """
        parts = recipe.parts
        artifact = self.run.artifact(parts.pop("stage"), **parts)
        started, reused = time.perf_counter(), artifact.complete
        before = sum(timing.seconds for timing in self.timings)

        def inner() -> float:
            """Seconds of the stages that this one asked for on its way: they are counted there, not
            twice.
            """
            return sum(timing.seconds for timing in self.timings) - before

        if not reused:
            artifact.seconds_elsewhere = inner
            artifact.machine = lambda: {
                "peak_bytes": machine.peak_bytes(),
                "versions": machine.versions(),
            }
            fill(artifact)
        seconds = 0.0 if reused else time.perf_counter() - started - inner()
        if all(timing.digest != artifact.digest for timing in self.timings):
            self.timings.append(
                Timing(recipe.stage, artifact.digest, reused, seconds, machine.peak_bytes())
            )
        return artifact

    def unfinished(self, recipe: Recipe) -> bool:
        """Whether the artifact of a recipe was begun and is not complete: stopped in the middle, or
        reopened by a repair. Writes nothing.
        """
        parts = recipe.parts
        artifact = self.run.artifact(parts.pop("stage"), **parts, create=False)
        return artifact.path.is_dir() and not artifact.complete

    def stored(self, recipe: Recipe) -> Artifact | None:
        """The complete artifact of a recipe, if it is there. Writes nothing."""
        parts = recipe.parts
        artifact = self.run.artifact(parts.pop("stage"), **parts, create=False)
        return artifact if artifact.complete else None

    # --- encoded rows

    def encode_recipe(self, side: str) -> Recipe:
        settings = self.config.encode
        return Recipe(
            "encode",
            settings.canonical(),
            {"rows": self.sides[side].digest},
            tokenizer_identity(self.tokenizer, settings),
        )

    def encoded(self, side: str) -> EncodedRows:
        if side not in self._encoded:
            artifact = self.checked(
                self.make(self.encode_recipe(side), lambda artifact: self._encode(side, artifact))
            )
            self._encoded[side] = EncodedRows.load(artifact.path)
            checks.check_vocabulary(
                self.sides[side], self._encoded[side], load.vocabulary(self.config.model)
            )
            if side == "target":  # before anything is spent
                checks.check_encoded(self.sides[side], self._encoded[side])
        return self._encoded[side]

    def _encode(self, side: str, artifact: Artifact) -> None:
        rows = encode(self.sides[side], self.tokenizer, self.config.encode, progress=self.progress)
        for note in rows.notes:
            self.progress.note(note)
        rows.save(artifact.path)
        counts = {
            "rows": len(rows),
            "usable": int((rows.codes == 0).sum()),
            "tokens": int(rows.lengths.sum()),
        }
        artifact.finish(counts=counts)

    # --- the warm-up and its checkpoints

    def warmup_recipe(self) -> Recipe:
        if self.warmup_from is not None:
            return Recipe(
                "warmup",
                {"from": folder_hash(self.warmup_from)},
                identity={"model": self.model_identity},
            )
        return Recipe(
            "warmup",
            self.config.warmup.canonical(),
            {"pool": self.encode_recipe("pool").digest},
            self.compute_identity(),
        )

    @property
    def checkpoint_count(self) -> int:
        return (
            self.config.warmup.checkpoints
            if self.warmup_from is None
            else len(load_checkpoints(self.warmup_from))
        )

    def used_checkpoints(self, signal: Signal) -> range:
        last = self.checkpoint_count
        return range(last - 1, last) if signal.checkpoints == "last" else range(last)

    def checkpoints(self) -> list[Checkpoint]:
        if self.warmup_from is not None:
            return load_checkpoints(self.warmup_from)
        made = self.checked(self.make(self.warmup_recipe(), self._warm_up))
        # and no folder that somebody has put beside them
        named = {name.partition("/")[0] for name in made.manifest["files"]}
        found = [
            checkpoint
            for checkpoint in load_checkpoints(made.path)
            if checkpoint.path.name in named
        ]
        weights = self.config.warmup.weights
        if weights is None:
            return found
        return [replace(c, mean_lr=weight) for c, weight in zip(found, weights, strict=True)]

    def _warm_up(self, artifact: Artifact) -> None:
        model = self.load_base()
        if self.modules is not None:  # a name that no layer has is told before the training
            tracked_modules(model, self.modules)
        checkpoints = warm_up(
            model,
            self.encoded("pool"),
            self.config.warmup,
            artifact.path,
            pad_id=self.pad_id,
            progress=Stopping(self.progress),
            force=self.config.machine.force,
        )
        artifact.finish(counts={"checkpoints": len(checkpoints), "steps": checkpoints[-1].step})

    # --- the model

    def compute_identity(self) -> dict[str, Any]:
        model = self.config.model
        kind = machine.cpu_kind() if model.device == "cpu" else model.device.split(":")[0]
        return {
            "model": self.model_identity,
            "dtype": model.dtype,
            "attention": model.attention or "default",
            "machine": kind,
            "threads": self.threads,
            "torch": torch.__version__,
            **quantiser(model.dtype),
        }

    @property
    def pad_id(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if isinstance(token, int))

    @property
    def begin_id(self) -> int | None:
        """The token that the tokenizer puts before a text of its own (BOS), if it puts one."""
        first, begin = list(self.tokenizer("a")["input_ids"])[:1], self.tokenizer.bos_token_id
        return begin if isinstance(begin, int) and first == [begin] else None

    def load_base(self, dtype: str | None = None) -> Any:
        """The base model, in the run's number format or in another."""
        spans = self.config.machine.spans(self.config.model.device)
        return from_settings(self.config.model, dtype=dtype, spread=spans)

    def model_at(self, checkpoint: Checkpoint) -> Any:
        """The warmed-up model at a checkpoint, in eval mode; only one is held."""
        if self._model is None or self._model[0] != checkpoint.path:
            self._model = None
            self._model = (checkpoint.path, load_adapter(self.load_base(), checkpoint.path))
        return self._model[1]

    def lend(self, model: Any, at: Checkpoint | None = None) -> Callable[[], Any]:
        """`model` (the base, or that of a checkpoint) for the executor's workers: it itself, or how
        they get their own elsewhere.
        """
        if not self.executor.remote:
            return lambda: model
        self._model = None  # a worker may need the room
        spans = self.config.machine.spans(self.config.model.device)
        return ModelSource.of(
            self.config.model, self.model_identity, None if at is None else at.path, spans=spans
        ).load

    @property
    def advance(self) -> Callable[[int], None]:
        """What a worker calls with the tokens of each batch: the progress bar, or nothing where
        workers are elsewhere.
        """
        return nothing if self.executor.remote else self.progress.advance

    @property
    def modules(self) -> Modules:
        """What `extract` and the curvature take gradients of: None = the LoRA modules."""
        named = self.config.gradients.modules
        return None if named == "lora" else named

    @property
    def projection(self) -> Projection:
        return projection_of(self.config.gradients)
