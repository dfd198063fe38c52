"""What a new query over a finished store costs, as a ratio to a pass that only reads the store's
files. No model is run.

    python bench/query.py FOLDER [--rows 100000] [--dim 8192] [--dtype float16] [--targets 1 8 64]
    [--rounds 5] [--json FILE]

Writes a store of random rows to FOLDER/pool with the product's own writer (1.6 GB in fp16; found
again, and verified, by a later call), and target rows to FOLDER/target. Then, in turns within a
round: `read`, every byte of the pool's shards read into one buffer of 1 MiB, and for each number of
targets `dot-M` and `less-M`, the scores of all rows through
`gradsift.signals.influence.score_blocks`, the code that `gradsift score` and every method use.
`first`: the same in a store that was just opened, which hashes every shard as it first reads it.
The files are in the page cache from the first, unmeasured pass on, if memory suffices: `cached`
says which share of the pool's pages is. One thread; a ratio is the arm's CPU time (the kernel's
included, which copies the pages) over the read's in the same round, printed as median (min, max);
`wall_ratio` is the same of wall time. `goal` is the project's own bound.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Sets the allocator and one thread for the whole process, by starting it again.
import engine  # noqa: F401  # isort: skip
import torch

from gradsift.signals.influence import score_blocks
from gradsift.store.packing import StoreDtype
from gradsift.store.rows import RowStore, RowView

GOAL = 4.0
MOST = 64  # target rows in the store


def write_store(path: Path, n: int, dim: int, dtype: StoreDtype, seed: int) -> RowStore:
    ids = [f"row-{i:08d}" for i in range(n)]
    store = RowStore.create(
        path, recipe_digest=f"{seed:032x}", ids=ids, dim=dim, spec={"rows": "random"}, dtype=dtype
    )
    for shard in store.missing():
        span = store.shards[shard]
        generator = torch.Generator().manual_seed(1000 * seed + shard)
        rows = torch.randn(span.stop - span.start, dim, generator=generator)
        column = torch.ones(len(rows))
        store.write(shard, rows, norms=rows.norm(dim=1), losses=column, tokens=column.int())
    return RowStore.open(path)


def read_files(files: list[Path]) -> None:
    buffer = bytearray(1 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def share_cached(files: list[Path]) -> float:
    """Of the files' pages, how many are in memory (mincore is not in Python: a page that costs no
    major fault is).
    """
    before = _major_faults()
    pages = 0
    for file in files:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            pages += len(mapped[:: mmap.PAGESIZE])
    return 1 - (_major_faults() - before) / pages


def _major_faults() -> int:
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[9])


def score(store: RowStore, target: RowStore, m: int, backend: str) -> None:
    done = 0
    for block in score_blocks([store], [RowView(target, range(m))], [1.0], backend):
        done += len(block)
    assert done == len(store)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--dtype", default="float16", choices=["float16", "int8"])
    parser.add_argument("--targets", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = write_store(args.folder / "pool", args.rows, args.dim, args.dtype, 1)
    target = write_store(args.folder / "target", MOST, args.dim, "float16", 2)
    files = sorted((args.folder / "pool").glob("rows-*.safetensors"))
    arms: dict[str, Callable[[], None]] = {"read": lambda: read_files(files)}
    for m in args.targets:
        for backend in ("dot", "less"):
            arms[f"{backend}-{m}"] = lambda m=m, backend=backend: score(store, target, m, backend)
    arms[f"first-{args.targets[0]}"] = lambda: score(
        RowStore.open(args.folder / "pool"), target, args.targets[0], "dot"
    )
    for run in arms.values():
        run()
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, run in arms.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - start)
    report = {
        "torch": torch.__version__,
        "rows": args.rows,
        "dim": args.dim,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "load": os.getloadavg(),
        "bytes": sum(f.stat().st_size for f in files),
        "cached": round(share_cached(files), 4),
        "arms": {name: figures(name, cpu, wall) for name in arms},
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


def figures(
    name: str, cpu: dict[str, list[float]], wall: dict[str, list[float]]
) -> dict[str, object]:
    def spread(times: dict[str, list[float]]) -> list[float]:
        ratios = [a / f for a, f in zip(times[name], times["read"], strict=True)]
        return [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]

    return {
        "cpu_s": round(statistics.median(cpu[name]), 3),
        "wall_s": round(statistics.median(wall[name]), 3),
        "cpu_ratio": spread(cpu),
        "wall_ratio": spread(wall),
        "goal": None if name == "read" else GOAL,
    }


if __name__ == "__main__":
    main()
