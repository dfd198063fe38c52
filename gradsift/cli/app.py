"""The command line: a thin skin, every command is one library call. Data on stdout, log on
stderr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradsift.cli.flags import (
    AsJson,
    BudgetText,
    Given,
    Method,
    MethodOptions,
    ModelName,
    Out,
    PoolFiles,
    Quiet,
    RunFolder,
    Seed,
    TargetFiles,
    shared_flags,
)

if TYPE_CHECKING:
    from gradsift.commands.preflight import Inputs

app = typer.Typer(
    name="gradsift",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Pick the rows of an instruction pool that are worth training a language model on, by their"
        " gradients."
    ),
    epilog=(
        "Example: gradsift select tagcos --pool pool.jsonl --model ./my-model --budget 5% --run"
        " runs/a"
    ),
)


@app.command(
    epilog=(
        "Example: gradsift select less --pool pool.jsonl --target dev.jsonl --model ./my-model"
        " --budget 1000 --run runs/a -o preset=released"
    )
)
@shared_flags
def select(
    method: Method,
    pool: PoolFiles,
    budget: BudgetText,
    run: RunFolder,
    model: ModelName = None,
    target: TargetFiles = None,
    out: Out = None,
    seed: Seed = 0,
    option: MethodOptions = None,
    *,
    given: Given,
    add_scores: Annotated[
        bool, typer.Option("--add-scores", help="Write rank, gain and weight into the chosen rows.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose the rows worth training on, and write them with a report."""
    inputs = _inputs(run, pool, target, model, given)
    options = _checked(method, inputs, budget, option, given, out)
    _choose_waiting(given)
    from gradsift.commands.select import select

    result = select.select(
        method,
        pool=pool,
        budget=budget,
        run=run,
        model=model,
        target=target or [],
        out=out,
        seed=seed,
        options=options,
        settings=given.settings,
        add_scores=add_scores,
        constraints=given.constraints,
        progress=_progress(quiet),
        **given.call,
    )
    _print_selection(result, as_json)


def _inputs(
    run: Path, pool: list[str], target: list[str] | None, model: str | None, given: Given
) -> Inputs:
    """What the command reads and where it works, for the checks that come before anything heavy is
    loaded.
    """
    from gradsift.commands.preflight import Inputs

    return Inputs(
        run,
        pool,
        target or [],
        model,
        given.settings,
        **{n: given.call.get(n) for n in ("pool_group", "target_group", "warmup_from")},
    )


def _choose_waiting(given: Given) -> None:
    """How threads wait for each other is settled before torch is loaded, or never."""
    from gradsift.compute import threads

    threads.waiting().choose(given.settings.get("machine", {}).get("threads") or 0)


def _checked(
    method: str,
    inputs: Inputs,
    budget: str,
    option: list[str] | None,
    given: Given,
    out: str | None = None,
) -> dict[str, str]:
    """The options of the method, once a selection with these arguments was found to be in order."""
    from gradsift.commands.preflight import check_selection

    options = _options(option)
    check_selection(
        method,
        inputs,
        budget=budget,
        options=options,
        out=out,
        allow_short=given.call["allow_short"],
        null=given.call["null"],
        constraints=given.constraints,
    )
    return options


def _options(pairs: list[str] | None) -> dict[str, str]:
    from gradsift import methods

    return methods.options_from(pairs or (), before="-o ", remedy="Write it as -o clusters=50.")


def _progress(quiet: bool) -> Any:
    from gradsift.compute import progress

    return progress.silent() if quiet else progress.auto()


def _print_selection(result: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.summary(), ensure_ascii=False, indent=2))
        return
    for line in result.lines():
        typer.echo(line)


@app.command(
    epilog=(
        "Example: gradsift plan tagcos --pool pool.jsonl --model ./my-model --budget 5% --run"
        " runs/a"
    )
)
@shared_flags
def plan(
    method: Method,
    pool: PoolFiles,
    budget: BudgetText,
    run: RunFolder,
    model: ModelName = None,
    target: TargetFiles = None,
    seed: Seed = 0,
    option: MethodOptions = None,
    *,
    given: Given,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """What `select` would run: stages, rows, tokens, bytes, memory, time. Writes nothing."""
    inputs = _inputs(run, pool, target, model, given)
    options = _checked(method, inputs, budget, option, given)
    _choose_waiting(given)
    from gradsift.commands.plan import plan as planning

    result = planning.plan(
        method,
        pool=pool,
        budget=budget,
        run=run,
        model=model,
        target=target or [],
        seed=seed,
        options=options,
        settings=given.settings,
        constraints=given.constraints,
        progress=_progress(quiet),
        **given.call,
    )
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else result.table())


@app.command(
    epilog=(
        "Example: gradsift compare less tagcos --pool pool.jsonl --target dev.jsonl --test"
        " test.jsonl --model ./my-model --budget 5% --run runs/a"
    )
)
@shared_flags
def compare(
    method: Annotated[
        list[str],
        typer.Argument(
            help="Methods to compare, with options as less:aggregate=max,preset=paper.",
            metavar="METHOD...",
            show_default=False,
        ),
    ],
    pool: PoolFiles,
    test: Annotated[
        list[str],
        typer.Option(
            "--test",
            metavar="[NAME=]FILE",
            help="Held-out examples to test on. Repeatable.",
            show_default=False,
        ),
    ],
    budget: BudgetText,
    run: RunFolder,
    model: ModelName = None,
    target: TargetFiles = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Trainings of each arm.")] = 5,
    seed: Seed = 0,
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="NAME",
            help=(
                "length, length-matched, perplexity, rds, full. Repeatable; random is always there."
                " (default all)"
            ),
            show_default=False,
        ),
    ] = None,
    oracle: Annotated[
        str | None,
        typer.Option(
            "--oracle",
            metavar="FIELD=VALUE",
            help=(
                "Also train on rows so marked, and tell every arm's share of them; no method sees"
                " the mark."
            ),
            show_default=False,
        ),
    ] = None,
    equal: Annotated[
        str,
        typer.Option(
            "--equal",
            metavar="both|steps|tokens",
            help="What all trainings share: optimiser steps, tokens, or a table of each.",
        ),
    ] = "both",
    measure: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            metavar="exact|bleu|chrf",
            help="Measured on greedy answers, beside the loss. Repeatable.",
        ),
    ] = None,
    measure_command: Annotated[
        str | None,
        typer.Option(
            "--measure-command",
            metavar="COMMAND",
            help="Your own evaluation of the model in the folder {model}; prints a number last.",
            show_default=False,
        ),
    ] = None,
    level: Annotated[
        float,
        typer.Option("--level", metavar="SHARE", min=0, max=1, help="Confidence of the intervals."),
    ] = 0.95,
    *,
    given: Given,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train on what each method chose and on the controls, and say which is better, with
    intervals.
    """
    from gradsift.commands.compare.request import check_comparison

    ways = ("steps", "tokens") if equal == "both" else (equal,)
    checked = {
        "controls": control,
        "equal": ways,
        "measure": measure or [],
        "seeds": seeds,
        "level": level,
    }
    check_comparison(
        method, _inputs(run, pool, target, model, given), budget=budget, test=test, **checked
    )
    _choose_waiting(given)
    from gradsift.commands.compare import compare

    found = compare.compare(
        method,
        pool=pool,
        test=test,
        budget=budget,
        run=run,
        model=model,
        target=target or [],
        seed=seed,
        oracle=oracle,
        measure_command=measure_command,
        settings=given.settings,
        progress=_progress(quiet),
        **checked,
        **given.call,
    )
    if as_json:
        typer.echo(json.dumps(found.summary(), ensure_ascii=False, indent=2))
        return
    for line in found.lines():
        typer.echo(line)


@app.command(
    epilog=(
        "Example: gradsift score --backend ekfac --pool pool.jsonl --target dev.jsonl --model"
        " ./my-model --run runs/a --out scores.parquet"
    )
)
@shared_flags
def score(
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="dot, cosine, less, less-mean, trak, ekfac, kfac, kfac-released.",
            show_default=False,
        ),
    ],
    pool: PoolFiles,
    target: Annotated[
        list[str],
        typer.Option(
            "--target",
            metavar="[NAME=]FILE",
            help="Examples to score the pool's rows on. Repeatable.",
            show_default=False,
        ),
    ],
    run: RunFolder,
    model: ModelName = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Also copy the matrix here.", show_default=False
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            metavar="rows|groups",
            help="A column per target row or per group. (default rows)",
            show_default=False,
        ),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            "--checkpoints",
            metavar="mean|last",
            help="Of the warm-up; through the curvature always the last. (default mean)",
            show_default=False,
        ),
    ] = None,
    *,
    given: Given,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the influence of every pool row on every target row (or group) as parquet. Positive =
    training on the row helps.
    """
    from gradsift.commands.preflight import check_scores

    check_scores(
        backend,
        _inputs(run, pool, target, model, given),
        columns=columns,
        checkpoints=checkpoints,
        out=out,
    )
    _choose_waiting(given)
    from gradsift.commands import score

    found = score.score(
        backend,
        pool=pool,
        target=target,
        run=run,
        model=model,
        out=out,
        columns=columns,  # type: ignore[arg-type]
        checkpoints=checkpoints,  # type: ignore[arg-type]
        settings=given.settings,
        progress=_progress(quiet),
        **given.call,
    )
    typer.echo(
        json.dumps(found.summary(), ensure_ascii=False, indent=2)
        if as_json
        else "\n".join(found.lines())
    )


@app.command(epilog="Example: gradsift doctor --model ./my-model --pool pool.jsonl")
@shared_flags
def doctor(
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="NAME|PATH|tiny", help="The model to look at.", show_default=False
        ),
    ],
    pool: PoolFiles,
    rows: Annotated[int, typer.Option("--rows", help="How many rows to measure on.")] = 16,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            "--attention",
            metavar="NAME",
            help="Attention to try. Repeatable. (default eager and sdpa)",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="NAME",
            help="Number format to try. Repeatable. (default float32 and bfloat16)",
            show_default=False,
        ),
    ] = None,
    *,
    given: Given,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check that rows are the same alone and in batches, and say which attention and precision keep
    them so; exit 3 if none does.
    """
    from gradsift.commands.preflight import check_reading

    check_reading(pool, given.settings)
    _choose_waiting(given)
    from gradsift.commands import doctor as surgery

    found = surgery.doctor(
        model,
        pool,
        rows=rows,
        attentions=attention or ("eager", "sdpa"),
        dtypes=dtype or ("float32", "bfloat16"),
        settings=given.settings,
        progress=_progress(quiet),
    )
    typer.echo(
        json.dumps(found.as_dict(), ensure_ascii=False, indent=2)
        if as_json
        else "\n".join(found.lines())
    )
    raise typer.Exit(0 if found.recommended is not None else 3)


@app.command(epilog="Example: gradsift methods --json")
def methods(as_json: AsJson = False) -> None:
    """List the methods: what they need and which options they take."""
    from gradsift import methods as registry

    found = registry.describe()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from gradsift.cli.listing import listing, width

    for line in listing(found, width()):
        typer.echo(line)


@app.command(epilog="Example: gradsift inspect --pool pool.jsonl --model ./my-model --rows 5")
@shared_flags
def inspect(
    pool: PoolFiles,
    model: ModelName = None,
    rows: Annotated[int, typer.Option("--rows", help="How many rows to print.")] = 3,
    start: Annotated[int, typer.Option("--start", help="First row, counted from 0.")] = 0,
    *,
    given: Given,
) -> None:
    """Print rows as the model sees them, the supervised tokens coloured, and the funnel of
    counts.
    """
    from gradsift.commands.preflight import check_reading

    check_reading(pool, given.settings)
    from rich.console import Console

    from gradsift.commands import inspect as inspection

    lines = inspection.inspect(
        pool, model=model, rows=rows, start=start, settings=given.settings, **given.call
    )
    console = Console(highlight=False, markup=False)
    for line in lines:
        console.print(line, soft_wrap=True)


@app.command(epilog="Example: gradsift demo")
def demo(
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="Where to work.")] = Path(
        "runs/demo"
    ),
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """See it work, offline, in a few minutes: a generated pool, a built-in model, three methods,
    and the proof.
    """
    from gradsift.commands.demo import demo as show

    result = show.demo(run, seed=seed, progress=_progress(quiet))
    typer.echo(result.table())
    raise typer.Exit(0 if result.passed else 1)


@app.command(epilog="Example: gradsift verify runs/a")
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Delete now what is damaged, rather than let the next run set it aside.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Re-hash everything a run holds; exit 5 naming what is not as it was written. The next run
    makes just that anew.
    """
    from gradsift.commands import runs

    notes: list[str] = []
    problems = runs.verify(run, repair=repair, note=notes.append)
    if as_json:
        typer.echo(json.dumps({"problems": problems}, indent=2))
    else:
        typer.echo("\n".join(problems) or "everything is as it was written")
    for text in notes:
        typer.echo(text, err=True)
    raise typer.Exit(5 if problems else 0)


@app.command(epilog="Example: gradsift show runs/a")
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: AsJson = False,
) -> None:
    """What a run holds: stages, sizes, times, selections."""
    from gradsift.commands import runs
    from gradsift.report.text import table

    held = runs.show(run)
    if as_json:
        typer.echo(json.dumps(held, indent=2))
        return
    rows = [["artifact", "state", "bytes", "seconds", "about"]]
    for line in held["stages"]:
        state = "complete" if line["complete"] else "unfinished"
        about = ", ".join(
            f"{key} {value}"
            for key, value in {**line.get("about", {}), **line.get("counts", {})}.items()
            if value != {}
        )
        seconds = line.get("seconds")
        rows.append(
            [
                line["folder"],
                state,
                f"{line['bytes']:,}",
                "" if seconds is None else f"{seconds:.1f}",
                about,
            ]
        )
    typer.echo("\n".join(table(rows)))
    for command in held["commands"]:
        typer.echo(f"command  {command}")


@app.command(epilog="Example: gradsift report runs/a")
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write the report pages of a run's selections anew and print their paths."""
    from gradsift.commands import runs

    for path in runs.report(run):
        typer.echo(path)


@app.command(
    epilog="Example: gradsift diff runs/a/select-less-01234567 runs/b/select-tagcos-89abcdef"
)
def diff(
    a: Annotated[
        Path,
        typer.Argument(
            metavar="A", help="A selection: a select-... folder, or a run, whose newest is taken."
        ),
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Compare two selections of one pool: rows in common, rank correlation of the scores, and where
    their settings differ.
    """
    from gradsift.commands import runs

    found = runs.diff(a, b)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, folder, among in zip("ab", found["selections"], found["among"], strict=True):
        taken = f"  (the newest of {among:,} selections there)" if among > 1 else ""
        typer.echo(f"{name}         {folder}{taken}")
    if max(found["among"]) > 1:
        typer.echo("To compare another one, name its select-... folder, not its run.", err=True)
    typer.echo(
        f"rows      {found['a']:,} and {found['b']:,}, {found['common']:,} in common (Jaccard"
        f" {found['jaccard']:.2f})"
    )
    typer.echo(
        "overlap   "
        + ", ".join(f"{share:.0%} of the first {j:,}" for j, share in found["overlap_at"].items())
    )
    if found["spearman"] is not None:
        typer.echo(f"scores    Spearman {found['spearman']:+.2f}")
    for field, (old, new) in found["settings"].items():
        typer.echo(f"{field}: {old} -> {new}")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"gradsift {version('gradsift')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: gradsift's own errors become one line on stderr and an exit code."""
    import warnings

    from gradsift.errors import GradsiftError
    from gradsift.redaction import readable_command

    # Deprecations between libraries are for their developers, not for whoever reads this log.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except GradsiftError as error:
        print(f"gradsift: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(
            "gradsift: interrupted. Nothing finished is lost; resume with:"
            f" {readable_command(sys.argv)}",
            file=sys.stderr,
        )
        sys.exit(130)
