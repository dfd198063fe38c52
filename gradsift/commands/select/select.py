"""The main job: pool in, the rows worth training on out, with a report. One call, resumable at any point."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import RenderableType

from gradsift import methods
from gradsift.commands import budget as budgets
from gradsift.commands.demo import playground
from gradsift.commands.select import outputs
from gradsift.commands.select.choose import choose
from gradsift.commands.select.constraints import Constraints, screen
from gradsift.commands.select.constraints import build as build_constraints
from gradsift.commands.select.explain import Chosen, report_data
from gradsift.compute import machine
from gradsift.compute.executor import interruptible
from gradsift.compute.progress import Progress, silent
from gradsift.config import Config, build
from gradsift.data.encode import coloured, encode
from gradsift.data.pool import Pool, read_pool
from gradsift.delivery import check_out, deliver
from gradsift.errors import BudgetError, ConfigError, MismatchError, UserError
from gradsift.model.load import load_tokenizer
from gradsift.redaction import readable_command
from gradsift.report import write_report
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.recipe import Recipe, Timing
from gradsift.store.artifact import Artifact, file_hash, read_sealed, sealed
from gradsift.store.atomic import write_atomic, write_tensors
from gradsift.store.run import SETTINGS, Run
from gradsift.types import Selector, Subset

# What a run is made with, besides the number of threads.
RUN_SECTIONS = ("pool", "encode", "model", "warmup", "gradients", "curvature", "tuning")


@dataclass(frozen=True)
class Selection:
    """A finished selection: `folder` holds its files, `indices` [k] are pool rows in pick order, `ids` their ids."""

    method: str
    folder: Path
    subset_path: Path
    indices: np.ndarray
    ids: list[str]
    asked: int
    read: int
    timings: list[Timing]
    warnings: list[str]
    funnel: dict[str, int]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def summary(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "selected": len(self),
            "asked": self.asked,
            "funnel": self.funnel,
            "subset": str(self.subset_path),
            "report": str(self.report),
            "folder": str(self.folder),
            "stages": [vars(timing) for timing in self.timings],
            "warnings": self.warnings,
        }

    def lines(self) -> list[str]:
        funnel = ", ".join(f"{count:,} {name}" for name, count in self.funnel.items())
        bad = f" (each in {self.folder / 'dropped.jsonl'})" if any(name.startswith("quarantined:") for name in self.funnel) else ""
        made = [f"{timing.stage} {timing.seconds:.1f} s" for timing in self.timings if not timing.reused]
        reused = sum(timing.reused for timing in self.timings)
        return [
            f"rows      {funnel}{bad}",
            f"selected  {len(self):,} ({len(self) / max(self.read, 1):.2%} of the rows read) with {self.method}",
            f"stages    {', '.join(made) or 'nothing to make'}{f'; {reused} reused' if reused else ''}",
            *[f"warning   {text}" for text in self.warnings],
            f"report    {self.report}",
            f"subset    {self.subset_path}",
        ]


def select(
    method: str,
    *,
    pool: Sequence[str | Path] | str | Path,
    budget: str | int | float,
    run: str | Path,
    model: str | None = None,
    target: Sequence[str | Path] | str | Path = (),
    out: str | Path | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    pool_group: str | None = None,
    target_group: str | None = None,
    warmup_from: str | Path | None = None,
    allow_short: bool = False,
    add_scores: bool = False,
    constraints: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Choose rows of `pool` with a method of METHODS, reusing whatever the folder `run` already holds.

    pool, target: files as `[NAME=]FILE` or hf:NAME (see docs/formats.md). budget: "5%", 0.05, a count or "10M-tokens". settings: sections of
    Config that differ from the run's (or, in a new run, from the defaults). options: the method's hyper-parameters. constraints: arguments
    of `gradsift.commands.select.constraints.build`, test sets as files,
    applied to any method (docs/constraints.md). Killed at any point, the same call goes
    on where it stopped and ends with the same subset.

    Raises UserError (a wrong name, option, budget or combination), DataError (unusable input), ResourceError (disk, memory),
    IntegrityError (damaged work in `run`), Interrupted (a signal; resumable).
    """
    selector = methods.make(method, options)
    wanted = budgets.parse(budget)
    targets = as_list(target)
    check_target(method, selector, targets)
    check_out(out, [*as_list(pool), *targets])
    with opened(
        run, pool=pool, target=targets, model=model, settings=settings, pool_group=pool_group, target_group=target_group,
        warmup_from=warmup_from, progress=progress,
    ) as pipeline:  # fmt: skip
        limits = _limits(constraints or {}, pipeline.config, progress or silent())
        limits.check(pipeline.sides["pool"])
        check_budget(wanted, pipeline.sides["pool"], allow_short)
        return select_in(pipeline, method, selector, wanted, limits, seed, allow_short, add_scores, out)


def as_list(files: Sequence[str | Path] | str | Path) -> list[str | Path]:
    return [files] if isinstance(files, (str, Path)) else list(files)


def check_target(method: str, selector: Selector, targets: Sequence[Any]) -> None:
    if selector.target == "required" and not targets:
        raise UserError(f"{method} selects toward a target and none was given", remedy="Add --target FILE.")
    if selector.target == "none" and targets:
        raise UserError(f"{method} takes no target", remedy="Drop --target, or use a targeted method such as less.")


@contextlib.contextmanager
def opened(
    run: str | Path,
    *,
    pool: Sequence[str | Path] | str | Path,
    target: Sequence[str | Path] | str | Path = (),
    model: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    pool_group: str | None = None,
    target_group: str | None = None,
    warmup_from: str | Path | None = None,
    progress: Progress | None = None,
    keep: bool = True,
) -> Iterator[Pipeline]:
    """How every job begins: the pipeline of the folder `run` over pool and target, under the settings the run was made with.

    With `keep`, for jobs that write: the run is locked and remembers the command, what `gradsift verify` found damaged is set aside, and a
    signal stops between two shards.
    """
    playground.register()
    folder = Run(Path(run))
    with contextlib.ExitStack() as stack:
        if keep:
            stack.enter_context(folder.lock(sys.argv))
            stack.enter_context(interruptible(readable_command(sys.argv)))
        config = settle_config(folder, model, settings or {}, pool_group)
        pipeline = open_pipeline(folder, config, as_list(pool), as_list(target), target_group, warmup_from, progress or silent(), keep=keep)
        stack.callback(pipeline.executor.close)
        for problem in folder.set_aside() if keep else ():  # by a command that is not refused: its result tells of it
            pipeline.progress.note(f"set aside as damaged, made anew where it is needed: {problem}")
        yield pipeline


def settle_config(run: Run, model: str | None, settings: Mapping[str, Mapping[str, Any]], pool_group: str | None) -> Config:
    """The settings of this run: those it was made with, which `settings` may repeat but not change; in a new run, `settings` over the defaults.

    Raises MismatchError naming the first field that differs.
    """
    asked: dict[str, dict[str, Any]] = {name: dict(values) for name, values in settings.items()}
    if model is not None:
        asked.setdefault("model", {})["name"] = model
    if pool_group is not None:
        asked.setdefault("pool", {})["group_field"] = pool_group
    path = run.root / SETTINGS
    if not path.exists():
        config = build(asked, "settings")
        if "name" not in asked.get("model", {}):
            raise ConfigError("no model was named", remedy="Add --model NAME, a local folder, or --model tiny.")
        return config
    kept = read_sealed(path, remedy="Delete it and give the settings of the run again: what was made with them is found again.")
    if asked.get("machine", {}).get("threads") == 0:  # no number of its own: the run's
        del asked["machine"]["threads"]
    merged = {name: _overlaid(kept.get(name, {}), asked.get(name, {})) for name in {*kept, *asked}}
    config = build(merged, "settings")
    _same("machine.threads", kept.get("machine", {}).get("threads", 0), config.machine.threads, run.root)
    for name in RUN_SECTIONS:
        _same(name, build({name: kept.get(name, {})}, path).model_dump()[name], config.model_dump()[name], run.root)
    return config


def _overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {**base, **{k: _overlaid(base.get(k) or {}, v) if isinstance(v, dict) and k != "mapping" else v for k, v in over.items()}}


def _same(name: str, kept: Any, asked: Any, root: Path) -> None:
    if isinstance(kept, dict) and isinstance(asked, dict) and kept.keys() == asked.keys():
        for key in kept:
            _same(f"{name}.{key}", kept[key], asked[key], root)
    elif kept != asked:
        remedy = f"Use another --run folder for {asked!r}, or drop that setting to reuse what is there."
        raise MismatchError(f"this run was made with {name} = {kept!r}, and {asked!r} is asked now", where=root, remedy=remedy)


def open_pipeline(
    run: Run,
    config: Config,
    pool: Sequence[str | Path],
    target: Sequence[str | Path],
    target_group: str | None,
    warmup_from: str | Path | None,
    progress: Progress,
    *,
    keep: bool = True,
) -> Pipeline:
    """Reads pool and target; with `keep`, writes the run's settings down, so that later commands agree with them."""
    candidates = read_side(pool, config, config.pool.group_field, progress)
    wanted = read_side(target, config, target_group, progress) if target else None
    for rows in (candidates, wanted) if wanted is not None else (candidates,):
        for name, format in rows.formats.items():
            progress.note(f"{name}: {format} rows")
    pipeline = Pipeline(run, config, candidates, wanted, warmup_from=None if warmup_from is None else Path(warmup_from), progress=progress)
    if config.model.dtype in ("bfloat16", "nf4") and machine.emulates_bfloat16(config.model.device):
        progress.note(f"{config.model.dtype}: this CPU has no bfloat16 products, and gradients may take ten times as long as in float32")
    if keep and not (path := run.root / SETTINGS).exists():
        kept = {name: config.model_dump(mode="json")[name] for name in RUN_SECTIONS} | {"machine": {"threads": pipeline.threads}}
        write_atomic(path, (json.dumps(sealed(kept), indent=2, ensure_ascii=False) + "\n").encode())
    return pipeline


def read_side(files: Sequence[str | Path], config: Config, group_field: str | None, progress: Progress) -> Pool:
    """A pool or target as the settings say, exact duplicates dropped where asked."""
    settings = config.pool
    rows = read_pool(
        files,
        format=settings.format,
        group_field=group_field,
        id_field=settings.id_field,
        mapping=settings.mapping,
        max_bad_rows=settings.max_bad_rows,
        progress=progress,
    )
    if settings.dedup == "exact":
        twice = rows.exact_duplicates()
        rows = rows.take([i for i in range(len(rows)) if i not in twice])
    return rows


def _limits(given: Mapping[str, Any], config: Config, progress: Progress) -> Constraints:
    """Constraints as asked for; `decontaminate` names files, read as targets are."""
    tests = {str(file): read_side([file], config, None, progress) for file in as_list(given.get("decontaminate") or ())}
    return build_constraints(**{**given, "decontaminate": tests})


def check_budget(wanted: budgets.Budget, pool: Pool, allow_short: bool) -> None:
    """What can be told before anything is computed."""
    if wanted.unit == "rows" and (rows := wanted.rows(pool.funnel["read"])) > len(pool) and not allow_short:
        raise BudgetError(f"the budget is {rows:,} rows and {len(pool):,} are usable", remedy="Lower --budget, or add --allow-short.")


def select_in(
    pipeline: Pipeline,
    method: str,
    selector: Selector,
    wanted: budgets.Budget,
    limits: Constraints,
    seed: int,
    allow_short: bool = False,
    add_scores: bool = False,
    out: str | Path | None = None,
) -> Selection:
    """A selection in a run that is already open and locked; see `select`."""
    needs, read = selector.needs(), pipeline.sides["pool"].funnel["read"]
    recipes = pipeline.recipes(needs | limits.needs())

    def fill(artifact: Artifact) -> None:
        signals, kept = pipeline.signals(needs | limits.needs())
        pool, lengths = pipeline.sides["pool"], pipeline.encoded("pool").lengths
        left = screen(limits, pool, signals, kept)
        subset = choose(selector, signals, left, kept, limits, wanted, read=read, lengths=lengths, seed=seed, allow_short=allow_short)
        asked = wanted.rows(read) if wanted.unit == "rows" else len(subset)
        _write(
            artifact, Chosen(pipeline, method, selector, spread(subset, kept, len(pool)), asked, seed, left, wanted, recipes), add_scores
        )

    chosen = select_recipe(pipeline, method, selector, wanted, limits, seed, add_scores)
    if pipeline.stored(chosen) and any(pipeline.unfinished(recipe) for recipe in recipes):
        pipeline.signals(needs | limits.needs())  # a repair took something away that the selection was made from
    artifact = pipeline.make(chosen, fill)
    pool = pipeline.sides["pool"]
    indices = artifact.tensors("subset.safetensors")["indices"].numpy()
    name = next(name for name in artifact.manifest["files"] if name.startswith("selected."))
    path = deliver(artifact, name, out)
    return Selection(
        method=method,
        folder=artifact.path,
        subset_path=path,
        indices=indices,
        ids=[pool.ids[int(i)] for i in indices],
        asked=artifact.manifest["counts"]["asked"],
        read=read,
        timings=pipeline.timings,
        warnings=[*pool.warnings, *pipeline.run.mended(), *artifact.manifest.get("extra", {}).get("warnings", [])],
        funnel=pool.funnel,
    )


def select_recipe(
    pipeline: Pipeline, method: str, selector: Selector, wanted: budgets.Budget, limits: Constraints, seed: int, add_scores: bool = False
) -> Recipe:
    """The recipe of a selection: the method with its options, the budget in rows, the constraints, and the stages it reads."""
    config = {"method": method, "options": methods.options_of(selector), "budget": wanted.canonical(pipeline.sides["pool"].funnel["read"])}
    config |= {"seed": seed, "add_scores": add_scores, **({"constraints": limits.canonical()} if limits.canonical() else {})}
    recipes = pipeline.recipes(selector.needs() | limits.needs())
    return Recipe("select", config, {f"{i:02d}-{recipe.stage}": recipe.digest for i, recipe in enumerate(recipes)})


def spread(subset: Subset, kept: np.ndarray, n: int) -> Subset:
    """A subset of the usable rows as a subset of the pool: indices mapped, per-row columns padded (NaN, -1 or None where not usable)."""
    notes = {}
    for name, value in subset.notes.items():
        column = np.asarray(value) if not isinstance(value, (str, dict)) else None
        if column is None or column.ndim != 1 or len(column) != len(kept):
            notes[name] = value
            continue
        empty = np.nan if column.dtype.kind == "f" else None if column.dtype == object else -1
        full = np.full(n, empty, dtype=column.dtype)
        full[kept] = column
        notes[name] = full
    return replace(subset, indices=kept[np.asarray(subset.indices, dtype=np.int64)], notes=notes)


def _write(artifact: Artifact, chosen: Chosen, add_scores: bool) -> None:
    subset, pool = chosen.subset, chosen.pipeline.sides["pool"]
    config = chosen.pipeline.config
    written = outputs.write_outputs(
        artifact.path,
        pool,
        subset,
        columns=chosen.columns(),
        add_scores=add_scores,
        model=config.model.name,
        max_length=config.encode.max_length,
        template=config.encode.template,
        say=chosen.pipeline.progress.note,
        left_out=chosen.left_out(),
    )
    tensors = {"indices": torch.as_tensor(np.asarray(subset.indices))}
    for name in ("gains", "weights"):
        if getattr(subset, name) is not None:
            tensors[name] = torch.as_tensor(np.asarray(getattr(subset, name), dtype=np.float64))
    files = {path.relative_to(artifact.path).as_posix(): file_hash(path) for path in written}
    files["subset.safetensors"] = write_tensors(artifact.path / "subset.safetensors", tensors, {"recipe": artifact.digest})
    # The report is not hashed: it shows clocks, and `gradsift report` may write it anew.
    write_report(report_data(chosen, chosen.pipeline.timings, artifact), artifact.path)
    numbers = {name: value for name, value in subset.notes.items() if isinstance(value, (int, float))}
    counts = {"selected": len(subset), "asked": chosen.asked, "read": pool.funnel["read"]}
    artifact.finish(files=files, counts=counts, extra={"warnings": chosen.warnings(), "notes": numbers})


def inspect(
    pool: Sequence[str | Path] | str | Path,
    *,
    model: str | None = None,
    rows: int = 3,
    start: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    pool_group: str | None = None,
) -> list[RenderableType]:
    """What `gradsift inspect` prints: the funnel, the quarantine, notes of the encoder, and `rows` rows with the supervised tokens coloured."""
    playground.register()
    sections = {name: dict(values) for name, values in (settings or {}).items()}
    sections.setdefault("model", {})["name"] = model or sections.get("model", {}).get("name", "tiny")
    config = build(sections, "settings")
    candidates = read_side(as_list(pool), config, pool_group or config.pool.group_field, silent())
    tokenizer = load_tokenizer(config.model.name, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code)
    shown = range(min(start, len(candidates)), min(start + rows, len(candidates)))
    encoded = encode(candidates.take(shown), tokenizer, config.encode)
    lines: list[RenderableType] = [f"{name}: {format}" for name, format in candidates.formats.items()]
    lines.append(", ".join(f"{count:,} {name}" for name, count in candidates.funnel.items()))
    lines += [f"dropped {dropped}" for dropped in candidates.dropped[:10]]
    lines += encoded.notes
    for i, row in enumerate(shown):
        code = int(encoded.codes[i])
        what = encoded.reasons[code] if code else f"{encoded.supervised[i]} of {encoded.lengths[i]} tokens supervised"
        lines.append(f"\n{candidates.place(row)}  {candidates.ids[row]}  ({candidates.groups[row]}): {what}")
        if not code:
            lines.append(coloured(encoded[i], tokenizer))
    return lines
