"""How shards were made, where that can change their last digits: on which kind of GPU, and whether
batches were halved for want of memory.

It stands in the metadata of each shard's file, so a stage that was stopped, or mended, tells of all
its shards when it is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gradsift.store.tensors import TensorFile
from gradsift.types import counted

_GPU, _HALVINGS = "gpu", "halvings"


def made_on(gpu: str, halvings: int = 0) -> dict[str, str]:
    """Metadata of a shard. `gpu`: the kind, "" for a CPU, whose kind the recipe names; `halvings`:
    how often a batch of it was cut in two.
    """
    return ({_GPU: gpu} if gpu else {}) | ({_HALVINGS: str(halvings)} if halvings else {})


def summary(shards: Iterable[Path]) -> dict[str, Any]:
    """What a manifest's `extra` says of these files: {"gpus": {kind: shards}, "batch_halvings":
    {"times": n, "shards": k}}, each where there is any. Raises IntegrityError where one is
    damaged.
    """
    gpus, halved = Counter[str](), list[int]()
    for path in shards:
        with TensorFile(path) as file:
            meta = file.meta
        gpus.update([meta[_GPU]] if _GPU in meta else [])
        halved += [int(meta[_HALVINGS])] if _HALVINGS in meta else []
    found: dict[str, Any] = {"gpus": dict(sorted(gpus.items()))} if gpus else {}
    return found | (
        {"batch_halvings": {"times": sum(halved), "shards": len(halved)}} if halved else {}
    )


def warnings(name: str, extra: Mapping[str, Any]) -> list[str]:
    """What a result says of an artifact `name` it was made from, whose numbers another run would
    have within tolerance only.
    """
    found, gpus, halved = [], extra.get("gpus", {}), extra.get("batch_halvings")
    if len(gpus) > 1:
        kinds = ", ".join(f"{count:,} on {kind}" for kind, count in gpus.items())
        found.append(
            f"the shards of {name} were made on more than one kind of GPU ({kinds}): equal within"
            " tolerance, not bit for bit"
        )
    if halved:
        times, shards = halved["times"], halved["shards"]
        found.append(
            f"batches were halved {counted(times, 'time')} in {counted(shards, 'shard')} of"
            f" {name}, for want of"
            " memory: equal within tolerance, not bit for bit"
        )
    return found
