"""Cost per row and per byte of every stage, measured here on one thread, and from it a selection of
1M, 10M and 100M rows on paper.

    python bench/scale.py [--rounds 5] [--rows 400] [--folder DIR] [--json bench/results/scale.json]

Measured: reading and encoding a pool (seconds and memory per row), a plain training step and
gradient rows by `gradsift plan`'s own probe (random Llama of hidden size 256), writing a store of
8,192 fp16 numbers a row, an influence product over it, k-means, matching, neighbours. Each is the
median of the rounds, with the least and the most. What the paper part takes for granted (GPUs,
disk, network, an 8B model) stands under "assumed": see bench/scaling.py. `python
docs/generate_scale.py` writes docs/scale.md from the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import steady  # noqa: F401
from overheads import Clock, prepare

# isort: split
import numpy as np
import torch
from scaling import Assumed, Measured, report

from gradsift import methods
from gradsift.commands.demo.playground import write_playground
from gradsift.commands.plan.probe import probe
from gradsift.commands.preflight import Inputs
from gradsift.commands.session import opened
from gradsift.compute import machine
from gradsift.data.encode import encode
from gradsift.data.pool import read_pool
from gradsift.rules import blocks, kmeans, knn, omp
from gradsift.signals.influence import score_blocks
from gradsift.store.rows import RowStore

# dimensions of a store, and of rows for rules that are measured per dimension
WIDE, NARROW = 8192, 1024


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


MEMORY = """
import sys
from pathlib import Path
from gradsift.data.pool import read_pool

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

read_pool([sys.argv[2]])
before = held()
pool = read_pool([sys.argv[1]])
print(held() - before)
"""


def unit_rows(n: int, d: int) -> torch.Tensor:
    return blocks.unit(torch.randn(n, d, generator=torch.Generator().manual_seed(0)))


def of_pool(folder: Path, rows: int) -> dict[str, Callable[[], float]]:
    """Reading a pool: seconds and bytes of memory per row."""
    pool = write_playground(folder / "large", rows=rows, dev=8, test=8).pool
    small = write_playground(folder / "small", rows=100, dev=8, test=8).pool

    def memory() -> float:
        """In a process of its own: this one has freed memory to put it in."""
        command = [sys.executable, "-c", MEMORY, str(pool), str(small)]
        return (
            int(
                subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    check=True,
                    cwd=Path(__file__).parents[1],
                ).stdout
            )
            / rows
        )

    return {
        "read_row": lambda: seconds(lambda: read_pool([pool])) / rows,
        "pool_memory_row": memory,
    }


def of_model(
    parts: dict[str, Any], folder: Path
) -> tuple[dict[str, Callable[[], float]], dict[str, list[float]]]:
    """What the plan's probe finds, and encoding; the second: its rates, as they come."""
    rates: dict[str, list[float]] = {"train": [], "gradients": [], "forward": []}
    settings = {
        "encode": {"max_length": 256},
        "gradients": {"dim": WIDE},
        "machine": {"threads": 1},
    }
    inputs = Inputs(folder / "never-made", parts["pool"], parts["target"], parts["model"], settings)
    with opened(inputs, keep=False) as pipeline:
        pool, selector = pipeline.sides["pool"], methods.make("less", {})
        encoded = encode(pool, pipeline.tokenizer, pipeline.config.encode)
    tokens, latest = int(encoded.lengths.sum()), []

    def ratio() -> float:
        latest[:] = [probe(pipeline, encoded, selector.needs())]
        for name, found in rates.items():
            found.append(getattr(latest[0], name))
        return latest[0].train / latest[0].gradients

    return {
        "gradient_over_training": ratio,
        "multiply": lambda: latest[0].multiply,
        "encode_token": lambda: (
            seconds(lambda: encode(pool, pipeline.tokenizer, pipeline.config.encode)) / tokens
        ),
    }, rates


def of_store(folder: Path, rows: int) -> tuple[dict[str, Callable[[], float]], dict[str, float]]:
    """Writing shards of wide rows, and a product over them; the second: bytes per row on disk."""
    given, column = unit_rows(2048, WIDE), torch.ones(2048)
    target, written = unit_rows(64, WIDE), [0]
    latest: list[RowStore] = []
    clocks: list[Clock] = []

    def write() -> float:
        if latest:
            shutil.rmtree(latest.pop().path)
        written[0] += 1
        path = folder / f"store-{written[0]}"
        ids = [f"row-{i:09d}" for i in range(rows)]
        store = RowStore.create(path, recipe_digest="0" * 64, ids=ids, dim=WIDE, spec={})
        with Clock(sync=True) as clock:
            for shard, where in enumerate(store.shards):
                count = where.stop - where.start
                store.write(
                    shard,
                    given[:count],
                    norms=column[:count],
                    losses=column[:count],
                    tokens=column[:count],
                )
        clocks[:], latest[:] = [clock], [store]
        return (clock.seconds["hash"] + clock.seconds["fsync"]) / (rows * WIDE * 2)

    def product() -> float:
        return (
            rows
            * 64
            * WIDE
            / seconds(lambda: [None for _ in score_blocks([latest[0]], [target], [1.0], "cosine")])
        )

    write()
    size = sum(path.stat().st_size for path in latest[0].path.iterdir())
    return {
        "safe_byte": write,
        "write_byte": lambda: clocks[0].seconds["write"] / (rows * WIDE * 2),
        "influence_multiply": product,
    }, {"bytes_per_row": size / rows}


def of_rules(rows: int) -> dict[str, Callable[[], float]]:
    units = unit_rows(rows, NARROW)

    def matching() -> float:
        started = time.perf_counter()
        found = omp.match(units, units.mean(0), rows // 20, ridge=0.0, tol=0.0)
        return (time.perf_counter() - started) / (len(found.residual_norms) * rows * NARROW)

    return {
        # greedy k-means++ costs about eight steps, as the plan has it
        "kmeans": lambda: (
            seconds(lambda: kmeans.fit(units, 50, rng=np.random.default_rng(0), iterations=10))
            / (rows * 50 * 18 * NARROW)
        ),
        "omp": matching,
        "knn": lambda: seconds(lambda: knn.graph(units, 10)) / (rows * rows / 2 * NARROW),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rows",
        type=int,
        default=400,
        help="of the pool whose gradients are taken; stores and rules take twenty times as many",
    )
    parser.add_argument(
        "--folder", type=Path, help="on which disk; the default is that of temporary files"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine.settle(1)
    others = os.getloadavg()[0]
    load = (
        f", other work on the machine (load {others:.1f} of {os.cpu_count()})"
        if others > 0.5
        else ""
    )
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="gradsift-scale-") as name:
        folder = Path(name)
        parts = prepare(folder, args.rows)
        of_all, rates = of_model(parts, folder)
        of_disk, stored = of_store(folder, 20 * args.rows)
        calls = {**of_pool(folder, 20 * args.rows), **of_all, **of_disk, **of_rules(20 * args.rows)}
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                found[name].append(call())
    measured = Measured(
        **{field.name: statistics.median(found[field.name]) for field in fields(Measured)}
    )
    spread = {name: [min(values), max(values)] for name, values in found.items()}
    conditions = {
        "rounds": args.rounds,
        "rows": args.rows,
        "cpu": machine.cpu_kind(),
        "versions": machine.versions(),
        "threads": 1,
        "load": load,
    }
    rows = {
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        **stored,
    }
    text = json.dumps(
        {"conditions": conditions, "rates": rows, "spread": spread, **report(Assumed(), measured)},
        indent=1,
    )
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
