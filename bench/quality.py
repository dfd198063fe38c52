"""Selection quality on real data: is a model trained on the subset better than one trained on its
controls?

    python bench/quality.py                                    every table: many hours of CPU; says
    how many first
    python bench/quality.py --tables agnostic,targeted --targets gsm8k --seeds 5
    python bench/quality.py --budgets 1% --seeds 2            a fifth of the training
    python bench/quality.py --full                             1 % too, equal tokens, all targets

Needs the folder of pools, targets and the small model that the tests use (`--shared`, default
../shared). Everything is kept in `--run` and resumes; each table is written into the JSON file
(`--out`) as soon as it is there. Nothing is tuned here: dev files guide the selections, test files
are only reported. One table, `defaults`, takes no test file: one half of the dev rows guides and
the other tests.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import rankdata

import gradsift
from gradsift import methods
from gradsift.commands.compare.compare import BASE, compare
from gradsift.commands.compare.request import CONTROL
from gradsift.commands.compare.results import ArmResult, Comparison
from gradsift.commands.compare.trials import Test, Trial, Trials
from gradsift.commands.plan.probe import probe
from gradsift.commands.preflight import Inputs
from gradsift.commands.session import opened
from gradsift.compute.batches import plan_batches
from gradsift.compute.progress import auto
from gradsift.data.encode import encode
from gradsift.model.layers import tracked_modules
from gradsift.model.lora import load_adapter
from gradsift.rules.topk import apportion
from gradsift.signals.backends import BACKENDS

TARGETS = ("gsm8k", "code_alpaca", "ni_title", "mt_de_en", "bbh_logical_deduction_five_objects")
ALL_TARGETS = (
    *TARGETS,
    "mt_zh_en",
    "ni_sentiment",
    "bbh_date_understanding",
    "bbh_boolean_expressions",
    "mmlu",
)
ORACLES = {
    "gsm8k": "source=gsm8k",
    "code_alpaca": "source=codealpaca",
    "mt_de_en": "task=mt_de_en",
    "bbh_logical_deduction_five_objects": "task=bbh/logical_deduction_three_objects",
}
TARGETED = (
    "contrast",
    "less",
    "less:backend=less,aggregate=rows",
    "g2is",
    "g2is:preset=uncentred",
    "gdig",
    "bids",
    "bids:preset=paper",
    "gist",
    "gradmatch",
    "dsir",
)
AGNOSTIC = ("tagcos", "gradmatch", "kcenter", "selffilter", "ifd")
DEFAULTS = ("contrast", "g2is", "g2is:preset=uncentred", "bids", "bids:preset=paper")
# Which of two should be the default; and whether a method's weights pay.
PAIRS = (
    ("less", "less:aggregate=max"),
    ("g2is", "g2is:preset=uncentred"),
    ("bids", "bids:preset=paper"),
    ("less:backend=less,aggregate=rows", "less"),
    ("gradmatch (weighted)", "gradmatch"),
)
SEVERAL = ("contrast", "bids", "bids:preset=paper", "less", "less:aggregate=max", "rds")
NOISE = (
    "contrast",
    "contrast:per=token",
    "gdig",
    "gdig:preset=released",
    "less",
    "rds",
    "tagcos",
    "perplexity",
    "ifd",
)
GUIDED = ("contrast", "gdig", "less", "rds")  # those of NOISE that take a target
# every direction's seeds pick in turn
GROUPED, BY_DIRECTION = ("less",), ", seeds grouped by direction"
TESTED = 300
LDS_ROWS, LDS_TARGETS = 1500, 64
# Curvature of labels drawn from the model, the default, and of the rows' own, as the other library
# here takes it.
EMPIRICAL = {"labels": "empirical"}
LDS_BACKENDS: list[tuple[str, dict[str, Any]]] = [
    *((backend, {}) for backend in ("dot", "cosine", "less", "kfac", "ekfac", "trak")),
    ("kfac", EMPIRICAL),
    ("ekfac", EMPIRICAL),
]
LDS_EPOCHS = 1  # of 750 rows: as many steps as a table's training of 5 % of 5,000 rows
RECIPE = {"mode": "full", "lr": 5e-4, "epochs": 3, "batch_size": 16}


# What rows and curvature are of. Adam's moments are those of the warm-up's LoRA layers alone.
LDS_LAYERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "all linears": {
        "modules": "linear",
        "projection": "rademacher",
        "dim": [16, 16],
        "norms": "sketched",
    },
}


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stratified(
    rows: Sequence[dict[str, Any]], field: str, count: int, seed: int = 0
) -> list[dict[str, Any]]:
    """`count` rows in file order, every value of `field` in its share."""
    rng, groups = np.random.default_rng(seed), sorted({row[field] for row in rows})
    places = {
        group: np.array([i for i, row in enumerate(rows) if row[field] == group])
        for group in groups
    }
    shares = apportion(count, [len(places[group]) for group in groups])
    chosen = np.concatenate(
        [
            rng.choice(places[group], share, replace=False)
            for group, share in zip(groups, shares, strict=True)
        ]
    )
    return [rows[i] for i in sorted(chosen.tolist())]


def general_pool(root: Path, shared: Path, count: int) -> Path:
    """The file of a stratified part of the general pool, written where it is not there yet."""
    path = root / "data" / f"pool{count}.jsonl"
    if not path.exists():
        write(path, stratified(read(shared / "data" / "pool_general.jsonl.gz"), "source", count))
    return path


class Bench:
    """One bench run: its files, its settings, and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.root, self.shared = options, Path(options.run), Path(options.shared)
        self.targets = (
            tuple(options.targets.split(","))
            if options.targets
            else (ALL_TARGETS if options.full else TARGETS)
        )
        self.model = str(self.shared / "models" / "tiny-lm")
        self.out = Path(options.out)
        self.results: dict[str, Any] = json.loads(self.out.read_text()) if self.out.exists() else {}
        trained, dtype = {**RECIPE, "bf16": options.bf16}, "bfloat16" if options.bf16 else "float32"
        self.settings: dict[str, dict[str, Any]] = {"finetune": trained, "model": {"dtype": dtype}}
        self.settings["machine"] = {"threads": options.threads}
        self.devs = {t: self.shared / "data" / "targets" / t / "dev.jsonl.gz" for t in self.targets}
        self.tests = {t: self._test(t) for t in (*TARGETS, *self.targets)}

    def _test(self, target: str) -> Path:
        rows = read(self.shared / "data" / "targets" / target / "test.jsonl.gz")
        rng = np.random.default_rng(0)
        kept = sorted(rng.choice(len(rows), min(TESTED, len(rows)), replace=False).tolist())
        return write(self.root / "data" / f"{target}.jsonl", [rows[i] for i in kept])

    @property
    def asked(self) -> dict[str, Path]:
        return {target: self.tests[target] for target in self.targets}

    @property
    def pool(self) -> Path:
        return general_pool(self.root, self.shared, self.options.rows)

    def compare(
        self, arms: Sequence[str], tests: Sequence[Path], budget: str, **more: Any
    ) -> Comparison:
        """One comparison on the general pool; all tests of the bench are kept out of every arm, so
        that arms can be shared.
        """
        return compare(
            self.chosen(arms),
            pool=self.pool,
            test=tests,
            decontaminate=[*self.tests.values(), *more.pop("decontaminate", ())],
            budget=budget,
            run=self.root / f"run{self.options.rows}",
            # as bench/methods.py: what one bench has made of these rows serves the other
            pool_group="source",
            model=self.model,
            seeds=self.options.seeds,
            equal=[way.strip() for way in self.options.equal.split(",")],
            measure=("loss",),
            settings=self.settings,
            progress=auto(),
            **more,
        )

    def record(self, table: str, key: str, value: Any) -> None:
        """Writes what is there; results of other settings stay under their own key."""
        # these two train nothing, or on halves
        seeds = "" if table in ("noise", "lds") else f", {self.options.seeds} seeds"
        rows = LDS_ROWS if table == "lds" else self.options.rows
        precision = ", bfloat16" if self.options.bf16 else ""
        self.results.setdefault(f"{table} ({rows:,} rows{seeds}{precision})", {})[key] = value
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")

    def agnostic(self, budget: str) -> None:
        """Table 3: methods without a target, on the mean over all tests."""
        made = self.compare(
            AGNOSTIC, list(self.asked.values()), budget, controls=["length", "perplexity", "full"]
        )
        for name, found in by_way("agnostic", made):
            summary, lines = found.summary(), {line.arm: line for line in found.table().lines}
            summary["pairs"] = pairs({"mean": lines})
            if "kcenter" in lines:
                summary["against_kcenter"] = {
                    arm: against(line, lines["kcenter"])
                    for arm, line in lines.items()
                    if line.draws is not None
                }
            self.record(name, budget, summary)
        print("\n".join(made.lines()), file=sys.stderr)

    def targeted(self, budget: str) -> None:
        """Table 1: methods with a target, one target at a time; the recovered gap over those where
        the oracle is clearly better.
        """
        files = {target: (self.devs[target], self.tests[target]) for target in self.targets}
        self.one_at_a_time("targeted", TARGETED, files, budget, self.options.controls.split(","))

    def defaults(self, budget: str) -> None:
        """Table 6: which of two should be the default, without a look at a test file: the even dev
        rows of a target guide, the odd ones test.
        """
        files = {}
        for target in self.targets:
            rows = read(self.devs[target])
            files[target] = tuple(
                write(self.root / "data" / f"{target}_{half}.jsonl", rows[i::2])
                for i, half in enumerate(("even", "odd"))
            )
        self.one_at_a_time(
            "defaults", DEFAULTS, files, budget, ["rds"], [test for _, test in files.values()]
        )

    def one_at_a_time(
        self,
        table: str,
        arms: Sequence[str],
        files: Mapping[str, tuple[Path, ...]],
        budget: str,
        controls: Sequence[str],
        decontaminate: Sequence[Path] = (),
    ) -> None:
        """files: target -> (what guides, what tests)."""
        found: dict[str, dict[str, Comparison]] = {}
        for target, (guide, test) in files.items():
            made = self.compare(
                arms,
                [test],
                budget,
                target=[guide],
                controls=controls,
                oracle=ORACLES.get(target),
                decontaminate=decontaminate,
            )
            for name, comparison in by_way(table, made):
                found.setdefault(name, {})[target] = comparison
                self.record(name, f"{budget} {target}", comparison.summary())
            print("\n".join(made.lines()), file=sys.stderr)
        for name, comparisons in found.items():
            self.record(name, f"{budget} over targets", over_targets(comparisons))

    def several(self, budget: str) -> None:
        """Table 2: all targets at once; the mean over groups and the worst of them."""
        targets = [f"{t}={self.devs[t]}" for t in self.targets]
        made = self.compare(
            SEVERAL, list(self.asked.values()), budget, target=targets, controls=["length"]
        )
        for name, found in by_way("several", made):
            summary = found.summary()
            lines = {t: {line.arm: line for line in found.table(t).lines} for t in self.targets}
            summary["pairs"] = pairs({"mean": {line.arm: line for line in found.table().lines}})
            summary["worst_gain"] = {
                arm.name: worst_gain(lines, arm.name)
                for arm in found.arms
                if arm.name not in (BASE, CONTROL)
            }
            self.record(name, budget, summary)
        print("\n".join(made.lines()), file=sys.stderr)

    def noise(self, budget: str) -> None:
        """Table 4: which rows of a noisy translation pool are picked, given clean ones of all six
        directions as target, the same as a group for each direction, then dev rows of one; and the
        loss of models trained on the picks of the former two.
        """
        every = read(self.shared / "data" / "pool_mt.jsonl.gz")
        rows = stratified(every, "task", self.options.rows)
        clean = [row for row in rows if row["noise"] == "none"]
        seeds = stratified(clean, "task", 64, seed=1)
        taken = {row["id"] for row in seeds}
        pool = [row for row in rows if row["id"] not in taken]
        files = (
            write(self.root / "data" / "mt_pool.jsonl", pool),
            write(self.root / "data" / "mt_seeds.jsonl", seeds),
        )
        test = self._clean_test(every, rows)
        dev = self.shared / "data" / "targets" / "mt_de_en" / "dev.jsonl.gz"
        for name in (*NOISE, CONTROL):
            self._picked(name, "", pool, files[0], files[1])
            if name.partition(":")[0] in GUIDED:
                self._picked(name, " (target mt_de_en)", pool, files[0], dev)
        for name in GROUPED:
            self._picked(name, BY_DIRECTION, pool, files[0], files[1], target_group="task")
        self._noise_trained("", NOISE, files, test)
        self._noise_trained(BY_DIRECTION, GROUPED, files, test, target_group="task")

    def _clean_test(self, every: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Path:
        """Clean rows of all six directions, no text of which stands in `rows`."""
        inside = {text for row in rows for text in texts(row)}
        held = [row for row in every if row["noise"] == "none" and not inside & texts(row)]
        if len(held) < TESTED:
            sys.exit(
                f"--rows {self.options.rows} leaves {len(held):,} clean rows of {len(every):,} to"
                " test with; give fewer"
            )
        return write(
            self.root / "data" / "mt_clean.jsonl", stratified(held, "task", TESTED, seed=2)
        )

    def _picked(
        self,
        arm: str,
        label: str,
        rows: Sequence[dict[str, Any]],
        pool: Path,
        target: Path,
        **more: Any,
    ) -> None:
        if not self.chosen([arm]):
            return
        method, _, options = arm.partition(":")
        chosen = gradsift.select(
            method,
            pool=pool,
            target=[target] if method in GUIDED else [],
            budget="10%",
            run=self.root / "mt",
            model=self.model,
            options={
                key: value
                for key, _, value in (pair.partition("=") for pair in options.split(",") if pair)
            },
            settings=self.settings,
            progress=auto(),
            **more,
        )
        self.record("noise", arm + label, noise_found(rows, chosen))

    def _noise_trained(
        self, label: str, arms: Sequence[str], files: tuple[Path, Path], clean: Path, **more: Any
    ) -> None:
        """Tested on held-out rows of two directions and on clean rows of all six."""
        if not self.chosen(arms):
            return
        tests = {
            name: self.tests.get(name) or self._test(name) for name in ("mt_de_en", "mt_zh_en")
        } | {"mt_clean": clean}
        found = compare(
            self.chosen(arms),
            pool=files[0],
            target=[files[1]],
            test=list(tests.values()),
            controls=[],
            oracle="noise=none",
            budget="10%",
            run=self.root / "mt",
            model=self.model,
            seeds=self.options.seeds,
            equal=("steps",),
            measure=("loss",),
            settings=self.settings,
            progress=auto(),
            **more,
        )
        self.record("noise training", f"10%{label}", found.summary())
        print("\n".join(found.lines()), file=sys.stderr)

    def lds(self, budget: str) -> None:
        """Table 5: linear datamodeling score (Park et al. 2023, section 2): does the sum of scores
        over a random half of the pool rank the losses of models trained on such halves? Mean
        Spearman over target rows, resampled over halves and target rows.
        """
        pool = write(
            self.root / "data" / "lds_pool.jsonl",
            stratified(
                read(self.shared / "data" / "pool_general.jsonl.gz"), "source", LDS_ROWS, seed=2
            ),
        )
        targets = [
            row
            for t in TARGETS
            for row in lines_of(self.tests[t])[: -(-LDS_TARGETS // len(TARGETS))]
        ][:LDS_TARGETS]
        target = write(self.root / "data" / "lds_target.jsonl", targets)
        given: dict[str, Any] = {
            "pool": [pool],
            "target": [target],
            "model": self.model,
            "settings": {**self.settings, "model": {"dtype": "float32"}},  # as the other libraries
            "run": self.root / "lds",
        }
        with opened(Inputs(**given), progress=auto()) as pipeline:
            encoded = pipeline.encoded("target")
            test, trials = (
                Test("targets", encoded, pipeline.encode_recipe("target").digest),
                Trials(pipeline),
            )
            halves = [
                np.sort(
                    np.random.default_rng([5, i]).choice(LDS_ROWS, LDS_ROWS // 2, replace=False)
                )
                for i in range(self.options.halves)
            ]
            recipe = pipeline.config.finetune.model_copy(update={"epochs": LDS_EPOCHS})
            recipe = recipe.model_copy(update={"steps": recipe.steps_for(LDS_ROWS // 2)})
            done = [
                Trial(rows, recipe.model_copy(update={"seed": i})) for i, rows in enumerate(halves)
            ]
            trials.run([(trial, [test]) for trial in done])
            losses = np.stack([(s := trials.scores(trial, test)).sums / s.tokens for trial in done])
        members = np.zeros((len(halves), LDS_ROWS))
        for half, rows in enumerate(halves):
            members[half, rows] = 1
        for layers, gradients in LDS_LAYERS.items():
            for backend, curvature in LDS_BACKENDS:
                if BACKENDS[backend].transform != "none" and gradients:
                    continue
                settings = {**given["settings"], "gradients": gradients, "curvature": curvature}
                # a run has one kind of curvature
                run = self.root / f"lds {layers}{' labelled' if curvature else ''}".replace(
                    " ", "-"
                )
                found = gradsift.score(
                    backend, **{**given, "settings": settings, "run": run}, progress=auto()
                )
                table = pq.read_table(found.path).select(found.columns)
                scores = np.nan_to_num(
                    np.stack([column.to_numpy() for column in table.columns], axis=1)
                )
                name = " with the given labels" if curvature else ""
                self.record(
                    "lds", f"{backend}{name}, {layers}", datamodeling(scores, members, losses)
                )
        for name, scores in self.others(given):
            self.record("lds", name, datamodeling(scores, members, losses))

    def others(self, given: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """Scores [n, m] of what other libraries are installed, at the model that ours are taken at:
        the warm-up's last, merged.
        """
        if not (find_spec("bergson") or find_spec("kronfluence")):
            return
        import curvature
        import peers

        with opened(Inputs(**given), progress=auto()) as pipeline:
            encoded = {side: pipeline.encoded(side) for side in ("pool", "target")}
            usable = {side: np.flatnonzero(rows.codes == 0) for side, rows in encoded.items()}
            pool, target = (
                [{k: list(v) for k, v in encoded[side][int(i)].items()} for i in places]
                for side, places in usable.items()
            )
            folder = pipeline.checkpoints()[-1].path

            def model() -> Any:
                return load_adapter(pipeline.load_base(), folder).merge_and_unload().eval()

            def batches(rows: Sequence[Any]) -> Sequence[np.ndarray]:
                return plan_batches(np.array([len(row["input_ids"]) for row in rows]), 2048)

            def whole(scores: Any) -> np.ndarray:
                made = np.zeros((len(encoded["pool"]), len(encoded["target"])))
                made[np.ix_(usable["pool"], usable["target"])] = scores.numpy()
                return made

            if find_spec("bergson"):
                for kind, scores in peers.bergson_scores(model(), pool, target, batches).items():
                    yield f"bergson {kind}, all linears", whole(scores)
            if find_spec("kronfluence"):
                names = list(tracked_modules(model(), "linear"))
                yield (
                    "kronfluence ekfac, all linears",
                    whole(curvature.kronfluence_scores(pool, target, names, 1, model())[0]),
                )

    def projected(self) -> float:
        """CPU-hours of what is asked for, from an empty folder: passes over the pool and trainings,
        at the speed of a few rows.
        """
        options, wanted = self.options, self.options.tables.split(",")
        inputs = Inputs(
            self.root / "speed",
            self.pool,
            model=self.model,
            settings=self.settings,
            pool_group="source",
        )
        with opened(inputs, keep=False) as pipeline:
            rows = encode(
                pipeline.sides["pool"].take(range(0, options.rows, 8)),
                pipeline.tokenizer,
                pipeline.config.encode,
            )
            rates, per_row = (
                probe(pipeline, rows, methods.make("less").needs()),
                float(rows.lengths.mean()),
            )
            checkpoints, threads = pipeline.checkpoint_count, pipeline.threads
        pool, several, seconds = (
            options.rows * per_row,
            {"targeted", "several", "agnostic", "defaults"} & set(wanted),
            0.0,
        )
        # Adam rows at each checkpoint, plain rows, curvature, influence of each target.
        passes: float = checkpoints + 1 + 3 + len(self.targets) if several else 0
        passes += (checkpoints + 1 + 3 + 2 + 2) if "noise" in wanted else 0
        passes += (2 * checkpoints + 3 + 3 + 2) * LDS_ROWS / options.rows if "lds" in wanted else 0
        seconds += passes * pool / rates.gradients
        # With the oracle and random rows.
        controls = {
            "targeted": 2 + len(options.controls.split(",")),
            "several": 2,
            "agnostic": 4,
            "defaults": 3,
        }
        named = {
            "targeted": TARGETED,
            "several": SEVERAL,
            "agnostic": AGNOSTIC,
            "defaults": DEFAULTS,
        }
        one_at_a_time = ("targeted", "defaults")
        for table in several:
            arms, ways = (
                len(self.chosen(named[table])) + controls[table],
                len(options.equal.split(",")),
            )
            rounds, tests = (
                (len(self.targets), 1) if table in one_at_a_time else (1, len(self.targets))
            )
            for budget in options.budgets.split(","):
                rows_picked = float(budget.rstrip("%")) / 100 * options.rows
                each = (
                    RECIPE["epochs"] * rows_picked * per_row / rates.train
                    + tests * TESTED * per_row / rates.forward
                )
                seconds += arms * options.seeds * each * rounds * ways
        if "noise" in wanted:  # a tenth of the pool, with random and clean rows
            each = (
                RECIPE["epochs"] * options.rows / 10 * per_row / rates.train
                + 3 * TESTED * per_row / rates.forward
            )
            seconds += (len(self.chosen((*NOISE, *GROUPED))) + 2) * options.seeds * each
        if "lds" in wanted:
            seconds += options.halves * LDS_EPOCHS * LDS_ROWS / 2 * per_row / rates.train
        return seconds * threads / 3600

    def chosen(self, arms: Sequence[str]) -> list[str]:
        """Those of `arms` that are asked for."""
        return [
            arm
            for arm in arms
            if not self.options.methods or arm.partition(":")[0] in self.options.methods.split(",")
        ]

    def run(self) -> None:
        print(
            f"from an empty folder, about {self.projected():.1f} CPU-hours; what is there already"
            " is not made again",
            file=sys.stderr,
        )
        tables: dict[str, Callable[[str], None]] = {
            "agnostic": self.agnostic,
            "targeted": self.targeted,
            "defaults": self.defaults,
            "several": self.several,
            "noise": self.noise,
            "lds": self.lds,
        }
        for name in self.options.tables.split(","):
            several = name not in ("noise", "lds")  # these two have no budget of their own
            for budget in self.options.budgets.split(",") if several else ("",):
                tables[name](budget)


def by_way(table: str, made: Comparison) -> Iterator[tuple[str, Comparison]]:
    """The name of a table and what it shows, for every way of equal training: of equal steps, then
    "..., equal tokens". The cost is known of the first way.
    """
    for way in dict.fromkeys(found.equal for found in made.tables):
        name = table if way == "steps" else f"{table}, equal {way}"
        tables, first = (
            tuple(found for found in made.tables if found.equal == way),
            way == made.tables[0].equal,
        )
        yield name, replace(made, tables=tables, cost=made.cost if first else {})


def gap(
    lines: Mapping[str, ArmResult], arm: str, oracle: str
) -> tuple[float, np.ndarray, np.ndarray]:
    """(recovered gap, draws of its numerator, draws of its denominator): (random - arm) over
    (random - oracle).
    """
    random, ours, best = lines[CONTROL], lines[arm], lines[oracle]
    assert random.draws is not None
    assert ours.draws is not None
    assert best.draws is not None
    return (
        (random.value - ours.value) / (random.value - best.value),
        random.draws - ours.draws,
        random.draws - best.draws,
    )


def over_targets(found: Mapping[str, Comparison]) -> dict[str, Any]:
    """Means over targets: the difference to random and to RDS+ of every arm, and the gap to the
    oracle that it recovers; and of pairs of arms that a default was chosen between.
    """
    by = {
        target: {line.arm: line for line in comparison.table().lines}
        for target, comparison in found.items()
    }
    oracles = {
        t: next((arm for arm in lines if arm.startswith("oracle")), None) for t, lines in by.items()
    }
    clear = [
        t
        for t, arm in oracles.items()
        if arm and 2 * (d := gap(by[t], arm, arm)[2]).std() < d.mean()
    ]
    common = [
        arm
        for arm in next(iter(by.values()))
        if all(arm in lines for lines in by.values()) and arm != BASE
    ]
    result: dict[str, Any] = {"targets": list(by), "clear_oracles": clear, "arms": {}}
    for arm in common:
        entry: dict[str, Any] = {}
        for other in (CONTROL, "rds"):
            if other in common and arm != other:
                entry[f"against {other}"] = mean_against(by, arm, other)
        if clear:
            gaps = [gap(by[t], arm, str(oracles[t])) for t in clear]
            entry["recovered_gap"] = [
                float(np.mean([g[0] for g in gaps])),
                *percentiles(np.mean([g[1] / g[2] for g in gaps], axis=0)),
            ]
        result["arms"][arm] = entry
    result["pairs"] = pairs(by)
    return result


def pairs(by: Mapping[str, Mapping[str, ArmResult]]) -> dict[str, list[float]]:
    """The differences of those PAIRS that every target has both arms of."""
    common = set.intersection(*(set(lines) for lines in by.values()))
    return {
        f"{arm} against {other}": mean_against(by, arm, other)
        for arm, other in PAIRS
        if {arm, other} <= common
    }


def mean_against(by: Mapping[str, Mapping[str, ArmResult]], arm: str, other: str) -> list[float]:
    """[mean over targets of the difference of two losses, its 95 % interval]."""
    found = [against_draws(lines[arm], lines[other]) for lines in by.values()]
    return [
        float(np.mean([value for value, _ in found])),
        *percentiles(np.mean([draws for _, draws in found], axis=0)),
    ]


def against(line: ArmResult, other: ArmResult) -> list[float]:
    """[difference of two losses, its 95 % interval]."""
    value, draws = against_draws(line, other)
    return [value, *percentiles(draws)]


def against_draws(line: ArmResult, other: ArmResult) -> tuple[float, np.ndarray]:
    assert line.draws is not None
    assert other.draws is not None
    return line.value - other.value, line.draws - other.draws


def percentiles(draws: np.ndarray) -> list[float]:
    return [float(x) for x in np.quantile(draws, [0.025, 0.975])]


def worst_gain(lines: Mapping[str, Mapping[str, ArmResult]], arm: str) -> list[Any]:
    """[target, difference to random] where the arm gains least."""
    target = max(lines, key=lambda t: lines[t][arm].value - lines[t][CONTROL].value)
    return [target, lines[target][arm].value - lines[target][CONTROL].value]


def noise_found(pool: Sequence[Mapping[str, Any]], chosen: Any) -> dict[str, Any]:
    """Share of clean rows and of every direction among the picks, and per kind of noise the AUC of
    the score against clean rows (1 = all noise below).
    """
    kinds = np.array([row["noise"] for row in pool])
    table = pq.read_table(chosen.folder / "scores.parquet").to_pydict()
    found: dict[str, Any] = {
        "picked": len(chosen),
        "clean": float((kinds[chosen.indices] == "none").mean()),
    }
    tasks = np.array([row["task"] for row in pool])
    found |= {
        task.removeprefix("mt_"): float((tasks[chosen.indices] == task).mean())
        for task in sorted(set(tasks))
    }
    scores = np.array([np.nan if s is None else s for s in table["score"]], dtype=float)
    if not np.isfinite(scores).any():
        return found
    for kind in sorted(set(kinds) - {"none"}):
        found[f"auc {kind}"] = auc(scores[kinds == "none"], scores[kinds == kind])
    return found


def datamodeling(
    scores: np.ndarray, members: np.ndarray, losses: np.ndarray, draws: int = 1000
) -> dict[str, Any]:
    """scores [n, m], members [halves, n] of 0 and 1, losses [halves, m] -> mean Spearman over
    targets and its 95 % interval.
    """
    predicted, rng = members @ scores, np.random.default_rng(0)

    def value(halves: np.ndarray, targets: np.ndarray) -> float:
        ours, theirs = (
            ranks(predicted[np.ix_(halves, targets)]),
            ranks(-losses[np.ix_(halves, targets)]),
        )
        return float(
            np.mean(
                (ours * theirs).sum(axis=0)
                / np.sqrt((ours**2).sum(axis=0) * (theirs**2).sum(axis=0))
            )
        )

    k, m = losses.shape
    drawn = [value(rng.integers(0, k, k), rng.integers(0, m, m)) for _ in range(draws)]
    return {
        "lds": value(np.arange(k), np.arange(m)),
        "interval": percentiles(np.array(drawn)),
        "halves": k,
        "targets": m,
    }


def ranks(values: np.ndarray) -> np.ndarray:
    """Centred ranks down each column, equal values sharing theirs."""
    return rankdata(values, axis=0) - (len(values) + 1) / 2


def texts(row: Mapping[str, Any]) -> set[str]:
    """What makes a row known: its id and the contents of its messages."""
    return {row["id"], *(message["content"] for message in row["messages"])}


def auc(high: np.ndarray, low: np.ndarray) -> float:
    """Chance that a value of `high` is above one of `low`, ties counted half."""
    high, low = np.sort(high[np.isfinite(high)]), low[np.isfinite(low)]
    above = len(high) - np.searchsorted(high, low, side="right")
    equal = np.searchsorted(high, low, side="right") - np.searchsorted(high, low, side="left")
    return float((above + equal / 2).sum() / (len(high) * len(low)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default="agnostic,targeted,several,noise,lds,defaults")
    parser.add_argument("--targets", default="", help="names, separated by commas")
    parser.add_argument("--methods", default="", help="only these, separated by commas")
    parser.add_argument(
        "--rows", type=int, default=8000, help="of the general pool, and of the translation pool"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--budgets",
        default="",
        help="of the tables that train on what was chosen (default 5%%; with --full 5%%,1%%)",
    )
    parser.add_argument(
        "--controls",
        default="length,length-matched,perplexity,rds,full",
        help="beside random, in the table of one target at a time",
    )
    parser.add_argument(
        "--equal",
        default="",
        help="what all trainings share (default steps; with --full steps,tokens)",
    )
    parser.add_argument(
        "--halves", type=int, default=60, help="trainings of the linear datamodeling score"
    )
    parser.add_argument("--full", action="store_true")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="signals of a bfloat16 model, trainings in mixed precision",
    )
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--shared", default="../shared")
    parser.add_argument("--run", default="runs/quality")
    parser.add_argument("--out", default="bench/results/quality.json")
    options = parser.parse_args()
    options.budgets = options.budgets or ("5%,1%" if options.full else "5%")
    options.equal = options.equal or ("steps,tokens" if options.full else "steps")
    Bench(options).run()


if __name__ == "__main__":
    main()
