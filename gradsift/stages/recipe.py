"""What a stage is: a recipe with a digest, an artifact made once, and what making it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gradsift.compute import machine
from gradsift.errors import IntegrityError
from gradsift.gradients.objectives import Loss
from gradsift.store.artifact import REPAIR, Artifact, file_hash, recipe
from gradsift.store.atomic import recipe_digest
from gradsift.store.run import Run

VERSIONS = {
    "encode": 1,
    "warmup": 1,
    "gradients": 3,
    "mean": 1,
    "curvature": 3,
    "influence": 1,
    "scores": 1,
    "embeddings": 2,
    "features": 1,
    "loss": 3,
    "ifd": 3,
    "tuned": 1,
    "ngrams": 1,
    "difficulty": 2,
    "select": 3,
    "trial": 2,
    "compare": 1,
}


@dataclass(frozen=True)
class Recipe:
    """What an artifact is made of; equal recipes make equal artifacts."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Any]:
        version = VERSIONS[self.stage]
        return recipe(self.stage, version=version, config=self.config, inputs=self.inputs, identity=self.identity)

    @property
    def digest(self) -> str:
        return recipe_digest(self.parts)


@dataclass(frozen=True)
class Timing:
    """One line of the cost table: a stage, whether it was reused, and what making it took."""

    stage: str
    digest: str
    reused: bool
    seconds: float
    peak_bytes: int


class Stages:
    """Makes artifacts of a run by recipe, and keeps the cost of each. `timings`: one line per stage asked for, in order."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.timings: list[Timing] = []
        self._sound: set[str] = set()

    def checked(self, artifact: Artifact) -> Artifact:
        """`artifact`, whose files were compared with its manifest once in this process. Raises IntegrityError naming the file."""
        if artifact.path.name not in self._sound:
            for name, stated in artifact.manifest["files"].items():
                if file_hash(artifact.file(name)) != stated:
                    raise IntegrityError("is not the file that the manifest names", where=artifact.path / name, remedy=REPAIR)
            self._sound.add(artifact.path.name)
        return artifact

    def make(self, recipe: Recipe, fill: Callable[[Artifact], None]) -> Artifact:
        """The complete artifact of a recipe: what is there, or what `fill` makes of the open folder."""
        parts = recipe.parts
        artifact = self.run.artifact(parts.pop("stage"), **parts)
        started, reused = time.perf_counter(), artifact.complete
        before = sum(timing.seconds for timing in self.timings)

        def inner() -> float:
            """Seconds of the stages that this one asked for on its way: they are counted there, not twice."""
            return sum(timing.seconds for timing in self.timings) - before

        if not reused:
            artifact.seconds_elsewhere = inner
            fill(artifact)
        seconds = 0.0 if reused else time.perf_counter() - started - inner()
        if all(timing.digest != artifact.digest for timing in self.timings):
            self.timings.append(Timing(recipe.stage, artifact.digest, reused, seconds, machine.peak_bytes()))
        return artifact

    def unfinished(self, recipe: Recipe) -> bool:
        """Whether the artifact of a recipe was begun and is not complete: stopped in the middle, or reopened by a repair. Writes nothing."""
        parts = recipe.parts
        artifact = self.run.artifact(parts.pop("stage"), **parts, create=False)
        return artifact.path.is_dir() and not artifact.complete

    def stored(self, recipe: Recipe) -> Artifact | None:
        """The complete artifact of a recipe, if it is there. Writes nothing."""
        parts = recipe.parts
        artifact = self.run.artifact(parts.pop("stage"), **parts, create=False)
        return artifact if artifact.complete else None


def named(loss: Loss) -> dict[str, Any]:
    """What a recipe says of rows that are not gradients of the loss; the others say nothing, as they always did."""
    return {} if loss == "cross-entropy" else {"loss": loss}
