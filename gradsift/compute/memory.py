"""What every pass over rows does when memory runs out: its batches are halved, and a row that does
not fit alone is left out.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("gradsift")

T = TypeVar("T")


class Halving:
    """Runs batches of rows within the memory there is, and keeps what that took.

    `limit`: the most padded tokens of a batch from now on, None while nothing ran out. `count`: how
    often a batch was halved; above 0 the numbers are right but not bit-reproducible. `failed`: rows
    that do not fit in memory alone. One object may serve several passes: what fits was then learned
    once.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self.count = 0
        self.failed: set[int] = set()

    def run(
        self, batches: Sequence[np.ndarray], lengths: np.ndarray, work: Callable[[np.ndarray], T]
    ) -> Iterator[tuple[np.ndarray, T | None, int]]:
        """Yields (batch, work(batch), how often it was halved) for batches of row numbers, each row
        once; (batch, None, ...) for a batch of one row that does not fit, with a warning in the
        log. `lengths`: tokens of every row. `work` may be called again with part of a batch that it
        has failed at, so it must leave nothing behind when it raises, and it returns something.
        """
        todo = deque((batch, 0) for batch in batches)
        while todo:
            batch, halvings = todo.popleft()
            size = len(batch) * int(lengths[batch].max())
            made = None
            if self.limit is None or size <= self.limit or len(batch) == 1:
                try:
                    made = work(batch)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    self.limit = max(1, size // 2)
            if made is not None:
                yield batch, made, halvings
            elif len(batch) > 1:
                half = len(batch) // 2
                todo.extendleft([(batch[half:], halvings + 1), (batch[:half], halvings + 1)])
                self.count += 1
                log.warning(
                    "out of memory at %d rows of %d tokens: the batch is halved",
                    len(batch),
                    size // len(batch),
                )
            else:
                self.failed.add(int(batch[0]))
                log.warning(
                    "row %d (%d tokens) does not fit in memory on its own: it is left out",
                    int(batch[0]),
                    size,
                )
                yield batch, None, halvings


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, the system or Python ran out of memory."""
    said = (
        "out of memory",
        "DefaultCPUAllocator",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(
        s in str(error) for s in said
    )
