"""The one loop over shards: every stage that works row by row runs through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gradsift.compute.executor import Executor
from gradsift.data.encode import EncodedRows
from gradsift.stages.context import Context
from gradsift.stages.work import ShardResult
from gradsift.store.provenance import made_on

if TYPE_CHECKING:
    from torch import Tensor


class Keeper(Protocol):
    """Where finished shards are kept: a `RowStore` or a `Partial`.

    `shards`: the rows of each shard. `problems`: the damaged shards that it found, in words.
    """

    @property
    def shards(self) -> Sequence[slice]: ...

    @property
    def problems(self) -> Sequence[str]: ...

    def missing(self) -> list[int]:
        """Numbers of the shards that are absent or damaged."""
        ...

    def keep(
        self,
        shard: int,
        tensors: Mapping[str, Tensor],
        made: Mapping[str, str],
        failed: Collection[int],
    ) -> None:
        """Writes a shard atomically. `failed`: places in the shard that did not fit in memory."""
        ...


def map_shards(
    context: Context,
    keeper: Keeper,
    work: Callable[[], Callable[[Any], ShardResult]],
    rows: EncodedRows | None,
    *,
    label: str,
    tokens: np.ndarray | None = None,
    executor: Executor | None = None,
) -> None:
    """Runs `work` on every shard that `keeper` lacks and keeps each result.

    Args:
        context: names the executor and the progress bar.
        keeper: lacks some shards; `work` is not built where it lacks none.
        work: a maker for `Executor.map`; it takes the encoded rows of a shard, or its number.
        rows: encoded rows of the side that is worked on; None where workers bring their rows.
        label: what the progress bar says.
        tokens: cost of each row on the progress bar, int [n]; default: its length.
        executor: default: the context's.

    Raises:
        Interrupted: after a signal; the shards that are kept stay.
        DiskFull, ResourceError: a result cannot be written.
    """
    executor = executor or context.executor
    part = None if rows is None else lambda shard: rows.part(keeper.shards[shard])
    cost = np.zeros(0) if rows is None else rows.lengths
    cost = cost if tokens is None else tokens
    missing = keeper.missing()
    for problem in keeper.problems:
        context.progress.note(f"made anew: {problem}")
    context.progress.start(
        sum(int(cost[keeper.shards[shard]].sum()) for shard in missing), "tokens", label
    )
    for shard, result in executor.map(work, missing, part):
        keeper.keep(shard, result.tensors, made_on(executor.gpu, result.halvings), result.failed)
        if executor.remote:  # a worker in this process has told its own progress, batch by batch
            context.progress.advance(int(cost[keeper.shards[shard]].sum()))
    context.progress.done()
