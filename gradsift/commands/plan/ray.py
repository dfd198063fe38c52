"""What a plan looks like over Ray workers: how many there are, how the time falls, and what object
store and memory they need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from gradsift.compute.ray import Ray
from gradsift.signals.backends import BACKENDS
from gradsift.signals.curvature.exact import MEMORY
from gradsift.types import counted

if TYPE_CHECKING:
    from gradsift.commands.plan.costs import StageCost
    from gradsift.commands.plan.probe import Rates
    from gradsift.stages.pipeline import Pipeline

# and influence through the curvature
MAPPED = ("gradients", "embeddings", "loss", "tuned", "ifd", "curvature")
STARTING = 15.0  # seconds until a worker has its libraries, without the model
MINIMUM = 75 << 20  # Ray takes no smaller object store


@dataclass(frozen=True)
class Spread:
    """`workers` of `threads` threads and `gpus` GPUs each. `seconds`: the whole selection with
    them. Bytes: of the object store on every machine, `shared` once and `each` for each of its
    workers; of memory, `memory` for each worker besides.
    """

    workers: int
    threads: int
    gpus: int
    seconds: float
    shared: int
    each: int
    memory: int

    def store(self, workers_here: int) -> int:
        """Bytes of object store that a machine with so many of the workers needs."""
        return max(MINIMUM, self.shared + workers_here * self.each)

    def line(self) -> str:
        kind = counted(self.gpus, "GPU") if self.gpus else counted(self.threads, "thread")
        return (
            f"ray      {counted(self.workers, 'worker')} of {kind}; each takes"
            f" {self.memory / 1e6:,.0f} MB of"
            f" memory, and of its machine's object store {self.each / 1e6:,.1f} MB besides"
            f" {self.shared / 1e6:,.1f} MB once (--object-store-memory {self.store(self.workers)}"
            " where all are on one machine)"
        )


def spread(pipeline: Pipeline, stages: Sequence[StageCost], rates: Rates) -> Spread | None:
    """None for the serial executor. Of a cluster that is running the room is asked; a local one is
    not started for a plan.
    """
    executor = pipeline.executor
    if not isinstance(executor, Ray):
        return None
    gpus, threads = executor.gpus, pipeline.threads
    wanted = pipeline.config.machine.workers
    if executor.address is not None:
        workers = wanted or executor.room()
    else:
        local = torch.cuda.device_count() // gpus if gpus else (psutil.cpu_count() or 1) // threads
        workers = wanted or max(1, local)
    todo = [stage for stage in stages if not stage.reused]
    mapped = [stage for stage in todo if stage.stage in MAPPED or _through_curvature(stage)]
    alone = sum(stage.seconds for stage in todo) - sum(stage.seconds for stage in mapped)
    rows = pipeline.config.gradients.shard_rows
    targets = len(pipeline.sides["target"]) if "target" in pipeline.sides else 0
    results, shared = [0], [0]
    for stage in mapped:
        size = min(rows, stage.rows)
        results.append(
            {
                "gradients": size * (2 * rates.dim + 17),
                "embeddings": size * (2 * rates.hidden + 17),
                "curvature": rates.factors,
                "influence": 4 * size * targets,
            }.get(stage.stage, 8 * size)
        )
        shared.append(
            {"curvature": rates.factors, "influence": min(targets * rates.tracked, MEMORY)}.get(
                stage.stage, 12 * rates.parameters
            )
        )
    given = max(
        (min(rows, stage.rows) * (8 * stage.tokens // max(stage.rows, 1) + 9) for stage in mapped),
        default=0,
    )
    return Spread(
        workers=workers,
        threads=threads,
        gpus=gpus,
        seconds=alone
        + sum(stage.seconds for stage in mapped) / max(workers, 1)
        + (STARTING if mapped else 0.0),
        shared=max(shared),
        each=given + max(results),
        memory=rates.peak_bytes + 3 * max(results),
    )


def _through_curvature(stage: StageCost) -> bool:
    """Whether a stage is influence through the curvature, by its backend's line in BACKENDS:
    workers map that, and no other influence.
    """
    return stage.stage == "influence" and BACKENDS[stage.label].curvature is not None
