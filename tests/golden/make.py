"""Makes the golden folder of the current format: `python -m tests.golden.make tests/golden/v1`.
Done once per format version, then kept.

It is written by hand, without a model: its recipes name no build of torch and no kind of CPU, so it
is read alike everywhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gradsift.data.encode import EncodedRows
from gradsift.store.rows import RowStore
from gradsift.store.run import Run
from gradsift.store.tensors import write_tensors

IDS = ["a", "007", "../x", "", "=1+1", "\u00e9\n", "row 6", "\U0001f600"]
DIM, SHARD = 16, 3
ZERO, NOT_FINITE = 3, 5  # rows that the store quarantines
LINES = [
    b'{"id": "a", "text": "one"}',
    b'{"id":"007" ,"text":"two"}\r',
    '{"id": "../x", "text": "\u00e9"}'.encode(),
]


def raw(rows: Sequence[int]) -> torch.Tensor:
    """Row i has the entries 4, +-3 and 12, so that its length is 13 and its unit row is of
    thirteenths; times 2^i.
    """
    found = torch.zeros(len(rows), DIM)
    for at, i in enumerate(rows):
        found[at, i], found[at, (i + 5) % DIM], found[at, (i + 9) % DIM] = (
            4.0,
            -3.0 if i % 2 else 3.0,
            12.0,
        )
        found[at] *= 2.0**i
        if i == ZERO:
            found[at] = 0
        if i == NOT_FINITE:
            found[at, 0] = float("nan")
    return found


def fill(store: RowStore) -> None:
    for shard in store.missing():
        rows = list(range(len(IDS)))[store.shards[shard]]
        numbers = torch.tensor(rows, dtype=torch.float32)
        store.write(
            shard,
            raw(rows),
            norms=numbers + 0.5,
            losses=numbers / 4,
            tokens=torch.tensor(rows, dtype=torch.int32) + 1,
        )


def make(root: Path) -> None:
    run = Run(root / "run")
    numbers = ([5, 6, 7, 8, 9], [-100, 6, -100, 8, 9], [2, 3], [1, 2])
    tokens = EncodedRows(
        *[np.array(column, dtype=np.int32) for column in numbers],
        np.zeros(2, dtype=np.uint8),
        notes=["by hand"],
    )
    with run.lock():
        encode = run.artifact(
            "encode",
            version=1,
            config={"max_length": 8},
            inputs={"rows": "0" * 32},
            identity={"tokenizer": "none"},
        )
        tokens.save(encode.path)
        encode.finish(counts={"rows": 2})
        digests = {}
        for dtype in ("float16", "int8"):
            rows = run.artifact(
                "gradients",
                version=1,
                config={"dim": DIM, "store_dtype": dtype},
                inputs={"rows": encode.digest},
                identity={},
            )
            store = RowStore.create(
                rows.path,
                recipe_digest=rows.digest,
                ids=IDS,
                dim=DIM,
                spec={"projection": "sketch"},
                shard_rows=SHARD,
                dtype=dtype,
            )
            fill(store)
            store.seal(rows)
            digests[dtype] = rows.digest
        influence = run.artifact(
            "influence", version=1, config={"backend": "cosine"}, inputs=digests, identity={}
        )
        write_tensors(
            influence.path / "scores.safetensors",
            {"scores": torch.arange(8.0)[:, None] / 8},
            {"recipe": influence.digest},
        )
        influence.finish(counts={"rows": 8})
        select = run.artifact(
            "select",
            version=1,
            config={"method": "less"},
            inputs={"influence": influence.digest},
            identity={},
        )
        write_tensors(
            select.path / "subset.safetensors",
            {"indices": torch.tensor([2, 0, 1])},
            {"recipe": select.digest},
        )
        (select.path / "selected.jsonl").write_bytes(b"\n".join(LINES) + b"\n")
        select.finish(counts={"selected": 3, "asked": 3, "read": 8})
    (root / "run" / ".gradsift-lock").unlink()
    contents = {artifact.path.name: artifact.content for artifact in run.artifacts()}
    (root / "contents.json").write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if folder.exists():
        sys.exit(f"{folder} is kept as it is; name a new folder for a new format")
    make(folder)
