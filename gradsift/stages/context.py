"""What every stage needs: the run, the settings, the rows of both sides, the executor, the model."""

from __future__ import annotations

import time
from collections.abc import Callable

from gradsift.compute import machine
from gradsift.errors import IntegrityError
from gradsift.stages.recipe import Recipe, Timing
from gradsift.store.artifact import REPAIR, Artifact
from gradsift.store.run import Run
from gradsift.store.tensors import file_hash


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
