"""Writes docs/methods-measured.md from bench/results/methods.json, and the table of docs/methods.md from the methods themselves:
`python docs/generate_methods.py`. Numbers are never typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradsift import methods

ROOT = Path(__file__).parent
HEAD = """# What each method takes, and what it costs

Written by `python docs/generate_methods.py` from `bench/results/methods.json`, which `python bench/methods.py` measures: {rows:,} rows of a real
instruction pool, every source in its share, {budget} chosen; target, where a method takes one, the {target} development rows; a model of 6 million
parameters, {threads} thread. Seconds are of the processor and in the number format named in the last column; stages that methods share are counted
for each of them.

*Spearman* is the rank correlation of a method's score with the number of supervised tokens and with the gradient's norm: far from 0, the method
chooses by length as much as by anything else. *Took* names the sources whose share changed most: of the pool, then of the picks.

| method | signals, s | choosing, s | memory, GB | tokens per pick | Spearman: length | norm | took | on |
|---|---:|---:|---:|---:|---:|---:|---|---|
"""


BEGIN, END = "<!-- from `gradsift methods` -->\n", "<!-- end -->\n"


def main() -> None:
    guide = ROOT / "methods.md"
    guide.write_text(guided(guide.read_text(encoding="utf-8")), encoding="utf-8")
    results = json.loads(
        (ROOT.parent / "bench" / "results" / "methods.json").read_text(encoding="utf-8")
    )
    (ROOT / "methods-measured.md").write_text(page(results), encoding="utf-8")


def guided(text: str) -> str:
    """docs/methods.md with the table of what each method needs."""
    before, _, rest = text.partition(BEGIN)
    lines = ["| method | from | target | reads | cost beyond encoding |", "|---|---|---|---|---|"]
    for method in methods.describe():
        cells = [
            f"`{method['name']}`",
            method["source"],
            method["target"],
            ", ".join(method["needs"]) or "nothing",
            method["cost"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return before + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2]


def page(results: Mapping[str, Any]) -> str:
    lines = [line(arm, found, results["stages"]) for arm, found in results["methods"].items()]
    missing = ", ".join(named(arm) for arm in results["missing"])
    end = f"\nNot measured yet: {missing}.\n" if missing else ""
    return HEAD.format(**results["about"]) + "".join(lines) + end


def line(arm: str, found: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> str:
    made = [stages[digest] for digest in found["stages"] if digest in stages]
    changed = sorted(found["sources"].items(), key=lambda item: -abs(item[1][1] - item[1][0]))[:3]
    cells = [
        named(arm),
        f"{sum(stage['cpu_s'] for stage in made):,.0f}",
        f"{found['seconds']['cpu_s']:.1f}",
        f"{max([found['peak_gb'], *(stage['peak_gb'] for stage in made)]):.1f}",
        f"{found['mean_tokens']:.0f}",
        *(signed(found["spearman"].get(kind)) for kind in ("length", "norm")),
        ", ".join(f"{source} {before:.0%} to {after:.0%}" for source, (before, after) in changed),
        f"{found['on']['cpu']} {found['on']['dtype']}",
    ]
    return "| " + " | ".join(cells) + " |\n"


def named(arm: str) -> str:
    name, _, options = arm.partition(":")
    return f"`{name}`" + (f" `-o {options}`" if options else "")


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


if __name__ == "__main__":
    main()
