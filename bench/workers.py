"""What a second worker is worth: gradients of the same rows in this process, by one Ray worker and
by two, of one thread each.

    python bench/workers.py [--rounds 3] [--rows 400] [--dim 8192] [--shard-rows 16] [--workers 1 2]
    [--folder DIR] [--json FILE]

Job: the pool's gradients at the last checkpoint of `gradsift select less` on the playground, with a
random Llama of hidden size 256; the warm-up is made once and copied. In every round each arm opens
the run, makes the rows once (workers start and load the model), deletes them, and makes them again:
that second time is measured, writing included. Printed: medians over the rounds (least, most) of
the speed-up of the largest number of workers over the smallest, and of that over this process, and
whether all content digests are equal. Leave as many cores free as there are workers: on one core
two workers share it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import steady  # noqa: F401
from overheads import prepare

# isort: split
from gradsift.commands.preflight import Inputs
from gradsift.commands.session import opened
from gradsift.stages.rows import gradients, recipe


def arm(
    run: Path, parts: dict[str, Any], settings: dict[str, Any], workers: int
) -> tuple[float, str]:
    """(seconds, content digest) of the pool's rows; workers 0 = this process."""
    how = {"executor": "ray", "workers": workers} if workers else {"executor": "serial"}
    with opened(
        Inputs(run, **parts, settings={**settings, "machine": {"threads": 1, **how}})
    ) as pipeline:
        last = pipeline.checkpoint_count - 1
        shutil.rmtree(gradients(pipeline, "pool", last, "adam").path)
        started = time.perf_counter()
        gradients(pipeline, "pool", last, "adam")
        seconds = time.perf_counter() - started
        made = pipeline.stored(recipe(pipeline, "pool", last, "adam"))
        assert made is not None
        return seconds, made.content


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--shard-rows", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = {
        "encode": {"max_length": 256},
        "gradients": {"dim": args.dim, "shard_rows": args.shard_rows},
        "warmup": {"min_rows": 64, "min_steps": 20, "checkpoints": 1},
    }
    arms = [0, *args.workers]
    seconds: dict[int, list[float]] = {workers: [] for workers in arms}
    digests: set[str] = set()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="gradsift-workers-") as name:
        folder = Path(name)
        parts = prepare(folder, args.rows)
        with opened(
            Inputs(folder / "base", **parts, settings={**settings, "machine": {"threads": 1}})
        ) as pipeline:
            pipeline.checkpoints()
        for number in range(args.rounds):
            for workers in arms if number % 2 else reversed(arms):
                run = shutil.copytree(folder / "base", folder / "run")
                took, digest = arm(run, parts, settings, workers)
                seconds[workers].append(took)
                digests.add(digest)
                shutil.rmtree(run)

    def over(slow: int, fast: int) -> list[float]:
        ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
        return [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]

    most, least = max(args.workers), min(args.workers)
    found = {
        "same_digests": len(digests) == 1,
        f"speed_up_{most}_over_{least}_workers": over(least, most),
        f"speed_up_{least}_worker_over_this_process": over(0, least),
        "seconds": {
            "this process" if not n else f"workers {n}": [round(s, 2) for s in values]
            for n, values in seconds.items()
        },
        "cpus": len(os.sched_getaffinity(0)),
        "rounds": args.rounds,
        "rows": args.rows,
        "dim": args.dim,
        "shard_rows": args.shard_rows,
    }
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    if len(digests) > 1:
        sys.exit("the rows differ")


if __name__ == "__main__":
    main()
