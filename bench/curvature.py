"""What fitting EK-FAC and scoring with it cost, as a ratio to a plain training step of the same
parameters in the same run.

    python bench/curvature.py [--rounds 5] [--rows 48] [--targets 8 64 256] [--kronfluence] [--json
    FILE]

Model, rows and floor are those of bench/engine.py: a random Llama, all 28 block linears, fp32, one
thread; the floor is forward and backward with the batch's weight gradients. Arms and floor take
turns within a round; a ratio is the arm's CPU time over the floor's of the same round, printed as
median (min, max). `fit` is both passes, `factors` and `eigenvalues`, without the
eigendecompositions, which are paid once per fit and given apart in ms (`once_cpu_ms`). `scores-M`:
the pool's side of M whole (full rank) targets, prepared before; `scores-M-low`: the same at rank
32, with `--low`. What preparing costs is given apart, in ms per target. `goal` is the bound the
project set itself; nothing fails when it is missed. `added_mb`, `memory_ratio`: peak memory that
one more pass adds to what the process held before it (the targets, the basis), and its ratio to the
floor's.

`usual`: with torch's own matrix products, as the floor's, on a processor where ours go to oneDNN
(bench/engine.py); beside scores only.

`--rows 2000 --targets --rounds 2` measures the fit alone, on as many rows as the goal names:
minutes of one core a round, and as much twice before the first.

`--kronfluence` (the package must be installed; docs/benchmarks.md) fits EK-FAC and scores 8 targets
with kronfluence over the same model, rows and labels: true labels, per-example eigenvalue
correction, damping 0.1 x mean eigenvalue of each layer, which it has as an option
(`damping_factor=None`); its default is 1e-8 in all layers. Given are its cost against the floor,
and how its scores lie with ours: for each target, over the pool, the Spearman and the Pearson
correlation (least and mean of the targets). Both take a row's loss as the mean over its supervised
tokens. What differs by definition is which tokens enter the factors: "all tokens" masks padding
alone, as kronfluence is commonly run, "same tokens" also the last token of each row, whose
activations cannot reach the loss and which ours leaves out.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# first of all, because it sets the allocator and one thread for the whole process, by starting it
# again
from engine import added_memory, base_model, floor, make_rows, with_usual_products  # isort: skip
import numpy as np
import torch
from peers import Arm, Rows, losses, pad
from torch import Tensor, nn

from gradsift.compute import machine
from gradsift.model.layers import tracked_modules
from gradsift.signals.curvature.exact import (
    influence_scores,
    prepare_targets,
    rank_agreement,
    score_pool,
)
from gradsift.signals.curvature.fit import Fitting, fit

GOALS = {"fit": 2.0, "scores-8": 1.2, "scores-64": 1.5, "scores-256": 3.0}


def make_arms(
    n: int, budget: int, counts: list[int], low: bool
) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """The arms by name, and what is paid once, in ms."""
    model, rows = base_model(), make_rows(n)
    targets = make_rows(max(counts, default=0))
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
    if machine.prefers_onednn() and counts:
        arms |= {
            f"{name}-usual": with_usual_products(arms[name]) for name in ("factors", "eigenvalues")
        }
    for m in counts:
        for name, rank in ((f"scores-{m}", None), (f"scores-{m}-low", 32))[: 1 + low]:
            start = time.process_time()
            memory = 1 << 62 if rank is None else 1 << 29
            prepared = prepare_targets(
                model, targets[:m], inverse, modules="linear", rank=rank, memory=memory
            )
            once[f"prepare-{name}"] = 1000 * (time.process_time() - start) / m
            arms[name] = lambda prepared=prepared: void(
                list(score_pool(model, rows, prepared, modules="linear", token_budget=budget))
            )
    return arms, once


def low_rank_agreement(n: int, targets: int, budget: int) -> dict[str, Any]:
    """How rank-32 scores order the rows against those of whole targets: Spearman, least and mean
    over the targets.
    """
    model, rows = base_model(), make_rows(n)
    inverse = fit(model, rows, modules="linear", token_budget=budget).inverse()
    found = rank_agreement(
        model,
        rows,
        make_rows(n + targets)[-targets:],
        inverse,
        32,
        modules="linear",
        token_budget=budget,
    )
    return {
        "rank": 32,
        "targets": targets,
        "spearman": [round(float(found.min()), 5), round(float(found.mean()), 5)],
    }


def against_kronfluence(rows: Rows, targets: Rows, budget: int) -> dict[str, Any]:
    """Its cost and its agreement with ours, by which tokens enter the factors."""
    model = base_model()
    names = list(tracked_modules(model, "linear"))
    inverse = fit(model, rows, modules="linear", token_budget=budget).inverse()
    parts = list(
        influence_scores(
            model, rows, targets, inverse, modules="linear", token_budget=budget, memory=1 << 62
        )
    )
    order = np.argsort(np.concatenate([indices for indices, _ in parts]))
    ours = torch.cat([scores for _, scores in parts])[order]
    plain = floor(model, [model.get_submodule(n).weight for n in names], rows)  # type: ignore[arg-type]
    plain()
    found: dict[str, Any] = {"rows": len(rows), "targets": len(targets)}
    for label, spared in (("all tokens", 0), ("same tokens", 1)):
        step = cpu_seconds(plain)
        theirs, seconds = kronfluence_scores(rows, targets, names, spared)
        found[label] = {what: round(took / step, 2) for what, took in seconds.items()} | agreement(
            ours, theirs
        )
    return found


def kronfluence_scores(
    rows: Rows, targets: Rows, names: list[str], spared: int, plain: nn.Module | None = None
) -> tuple[Tensor, dict[str, float]]:
    """(scores [n, m], CPU seconds of its fit and of its scoring). `spared`: so many last tokens of
    each row are masked beside the padding. `plain`: the model, which it changes; the bench's own
    otherwise.
    """
    from kronfluence.analyzer import Analyzer, prepare_model  # type: ignore[import-not-found]
    from kronfluence.arguments import FactorArguments, ScoreArguments  # type: ignore[import-not-found]
    from kronfluence.task import Task  # type: ignore[import-not-found]
    from kronfluence.utils.dataset import DataLoaderKwargs  # type: ignore[import-not-found]

    class Language(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            return losses(
                model(input_ids=batch["ids"], use_cache=False).logits, batch["labels"]
            ).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch["mask"]

    def collate(part: Rows) -> dict[str, Tensor]:
        ids, labels = pad(part)
        ends = torch.tensor([len(row["input_ids"]) - spared for row in part])
        return {
            "ids": ids,
            "labels": labels,
            "mask": (torch.arange(ids.shape[1]) < ends[:, None]).long(),
        }

    task, seconds = Language(), {}
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(base_model() if plain is None else plain, task)
        analyzer = Analyzer(
            "bench", model, task, cpu=True, output_dir=folder, disable_tqdm=True, log_level=40
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
        settings = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        # 0.1 x mean eigenvalue of the layer; its own default is 1e-8, absolute
        relative = ScoreArguments(damping_factor=None)
        seconds["fit"] = cpu_seconds(
            lambda: analyzer.fit_all_factors(
                "f", rows, per_device_batch_size=8, factor_args=settings
            )
        )  # type: ignore[arg-type]
        seconds[f"scores-{len(targets)}"] = cpu_seconds(
            lambda: analyzer.compute_pairwise_scores(
                "s", "f", targets, rows, len(targets), 8, score_args=relative
            )  # type: ignore[arg-type]
        )
        scores = analyzer.load_pairwise_scores("s")
    assert scores is not None
    return scores["all_modules"].T.float(), seconds


def cpu_seconds(run: Arm) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def agreement(a: Tensor, b: Tensor) -> dict[str, list[float]]:
    """[least, mean] over the columns of two score matrices [n, m]."""

    def correlate(x: Tensor, y: Tensor) -> list[float]:
        x, y = (v.double() - v.double().mean(0) for v in (x, y))
        each = (x * y).sum(0) / (x.norm(dim=0) * y.norm(dim=0))
        return [round(float(each.min()), 5), round(float(each.mean()), 5)]

    ranks = [v.argsort(0).argsort(0) for v in (a, b)]
    return {"spearman": correlate(ranks[0], ranks[1]), "pearson": correlate(a, b)}


def void(value: object) -> None:
    assert value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument(
        "--budget", type=int, default=1024, help="padded tokens per batch of the engine"
    )
    parser.add_argument("--targets", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument(
        "--kronfluence",
        action="store_true",
        help="compare with kronfluence, which must be installed",
    )
    parser.add_argument("--low", action="store_true", help="also score against targets of rank 32")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    arms, once = make_arms(args.rows, args.budget, args.targets, args.low)
    for run in arms.values():
        run()
    memory = {name: added_memory(run, "cpu") for name, run in arms.items()}
    whole = [tail for tail in ("", "-usual") if f"factors{tail}" in arms]
    for tail in whole:
        memory[f"fit{tail}"] = max(memory[f"factors{tail}"], memory[f"eigenvalues{tail}"])
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, run in arms.items():
            gc.collect()
            start = time.process_time()
            run()
            cpu[name].append(time.process_time() - start)
    for tail in whole:
        cpu[f"fit{tail}"] = [
            a + b for a, b in zip(cpu[f"factors{tail}"], cpu[f"eigenvalues{tail}"], strict=True)
        ]
    report = {
        "torch": torch.__version__,
        "rounds": args.rounds,
        "rows": args.rows,
        "token_budget": args.budget,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "once_cpu_ms": {name: round(ms, 1) for name, ms in once.items()},
        "arms": {name: figures(name, cpu, memory, args.rows) for name in cpu},
    }
    if args.low:
        report["low"] = low_rank_agreement(args.rows, 8, args.budget)
    if args.kronfluence:
        report["kronfluence"] = against_kronfluence(
            make_rows(args.rows), make_rows(args.rows + 8)[-8:], args.budget
        )
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


def figures(
    name: str, cpu: dict[str, list[float]], memory: dict[str, float], rows: int
) -> dict[str, object]:
    ratios = [a / f for a, f in zip(cpu[name], cpu["floor"], strict=True)]
    spread = [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]
    return {
        "cpu_ms_per_row": round(1000 * statistics.median(cpu[name]) / rows, 2),
        "cpu_ratio": spread,
        "goal": GOALS.get(name),
        "added_mb": round(memory[name]),
        "memory_ratio": round(memory[name] / memory["floor"], 2),
    }


if __name__ == "__main__":
    main()
