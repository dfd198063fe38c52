"""Writes docs/quality.md from bench/results/quality.json: `python docs/generate_quality.py`. Numbers are never typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradsift.comparison import Comparison

ROOT = Path(__file__).parent
HEAD = """# Does the selection train better models?

Tables written by `python docs/generate_quality.py` from `bench/results/quality.json`, which `python bench/quality.py` measures: a small language
model, real instruction pools, training on what was chosen, loss on held-out rows (nats per supervised token; lower is better). Differences are to
random rows, with 95 % intervals over seeds and test rows. `docs/compare.md` says how.
"""
TITLES = {
    "targeted": "One target at a time",
    "several": "Several targets at once",
    "agnostic": "Without a target: the mean over all tests",
    "noise": "Noise in a translation pool, clean seeds",
    "lds": "Linear datamodeling score of influence backends",
}


def main() -> None:
    results = json.loads((ROOT.parent / "bench" / "results" / "quality.json").read_text(encoding="utf-8"))
    (ROOT / "quality.md").write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    parts = [HEAD]
    for name, title in TITLES.items():
        for key, found in results.items():
            if key.partition(" (")[0] == name:
                parts.append(f"## {title} ({key.partition(' (')[2]}\n")
                parts.append({"noise": _plain, "lds": _plain}.get(name, _compared)(found))
    return "\n".join(parts)


def _compared(found: Mapping[str, Any]) -> str:
    parts = []
    for key, value in found.items():
        if "arms" in value and "tables" in value:
            comparison = Comparison.read(value)
            parts += [f"### {key}\n", comparison.markdown(), *[f"{note}." for note in comparison.notes], ""]
        else:
            parts += [f"### {key}\n", _over(value)]
    return "\n".join(parts)


def _over(value: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for arm in value["arms"].values() for name in arm))
    lines = [f"| mean over targets | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for arm, entry in value["arms"].items():
        cells = [f"{entry[n][0]:+.4f} ({entry[n][1]:+.4f} to {entry[n][2]:+.4f})" if n in entry else "" for n in names]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    clear = ", ".join(value["clear_oracles"]) or "none"
    return "\n".join(
        [*lines, "", f"recovered_gap: (random - method) / (random - oracle), mean over the targets with a clear oracle: {clear}.", ""]
    )


def _plain(found: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for entry in found.values() for name in entry))
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    lines += [f"| {row} | {' | '.join(_cell(entry.get(name, '')) for name in names)} |" for row, entry in found.items()]
    return "\n".join([*lines, ""])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{part:.3f}" for part in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
