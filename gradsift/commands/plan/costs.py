"""What a plan says of a stage, and the rates that its probe measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageCost:
    """One stage to come: `seconds` and `bytes` are estimates, 0 where it is there already."""

    stage: str
    label: str
    digest: str
    reused: bool
    rows: int
    tokens: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Rates:
    """What the probe measured, in tokens per second and bytes."""

    train: float
    gradients: float
    forward: float
    encode_rows: float
    multiply: float  # fp32 multiply-adds per second
    peak_bytes: int
    used_bytes: int  # that is not free again afterwards
    dim: int
    parameters: int
    hidden: int
    factors: int  # bytes of a shard's curvature sums
    tracked: int  # bytes of a whole gradient
