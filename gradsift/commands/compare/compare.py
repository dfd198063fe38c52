"""Does a model trained on the subset beat its controls? Every way of choosing rows, trained with
one recipe and tested on held-out rows.

All trainings start from the same base and take the same number of optimiser steps (and, in a second
table, see the same number of tokens); seed s gives every arm the same initialisation of adapters
and dropout. Random is drawn anew for every seed, so that its luck counts too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.commands.compare.arms import ArmRows, Arms
from gradsift.commands.compare.request import CONTROL, MEASURES, check_comparison
from gradsift.commands.compare.results import Arm, Comparison, Results
from gradsift.commands.compare.statistics import Measured, compare_measured
from gradsift.commands.compare.trials import COMMAND, Command, Test, Trial, Trials
from gradsift.commands.preflight import Inputs, as_list, check_budget, read_side
from gradsift.commands.select.contamination import TestSets
from gradsift.commands.session import opened
from gradsift.compute.progress import Progress, silent
from gradsift.config import FinetuneSettings
from gradsift.data.pool import Pool
from gradsift.data.records import text_of
from gradsift.errors import ConfigError, DataError
from gradsift.model.finetune import finetune, heldout_loss
from gradsift.report.data import ReportData
from gradsift.report.write import write_report
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.recipe import Recipe
from gradsift.store.artifact import Artifact
from gradsift.store.atomic import write_atomic
from gradsift.store.canonical import recipe_digest
from gradsift.types import Example, counted

BASE = "untrained"
_RESULT = "comparison.json"


def compare(
    arms: Sequence[str],
    *,
    pool: Sequence[str | Path] | str | Path,
    test: Sequence[str | Path] | str | Path,
    budget: str | int | float,
    run: str | Path,
    model: str | None = None,
    target: Sequence[str | Path] | str | Path = (),
    seeds: int = 5,
    seed: int = 0,
    controls: Sequence[str] | None = None,
    oracle: str | None = None,
    decontaminate: Sequence[str | Path] = (),
    equal: Sequence[str] | str = ("steps", "tokens"),
    measure: Sequence[str] = (),
    measure_command: str | None = None,
    level: float = 0.95,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    pool_group: str | None = None,
    target_group: str | None = None,
    warmup_from: str | Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Choose with every method of `arms`, train on each choice and on the controls, and test.

    arms: "less", or with options "less:aggregate=max,preset=paper". test: held-out files as
    `[NAME=]FILE`; with several, the first table is their mean. controls: names of CONTROLS
    (default: all that fit; random is always there). oracle: "FIELD=VALUE", an arm of rows drawn
    among those so marked, and every arm's share of them; no method reads the field. equal: "steps",
    "tokens" or both. measure: names of MEASURES beside the loss (exact is added where test rows
    carry `answer`). measure_command: see trials.Command. settings: as in `select`; the training is
    the section "finetune". Rows that share 13 words with a test, or with one of `decontaminate`,
    are left out of every arm and counted. Every training is kept in `run`: a repeated or resumed
    comparison trains only what is missing.

    Raises what `select` raises; DataError for a test without a supervised token.
    """
    progress = progress or silent()
    inputs = Inputs(run, pool, target, model, settings, pool_group, target_group, warmup_from)
    request = check_comparison(
        arms,
        inputs,
        budget=budget,
        test=test,
        seeds=seeds,
        level=level,
        controls=controls,
        equal=equal,
        measure=measure,
    )
    with opened(inputs, progress=progress) as pipeline:
        check_budget(request.budget, pipeline.sides["pool"], False)
        tests = [_test(pipeline, file, request.measures, progress) for file in as_list(test)]
        if len({test.name for test in tests}) < len(tests):
            raise ConfigError(
                "two tests have the same name", remedy="Tell them apart as --test NAME=FILE."
            )
        others = [
            read_side([file], pipeline.config, None, progress, "target") for file in decontaminate
        ]
        overlap = _overlapping(
            pipeline.sides["pool"], [*(test.examples for test in tests), *others]
        )
        make = Arms(pipeline, request.budget, overlap, list(range(seed, seed + seeds)))
        marked = None if oracle is None else make.marked(oracle)
        choices = [
            choice
            for name, (method, selector) in request.methods.items()
            for choice in make.selected(name, method, selector)
        ]
        choices += [
            choice for name in request.controls for choice in make.control(name, choices[0])
        ]
        if marked is not None:
            choices.append(make.oracle(f"oracle {oracle}", marked, len(choices[0].rows(0))))
        command = None if measure_command is None else Command(measure_command)
        result = _Comparing(make, pipeline.config.finetune, marked).measure(
            choices, tests, command, request.ways, level
        )
        return _keep(pipeline, result, choices)


def _test(
    pipeline: Pipeline, file: str | Path, measures: tuple[str, ...], progress: Progress
) -> Test:
    rows = read_side([file], pipeline.config, None, progress, "target")
    other = pipeline.over(rows)
    encoded, name = other.encoded("pool"), rows.groups[0]
    if not encoded.supervised.sum():
        raise DataError(
            "no test row has a supervised token",
            where=str(file),
            remedy="Look at it with `gradsift inspect`.",
        )
    answers = tuple(
        None if (answer := rows.record(i).get("answer")) is None else str(answer)
        for i in range(len(rows))
    )
    names = {"loss", *measures, *(["exact"] if any(answers) and not measures else [])}
    if "exact" in measures and not any(answers):
        raise DataError(
            "no test row carries `answer`",
            where=str(file),
            remedy="Drop --measure exact, or add the field.",
        )
    texts = tuple(example.messages[-1].content if example.messages else "" for example in rows)
    return Test(
        name,
        encoded,
        other.encode_recipe("pool").digest,
        tuple(m for m in MEASURES if m in names),
        texts,
        answers,
        rows,
    )


def _overlapping(pool: Pool, tests: Sequence[Sequence[Example]]) -> np.ndarray:
    sets = TestSets((str(number), test) for number, test in enumerate(tests))
    return np.array(
        [row for row, example in enumerate(pool) if sets.overlap(text_of(example)) is not None],
        dtype=np.int64,
    )


@dataclass(frozen=True, eq=False)
class _Comparing:
    arms: Arms
    recipe: FinetuneSettings
    marked: np.ndarray | None  # pool rows that carry the oracle's mark

    @property
    def pipeline(self) -> Pipeline:
        return self.arms.pipeline

    def steps(self, choice: ArmRows, seed: int, equal: str, reference: ArmRows) -> int:
        """Optimiser steps: what `epochs` passes over the control's rows need; for equal tokens,
        scaled by the rows' mean length.
        """
        steps = self.recipe.steps_for(len(reference.rows(0)))
        if equal == "steps":
            return steps
        lengths = self.pipeline.encoded("pool").lengths
        mean = np.mean([lengths[reference.rows(s)].mean() for s in range(len(reference.draws))])
        return max(1, round(steps * float(mean) / float(lengths[choice.rows(seed)].mean())))

    def trial(self, choice: ArmRows, number: int, equal: str, reference: ArmRows) -> Trial:
        steps = self.steps(choice, number, equal, reference)
        recipe = self.recipe.model_copy(update={"seed": self.arms.seeds[number], "steps": steps})
        return Trial(choice.rows(number), recipe, choice.weights)

    def measure(
        self,
        choices: Sequence[ArmRows],
        tests: Sequence[Test],
        command: Command | None,
        equal: Sequence[str],
        level: float,
    ) -> Comparison:
        trials, reference = (
            Trials(self.pipeline),
            next(choice for choice in choices if choice.name == CONTROL),
        )
        every: list[Test | Command] = [*tests, *([command] if command else [])]
        base = Trial(np.zeros(0, dtype=np.int64), self.recipe)
        # Seed by seed, so that a comparison cut off early has whole rounds of all arms.
        numbers = range(len(self.arms.seeds))
        plan = [(base, every)] + [
            (self.trial(c, n, e, reference), every) for e in equal for n in numbers for c in choices
        ]
        missing = trials.missing(plan)
        if missing:
            self._project(missing, tests)
        trials.run(plan)
        tables: list[Results] = []
        for way in equal:
            by_arm = {
                choice.name: [self.trial(choice, n, way, reference) for n in numbers]
                for choice in choices
            }
            by_arm[BASE] = [base]
            for name in dict.fromkeys(measure for test in tests for measure in test.measures):
                scored = [test for test in tests if name in test.measures]
                measured = {
                    test.name: {
                        arm: _measured(trials, done, test, name) for arm, done in by_arm.items()
                    }
                    for test in scored
                }
                tables += compare_measured(
                    measured, control=CONTROL, level=level, measure=name, equal=way, seed=0
                )
            if command is not None:
                tables += _commanded(trials, by_arm, command, way, level)
        arms = [self._arm(choice) for choice in choices] + [Arm(BASE, "none", 0, 0, 0.0)]
        return Comparison(
            control=CONTROL,
            level=level,
            arms=tuple(arms),
            tables=tuple(tables),
            settings={
                "finetune": self.recipe.canonical(),
                "seeds": self.arms.seeds,
                "tests": {test.name: len(test.rows) for test in tests},
            },
            overlap=len(self.arms.overlap),
            cost=self._cost(
                trials,
                [self.trial(c, n, equal[0], reference) for c in choices for n in numbers],
                tests,
                reference,
            ),
            notes=self._notes(tests),
        )

    def _arm(self, choice: ArmRows) -> Arm:
        rows = choice.rows(0)
        tokens = int(self.pipeline.encoded("pool").supervised[rows].sum())
        marked = None if self.marked is None else round(float(np.isin(rows, self.marked).mean()), 4)
        seconds = round(choice.seconds, 1)
        return Arm(
            choice.name,
            choice.kind,
            len(rows),
            tokens,
            seconds,
            marked,
            choice.draws,
            choice.selection,
        )

    def _project(
        self, missing: Sequence[tuple[Trial, Sequence[Any]]], tests: Sequence[Test]
    ) -> None:
        """Says how long the trainings will take, from two steps and a small test."""
        encoded, model = self.pipeline.encoded("pool"), self.pipeline
        longest = max((trial for trial, _ in missing), key=lambda trial: len(trial.rows))
        if not len(longest.rows):
            return
        sample = longest.rows[: 2 * self.recipe.batch_size]
        rows = [encoded[int(i)] for i in sample]
        started = time.perf_counter()
        base: Any = model.load_base()
        loaded = time.perf_counter() - started
        started = time.perf_counter()
        probe = self.recipe.model_copy(update={"steps": 2})
        net = finetune(lambda: base, rows, settings=probe, device=self.pipeline.config.model.device)
        per_token = (time.perf_counter() - started) / max(1, int(encoded.lengths[sample].sum()))
        some = tests[0].rows[:16]
        started = time.perf_counter()
        heldout_loss(net, some, self.recipe.token_budget)
        per_test_token = (time.perf_counter() - started) / max(
            1, sum(len(row["input_ids"]) for row in some)
        )
        seconds = loaded * len(missing)
        for trial, wanted in missing:
            if len(trial.rows):
                steps = trial.settings.steps or 0
                seconds += (
                    per_token
                    * steps
                    * self.recipe.batch_size
                    * float(encoded.lengths[trial.rows].mean())
                )
            seconds += per_test_token * sum(
                int(test.rows.lengths.sum()) for test in wanted if isinstance(test, Test)
            )
        generated = any(set(test.measures) - {"loss"} for test in tests)
        beside = ", besides generating answers" if generated else ""
        self.pipeline.progress.note(
            f"{counted(len(missing), 'training')} to do: about {max(1, round(seconds / 60)):,}"
            f" min{beside}"
        )

    def _cost(
        self, trials: Trials, done: Sequence[Trial], tests: Sequence[Test], reference: ArmRows
    ) -> dict[str, float]:
        """Minutes: of a training, on average over all arms; and what training on everything for as
        many passes would take at their rate.
        """
        lengths, seconds, tokens, counted = self.pipeline.encoded("pool").lengths, 0.0, 0.0, 0
        for trial in done:
            spent = trials.seconds(trial, tests[0]).get("training")
            if spent is not None and len(trial.rows):
                seconds, counted = seconds + spent, counted + 1
                tokens += (
                    (trial.settings.steps or 0)
                    * trial.settings.batch_size
                    * float(lengths[trial.rows].mean())
                )
        if not tokens:
            return {}
        passes = (
            self.recipe.steps_for(len(reference.rows(0)))
            * self.recipe.batch_size
            / len(reference.rows(0))
        )
        everything = passes * float(lengths[self.arms.usable].sum()) * seconds / tokens / 60
        return {
            "training_minutes": round(seconds / 60 / counted, 4),
            "training_on_everything_minutes": round(everything, 4),
        }

    def _notes(self, tests: Sequence[Test]) -> tuple[str, ...]:
        recipe = self.recipe
        how = (
            f"{'LoRA' if recipe.mode == 'lora' else 'full'} fine-tuning, learning rate"
            f" {recipe.rate:g}, batch {recipe.batch_size}"
        )
        how += ", mixed precision" if recipe.bf16 else ""
        rows = ", ".join(f"{test.name} {counted(len(test.rows), 'row')}" for test in tests)
        notes = [f"{how}; {counted(len(self.arms.seeds), 'seed')}; tested on {rows}"]
        if len(self.arms.overlap):
            notes.append(
                f"{len(self.arms.overlap):,} pool rows share 13 words with a test and were left out"
                " of every arm"
            )
        if len(self.arms.seeds) == 1:
            notes.append("one seed: the intervals know nothing of the luck of a training")
        return tuple(notes)


def _measured(trials: Trials, done: Sequence[Trial], test: Test, measure: str) -> Measured:
    scores = [trials.scores(trial, test) for trial in done]
    steps = done[0].settings.steps or 0
    if not len(done[0].rows):
        steps = 0
    if measure == "loss":
        return Measured(np.stack([score.sums for score in scores]), scores[0].tokens, steps)
    values = np.stack([score.measures[measure] for score in scores])
    has = np.isfinite(values[0])
    return Measured(np.where(has, values, 0.0), has.astype(float), steps)


def _commanded(
    trials: Trials, by_arm: Mapping[str, Sequence[Trial]], command: Command, way: str, level: float
) -> list[Results]:
    """Tables of what the command printed: one number per training, so the interval is over seeds
    alone.
    """
    numbers = {
        arm: [trials.scores(trial, command).numbers for trial in done]
        for arm, done in by_arm.items()
    }
    results: list[Results] = []
    for name in dict.fromkeys(
        key for printed in numbers.values() for each in printed for key in each
    ):
        measured = {}
        for arm, printed in numbers.items():
            values = np.array([[each.get(name, np.nan)] for each in printed])
            measured[arm] = Measured(values, np.ones(1), by_arm[arm][0].settings.steps or 0)
        results += compare_measured(
            {COMMAND: measured}, control=CONTROL, level=level, measure=name, equal=way, seed=0
        )
    return results


def _keep(pipeline: Pipeline, result: Comparison, choices: Sequence[ArmRows]) -> Comparison:
    """Writes the comparison down and into the reports of the selections it is about."""
    inputs = {
        f"{i:03d}": f"select-{choice.selection.folder.name[-12:]}"
        for i, choice in enumerate(choices)
        if choice.selection is not None
    }
    costs = replace(result, cost={}, arms=tuple(replace(arm, seconds=0.0) for arm in result.arms))

    def fill(artifact: Artifact) -> None:
        write_atomic(
            artifact.path / _RESULT,
            json.dumps(result.summary(), indent=1, ensure_ascii=False).encode() + b"\n",
        )
        write_atomic(artifact.path / "comparison.md", result.markdown().encode())
        artifact.finish(files={}, counts={"arms": len(result.arms)})

    made_by = Recipe("compare", {"result": recipe_digest(costs.summary())}, inputs)
    artifact = pipeline.make(made_by, fill)
    for choice in choices:
        if choice.selection is not None:
            data = ReportData.model_validate_json(
                (choice.selection.folder / "report.json").read_bytes()
            )
            write_report(
                data.model_copy(update={"comparison": result.panel()}), choice.selection.folder
            )
    return replace(result, folder=artifact.path)
