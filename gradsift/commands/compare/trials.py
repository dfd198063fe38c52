"""One training and what it scored: the cell of a comparison, kept as an artifact, so that nothing
is trained twice.
"""

from __future__ import annotations

import functools
import json
import math
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from gradsift.commands.compare.measures import answers, bleu, chrf, same_answer
from gradsift.compute.progress import quiet
from gradsift.config import FinetuneSettings, ModelSettings
from gradsift.data.encode import EncodedRows
from gradsift.errors import DataError
from gradsift.model.finetune import finetune, heldout_loss
from gradsift.model.load import from_settings, tokenizer_from_settings
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.recipe import Recipe
from gradsift.store.artifact import Artifact
from gradsift.store.tensors import write_tensors
from gradsift.types import Example

_FILE = "scores.safetensors"
COMMAND = "command"  # the name of the measure that a user's own command gives


@dataclass(frozen=True, eq=False)
class Trial:
    """A training: pool rows (ascending; none = the base model as it is), the recipe with its seed
    and steps, and weights [rows] or None.
    """

    rows: np.ndarray
    settings: FinetuneSettings
    weights: np.ndarray | None = None

    def canonical(self) -> dict[str, Any]:
        hasher = xxhash.xxh3_128(np.asarray(self.rows, dtype=np.int64).tobytes())
        if self.weights is not None:
            hasher.update(np.asarray(self.weights, dtype=np.float64).tobytes())
        recipe = self.settings.canonical() if len(self.rows) else None
        return {
            "rows": hasher.hexdigest(),
            "count": len(self.rows),
            "weighted": self.weights is not None,
            "finetune": recipe,
        }


@dataclass(frozen=True, eq=False)
class Test:
    """Held-out rows, encoded, and by which MEASURES they are judged. `references`, `answers` [m]:
    texts, None where a row has none.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    name: str
    rows: EncodedRows
    digest: str
    measures: tuple[str, ...] = ("loss",)
    references: tuple[str, ...] = ()
    answers: tuple[str | None, ...] = ()
    examples: Sequence[Example] = ()

    def canonical(self) -> dict[str, Any]:
        return {"measures": list(self.measures)}


@dataclass(frozen=True)
class Command:
    """The user's own evaluation: a command line in which {model} is the folder of the trained
    model. Its last line on stdout is a number, or a JSON object of numbers.
    """

    text: str
    name: str = COMMAND
    digest: str = ""

    def canonical(self) -> dict[str, Any]:
        return {"command": self.text}


@dataclass(frozen=True, eq=False)
class TrialScores:
    """What one training scored. `sums` [m] nats and `tokens` [m] supervised tokens per test row;
    `measures`: name -> [m], NaN where a row has none; `numbers`: what a Command printed.
    """

    sums: np.ndarray
    tokens: np.ndarray
    measures: Mapping[str, np.ndarray]
    numbers: Mapping[str, float]


class Trials:
    """Trains what is missing and keeps every score. `pipeline`: the pool's, inside its run's
    lock.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def recipe(self, trial: Trial, test: Test | Command) -> Recipe:
        inputs = {"pool": self.pipeline.encode_recipe("pool").digest, "test": test.digest}
        return Recipe(
            "trial",
            {**trial.canonical(), **test.canonical()},
            inputs,
            self.pipeline.compute_identity(),
        )

    def missing(
        self, wanted: Iterable[tuple[Trial, Sequence[Test | Command]]]
    ) -> list[tuple[Trial, list[Test | Command]]]:
        """Trainings to be done and the tests that lack their scores; a training wanted twice is
        done once.
        """
        jobs: dict[str, tuple[Trial, dict[str, Test | Command]]] = {}
        for trial, tests in wanted:
            for test in tests:
                recipe = self.recipe(trial, test)
                if self.pipeline.stored(recipe) is None:
                    jobs.setdefault(json.dumps(trial.canonical(), sort_keys=True), (trial, {}))[1][
                        recipe.digest
                    ] = test
        return [(trial, list(tests.values())) for trial, tests in jobs.values()]

    def run(self, wanted: Iterable[tuple[Trial, Sequence[Test | Command]]]) -> int:
        """Trains and tests what is not there yet, in the order given; returns how many trainings
        that took. Raises Interrupted.
        """
        jobs, progress = self.missing(wanted), self.pipeline.progress
        if not jobs:
            return 0
        encoded = self.pipeline.encoded("pool")
        progress.start(len(jobs), "trainings", "training and testing")
        make = functools.partial(_worker, self.pipeline.config.model)
        for number, (made, seconds) in self.pipeline.executor.map(
            make, range(len(jobs)), lambda number: _job(*jobs[number], encoded)
        ):
            trial, tests = jobs[number]
            for test, scores in zip(tests, made, strict=True):
                self.pipeline.make(
                    self.recipe(trial, test),
                    functools.partial(_keep, scores, seconds, self.pipeline.executor.gpu),
                )
            progress.advance()
        progress.done()
        return len(jobs)

    def scores(self, trial: Trial, test: Test | Command) -> TrialScores:
        """The scores of a training that `run` has done."""
        artifact = self.pipeline.make(self.recipe(trial, test), _not_run)
        if isinstance(test, Command):
            return TrialScores(
                np.zeros(0), np.zeros(0), {}, dict(artifact.manifest["extra"]["numbers"])
            )
        tensors = {name: value.numpy() for name, value in artifact.tensors(_FILE).items()}
        return TrialScores(tensors.pop("sums"), tensors.pop("tokens"), tensors, {})

    def seconds(self, trial: Trial, test: Test | Command) -> dict[str, float]:
        """Wall seconds of the training and its test: {"training", "testing"}; empty where
        stats.json is lost.
        """
        artifact = self.pipeline.stored(self.recipe(trial, test))
        stats = {} if artifact is None else artifact.stats
        return {name: stats[name] for name in ("training", "testing") if name in stats}


def _not_run(artifact: Artifact) -> None:
    raise RuntimeError(f"{artifact.path.name} was asked for its scores before it was run")


def _keep(scores: TrialScores, seconds: Mapping[str, float], gpu: str, artifact: Artifact) -> None:
    files = {}
    if len(scores.sums):
        arrays = {"sums": scores.sums, "tokens": scores.tokens, **scores.measures}
        # those of a worker are read-only
        tensors = {name: torch.tensor(value) for name, value in arrays.items()}
        files[_FILE] = write_tensors(artifact.path / _FILE, tensors, {"recipe": artifact.digest})
    extra = {"numbers": dict(scores.numbers), **({"gpus": {gpu: 1}} if gpu else {})}
    artifact.finish(
        files=files, counts={"rows": len(scores.sums)}, extra=extra, stats=dict(seconds)
    )


@dataclass(frozen=True, eq=False)
class _Job:
    rows: list[dict[str, list[int]]]
    settings: FinetuneSettings
    weights: np.ndarray | None
    tests: tuple[Test | Command, ...]


def _job(trial: Trial, tests: Sequence[Test | Command], encoded: EncodedRows) -> _Job:
    # Texts of the test sets stay here: a pool holds open files.
    sent = tuple(replace(test, examples=()) if isinstance(test, Test) else test for test in tests)
    return _Job([encoded[int(i)] for i in trial.rows], trial.settings, trial.weights, sent)


def _worker(model: ModelSettings) -> Callable[[_Job], tuple[list[TrialScores], dict[str, float]]]:
    """Made where the work is done, from plain data."""
    tokenizer = tokenizer_from_settings(model)

    def base(mode: str) -> Any:
        # Trained in full, weights of half precision would lose small updates.
        return from_settings(model, dtype=None if mode == "lora" else "float32")

    def work(job: _Job) -> tuple[list[TrialScores], dict[str, float]]:
        started = time.perf_counter()
        load = functools.partial(base, job.settings.mode)
        net = (
            finetune(
                load, job.rows, settings=job.settings, weights=job.weights, device=model.device
            )
            if job.rows
            else load()
        )
        trained = time.perf_counter()
        made = [_score(net, tokenizer, test, job.settings.token_budget) for test in job.tests]
        return made, {"training": trained - started, "testing": time.perf_counter() - trained}

    return work


def _score(net: Any, tokenizer: Any, test: Test | Command, token_budget: int) -> TrialScores:
    if isinstance(test, Command):
        return TrialScores(np.zeros(0), np.zeros(0), {}, _ask(test.text, net, tokenizer))
    held, measures = heldout_loss(net, test.rows, token_budget), {}
    generated = answers(net, test.rows, tokenizer) if set(test.measures) - {"loss"} else []
    if "exact" in test.measures:
        pairs = zip(generated, test.answers, strict=True)
        measures["exact"] = np.array(
            [
                math.nan if answer is None else float(same_answer(text, answer))
                for text, answer in pairs
            ]
        )
    for name, function in (("bleu", bleu), ("chrf", chrf)):
        if name in test.measures:
            measures[name] = np.array(
                [
                    function(text, said)
                    for text, said in zip(generated, test.references, strict=True)
                ]
            )
    return TrialScores(held.sums, held.tokens, measures, {})


def _ask(command: str, net: Any, tokenizer: Any) -> dict[str, float]:
    """Saves the trained model (the adapter, in LoRA mode) where {model} stands and runs the
    command.
    """
    with tempfile.TemporaryDirectory(prefix="gradsift-") as folder:
        with quiet():
            net.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        words = [word.replace("{model}", folder) for word in shlex.split(command)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise DataError(
                f"--measure-command cannot be run: {error.strerror}",
                where=words[0],
                remedy="Try it in a shell.",
            ) from None
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            told = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            raise DataError(
                f"--measure-command ended with {done.returncode}: {told}",
                where=words[0],
                remedy="Try it in a shell.",
            )
        return _numbers(lines[-1], Path(words[0]))


def _numbers(line: str, where: Path) -> dict[str, float]:
    try:
        printed = json.loads(line)
    except ValueError:
        printed = None
    printed = (
        {"value": printed}
        if isinstance(printed, (int, float)) and not isinstance(printed, bool)
        else printed
    )
    if (
        isinstance(printed, dict)
        and printed
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in printed.values())
    ):
        return {str(name): float(value) for name, value in printed.items()}
    what = f"--measure-command printed {line[:80]!r} last"
    raise DataError(
        what, where=where, remedy="Let its last line be a number or a JSON object of numbers."
    )
