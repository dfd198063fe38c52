"""What is wrong with a command, told before anything heavy is loaded: its names, its settings, its
files, its budget.

A job calls its check first, and so does the command line before it imports the job. Nothing here,
and nothing it imports, loads torch, transformers, peft or pyarrow.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from gradsift import methods
from gradsift.commands import budget as budgets
from gradsift.config import AUTO, Config, build
from gradsift.data.files import container, converted
from gradsift.data.remote import is_url, place_of
from gradsift.data.sources import check_pool, expanded, holds, split_name
from gradsift.errors import BudgetError, ConfigError, MismatchError, UnknownName, UserError
from gradsift.signals.backends import backend as backend_of
from gradsift.store.artifact import read_sealed
from gradsift.store.run import SETTINGS, Run
from gradsift.types import Signal, counted

if TYPE_CHECKING:
    from gradsift.compute.progress import Progress
    from gradsift.data.files import Text
    from gradsift.data.pool import Pool
    from gradsift.types import Selector

Files: TypeAlias = Sequence[str | Path] | str | Path
Columns = Literal["rows", "groups"]
Side = Literal["pool", "target"]
COUNTED = 64 << 20  # bytes of a pool above which its lines are not counted ahead of the reading

# What a run is made with, besides the number of threads.
RUN_SECTIONS = ("pool", "encode", "model", "warmup", "gradients", "curvature", "tuning")


@dataclass(frozen=True)
class Inputs:
    """What a job reads and where it works; the arguments that every job has.

    Args:
        run: the run folder.
        pool, target: files as `[NAME=]FILE` or hf:NAME.
        model: a name, a folder or "tiny"; None = as the run or `settings` say.
        settings: sections of Config that differ from the run's, or in a new run from the defaults.
        pool_group, target_group: the field of a row that is its group.
        warmup_from: the folder of a LoRA run whose checkpoints stand in for a warm-up.
    """

    run: str | Path
    pool: Files
    target: Files = ()
    model: str | None = None
    settings: Mapping[str, Mapping[str, Any]] | None = None
    pool_group: str | None = None
    target_group: str | None = None
    warmup_from: str | Path | None = None

    @property
    def pool_files(self) -> list[str | Path]:
        return as_list(self.pool)

    @property
    def target_files(self) -> list[str | Path]:
        return as_list(self.target)

    def config(self, run: Run) -> Config:
        """The settings in force in the run folder `run`; see `settle_config`."""
        return settle_config(run, self.model, self.settings or {}, self.pool_group)


def check_selection(
    method: str,
    inputs: Inputs,
    *,
    budget: str | int | float,
    options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    allow_short: bool = False,
    null: bool = False,
    constraints: Mapping[str, Any] | None = None,
) -> tuple[Selector, budgets.Budget]:
    """Checks the arguments of `gradsift.select`, or of a plan of it, with the errors that it would
    end with.

    Returns:
        The method with its options, and the budget.

    Raises:
        UserError: a wrong name, option, budget, setting or combination, a file that is not there.
        DataError: a file whose first bytes cannot be read as rows.
        IntegrityError: the run's settings file is damaged.
    """
    selector, wanted = methods.make(method, options), budgets.parse(budget)
    check_target(method, selector, inputs.target_files)
    share_by_score((constraints or {}).get("mix"))
    if null and (selector.target == "none" or not inputs.target_files):
        raise UserError(
            f"--null puts pool rows in the place of the target, and {method} "
            + ("reads none" if selector.target == "none" else "was given none"),
            remedy="Leave it out, or add --target FILE for a method that reads one.",
        )
    check_out(out, [*inputs.pool_files, *inputs.target_files])
    if out is not None:
        container(out)
    config, texts = check_run(inputs)
    if out is not None:
        check_container(out, inputs.pool_files, texts)
    if not allow_short:
        check_lines(wanted, texts, inputs, config)
    return selector, wanted


def check_scores(
    backend: str,
    inputs: Inputs,
    *,
    columns: str | None = None,
    checkpoints: str | None = None,
    out: str | Path | None = None,
) -> tuple[Signal, Columns]:
    """Checks the arguments of `gradsift.score`. Raises as `check_selection`.

    Returns:
        The signal to compute, and how its columns are cut.
    """
    settled = _settled(backend, columns, checkpoints)
    if not inputs.target_files:
        raise UserError(
            "scores are influence on a target and none was given", remedy="Add --target FILE."
        )
    check_out(out, [*inputs.pool_files, *inputs.target_files])
    if out is not None and not str(out).partition("?")[0].lower().endswith(".parquet"):
        raise UserError(
            "scores are written as parquet alone", where=out, remedy="End the name in .parquet."
        )
    check_run(inputs)
    return settled


def _settled(name: str, columns: str | None, checkpoints: str | None) -> tuple[Signal, Columns]:
    """The signal to compute and how its columns are cut. Raises UnknownName, or UserError for what
    the backend cannot do.
    """
    chosen = backend_of(name)
    if columns not in (None, "rows", "groups"):
        raise UnknownName("kind of columns", columns, ("rows", "groups"))
    if checkpoints not in (None, "mean", "last"):
        raise UnknownName("choice of checkpoints", checkpoints, ("mean", "last"))
    if chosen.merge and columns == "rows":
        raise UserError(
            f"{name} averages the target rows of a group before it scores",
            remedy="Use --columns groups, or another backend.",
        )
    if chosen.curvature is not None and checkpoints == "mean":
        raise UserError(
            f"{name} knows the curvature at the last checkpoint alone",
            remedy="Use --checkpoints last, or another backend.",
        )
    at: Any = checkpoints or ("last" if chosen.curvature is not None else "mean")
    return Signal("influence", transform=chosen.transform, checkpoints=at, backend=name), (
        "groups" if chosen.merge else columns or "rows"
    )  # type: ignore[return-value]


def check_reading(
    pool: Files,
    settings: Config | Mapping[str, Mapping[str, Any]],
    side: Side = "pool",
    group_field: str | None = None,
) -> list[Text | None]:
    """Checks files that are read as rows of a side, under a config or its sections. Raises as
    `check_selection`.

    Returns:
        For each file its text where it is a plain one, else None.
    """
    config = settings if isinstance(settings, Config) else build(settings, "settings")
    arguments = reading(config, side)
    return check_pool(
        as_list(pool),
        group_field=config.pool.group_field if side == "pool" else group_field,
        **{name: arguments[name] for name in ("format", "mapping", "files", "inherited")},
    )


def reading(config: Config, side: Side) -> dict[str, Any]:
    """Arguments of `read_pool` for the rows of a side."""
    settings = config.reading(side)
    own = config.target if side == "target" else config.pool
    return {
        "format": settings.format,
        "group_field": settings.group_field,
        "id_field": settings.id_field,
        "mapping": settings.mapping,
        "files": {name: file.model_dump() for name, file in settings.files.items()},
        "inherited": [name for name in ("format", "mapping") if getattr(own, name) is None]
        + ["files"] * (side == "target"),
        "max_bad_rows": settings.max_bad_rows,
    }


def open_run(root: Path) -> Run:
    """The run in a folder. Raises UserError where there is none."""
    run = Run(root)
    if not run.exists:
        raise UserError(
            "is not a run folder", where=root, remedy="Give the folder that --run named."
        )
    return run


def check_run(inputs: Inputs) -> tuple[Config, list[Text | None]]:
    """Checks run folder, settings and files. Raises as `check_selection`.

    Returns:
        The settings in force, and of the pool's files the plain texts, None for others.
    """
    config = inputs.config(Run(Path(inputs.run)))
    check_folders(inputs, config)
    texts = check_reading(inputs.pool_files, config)
    if inputs.target_files:
        group_field = inputs.target_group or config.target.group_field
        check_reading(inputs.target_files, config, "target", group_field)
    return config, texts


def check_folders(inputs: Inputs, config: Config) -> None:
    """Refuses a model folder or a folder of checkpoints that is not there. A name that may be one
    of the hub is left to the loading.
    """
    name = config.model.name
    folder = name.startswith((".", "/", "~")) or name.count("/") > 1
    if folder and not os.path.isdir(os.path.expanduser(name)):
        raise UserError(
            "no such model folder",
            where=name,
            remedy="Give a folder with config.json and *.safetensors, a hub name, or tiny.",
        )
    if inputs.warmup_from is None:
        return
    if not os.path.isdir(inputs.warmup_from):
        raise UserError(
            "no such folder",
            where=inputs.warmup_from,
            remedy="Check --warmup-from: the output folder of a LoRA training.",
        )
    if config.warmup.weights is not None:
        raise ConfigError(
            "[warmup] weights are of the run's own checkpoints, and --warmup-from brings others",
            remedy="Leave one of the two out.",
        )


def share_by_score(mix: float | str | None) -> Fraction | None:
    """The share of the budget that goes by score, written as 0.5 or 50%; None = all of it.

    Raises:
        ConfigError: no share, or none above 0 and at most 1.
    """
    if mix is None:
        return None
    text = str(mix).strip()
    try:
        share = Fraction(text.removesuffix("%").strip()) / (100 if text.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ConfigError(
            f"--mix {mix}: not a share of the budget",
            remedy="Give the part that goes by score, above 0 and at most 1: 0.5 or 50%.",
        )
    return None if share == 1 else share


def check_lines(
    wanted: budgets.Budget, texts: Iterable[Text | None], inputs: Inputs, config: Config
) -> None:
    """Refuses a number of rows that the pool has not even lines for: then the rows are read, to say
    how many are usable.
    """
    if wanted.unit != "rows" or wanted.count is None:
        return
    lines, size = 0, 0
    for text in texts:
        if text is None or (size := size + len(text)) > COUNTED:
            return
        lines += text.most_rows(wanted.count - lines)
        if lines >= wanted.count:
            return
    check_budget(
        wanted, read_side(inputs.pool_files, config, config.pool.group_field), allow_short=False
    )


def as_list(files: Sequence[str | Path] | str | Path) -> list[str | Path]:
    return [files] if isinstance(files, (str, Path)) else list(files)


def check_target(method: str, selector: Selector, targets: Sequence[Any]) -> None:
    if selector.target == "required" and not targets:
        raise UserError(
            f"{method} selects toward a target and none was given", remedy="Add --target FILE."
        )
    if selector.target == "none" and targets:
        raise UserError(
            f"{method} takes no target",
            remedy="Drop --target, or use a targeted method such as less.",
        )


def check_budget(wanted: budgets.Budget, pool: Pool, allow_short: bool) -> None:
    """What can be told before anything is computed."""
    if (
        wanted.unit == "rows"
        and (rows := wanted.rows(pool.funnel["read"])) > len(pool)
        and not allow_short
    ):
        raise BudgetError(
            f"the budget is {counted(rows, 'row')} and {counted(len(pool), 'is', 'are')} usable",
            remedy="Lower --budget, or add --allow-short.",
        )


def check_out(out: str | Path | None, inputs: Sequence[str | Path]) -> None:
    """Raises UserError when `out` would overwrite a file of `inputs`, given as [NAME=]FILE."""
    if out is None:
        return
    place = place_of(str(out))
    if any(place == place_of(source.file) for source in expanded(inputs)):
        raise UserError(
            "--out names an input file",
            where=out,
            remedy="Choose another name for what is written.",
        )
    for file in (split_name(source)[1] for source in inputs):
        if not is_url(str(out)) and holds(file, Path(out)):
            raise UserError(
                f"the next command would read --out as rows of {file}",
                where=out,
                remedy="Write it outside of the folders that are read.",
            )


def check_container(
    out: str | Path, pool: Sequence[str | Path], texts: Sequence[Text | None]
) -> None:
    """Raises UserError when the rows of the pool cannot be written in the container that the suffix
    of `out` names; a packed file is taken for what its name says.
    """
    kinds = []
    for source, text in zip(expanded(pool), texts, strict=True):
        if text is not None:
            kinds.append(text.kind)
        elif source.file.startswith("hf:") or os.path.isdir(source.file):
            kinds.append("arrow")
        else:
            with contextlib.suppress(UserError):
                kinds.append(container(source.file)[0])
    if kinds:
        converted(kinds, out)


def settle_config(
    run: Run, model: str | None, settings: Mapping[str, Mapping[str, Any]], pool_group: str | None
) -> Config:
    """The settings of this run: those it was made with, which `settings` may repeat but not change;
    in a new run, `settings` over the defaults.

    Raises MismatchError naming the first field that differs.
    """
    asked: dict[str, dict[str, Any]] = {name: dict(values) for name, values in settings.items()}
    if model is not None:
        asked.setdefault("model", {})["name"] = model
    if pool_group is not None:
        asked.setdefault("pool", {})["group_field"] = pool_group
    kept = _kept(run)
    if kept is None:
        config = build(asked, "settings")
        if "name" not in asked.get("model", {}):
            raise ConfigError(
                "no model was named", remedy="Add --model NAME, a local folder, or --model tiny."
            )
        return config
    if asked.get("machine", {}).get("threads") == 0:  # no number of its own: the run's
        del asked["machine"]["threads"]
    merged = {name: _overlaid(kept.get(name, {}), asked.get(name, {})) for name in {*kept, *asked}}
    config = build(merged, "settings")
    _agree(kept, config, run.root)
    return config


def check_kept(run: Run, config: Config) -> None:
    """Checks settings against those that the run was made with, "auto" being decided by now.

    Raises MismatchError naming the first field that differs.
    """
    kept = _kept(run)
    if kept is not None:
        _agree(kept, config, run.root)


def _kept(run: Run) -> dict[str, Any] | None:
    """The sections of the run's settings file; None for a run that has none yet."""
    path = run.root / SETTINGS
    if not path.exists():
        return None
    return read_sealed(
        path,
        remedy=(
            "Delete it and give the settings of the run again: what was made with them is found"
            " again."
        ),
    )


def _agree(kept: Mapping[str, Any], config: Config, root: Path) -> None:
    _same(
        "machine.threads", kept.get("machine", {}).get("threads", 0), config.machine.threads, root
    )
    for name in RUN_SECTIONS:
        made = build({name: kept.get(name, {})}, root / SETTINGS).model_dump()[name]
        asked = config.model_dump()[name]
        if name == "model":  # decided where torch is at hand, and compared then
            asked = {k: made[k] if v == AUTO else v for k, v in asked.items()}
        _same(name, made, asked, root)


def _overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **base,
        **{
            k: _overlaid(base.get(k) or {}, v) if isinstance(v, dict) and k != "mapping" else v
            for k, v in over.items()
        },
    }


def _same(name: str, kept: Any, asked: Any, root: Path) -> None:
    if isinstance(kept, dict) and isinstance(asked, dict) and kept.keys() == asked.keys():
        for key in kept:
            _same(f"{name}.{key}", kept[key], asked[key], root)
    elif kept != asked:
        remedy = (
            f"Use another --run folder for {asked!r}, or drop that setting to reuse what is there."
        )
        raise MismatchError(
            f"this run was made with {name} = {kept!r}, and {asked!r} is asked now",
            where=root,
            remedy=remedy,
        )


def read_side(
    files: Sequence[str | Path],
    config: Config,
    group_field: str | None,
    progress: Progress | None = None,
    side: Side = "pool",
) -> Pool:
    """A pool or target as the settings say, exact duplicates dropped where asked."""
    from gradsift.data.pool import read_pool

    arguments = {**reading(config, side), "group_field": group_field}
    rows = read_pool(files, **arguments, progress=progress)
    if config.pool.dedup == "exact":
        twice = rows.exact_duplicates()
        rows = rows.take([i for i in range(len(rows)) if i not in twice])
    return rows
