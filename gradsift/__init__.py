"""gradsift: instruction pool in, the rows worth training on out, with the proof."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsift.types import lazy_face

if TYPE_CHECKING:
    from gradsift.commands.compare.compare import compare
    from gradsift.commands.compare.results import Comparison
    from gradsift.commands.score import Scores, score
    from gradsift.commands.select.select import Selection, select
    from gradsift.data.pool import Pool, read_pool
    from gradsift.data.write import write_subset
    from gradsift.gradients.adam import Adam, FactoredAdam
    from gradsift.gradients.passes import GradientBatch, extract
    from gradsift.gradients.projection import Projection
    from gradsift.model.checkpoints import read_moments
    from gradsift.model.warmup import TrajectoryCallback
    from gradsift.store.rows import RowStore
    from gradsift.types import Checkpoint, Example, Message, Signal, Signals, Subset

# Wings are imported on first use, so that `gradsift --help` does not wait for torch.
_HOMES = {
    "Adam": "gradients.adam",
    "Checkpoint": "types",
    "Comparison": "commands.compare.results",
    "Example": "types",
    "FactoredAdam": "gradients.adam",
    "GradientBatch": "gradients.passes",
    "Message": "types",
    "Pool": "data.pool",
    "Projection": "gradients.projection",
    "RowStore": "store.rows",
    "Scores": "commands.score",
    "Selection": "commands.select.select",
    "Signal": "types",
    "Signals": "types",
    "Subset": "types",
    "TrajectoryCallback": "model.warmup",
    "compare": "commands.compare.compare",
    "extract": "gradients.passes",
    "read_moments": "model.checkpoints",
    "read_pool": "data.pool",
    "score": "commands.score",
    "select": "commands.select.select",
    "write_subset": "data.write",
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

__getattr__, __dir__ = lazy_face(__name__, _HOMES)
