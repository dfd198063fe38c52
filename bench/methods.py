"""Every method on 8,000 rows of the real pool: what it costs, what it takes, and what its score
follows.

    python bench/methods.py                     every method and preset, in one run that they share:
    hours of one core
    python bench/methods.py --only rds,less     some of them
    python bench/methods.py --read less         twenty picks of a finished one, prompt and answer,
    to be read

Needs the folder of pools, targets and the small model that the tests use (`--shared`, default
../shared). 5 % of a part of the general pool that keeps the share of every source; the target,
where a method takes one, is gsm8k's dev file. Everything is kept in `--run` and resumes; each
method is written into the JSON file (`--out`) as soon as it is there.

A method's signals are made in one process and its subset chosen in a second one, so that `peak_gb`
of choosing is that of choosing. Seconds are CPU seconds, which other work on the machine does not
change much; those of a stage that several methods read stand in the row of each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from quality import general_pool

from gradsift import methods
from gradsift.commands import budget
from gradsift.commands.preflight import Inputs
from gradsift.commands.select.constraints import Constraints
from gradsift.commands.select.select import select_in
from gradsift.commands.session import opened
from gradsift.compute import machine
from gradsift.compute.progress import auto
from gradsift.rules.ranks import spearman
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.recipe import Recipe
from gradsift.store.artifact import Artifact

# Those that read least come first, then those that share rows: a run that is stopped early has
# measured most.
ARMS = (
    "random",
    "length",
    "dsir",
    "bm25",
    "rds",
    "kcenter",
    "perplexity",
    "ifd",
    "selffilter",
    "less",
    "bids",
    "bids:preset=paper",
    "tagcos",
    "tagcos:preset=released",
    "g2is",
    "g2is:preset=uncentred",
    "g2is:preset=released",
    "gist",
    "gradmatch",
    "gdig",
    "gdig:preset=released",
    "contrast",
)
BUDGET = "5%"
READ, CUT = 20, 300  # picks to be read, and characters of each text


class Bench:
    """One bench run: its files, its settings, and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.root, self.out = options, Path(options.run), Path(options.out)
        self.shared = Path(options.shared)
        self.results: dict[str, Any] = (
            json.loads(self.out.read_text()) if self.out.exists() else {"stages": {}, "methods": {}}
        )

    @property
    def pool(self) -> Path:
        return general_pool(self.root, self.shared, self.options.rows)

    def opened(self, arm: str, **more: Any) -> Any:
        targeted = selector_of(arm).target != "none"
        inputs = Inputs(
            self.root / "run",
            pool=self.pool,
            target=(
                [self.shared / "data" / "targets" / "gsm8k" / "dev.jsonl.gz"] if targeted else []
            ),
            model=str(self.shared / "models" / "tiny-lm"),
            pool_group="source",
            settings={
                "model": {"dtype": self.options.dtype},
                "machine": {"threads": self.options.threads},
            },
        )
        return opened(inputs, progress=auto(), **more)

    def signals(self, arm: str) -> dict[str, Any]:
        """In a process of its own: every stage that the method reads."""
        needs = selector_of(arm).needs()
        with self.opened(arm) as pipeline:
            spent = counted(pipeline)
            pipeline.signals(needs)
            return {"spent": spent, "needs": [recipe.digest for recipe in pipeline.recipes(needs)]}

    def choose(self, arm: str) -> dict[str, Any]:
        """In a process of its own: the subset and its files, every signal being there."""
        with self.opened(arm) as pipeline:
            spent = counted(pipeline)
            found = select_in(
                pipeline,
                arm.partition(":")[0],
                selector_of(arm),
                budget.parse(BUDGET),
                Constraints(),
                seed=0,
            )
            chosen = next((value for value in spent.values() if value["stage"] == "select"), None)
        return {"spent": chosen, "folder": found.folder.name, "warnings": found.warnings}

    @property
    def every(self) -> list[str]:
        """Methods that ARMS does not know come last."""
        return [*ARMS, *(name for name in sorted(methods.METHODS) if name not in ARMS)]

    @property
    def arms(self) -> list[str]:
        """What is asked for."""
        return [
            arm
            for arm in self.every
            if not self.options.only or arm.partition(":")[0] in self.options.only.split(",")
        ]

    def run(self) -> None:
        for arm in self.arms:
            if "seconds" not in self.results["methods"].get(arm, {}):
                made = self._apart("signals", arm)
                self.results["stages"] |= {
                    self.key(digest): spent for digest, spent in made["spent"].items()
                }
                chosen = self._apart("choose", arm)
                keys = [self.key(digest) for digest in made["needs"]]
                line = {
                    "stages": keys,
                    "folder": chosen["folder"],
                    "warnings": chosen["warnings"],
                    "on": self.machine,
                }
                self.results["methods"][arm] = line | (
                    {"seconds": chosen["spent"], "peak_gb": chosen["peak_gb"]}
                    if chosen["spent"]
                    else {}
                )
                self.save()
        for arm, line in self.results["methods"].items():
            if (self.root / "run" / line["folder"]).is_dir():
                # else it was chosen in another folder, perhaps on another machine
                line |= self.described(arm)
        self.save()

    def key(self, digest: str) -> str:
        """Of a stage and where it was made: encoding, for one, has the same digest everywhere and
        not the same cost.
        """
        return " ".join([digest, *self.machine.values()])

    @property
    def machine(self) -> dict[str, str]:
        """What a method's seconds depend on; it stands beside each, for a file may be continued
        elsewhere.
        """
        return {"cpu": machine.cpu_kind(), "dtype": self.options.dtype}

    def _apart(self, part: str, arm: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--part", part, "--arm", arm],
            stdout=subprocess.PIPE,
            check=True,
        )
        return json.loads(done.stdout)

    def save(self) -> None:
        about = {
            "rows": self.options.rows,
            "budget": BUDGET,
            "target": "gsm8k",
            "threads": self.options.threads,
        }
        self.results |= {"about": about | machine.versions()}
        self.results["missing"] = [arm for arm in self.every if arm not in self.results["methods"]]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")

    def described(self, arm: str) -> dict[str, Any]:
        """What a finished selection took, and what its score follows."""
        table = table_in(self.root / "run" / self.results["methods"][arm]["folder"])
        picks, score = order(table), numbers(table, "score")
        norms = next(
            (
                column
                for line in self.results["methods"].values()
                if (path := self.root / "run" / line["folder"]).is_dir()
                and np.isfinite(column := numbers(table_in(path), "norm")).any()
            ),
            None,
        )
        lengths = numbers(table, "tokens")
        follows = {"length": lengths, **({"norm": norms} if norms is not None else {})}
        manifest = Artifact.load(self.root / "run" / self.results["methods"][arm]["folder"])
        assert manifest is not None
        return {
            "picked": len(picks),
            "sources": shares(table["group"], picks),
            "mean_tokens": round(float(lengths[picks].mean()), 1),
            "spearman": {
                name: rounded(spearman(score, column)) for name, column in follows.items()
            },
            "notes": {
                name: value
                for name, value in manifest.manifest["extra"]["notes"].items()
                if np.isfinite(value)
            },
            "read": [table["id"][i] for i in to_read(picks)],
        }

    def show(self, arm: str) -> str:
        rows = {
            row["id"]: row
            for row in map(json.loads, self.pool.read_text(encoding="utf-8").splitlines())
        }
        table = table_in(self.root / "run" / self.results["methods"][arm]["folder"])
        parts = []
        for rank in to_read(np.arange(len(picks := order(table)))):
            row, at = rows[table["id"][picks[rank]]], int(picks[rank])
            score = table["score"][at]
            head = f"{rank + 1}. {row['id']} ({row['task']}), {table['tokens'][at]} tokens" + (
                "" if score is None else f", score {score:.4g}"
            )
            texts = [
                " / ".join(message["content"][:CUT].split("\n")) for message in row["messages"]
            ]
            parts.append(
                "\n".join(
                    [
                        head,
                        *(
                            f"   {mark} {text}"
                            for mark, text in zip("?!?!?!?!", texts, strict=False)
                        ),
                    ]
                )
            )
        return "\n".join(parts)


def table_in(selection: Path) -> dict[str, list[Any]]:
    return pq.read_table(selection / "scores.parquet").to_pydict()


def counted(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Stages that `pipeline` makes from now on, by digest, with their CPU and wall seconds: those
    of stages asked for on the way count there.
    """
    spent: dict[str, dict[str, Any]] = {}
    inside = pipeline.make

    def total(kind: str) -> float:
        return sum(entry[kind] for entry in spent.values())

    def make(recipe: Recipe, fill: Callable[[Artifact], None]) -> Artifact:
        known = pipeline.stored(recipe) is not None
        cpu, wall = time.process_time() - total("cpu_s"), time.perf_counter() - total("wall_s")
        artifact = inside(recipe, fill)
        if not known:
            cpu, wall = (
                time.process_time() - total("cpu_s") - cpu,
                time.perf_counter() - total("wall_s") - wall,
            )
            kind = {
                key: recipe.config[key]
                for key in ("transform", "checkpoint", "backend")
                if key in recipe.config
            }
            spent[recipe.digest] = {
                "stage": recipe.stage,
                **kind,
                "cpu_s": round(cpu, 2),
                "wall_s": round(wall, 2),
                "peak_gb": peak_gb(),
            }
        return artifact

    pipeline.make = make  # type: ignore[method-assign]
    return spent


def peak_gb() -> float:
    """Of this process alone: the number that getrusage gives holds the parent's too."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status["VmHWM"].split()[0]) * 1024 / 1e9, 2)


def selector_of(arm: str) -> Any:
    name, _, options = arm.partition(":")
    return methods.make(name, dict(pair.split("=") for pair in options.split(",") if pair))


def numbers(table: Mapping[str, list[Any]], name: str) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in table[name]], dtype=np.float64)


def order(table: Mapping[str, list[Any]]) -> np.ndarray:
    """The picked rows, in pick order."""
    ranks = numbers(table, "rank")
    return np.argsort(ranks, kind="stable")[: int(np.isfinite(ranks).sum())]


def to_read(picks: np.ndarray) -> np.ndarray:
    """Of the picks: the first ten, and ten at even distances over the rest."""
    first, rest = picks[: READ // 2], picks[READ // 2 :]
    spread = np.linspace(0, max(len(rest) - 1, 0), READ // 2).astype(int)
    return np.concatenate([first, rest[np.unique(spread)[: len(rest)]]])


def shares(groups: list[str], picks: np.ndarray) -> dict[str, list[float]]:
    """{source: [share of the pool, share of the picks]}, largest first."""
    column = np.array(groups)
    every = {group: float((column == group).mean()) for group in dict.fromkeys(groups)}
    taken = {group: float((column[picks] == group).mean()) for group in every}
    return {
        group: [round(every[group], 4), round(taken[group], 4)]
        for group in sorted(every, key=lambda g: -taken[g])
    }


def rounded(value: float) -> float | None:
    return round(value, 3) if np.isfinite(value) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="methods, separated by commas")
    parser.add_argument(
        "--read", default="", metavar="METHOD", help="prints picks of a finished one"
    )
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--shared", default="../shared")
    parser.add_argument("--run", default="runs/methods")
    parser.add_argument("--out", default="bench/results/methods.json")
    parser.add_argument("--part", choices=("signals", "choose"), help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench = Bench(options)
    if options.part:
        print(json.dumps(getattr(bench, options.part)(options.arm) | {"peak_gb": peak_gb()}))
    elif options.read:
        print(bench.show(options.read))
    else:
        bench.run()


if __name__ == "__main__":
    main()
