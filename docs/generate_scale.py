"""Writes docs/scale.md from bench/results/scale.json: `python docs/generate_scale.py`. Numbers are never typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
HEAD = """# How it scales

Written by `python docs/generate_scale.py` from `bench/results/scale.json`, which `python bench/scale.py` measures. Three kinds of numbers,
told apart: **measured** (one thread of one machine, a small random model), **assumed** (an 8B model, a pool, GPUs, disk and network: nobody ran
them for this page), and **on paper** (what the two make). The arithmetic is that of `gradsift plan`, which measures your machine with your pool
and your model; trust it more than this page.
"""
MEANINGS = {
    "gradient_over_training": ("a token's gradient row over its plain training step", 1, ""),
    "read_row": ("reading a pool row from JSONL", 1e6, "microseconds"),
    "pool_memory_row": ("memory a pool row keeps", 1, "bytes"),
    "encode_token": ("encoding a token", 1e6, "microseconds"),
    "multiply": ("fp32 multiply-adds in a product of matrices", 1e-9, "10^9 / s"),
    "influence_multiply": (
        "multiply-adds of influence over stored rows (64 target rows)",
        1e-9,
        "10^9 / s",
    ),
    "kmeans": ("k-means, per row, cluster, step and dimension", 1e12, "picoseconds"),
    "omp": ("matching, per pick, row and dimension", 1e12, "picoseconds"),
    "knn": ("neighbours, per pair and dimension", 1e12, "picoseconds"),
    "safe_byte": ("hash and fsync, per stored byte", 1e9, "nanoseconds"),
    "write_byte": ("writing, per stored byte", 1e9, "nanoseconds"),
}
BYTES = ("driver_memory", "driver_disk", "disk_bytes", "network_bytes")
TITLES = {
    "less": "LESS: influence of stored rows on a target",
    "tagcos": "TAGCOS: clusters and matching, no target",
    "g2is": "G2IS: a graph of neighbours",
}
END = """## What to do

- **The gradients take too long**: score with a proxy model of the same family (`--model`), at one checkpoint (`warmup.checkpoints = 1` in the
  TOML), or cut the pool first with a method that needs one forward pass (`rds`) or none (`dsir`), then select from what is left.
- **The warm-up takes too long**: it is one process on one GPU, for its steps follow from each other. Its cost is a share of the pool: lower
  `warmup.share`.
- **The disk or the network fills**: a row takes two bytes per dimension and a little. Lower `--dim`; `store_dtype = "int8"` halves what is left.
- **Matching takes too long**: it is one pass over a cluster per pick, so its cost grows with the square of the pool at a fixed number of
  clusters, and a cluster over 1 GiB in fp32 is read again for every pick. Raise `-o clusters=` with the pool; k-means grows only in proportion.
  Both are spread over Ray workers that can read the run folder; the figures here are of the driver alone.
- **The neighbours take too long**: all pairs are quadratic. `-o exact=false` is a constant factor; beyond a few million rows cut the pool first.
- **The driver's memory fills**: the pool's ids and places, and the tokens while they are encoded, are held in memory. Split the pool by source,
  or cut it first.
"""


def main() -> None:
    results = json.loads(
        (ROOT.parent / "bench" / "results" / "scale.json").read_text(encoding="utf-8")
    )
    (ROOT / "scale.md").write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    parts = [HEAD, _measured(results), _assumed(results), "## On paper\n"]
    for method, sizes in results["projected"].items():
        parts.append(f"### {TITLES[method]}\n")
        for n, found in sizes.items():
            parts += [_stages(int(n), found), _breaks(found)]
        parts.append(_remedies(sizes))
    return "\n".join([*parts, END])


def _measured(results: Mapping[str, Any]) -> str:
    about, rates = results["conditions"], results["rates"]
    speeds = ", ".join(f"{name} {value:,.0f}" for name, value in rates["tokens_per_second"].items())
    lines = [
        "## Measured\n",
        f"{about['rounds']} rounds on one thread of {about['cpu']}, torch {about['versions']['torch']}{about['load']}: median (least to most). "
        f"Tokens per second of the small model: {speeds}. A row of 8,192 fp16 numbers takes {rates['bytes_per_row']:,.0f} bytes on disk.\n",
        "| what | measured | unit |",
        "|---|---:|---|",
    ]
    for name, (what, scale, unit) in MEANINGS.items():
        low, high = (_short(value * scale) for value in results["spread"][name])
        lines.append(
            f"| {what} | {_short(results['measured'][name] * scale)} ({low} to {high}) | {unit} |"
        )
    return "\n".join([*lines, ""])


def _assumed(results: Mapping[str, Any]) -> str:
    lines = ["## Assumed\n", "| what | assumed | |", "|---|---:|---|"]
    for name, value in results["assumed"].items():
        shown = (
            value if isinstance(value, str) else _bytes(value) if name in BYTES else _short(value)
        )
        lines.append(f"| {name.replace('_', ' ')} | {shown} | {results['notes'].get(name, '')} |")
    text = (
        "A token costs four operations per parameter (forward, and back through the activations; the base is frozen), a gradient row that "
        "times the measured ratio; attention is left out. Memory is the driver's, of pool, tokens and rules; that of the model is not counted, nor "
        "is the pool's own file."
    )
    return "\n".join([*lines, "", text, ""])


def _stages(n: int, found: Mapping[str, Any]) -> str:
    lines = [
        f"**{n:,} rows**\n",
        "| stage | where | hours | GPU-hours | disk | network | driver's memory |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for stage in [*found["stages"], {"stage": "**all**", "where": "", **found["total"]}]:
        cells = [stage["stage"], stage["where"], _short(stage["hours"]), _short(stage["gpu_hours"])]
        lines.append(
            f"| {' | '.join([*cells, *(_bytes(stage[name]) for name in ('disk', 'network', 'memory'))])} |"
        )
    return "\n".join([*lines, ""])


def _breaks(found: Mapping[str, Any]) -> str:
    if not found["breaks"]:
        return "Nothing breaks.\n"
    told = ", ".join(
        f"{entry['stage']} ({entry['of']}, {_short(entry['times'])} times what is there)"
        for entry in found["breaks"]
    )
    return f"Breaks first: {told}.\n"


def _remedies(sizes: Mapping[str, Any]) -> str:
    lines = [
        f"| hours / GPU-hours / disk, and what still breaks first | {' | '.join(f'{int(n):,} rows' for n in sizes)} |",
        "|---|" + "---|" * len(sizes),
    ]
    for name in next(iter(sizes.values()))["remedies"]:
        cells = []
        for found in sizes.values():
            entry = found["remedies"][name]
            broken = "".join(
                f"; {b['stage']}: {b['of']} x {_short(b['times'])}" for b in entry["breaks"]
            )
            cells.append(
                f"{_short(entry['hours'])} / {_short(entry['gpu_hours'])} / {_bytes(entry['disk'])}{broken}"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _short(value: float) -> str:
    if value and (abs(value) >= 1e7 or abs(value) < 1e-2):
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return "" if not value else "< 1 MB"


if __name__ == "__main__":
    main()
