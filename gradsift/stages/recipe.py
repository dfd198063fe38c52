"""What a stage is: a recipe with a digest, an artifact made once, and what making it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gradsift.gradients.objectives import Loss
from gradsift.store.artifact import recipe
from gradsift.store.canonical import recipe_digest

VERSIONS = {
    "encode": 1,
    "warmup": 2,
    "gradients": 3,
    "mean": 1,
    "curvature": 3,
    "influence": 1,
    "scores": 1,
    "embeddings": 2,
    "features": 1,
    "loss": 3,
    "ifd": 4,
    "tuned": 1,
    "ngrams": 1,
    "bm25": 1,
    "difficulty": 3,
    "select": 4,
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
        return recipe(
            self.stage,
            version=version,
            config=self.config,
            inputs=self.inputs,
            identity=self.identity,
        )

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


def loss_fields(loss: Loss) -> dict[str, Any]:
    """Extra recipe fields for rows that are not loss gradients. Loss gradients add none, so that
    digests of old runs stay valid.
    """
    return {} if loss == "cross-entropy" else {"loss": loss}
