"""gradsift: instruction pool in, the rows worth training on out, with the proof."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradsift.comparison import Comparison
    from gradsift.gradients import GradientBatch, extract
    from gradsift.judging import compare
    from gradsift.pool import Pool, read_pool, write_subset
    from gradsift.projection import Projection
    from gradsift.scoring import Scores, score
    from gradsift.selection import Selection, select
    from gradsift.store import RowStore
    from gradsift.transforms.adam import Adam, FactoredAdam
    from gradsift.types import Checkpoint, Example, Message, Signal, Signals, Subset
    from gradsift.warmup import TrajectoryCallback, read_moments

# Rooms are imported on first use, so that `gradsift --help` does not wait for torch.
_HOMES = {
    "Adam": "transforms.adam",
    "Checkpoint": "types",
    "Comparison": "comparison",
    "Example": "types",
    "FactoredAdam": "transforms.adam",
    "GradientBatch": "gradients",
    "Message": "types",
    "Pool": "pool",
    "Projection": "projection",
    "RowStore": "store",
    "Scores": "scoring",
    "Selection": "selection",
    "Signal": "types",
    "Signals": "types",
    "Subset": "types",
    "TrajectoryCallback": "warmup",
    "compare": "judging",
    "extract": "gradients",
    "read_moments": "warmup",
    "read_pool": "pool",
    "score": "scoring",
    "select": "selection",
    "write_subset": "pool",
}

__all__ = [
    "Adam",
    "Checkpoint",
    "Comparison",
    "Example",
    "FactoredAdam",
    "GradientBatch",
    "Message",
    "Pool",
    "Projection",
    "RowStore",
    "Scores",
    "Selection",
    "Signal",
    "Signals",
    "Subset",
    "TrajectoryCallback",
    "compare",
    "extract",
    "read_moments",
    "read_pool",
    "score",
    "select",
    "write_subset",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"gradsift.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gradsift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
