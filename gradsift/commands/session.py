"""How every command opens a run: its settings, its pool and target, its pipeline; and how it hands over a file."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsift.commands import budget as budgets
from gradsift.compute import machine
from gradsift.compute.progress import Progress, silent
from gradsift.compute.stopping import interruptible
from gradsift.config import Config, build
from gradsift.data.pool import Pool, read_pool, split_name
from gradsift.data.remote import is_url, place_of, sent
from gradsift.data.write import copy_file
from gradsift.errors import BudgetError, ConfigError, IntegrityError, MismatchError, UserError
from gradsift.redaction import readable_command
from gradsift.stages.pipeline import Pipeline
from gradsift.store.artifact import REPAIR, Artifact, read_sealed
from gradsift.store.atomic import make_folder, write_atomic
from gradsift.store.canonical import sealed
from gradsift.store.run import SETTINGS, Run
from gradsift.store.tensors import file_hash
from gradsift.types import Selector

# What a run is made with, besides the number of threads.
RUN_SECTIONS = ("pool", "encode", "model", "warmup", "gradients", "curvature", "tuning")


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


def check_budget(wanted: budgets.Budget, pool: Pool, allow_short: bool) -> None:
    """What can be told before anything is computed."""
    if wanted.unit == "rows" and (rows := wanted.rows(pool.funnel["read"])) > len(pool) and not allow_short:
        raise BudgetError(f"the budget is {rows:,} rows and {len(pool):,} are usable", remedy="Lower --budget, or add --allow-short.")


def check_out(out: str | Path | None, inputs: Sequence[str | Path]) -> None:
    """Raises UserError when `out` would overwrite a file of `inputs`, given as [NAME=]FILE."""
    if out is not None and any(place_of(str(out)) == place_of(split_name(file)[1]) for file in inputs):
        raise UserError("--out names an input file", where=out, remedy="Choose another name for what is written.")


def deliver(artifact: Artifact, name: str, out: str | Path | None) -> Path:
    """The file `name` of a complete artifact; with `out` a copy there, whose path is returned unless it is a URL.

    Raises IntegrityError when the file is not the one that was written; DiskFull, ResourceError, UserError for a URL that leads nowhere.
    """
    path = artifact.file(name)
    if file_hash(path) != artifact.manifest["files"][name]:
        raise IntegrityError("is not the file that the manifest names", where=path, remedy=REPAIR)
    if out is not None and is_url(str(out)):
        sent(path, str(out))
    elif out is not None:
        make_folder(Path(out).absolute().parent)
        copy_file(path, Path(out))
        path = Path(out)
    return path
