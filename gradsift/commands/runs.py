"""What a run holds: listing it, checking it, rewriting its reports, comparing two selections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gradsift.commands.preflight import open_run
from gradsift.errors import DataError, IntegrityError, MismatchError, ResourceError
from gradsift.store.artifact import Artifact
from gradsift.store.canonical import differences
from gradsift.store.run import SETTINGS, Run
from gradsift.store.verify import Problem


def show(root: Path) -> dict[str, Any]:
    """Stages, sizes in bytes, seconds, counts and the last command of a run, as plain data."""
    run = open_run(root)
    stages = []
    for artifact in run.artifacts():
        size = sum(path.stat().st_size for path in artifact.path.rglob("*") if path.is_file())
        line = {
            "stage": artifact.stage,
            "folder": artifact.path.name,
            "complete": artifact.complete,
            "bytes": size,
        }
        if artifact.complete:
            config = artifact.recipe["config"]
            about = {
                key: config[key]
                for key in ("method", "budget", "seed", "transform", "checkpoint", "backend")
                if key in config
            }
            line |= {
                "seconds": _seconds(artifact),
                "counts": artifact.manifest["counts"],
                "about": about,
            }
            line["finished"] = artifact.stats.get("finished", 0.0)
        stages.append(line)
    stages.sort(key=lambda line: (line.get("finished", float("inf")), line["folder"]))
    return {"run": str(run.root), "commands": run.commands, "stages": stages}


def _seconds(artifact: Artifact) -> float | None:
    """Wall seconds of a stage; of a trial, those of its training and test, which ran before the
    artifact was opened. None where stats.json is lost.
    """
    stats = artifact.stats
    if artifact.stage == "trial" and "training" in stats:
        return round(stats["training"] + stats.get("testing", 0.0), 3)
    return stats.get("wall_seconds")


def verify(
    root: Path, *, repair: bool = False, note: Callable[[str], None] = lambda _: None
) -> list[str]:
    """What is wrong in a run, one line per fault; empty = every file is as it was written. `note`
    is told what becomes of it.

    The run remembers what was found: the next command that works in it sets these files aside, says
    so, and makes them anew. `repair` deletes them now, and a damaged settings file too.
    """
    run = open_run(root)
    problems = run.verify()
    own = [problem for problem in problems if not problem.remedy]
    if repair and own:
        with run.lock():
            for problem in own:
                run.discard(problem)
            run.remember([])
        note("removed; run the same command again to make it anew")
    else:
        _remember(root, run, problems, note)
    return [str(problem) for problem in problems]


def _remember(
    root: Path, run: Run, problems: Sequence[Problem], note: Callable[[str], None]
) -> None:
    try:
        remembered = run.remember(problems)
    except ResourceError as error:  # a copy that is only read: what is wrong is told all the same
        note(f"this cannot be kept for the next run: {error}")
    else:
        if remembered:
            note("the next run sets aside what is damaged and makes just that anew")
        if any(not problem.artifact and problem.file == SETTINGS for problem in problems):
            note(
                f"{SETTINGS} cannot be made anew: `gradsift verify {root} --repair` removes it;"
                " then give all settings of the run again"
            )


def report(root: Path) -> list[Path]:
    """Writes report.html and report.md of every finished selection anew from its report.json, with
    what the run's other selections have in common with it; returns the pages.
    """
    run = open_run(root)
    selections = [
        artifact for artifact in run.artifacts() if artifact.stage == "select" and artifact.complete
    ]
    if not selections:
        raise DataError(
            "holds no finished selection", where=root, remedy="Run `gradsift select` first."
        )
    from gradsift.report.agreement import matrix
    from gradsift.report.data import ReportData
    from gradsift.report.write import write_report

    pages = []
    for selection in selections:
        folder = selection.path
        path = folder / "report.json"
        if not path.exists():
            raise DataError(
                "has no report.json",
                where=folder,
                remedy="Delete the folder; the same select command makes it anew.",
            )
        try:
            data = ReportData.model_validate_json(path.read_bytes())
        except ValueError as error:
            remedy = "Delete the folder; the same select command makes it anew."
            raise IntegrityError(
                "is not the report that was written", where=path, remedy=remedy
            ) from error
        pages.append(
            write_report(data.model_copy(update={"agreement": matrix(run, selection)}), folder)
        )
    return pages


def diff(a: Path, b: Path) -> dict[str, Any]:
    """Two selections of one pool: rows each has, rows in common, Jaccard overlap, overlap among the
    first j picks ("overlap_at": {j: share}), Spearman of the scores (None where one has none), the
    settings in which they differ (field: [a, b]), which folders were compared ("selections"), and
    how many selections there were to take each from ("among"; 1 for a folder that was named).

    Raises MismatchError for selections of different pools: their rows have nothing to do with each
    other.
    """
    (first, among), (second, others) = _selection(a), _selection(b)
    from gradsift.report.agreement import correlation, indices, overlaps, same_pool

    if not same_pool(first, second):
        raise MismatchError(
            "selections of different pools cannot be compared",
            where=b,
            remedy="Give two selections of the same rows.",
        )
    picked = [indices(s) for s in (first, second)]
    left, right = (set(rows.tolist()) for rows in picked)
    common = len(left & right)
    return {
        "selections": [str(s.path) for s in (first, second)],
        "among": [among, others],
        "a": len(left),
        "b": len(right),
        "common": common,
        "jaccard": round(common / max(len(left | right), 1), 4),
        "overlap_at": overlaps(*picked),
        "spearman": correlation(first, second),
        "settings": {
            name: [old, new] for name, old, new in differences(first.recipe, second.recipe)
        },
    }


def _selection(path: Path) -> tuple[Artifact, int]:
    """A select-... folder, or the newest selection of a run; and how many there were to take it
    from.
    """
    if path.name.startswith("select-") and path.is_dir():
        artifact = Artifact.load(path)
        if artifact is not None and artifact.complete:
            return artifact, 1
    run = open_run(path)
    newest = run.latest("select")
    if newest is None:
        raise DataError(
            "holds no finished selection", where=path, remedy="Run `gradsift select` first."
        )
    return newest, sum(artifact.complete for artifact in run.artifacts("select"))
