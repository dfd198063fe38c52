"""Selection rules: pure functions of tensors. They import torch and numpy, and nothing of gradsift
outside this folder.

Conventions that hold in every rule:

- `rows` is a Tensor, or any object with `.shape` and `[a:b] -> Tensor` (a store); float16 is
allowed, sums are float32 or better.
- Rows are read in fixed blocks of 2,048 and block results are added in block order: a parallel
`map` gives the bytes of a serial one.
- The work is done where the rows lie; results are on the CPU. Indices are int64 tensors, values
  float32 (float64 where said, or where the input is float64).
- Ties go to the lowest index. Every loop chooses something, rules something out for good, or ends.
- A bad argument is a ValueError. Randomness comes only from the `rng` that is passed in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradsift.rules import (
        balance,
        blocks,
        components,
        duplicates,
        kcenter,
        kmeans,
        knn,
        omp,
        penalty,
        plane,
        sample,
        topk,
        walk,
    )

__all__ = [
    "balance",
    "blocks",
    "components",
    "duplicates",
    "kcenter",
    "kmeans",
    "knn",
    "omp",
    "penalty",
    "plane",
    "sample",
    "topk",
    "walk",
]


def __getattr__(name: str) -> Any:
    """A rule's module, imported on first use: what only names a rule need not wait for torch."""
    if name in __all__:
        return importlib.import_module(f"gradsift.rules.{name}")
    raise AttributeError(f"module 'gradsift.rules' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
