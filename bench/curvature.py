"""What fitting EK-FAC and scoring with it cost, as a ratio to a plain training step of the same parameters in the same run.

    python bench/curvature.py [--rounds 5] [--rows 48] [--targets 8 64 256] [--json FILE]

Model, rows and floor are those of bench/engine.py: a random Llama, all 28 block linears, fp32, one thread; the floor is forward and
backward with the batch's weight gradients. Arms and floor take turns within a round; a ratio is the arm's CPU time over the floor's of the
same round, printed as median (min, max). `fit` is both passes, `factors` and `eigenvalues`, without the eigendecompositions, which are paid
once per fit and given apart in ms (`once_cpu_ms`). `scores-M`: the pool's side of M whole (full rank) targets, prepared before;
`scores-M-low`: the same at rank 32, with `--low`. What preparing costs is given apart, in ms per target. `goal` is the bound the project
set itself; nothing fails when it is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# first of all, because it sets the allocator and one thread for the whole process, by starting it again
from engine import base_model, floor, make_rows  # isort: skip
import torch

from gradsift.curvature import Fitting, prepare_targets, score_pool
from gradsift.model import tracked_modules

GOALS = {"fit": 2.0, "scores-8": 1.2, "scores-64": 1.5, "scores-256": 3.0}


def make_arms(n: int, budget: int, counts: list[int], low: bool) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """The arms by name, and what is paid once, in ms."""
    model, rows = base_model(), make_rows(n)
    targets = make_rows(max(counts))
    weights = [module.weight for module in tracked_modules(model, "linear").values()]
    work = Fitting(model, rows, modules="linear", token_budget=budget)
    once: dict[str, float] = {}
    work.factors(0)
    start = time.process_time()
    basis = work.basis()
    once["eigendecompositions"] = 1000 * (time.process_time() - start)
    inverse = work.result().inverse()
    arms: dict[str, Callable[[], None]] = {
        "floor": floor(model, weights, rows),  # type: ignore[arg-type]
        "factors": lambda: void(work.sum_factors(0)),  # the shards' own work, without writing them
        "eigenvalues": lambda: void(work.sum_squares(0, basis)),
    }
    for m in counts:
        for name, rank in ((f"scores-{m}", None), (f"scores-{m}-low", 32))[: 1 + low]:
            start = time.process_time()
            memory = 1 << 62 if rank is None else 1 << 29
            prepared = prepare_targets(model, targets[:m], inverse, modules="linear", rank=rank, memory=memory)
            once[f"prepare-{name}"] = 1000 * (time.process_time() - start) / m
            arms[name] = lambda prepared=prepared: void(list(score_pool(model, rows, prepared, modules="linear", token_budget=budget)))
    return arms, once


def void(value: object) -> None:
    assert value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--budget", type=int, default=1024, help="padded tokens per batch of the engine")
    parser.add_argument("--targets", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument("--low", action="store_true", help="also score against targets of rank 32")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    arms, once = make_arms(args.rows, args.budget, args.targets, args.low)
    for run in arms.values():
        run()
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, run in arms.items():
            gc.collect()
            start = time.process_time()
            run()
            cpu[name].append(time.process_time() - start)
    cpu["fit"] = [a + b for a, b in zip(cpu["factors"], cpu["eigenvalues"], strict=True)]
    report = {
        "torch": torch.__version__, "rounds": args.rounds, "rows": args.rows, "token_budget": args.budget,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "once_cpu_ms": {name: round(ms, 1) for name, ms in once.items()},
        "arms": {name: figures(name, cpu, args.rows) for name in cpu},
    }  # fmt: skip
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


def figures(name: str, cpu: dict[str, list[float]], rows: int) -> dict[str, object]:
    ratios = [a / f for a, f in zip(cpu[name], cpu["floor"], strict=True)]
    spread = [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]
    return {"cpu_ms_per_row": round(1000 * statistics.median(cpu[name]) / rows, 2), "cpu_ratio": spread, "goal": GOALS.get(name)}


if __name__ == "__main__":
    main()
