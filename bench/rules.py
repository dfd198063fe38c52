"""Speed of the selection rules, as ratios to something plain measured in the same run: `python
bench/rules.py` prints JSON.

    python bench/rules.py                     everything at the default sizes, under 3 minutes on 2
    cores
    python bench/rules.py --only kmeans,omp   some of it
    python bench/rules.py --full              the large sizes: 100k rows, 300k x 350, and TAGCOS
    whole over 1,000,000 rows on disk

`ratio` is always the rule's CPU seconds over those of `against`, which runs on the same data; a
goal is a bound on it. `ns_per_pick_and_row` of a rule that is linear in both stays where it is as
they grow. faiss is measured where it is installed. Set MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 (`make` does): without it glibc hands
every large block back to the kernel, and page faults dominate.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.methods.tagcos import Tagcos
from gradsift.rules import balance, blocks, kcenter, kmeans, knn, omp, penalty, walk
from gradsift.types import Signals

CLUSTERS = 100


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """(CPU seconds over all threads, wall seconds, result)."""
    cpu, wall = time.process_time(), time.perf_counter()
    out = call()
    return time.process_time() - cpu, time.perf_counter() - wall, out


def mixture(n: int, d: int, noise: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows around 100 random directions, noise `noise` times as long as the direction; and
    which direction each row has.
    """
    g = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(CLUSTERS, d, generator=g), dim=1)
    labels = torch.randint(0, CLUSTERS, (n,), generator=g)
    rows = torch.empty(n, d)
    for a, b in blocks.spans(n):
        rows[a:b] = blocks.unit(
            centres[labels[a:b]] + noise * torch.randn(b - a, d, generator=g) / d**0.5
        )
    return rows, labels


def spectrum(n: int, d: int, seed: int = 0) -> Tensor:
    """Unit rows without clusters: 200 directions of falling strength, heavy tails, some noise.
    Lloyd steps converge slowly here.
    """
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(200, d, generator=g) * (torch.arange(1, 201) ** -0.5)[:, None] / d**0.5
    rows = torch.empty(n, d)
    for a, b in blocks.spans(n):
        weights = torch.randn(b - a, 200, generator=g) / torch.randn(b - a, 3, generator=g).norm(
            dim=1, keepdim=True
        )
        rows[a:b] = blocks.unit(weights @ basis + 0.2 * torch.randn(b - a, d, generator=g) / d**0.5)
    return rows


def per_pick(rule: tuple[float, float, Any], picks: int, n: int) -> dict[str, float]:
    return {"ns_per_pick_and_row": round(rule[0] / picks / n * 1e9, 2)}


def record(
    rule: tuple[float, float, Any],
    plain: tuple[float, float, Any],
    against: str,
    goal: float | None = None,
    **more: Any,
) -> dict:
    out = {
        "cpu_s": round(rule[0], 3),
        "wall_s": round(rule[1], 3),
        "against": against,
        "against_cpu_s": round(plain[0], 3),
    }
    return out | {"ratio": round(rule[0] / plain[0], 2)} | ({"goal": goal} if goal else {}) | more


def bench_kmeans(full: bool) -> dict:
    """20 steps, 100 clusters, against one product of the rows with 100 centres."""
    out = {}
    for n, d, goal in [(20_000, 1024, None), (20_000, 8192, 12.0)] + (
        [(100_000, 1024, 21.0)] if full else []
    ):
        for kind, rows in (("mixture", mixture(n, d)[0]), ("spectrum", spectrum(n, d))):
            centres = rows[:CLUSTERS].clone()
            floor = min(
                (timed(lambda r=rows, c=centres: r @ c.T) for _ in range(3)), key=lambda t: t[0]
            )
            rule = timed(
                lambda r=rows: kmeans.fit(r, CLUSTERS, rng=np.random.default_rng(0), iterations=20)
            )
            more = {"objective": round(rule[2].objective, 5)}
            if n == 20_000 and (full or d == 1024):
                more |= scikit(rows, rule[2].objective) | faiss_kmeans(rows)
            out[f"{kind} {n} x {d}"] = record(rule, floor, "one X @ C.T", goal, **more)
    return out


def scikit(rows: Tensor, objective: float) -> dict:
    from sklearn.cluster import KMeans

    cpu, _, found = timed(
        lambda: KMeans(CLUSTERS, n_init=1, max_iter=20, random_state=0).fit(rows.numpy())
    )
    theirs = found.inertia_ / len(rows)
    return {
        "sklearn_objective": round(theirs, 5),
        "sklearn_cpu_s": round(cpu, 2),
        "objective_ratio": round(objective / theirs, 4),
        "goal_objective": 1.005,
    }


def faiss_kmeans(rows: Tensor) -> dict:
    """20 steps of faiss over all rows, drawn centres: its default, with no limit of points per
    centre.
    """
    try:
        import faiss
    except ImportError:
        return {}
    found = faiss.Kmeans(
        rows.shape[1], CLUSTERS, niter=20, seed=0, max_points_per_centroid=len(rows)
    )
    cpu, _, _ = timed(lambda: found.train(rows.numpy()))
    return {
        "faiss_objective": round(float(found.obj[-1]) / len(rows), 5),
        "faiss_cpu_s": round(cpu, 2),
    }


class Stored:
    """Rows of a float16 file, read from it at every slice."""

    def __init__(self, path: Path, n: int, d: int) -> None:
        self.path, self.shape = path, (n, d)

    def __getitem__(self, rows: slice, /) -> Tensor:
        return torch.from_numpy(
            np.array(np.memmap(self.path, dtype=np.float16, mode="r", shape=self.shape)[rows])
        )


def bench_million(full: bool) -> dict:
    """TAGCOS over 1,000,000 x 1,024 float16 rows on disk (100 clusters, 3 steps, 5 % matched), in a
    process of its own: its peak memory.
    """
    if not full:
        return {}
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        return alone.apply(million, (1_000_000, 1024, torch.get_num_threads()))


def million(n: int, d: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.f16"
        stored = np.memmap(path, dtype=np.float16, mode="w+", shape=(n, d))
        piece = mixture(20_000, d)[0]
        for a in range(0, n, len(piece)):
            stored[a : a + len(piece)] = piece + 0.3 * torch.randn(len(piece), 1) * piece.roll(
                a // len(piece), 1
            )
        stored.flush()
        del stored
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        method = Tagcos(clusters=CLUSTERS, iterations=3)
        given = Signals({method.rows: Stored(path, n, d)}, n)
        cpu, wall, found = timed(
            lambda: method.select(given, n // 20, rng=np.random.default_rng(0))
        )
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = {
        "cpu_s": round(cpu, 1),
        "wall_s": round(wall, 1),
        "objective": round(found.notes["objective"], 5),
        "picked": len(found),
    }
    out["largest_cluster"] = int(np.bincount(found.notes["cluster"]).max())
    peak = {
        "peak_gb": round(after / 2**20, 2),
        "peak_before_gb": round(before / 2**20, 2),
        "goal_peak_gb": 6,
    }
    return {f"{n} x {d} float16": out | peak}


def plain_graph(rows: Tensor, k: int) -> Tensor:
    """Every block of rows times all rows, and the largest products."""
    found = []
    for a, b in blocks.spans(len(rows)):
        product = rows[a:b] @ rows.T
        product[torch.arange(b - a), torch.arange(a, b)] = -torch.inf
        found.append(product.topk(k, dim=1).indices)
    return torch.cat(found)


def bench_knn(full: bool) -> dict:
    out = {}
    for n, d in [(20_000, 1024)] + ([(20_000, 8192), (100_000, 1024)] if full else []):
        rows = spectrum(n, d)
        plain = timed(lambda r=rows: plain_graph(r, 10))
        exact = timed(lambda r=rows: knn.graph(r, 10))
        close = timed(lambda r=rows: knn.graph(r, 10, exact=False))
        for name, rule, goal in (("exact", exact, 1.1), ("bfloat16", close, 0.5)):
            share = knn.recall(rows, rule[2][0], rng=np.random.default_rng(0))
            out[f"{name} {n} x {d}"] = record(
                rule,
                plain,
                "float32 block products + top-k",
                goal,
                recall=round(share, 5),
                goal_recall=0.999,
            )
    return out


def plain_pursuit(atoms: Tensor, target: Tensor, budget: int) -> list[int]:
    """Per pick: the correlations, a least-squares solve of the chosen atoms from scratch, the
    residual from all atoms' weights.
    """
    chosen: list[int] = []
    weights = torch.zeros(len(atoms))
    residual = target
    while len(chosen) < budget:
        chosen.append(int((atoms @ residual).argmax()))
        part = atoms[chosen]
        gram = part @ part.T + torch.eye(len(chosen))
        weights[chosen] = torch.linalg.lstsq(gram, (part @ target)[:, None]).solution[:, 0]
        residual = target - weights @ atoms
    return chosen


def bench_omp(full: bool) -> dict:
    """5 % of the rows, in 100 clusters and in one."""
    out = {}
    for n, d in [(20_000, 1024), (20_000, 8192)] + ([(100_000, 1024)] if full else []):
        rows, labels = mixture(n, d)
        parts = [rows[labels == c] for c in range(CLUSTERS)]
        jobs = [(part, part.mean(0), len(part) // 20) for part in parts]
        rule = timed(lambda j=jobs: [omp.fill(*job, ridge=1.0) for job in j])
        plain = timed(lambda j=jobs: [plain_pursuit(*job) for job in j])
        out[f"{CLUSTERS} clusters of {n} x {d}"] = record(
            rule, plain, "two passes and lstsq per pick", 1.0
        )
    rows = mixture(10_000, 1024)[0]
    rule = timed(lambda: omp.fill(rows, rows.mean(0), 500, ridge=1.0))
    plain = timed(lambda: plain_pursuit(rows, rows.mean(0), 500))
    out["one cluster of 10000 x 1024"] = record(rule, plain, "two passes and lstsq per pick", 1.0)
    return out


def bench_balance(full: bool) -> dict:
    """15 % of n rows x 350 targets; against evaluating every row at every pick (measured on 50
    picks and scaled).
    """
    out = {}
    for n in [10_000, 20_000, 40_000] + ([300_000] if full else []):
        scores = torch.randn(n, 350, generator=torch.Generator().manual_seed(0))
        scores += torch.randn(n, 1, generator=torch.Generator().manual_seed(1))
        budget = n * 15 // 100
        rule = timed(lambda s=scores, k=budget: balance.greedy(s, k))
        sweep = timed(lambda s=scores: [(s - s[i]).amax(1) for i in range(5)])
        plain = (sweep[0] / 5 * budget, 0.0, None)
        out[f"{budget} of {n} x 350"] = record(
            rule, plain, "every row at every pick (scaled from 5)", **per_pick(rule, budget, n)
        )
    return out


def bench_others(full: bool) -> dict:
    n, d = 20_000, 1024
    rows = spectrum(n, d)
    floor = timed(lambda: rows @ rows[:1000].T)
    graph = knn.graph(rows, 20)[0]
    directions = rows[:20]
    rng = np.random.default_rng
    against = "products with 1,000 rows"
    out = {}
    for part in (5_000, 10_000, 20_000):
        plain = timed(lambda p=part: rows[:p] @ rows[:1000].T)
        rule = timed(lambda p=part: kcenter.farthest_first(rows[:p], 1000, rng=rng(0)))
        out[f"farthest_first 1000 of {part} x {d}"] = record(
            rule, plain, against, **per_pick(rule, 1000, part)
        )
    return out | {
        f"diverse 1000 of {n} x {d}": record(
            timed(lambda: penalty.diverse(rng(0).random(n), rows, 1000)), floor, against
        ),
        f"gradient_walk 20 x 50 of {n} x {d}": record(
            timed(lambda: walk.gradient_walk(rows, directions, [50] * 20, graph)), floor, against
        ),
    }


BENCHES = {
    "kmeans": bench_kmeans,
    "million": bench_million,
    "knn": bench_knn,
    "omp": bench_omp,
    "balance": bench_balance,
    "others": bench_others,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="also the large sizes (tens of minutes, 6 GB of memory, 2 GB of disk)",
    )
    parser.add_argument(
        "--only", default=",".join(BENCHES), help="comma-separated: " + ", ".join(BENCHES)
    )
    options = parser.parse_args()
    results = {}
    for name in options.only.split(","):
        results[name] = BENCHES[name](options.full)
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    print(
        json.dumps(
            {"threads": torch.get_num_threads(), "torch": torch.__version__} | results, indent=2
        )
    )


if __name__ == "__main__":
    main()
