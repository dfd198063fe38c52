"""Writes docs/speed.md from the results of the benches: `python docs/generate_speed.py`. Numbers are never typed by hand; a bench whose file is
not in bench/results is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
RESULTS = ROOT.parent / "bench" / "results"
HEAD = """# What it costs

Written by `python docs/generate_speed.py` from the files in `bench/results`; [docs/benchmarks.md](benchmarks.md) names the command behind each. A
ratio is to something plain that ran in turns with it on the same machine, as median (least to largest) over the rounds. *Goal* is the bound the
project set itself.
"""
USUAL = (
    "On this processor the engine's float32 products go to oneDNN, which has kernels for its AVX-512; the plain step's go to MKL, as torch's do, "
    "which has them for Intel's only. What the engine costs with those, too, stands beside it.\n"
)
ENGINE = {
    "lora-sketch-1024": "LoRA, one global row of 1,024",
    "lora-adam-sketch-8192": "LoRA, exact Adam direction, 8,192",
    "linear-16x16": "all linear layers, 16 x 16 each, norms from the sketch",
    "linear-16x16-exact-norms": "the same, exact norms",
    "linear-factored-adam-16x16": "the same, factored Adam",
    "linear-adam-16x16": "the same, exact Adam, gradients formed",
    "linear-16x16-bf16": "all linear layers in bfloat16, against the float32 step",
    "lora-sketch-1024-usual": "LoRA, one global row of 1,024, torch's usual products",
    "linear-16x16-usual": "all linear layers, 16 x 16 each, torch's usual products",
}
CURVATURE = {
    "fit": "fitting EK-FAC, both passes",
    "fit-usual": "the same, torch's usual products",
    "scores-8": "influence on 8 targets, full rank",
    "scores-64": "influence on 64 targets, full rank",
    "scores-256": "influence on 256 targets, full rank",
    "scores-8-low": "influence on 8 targets, rank 32",
    "scores-64-low": "influence on 64 targets, rank 32",
    "scores-256-low": "influence on 256 targets, rank 32",
}


def main() -> None:
    (ROOT / "speed.md").write_text(page(RESULTS), encoding="utf-8")


def page(folder: Path) -> str:
    parts = [HEAD]
    for name, write in SECTIONS.items():
        path = folder / f"{name}.json"
        if path.exists():
            parts.append(write(json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def engine(found: Mapping[str, Any]) -> str:
    arms = found["arms"]
    lines = [
        "## A row's gradient, against a plain training step\n",
        f"Random Llama of {found['parameters'] / 1e6:.1f}M parameters, {found['rows']} rows, {found['rounds']} rounds, one thread ({found['cpu']}); "
        f"{arms['floor-lora']['tokens_per_s']:,} tokens a second for the plain step.\n",
        *([USUAL] if any(name.endswith("-usual") for name in arms) else []),
        "| work | cost / plain step | goal | added memory / the step's | tokens a second |",
        "|---|---:|---:|---:|---:|",
    ]
    known = {
        **ENGINE,
        **{
            name: f"*{name}*"
            for name in arms
            if name not in ENGINE and not name.startswith("floor") and "bf16" not in name
        },
    }
    for name, label in known.items():
        if name in arms:
            arm = arms[name]
            lines.append(
                row(
                    label,
                    spread(arm["cpu_ratio"]),
                    goal(arm),
                    f"{arm['memory_ratio']:.2f}",
                    f"{arm['tokens_per_s']:,}",
                )
            )
    lines += [
        "",
        "| rows on disk | bytes a row | of them not the row's numbers | writing, share of extracting and writing |",
        "|---|---:|---:|---:|",
    ]
    for name, kept in found["store"].items():
        lines.append(
            row(
                name,
                f"{kept['bytes_per_row']:,.0f}",
                f"{kept['metadata_bytes_per_row']:.0f}",
                f"{kept['write_share']:.2%}",
            )
        )
    left = [f"`{name}`: {why}" for name, why in found["left_out"].items()]
    return "\n".join([*lines, "", *([f"Left out: {'; '.join(left)}.", ""] if left else [])])


def curvature(found: Mapping[str, Any]) -> str:
    head = "| work, per row | cost / plain step | goal | added memory / the step's |"
    lines = [
        f"## EK-FAC, against the same step, {found['rows']:,} rows\n",
        head,
        "|---|---:|---:|---:|",
    ]
    for name, label in CURVATURE.items():
        if name in found["arms"]:
            arm = found["arms"][name]
            memory = f"{arm['memory_ratio']:.2f}" if "memory_ratio" in arm else "not measured"
            lines.append(row(label, spread(arm["cpu_ratio"]), goal(arm), memory))
    once = found["once_cpu_ms"]["eigendecompositions"] / 1000
    lines += ["", f"Paid once per fit besides: {once:.1f} s of eigendecompositions.", ""]
    if "low" in found:
        low = found["low"]
        least, mean = low["spearman"]
        lines += [
            f"Rank {low['rank']} orders the rows as full rank does: Spearman {least:.3f} at least, {mean:.3f} on average.",
            "",
        ]
    if "kronfluence" in found:
        theirs = found["kronfluence"]
        lines += [
            f"kronfluence on the same model, {theirs['rows']} rows, {theirs['targets']} targets, labels and damping:\n",
            "| tokens that enter its factors | its fit / plain step | its scores / plain step | Spearman with ours, least and mean of the targets |",
            "|---|---:|---:|---:|",
        ]
        for name in ("all tokens", "same tokens"):
            one = theirs[name]
            scores, rank = (
                one[f"scores-{theirs['targets']}"],
                " and ".join(f"{x:.3f}" for x in one["spearman"]),
            )
            lines.append(row(name, f"{one['fit']}", f"{scores}", rank))
        lines.append("")
    return "\n".join(lines)


def rules(found: Mapping[str, Any]) -> str:
    lines = [
        "## Rules\n",
        "| rule | CPU s | against | ratio | goal | besides |",
        "|---|---:|---|---:|---:|---|",
    ]
    for rule, part in found.items():
        for name, one in part.items() if isinstance(part, dict) else ():
            known = ("cpu_s", "wall_s", "against", "against_cpu_s", "ratio", "goal")
            besides = ", ".join(
                f"{key.replace('_', ' ')} {value}" for key, value in one.items() if key not in known
            )
            lines.append(
                row(
                    f"{rule}, {name}",
                    f"{one['cpu_s']}",
                    one.get("against", ""),
                    f"{one.get('ratio', '')}",
                    goal(one),
                    besides,
                )
            )
    return "\n".join([*lines, ""])


def query(found: Mapping[str, Any]) -> str:
    lines = [
        "## A new query over stored rows, against a pass that only reads them\n",
        "| targets | CPU ratio | goal |",
        "|---|---:|---:|",
    ]
    lines += [
        row(name, spread(one["cpu_ratio"]), goal(one))
        for name, one in found["arms"].items()
        if name != "read"
    ]
    return "\n".join([*lines, ""])


def overheads(found: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            "## What safety costs\n",
            f"Hashing and fsync together take {spread(found['hash_and_fsync_percent'])} % of a run (goal {found['goal_percent']} %), "
            f"writing {spread(found['write_percent'])} %; {found['rows']} rows of {found['dim']:,} in shards of {found['shard_rows']}, "
            f"{found['rounds']} rounds.",
            "",
        ]
    )


def workers(found: Mapping[str, Any]) -> str:
    same = "the same bytes" if found["same_digests"] else "DIFFERENT bytes"
    two, one = (
        sorted(found[name])
        for name in ("speed_up_2_over_1_workers", "speed_up_1_worker_over_this_process")
    )
    return "\n".join(
        [
            "## Ray workers\n",
            f"Two workers are {two[len(two) // 2]:.2f} times as fast as one ({two[0]:.2f} to {two[-1]:.2f}), one worker "
            f"{one[len(one) // 2]:.2f} times as this process; {same} ({found['rows']} rows, {found['cpus']} CPUs, one thread each).",
            "",
        ]
    )


WAITING = {
    "chosen": "as the command line chooses by the load",
    "spin": "spinning, as OpenMP does by itself",
    "passive": "sleeping, `OMP_WAIT_POLICY=passive`",
    "bounded": "`GOMP_SPINCOUNT=20000`",
}


def beside(found: Mapping[str, Any]) -> str:
    lines = [
        "## Beside other busy processes\n",
        f"`gradsift select` of {found['model']} by {found['threads']} threads on {found['cpus']} CPUs ({found['openmp']}), beside processes that only "
        "spin: steps of 16 rows a minute in the warm-up, tokens a second in the gradients, and both together against the fastest alone.\n",
        "| threads wait | busy processes beside | steps a minute | tokens a second | share of the best alone |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        row(
            WAITING[arm["waiting"]],
            str(arm["beside"]),
            f"{arm['steps_per_minute']:,.0f}",
            f"{arm['tokens_per_second']:,.0f}",
            f"{arm['share_of_best_alone']:.2f}",
        )
        for arm in found["arms"]
    ]
    return "\n".join([*lines, ""])


def spread(values: list[float]) -> str:
    middle, least, most = values
    return f"{middle:.2f} ({least:.2f} to {most:.2f})"


def goal(one: Mapping[str, Any]) -> str:
    return "" if one.get("goal") is None else f"{one['goal']:.2f}"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "engine": engine,
    "curvature": curvature,
    "curvature-2000": curvature,
    "query": query,
    "rules": rules,
    "overheads": overheads,
    "workers": workers,
    "beside": beside,
}


if __name__ == "__main__":
    main()
