"""Writes docs/quality.md and the README's table from bench/results/quality.json: `python docs/generate_quality.py`. Numbers are never typed
by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsift.commands.compare.results import Comparison

ROOT = Path(__file__).parent
HEAD = """# Does the selection train better models?

Tables written by `python docs/generate_quality.py` from `bench/results/quality.json`, which `python bench/quality.py` measures: a small language
model (6M parameters), real instruction pools, training on what was chosen, loss on held-out rows (nats per supervised token; lower is better).
Differences are to random rows, with 95 % intervals over seeds and test rows. [compare.md](compare.md) says how, and what the arms and columns are:
`untrained`, `full` and `oracle` are arms, `tokens` are supervised ones, `marked` is the share of the oracle's kind. After "Paired", one arm
against another on the same test rows: below 0, the first is better.

The pool: rows of many public instruction sets, `task` and `source` in each row. Targets: `gsm8k` (word problems), `code_alpaca` (short programs),
`ni_title` (titles for texts; the pool has headlines, but no title task of Natural Instructions), `mt_de_en` (German to English), `bbh_...` (logical
deduction with five objects, of BIG-bench Hard; the pool has it with three). 64 dev rows guide (50 of bbh), 300 other rows test (200 of bbh).

Tables marked bfloat16 took signals from the model in bfloat16 and trained in mixed precision, and `contrast` tunes there by its default, LoRA and ten
passes; in the others it tunes as the subsets are trained, in full, three passes, 5e-4. Tests are measured, and the scores of the linear datamodeling
table taken, in float32 everywhere.
"""
# RDS+'s embeddings with a choice of our own, where no target row loses its turn: what `rds` was when most tables were made.
TURNS_KEPT = "rds:taken=next"
# Why the defaults are what they are; the numbers stand in the tables.
DEFAULTS = """## What the defaults rest on

- `g2is -o preset=mean` against `preset=uncentred` (ours too: the paper's walk along principal directions, mended; the paper's own walk was not
  trained), and `bids -o preset=plain` against its paper's way. They were chosen by what they pick, before anything was trained on it:
  mostly more rows of the target's kind (`marked`), longer answers (`tokens`). The search began because the tables of test rows were low for both
  (the line "Paired" of "One target at a time (8,000 rows, 2 seeds, bfloat16)"), so these gains are of the tests that they were sought for. Judged
  afterwards without a test file ("Which default is better", the last section), the gain of `g2is` stays, its interval below 0; that of `bids` has the
  same sign, but its interval covers 0. It is the default for its cost as well: one pass over the pool in place of one for each checkpoint. The leads
  of `bids` and `contrast` over `rds -o taken=next` keep their sign there too, and their intervals cover 0: half of the dev rows are few to test with. The likely
  cause: Adam directions of a young warm-up look alike and favour short answers, and principal directions after the first lead away from the target.
- `less` lets target groups take turns: by the maximum, the groups of largest cosines took every pick (several targets at once).
- `contrast` is the first to try toward one target: best on the mean over targets. It is not best on each: it takes long answers, also of
  other kinds, where the target's own rows are few, and part of its gain there is that such rows undo least of what the model could. Its lead over
  `rds -o taken=next`, and that of `bids`, does not come of their longer rows: with the same number of tokens both keep it.
- Several targets at once: `rds -o taken=next`, then `contrast`, then `bids`.
- Weights: `gradmatch (weighted)` against `gradmatch`. They lower the loss without a target, not toward one.
- Without a target, no choice of 5 % beats `full`, as many steps on different rows of the whole pool.
- Noise: no method leaves out what the model cannot see. A translation that belongs to another sentence looks, to a model that cannot translate,
  like any other. And clean is not all: picks that leave a direction out (its column in the table is near 0) train worse models than random rows,
  however clean they are. `less` with the seeds as one group takes few rows of three directions and is worse than random rows; with a group for each
  direction, the same method is better than random rows. `rds -o taken=next`, where every seed picks in turn, covers all six, is as clean as any, and trains the
  best model. So name the kinds of example as target groups (`--target-group`).
"""
# Table -> its title, and what its words mean.
TITLES = {
    "targeted": ("One target at a time", ""),
    "several": (
        "Several targets at once",
        "worst_gain and the lines of single tests are of the same trainings.",
    ),
    "agnostic": (
        "Without a target",
        "Nothing guides; the first table is the mean over the tests of all targets.",
    ),
    "noise": (
        "Noise in a translation pool",
        "A tenth is picked from 8,000 translations of six directions, of which a known part was spoilt. Guides: 64 clean rows of all six, or where "
        "a line says so each direction's as a group of its own, or dev rows of one direction. clean: share of unspoilt picks; de_en and so on: "
        "share of each direction; auc: chance that a clean row's score is above that of one so spoilt (1 = every time, 0.5 = blind).",
    ),
    "noise training": (
        "Trained on what was picked from the noisy pool",
        "mt_clean: clean rows of all six directions, of which neither side stands in the pool; mt_de_en and mt_zh_en: two of the directions, "
        "from elsewhere.",
    ),
    "lds": (
        "Linear datamodeling score of influence backends",
        "lds: mean over target rows of Spearman's correlation between a row set's summed scores and the loss of a model trained on that set, over "
        "random halves of the pool. LoRA and all linears: which layers' gradients. Labels of the curvature are drawn from the model, the default; in "
        "kronfluence's line, and where a line says so, they are the given ones.",
    ),
    "defaults": (
        "Which default is better",
        "No test file is read: the even dev rows of a target guide, the odd ones test.",
    ),
}
EQUAL_TOKENS = (
    ", equal tokens"  # after a table's name: that of trainings with the same number of tokens
)


FULL = "full: rows of the whole pool in random order for as many steps, so more different rows, seen less often."
BEGIN, END = "<!-- from bench/results/quality.json -->\n", "<!-- end -->\n"


def main() -> None:
    results = json.loads(
        (ROOT.parent / "bench" / "results" / "quality.json").read_text(encoding="utf-8")
    )
    (ROOT / "quality.md").write_text(page(results), encoding="utf-8")
    readme = ROOT.parent / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(
        before + BEGIN + summary(results) + END + rest.partition(END)[2], encoding="utf-8"
    )


def summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The README's tables: every arm on the mean over several targets, best first; one for each budget, the largest first: that of most targets,
    then of most seeds. Arms that only fewer seeds have been spent on, on the same pool, stand at its end with their number of seeds: their
    differences are to the random rows of those seeds. Then the arms without a target: that of most seeds, then of most rows."""
    found: dict[float, list[tuple[int, int, int, str, Mapping[str, Any]]]] = {}
    unguided: list[tuple[int, int, str, Comparison]] = []
    for name, table in results.items():
        kind, _, run = name[:-1].partition(" (")
        for key, value in table.items():
            if kind == "targeted" and key.endswith("over targets") and len(value["targets"]) > 1:
                order = len(value["targets"]), _number(run, "seeds"), _number(run, "rows")
                found.setdefault(float(key.partition("%")[0]), []).append((*order, run, value))
            if kind == "agnostic":
                unguided.append(
                    (
                        _number(run, "seeds"),
                        _number(run, "rows"),
                        f"{run}; {key} picked",
                        _comparison(value),
                    )
                )
    tables = [_best(budget, found[budget]) for budget in sorted(found, reverse=True)]
    return "\n".join(
        [*tables, *([_unguided(*max(unguided, key=lambda each: each[:2])[2:])] if unguided else [])]
    )


def _unguided(run: str, found: Comparison) -> str:
    table = found.table()
    lines = sorted(
        (line for line in table.lines if line.difference is not None and line.steps),
        key=lambda line: line.value,
    )
    full = f" {FULL}" if any(line.arm == "full" for line in lines) else ""
    head = f"Without a target: loss on held-out rows, mean over the tests of all targets ({run}).{full}"
    rows = [
        f"| `{line.arm}` | {line.difference:+.3f} ({line.low:+.3f} to {line.high:+.3f}) |"
        for line in lines
    ]
    return "\n".join([head, "", "| trained on | against random rows |", "|---|---:|", *rows]) + "\n"


def _number(run: str, of: str) -> int:
    """5 of "8,000 rows, 5 seeds, bfloat16" and "seeds"; 0 where it says none."""
    return next(
        (int(part.split()[0].replace(",", "")) for part in run.split(", ") if part.endswith(of)), 0
    )


def _best(budget: float, found: Sequence[tuple[int, int, int, str, Mapping[str, Any]]]) -> str:
    (_, most, _, run, value), *fewer = sorted(found, key=lambda each: each[:4], reverse=True)
    known = {key for entry in value["arms"].values() for key in entry}
    reference = TURNS_KEPT if f"against {TURNS_KEPT}" in known else "rds"
    lines, shown = [], set[str]()
    for seeds, entries in (
        (most, value["arms"]),
        *(
            (s, v["arms"])
            for _, s, _, r, v in fewer
            if _same(r, s, run, most) and v["targets"] == value["targets"]
        ),
    ):
        new = {
            arm: entry
            for arm, entry in entries.items()
            if "against random" in entry and arm not in shown
        }
        for arm in sorted(new, key=lambda arm: new[arm]["against random"][0]):
            cells = [
                f"{e[0]:+.3f} ({e[1]:+.3f} to {e[2]:+.3f})"
                if (e := new[arm].get(f"against {o}"))
                else ""
                for o in ("random", reference)
            ]
            gap = f"{new[arm]['recovered_gap'][0]:.2f}" if "recovered_gap" in new[arm] else ""
            lines.append(
                f"| `{arm}`{'' if seeds == most else f' ({seeds} seeds)'} | {' | '.join(cells)} | {gap} |"
            )
        shown |= set(new)
    head = [
        f"Loss on held-out rows, mean over {', '.join(value['targets'])} ({run}; {budget:g} % picked, a 6M-parameter model; lower is better, "
        "95 % intervals; [all tables](docs/quality.md)). Gap: the share recovered of what rows of the right kind, drawn "
        "blindly, gain over random rows, "
        f"mean over the targets where they clearly do: {', '.join(value['clear_oracles']) or 'none'}."
        + (f" {FULL}" if "full" in shown else ""),
        "",
        f"| trained on | against random rows | against `{reference}` | gap |",
        "|---|---:|---:|---:|",
    ]
    return "\n".join([*head, *lines]) + "\n"


def _same(run: str, seeds: int, other: str, others: int) -> bool:
    """Whether two runs differ in the number of seeds alone."""
    return run.replace(f"{seeds} seeds", "") == other.replace(f"{others} seeds", "")


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Raises KeyError for a table without a title."""
    parts = [HEAD, DEFAULTS]
    places = {name: place for place, name in enumerate(TITLES)}

    def place(key: str) -> tuple[int, bool, int, int]:
        """As TITLES, equal steps before equal tokens, most seeds first, then the larger pool."""
        kind, _, run = key[:-1].partition(" (")
        base = kind.removesuffix(EQUAL_TOKENS)
        return places[base], base != kind, -_number(run, "seeds"), -_number(run, "rows")

    said = None
    for key in sorted(results, key=place):
        kind, _, run = key.partition(" (")
        base = kind.removesuffix(EQUAL_TOKENS)
        title, words = TITLES[base]
        title += ", every training of the same number of tokens" if base != kind else ""
        parts.append(f"## {title} ({run}\n")
        if words and base != said:
            parts.append(f"{words}\n")
        said = base
        parts.append((_plain if base in ("noise", "lds") else _compared)(results[key]))
    return "\n".join(parts)


def _compared(found: Mapping[str, Any]) -> str:
    parts = []
    for key, value in sorted(found.items(), key=lambda item: "over targets" not in item[0]):
        if "arms" in value and "tables" in value:
            comparison = _comparison(value)
            parts += [
                f"### {key}\n",
                comparison.markdown(),
                *[f"{note}." for note in comparison.notes],
                "",
            ]
            if "against_kcenter" in value:
                said = (
                    f"{arm} {d:+.4f} ({low:+.4f} to {high:+.4f})"
                    for arm, (d, low, high) in value["against_kcenter"].items()
                )
                parts += ["Mean of the tests against kcenter: " + "; ".join(said) + ".", ""]
            parts += _pairs(value)
        else:
            parts += [f"### {key}\n", _over(value)]
    return "\n".join(parts)


def _comparison(value: Mapping[str, Any]) -> Comparison:
    """The comparison behind what the bench recorded, which adds to its summary."""
    return Comparison.read(
        {
            name: said
            for name, said in value.items()
            if name not in ("against_kcenter", "worst_gain", "pairs")
        }
    )


def _over(value: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for arm in value["arms"].values() for name in arm))
    lines = [f"| mean over targets | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for arm, entry in value["arms"].items():
        cells = [
            f"{entry[n][0]:+.4f} ({entry[n][1]:+.4f} to {entry[n][2]:+.4f})" if n in entry else ""
            for n in names
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    clear = ", ".join(value["clear_oracles"]) or "none"
    lines += [
        "",
        f"recovered_gap: (random - method) / (random - oracle), mean over the targets with a clear oracle: {clear}.",
        "",
    ]
    return "\n".join([*lines, *_pairs(value)])


def _pairs(value: Mapping[str, Any]) -> list[str]:
    said = [
        f"{pair} {d:+.4f} ({low:+.4f} to {high:+.4f})"
        for pair, (d, low, high) in value.get("pairs", {}).items()
    ]
    return ["Paired, on the mean over targets: " + "; ".join(said) + ".", ""] if said else []


def _plain(found: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for entry in found.values() for name in entry))
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    lines += [
        f"| {row} | {' | '.join(_cell(entry.get(name, '')) for name in names)} |"
        for row, entry in found.items()
    ]
    return "\n".join([*lines, ""])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{part:.3f}" for part in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
