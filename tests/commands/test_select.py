"""The main job end to end on a small random model: outputs, reuse, resume, refusals."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import spearmanr
from typer.testing import CliRunner

import gradsift
from gradsift.cli.app import app
from gradsift.commands import runs
from gradsift.commands.select.select import Selection
from gradsift.compute.progress import Lines
from gradsift.errors import (
    BudgetError,
    ConfigError,
    DataError,
    GradsiftError,
    MismatchError,
    UnknownName,
    UserError,
)
from gradsift.report import ReportData
from gradsift.store.artifact import Artifact
from gradsift.store.rows import RowStore
from gradsift.store.run import Run
from tests.conftest import SETTINGS, rows, write_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)


def select(
    method: str,
    pool: Path,
    model: Path,
    run: Path,
    budget: Any = "25%",
    settings: Mapping[str, Any] = SETTINGS,
    **more: Any,
) -> Selection:
    return gradsift.select(
        method, pool=pool, model=str(model), run=run, budget=budget, settings=settings, **more
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "a"


@pytest.fixture(scope="module")
def tagcos(run: Path, pool_file: Path, model_folder: Path) -> Selection:
    return select("tagcos", pool_file, model_folder, run, options={"clusters": 4})


@pytest.fixture(scope="module")
def less(
    run: Path, pool_file: Path, target_file: Path, model_folder: Path, tagcos: Selection
) -> Selection:
    return select("less", pool_file, model_folder, run, target=target_file)


def stages(chosen: Selection) -> dict[str, list[bool]]:
    """Stage -> whether each of its artifacts was reused."""
    found: dict[str, list[bool]] = {}
    for timing in chosen.timings:
        found.setdefault(timing.stage, []).append(timing.reused)
    return found


def test_a_subset_holds_the_original_lines_in_file_order(
    tagcos: Selection, pool_file: Path
) -> None:
    lines = pool_file.read_bytes().splitlines(keepends=True)
    assert len(tagcos) == 18
    assert tagcos.subset_path.read_bytes() == b"".join(lines[i] for i in sorted(tagcos.indices))
    assert tagcos.ids == [f"r{i:03d}" for i in tagcos.indices]


def test_scores_cover_every_pool_row(tagcos: Selection, less: Selection) -> None:
    table = pq.read_table(tagcos.folder / "scores.parquet").to_pydict()
    assert len(table["id"]) == 72
    assert sum(table["selected"]) == 18
    assert [
        table["id"][i] for i in np.argsort([r or 99 for r in table["rank"]], kind="stable")[:18]
    ] == tagcos.ids
    assert all(c is not None for c in table["cluster"])
    assert all(n > 0 for n in table["norm"])
    scored = pq.read_table(less.folder / "scores.parquet").to_pydict()
    best = np.argsort(-np.array(scored["influence"]), kind="stable")[:18]
    assert sorted(best.tolist()) == sorted(less.indices.tolist())


def test_less_scores_are_weighted_cosines_with_the_group_mean(less: Selection, run: Path) -> None:
    """The stored influence against products taken one by one from the stored rows."""
    gradients = [a for a in Run(run).artifacts() if a.stage == "gradients"]
    sides: dict[tuple[str, int], RowStore] = {}
    for artifact in gradients:
        store = RowStore.open(artifact.path)
        sides[
            ("pool" if len(store) == 72 else "target", artifact.recipe["config"]["checkpoint"])
        ] = store
    weights = [
        c["mean_lr"]
        for c in (
            json.loads(p.read_text())
            for p in sorted(run.glob("warmup-*/checkpoint-*/checkpoint.json"), key=step)
        )
    ]
    expected = np.zeros(72)
    for c, weight in enumerate(weights):
        target = sides["target", c]
        mean = (target[0 : len(target)].double() * target.scales[:, None]).mean(0)
        pool = torch.nn.functional.normalize(sides["pool", c][0:72].double(), dim=1)
        expected += weight / sum(weights) * (pool @ (mean / mean.norm())).numpy()
    stored = pq.read_table(less.folder / "scores.parquet")["influence"].to_numpy()
    assert np.allclose(stored, expected, atol=2e-4)


def step(path: Path) -> int:
    return json.loads(path.read_text())["step"]


# T1.8
def test_the_mean_over_checkpoints_is_weighted_by_their_mean_learning_rates(
    tagcos: Selection, run: Path
) -> None:
    found = {a.stage: a for a in Run(run).artifacts() if a.stage == "mean"}["mean"]
    rates = [
        json.loads(p.read_text())["mean_lr"]
        for p in sorted(run.glob("warmup-*/checkpoint-*/checkpoint.json"), key=step)
    ]
    weights = [rate / sum(rates) for rate in rates]
    assert found.manifest["extra"]["weights"] == pytest.approx(weights)
    parts = {
        a.digest: RowStore.open(a.path) for a in Run(run).artifacts() if a.stage == "gradients"
    }
    expected = sum(
        w * parts[found.recipe["inputs"][str(c)]][0:72].double() for c, w in enumerate(weights)
    )
    mean = RowStore.open(found.path)
    assert torch.allclose(
        mean[0:72].double() * mean.scales[:, None], torch.as_tensor(expected), atol=1e-3
    )
    assert mean.scales.max() <= 1.001


def test_a_second_method_reuses_warm_up_and_gradients(less: Selection) -> None:
    found = stages(less)
    assert found["warmup"] == [True]
    # the target's are new, the pool's are there
    assert sorted(found["gradients"]) == [False] * 3 + [True] * 3
    assert found["influence"] == [False]


def test_a_new_budget_costs_only_the_selection(
    tagcos: Selection, run: Path, pool_file: Path, model_folder: Path
) -> None:
    smaller = select("tagcos", pool_file, model_folder, run, budget=7, options={"clusters": 4})
    found = stages(smaller)
    assert len(smaller) == 7
    assert found.pop("select") == [False]
    assert all(all(reused) for reused in found.values())


def test_the_same_command_makes_nothing_and_gives_the_same(
    tagcos: Selection, run: Path, pool_file: Path, model_folder: Path
) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in run.rglob("*")
        if path.is_file() and path.parent != run
    }
    again = select("tagcos", pool_file, model_folder, run, options={"clusters": 4})
    assert again.indices.tolist() == tagcos.indices.tolist()
    assert all(timing.reused for timing in again.timings)
    assert before == {
        path: path.stat().st_mtime_ns
        for path in run.rglob("*")
        if path.is_file() and path.parent != run
    }


def test_work_lost_in_the_middle_is_made_again_with_the_same_bytes(
    tagcos: Selection,
    less: Selection,
    run: Path,
    pool_file: Path,
    model_folder: Path,
    target_file: Path,
) -> None:
    artifact = next(
        a
        for a in Run(run).artifacts()
        if a.stage == "gradients" and len(RowStore.open(a.path)) == 72
    )
    content, shards = artifact.content, sorted(artifact.path.glob("rows-*"))
    kept = {path: path.stat().st_mtime_ns for path in shards[1:]}
    (artifact.path / "manifest.json").unlink()
    shards[0].unlink()
    again = select("less", pool_file, model_folder, run, target=target_file, budget="24%")
    fresh = Artifact.load(artifact.path)
    assert fresh is not None and fresh.content == content
    assert {path: path.stat().st_mtime_ns for path in shards[1:]} == kept
    assert set(again.indices.tolist()) <= set(less.indices.tolist())


@pytest.mark.slow
def test_two_runs_from_nothing_are_byte_identical(
    tmp_path: Path, less: Selection, pool_file: Path, target_file: Path, model_folder: Path
) -> None:
    other = select("less", pool_file, model_folder, tmp_path / "b", target=target_file)
    first, second = Artifact.load(less.folder), Artifact.load(other.folder)
    assert first is not None and second is not None
    assert first.content == second.content
    assert first.manifest == second.manifest


@pytest.mark.slow
def test_shard_size_changes_no_row_beyond_rounding(
    tmp_path: Path, tagcos: Selection, run: Path, pool_file: Path, model_folder: Path
) -> None:
    settings = {**SETTINGS, "gradients": {**SETTINGS["gradients"], "shard_rows": 50}}
    select(
        "tagcos",
        pool_file,
        model_folder,
        tmp_path / "b",
        settings=settings,
        options={"clusters": 4},
    )

    def store(folder: Path) -> RowStore:
        return next(RowStore.open(a.path) for a in Run(folder).artifacts() if a.stage == "mean")

    cosine = torch.nn.functional.cosine_similarity(
        store(run)[0:72].float(), store(tmp_path / "b")[0:72].float()
    )
    assert cosine.min() > 0.9999


def test_the_report_says_what_was_done(less: Selection) -> None:
    data = ReportData.model_validate_json((less.folder / "report.json").read_bytes())
    assert data.verdict[0].text.startswith("Selected 18 of 72 rows")
    assert [s.name for s in data.funnel][-1] == "selected"
    assert data.coverage is not None and "100.0%" in data.coverage.caption
    assert {t.stage for t in data.timings} >= {"encode", "warmup", "gradients", "influence"}
    assert sum(g.picked_rows for g in data.groups) == 18
    assert len(data.best) == 18 and len(data.worst) == 20
    assert all("with the mean gradient of dev" in row.why for row in data.best)
    assert all(row.nearest is not None for row in (*data.best, *data.borderline))
    assert data.map is not None and len(data.map.points) == 72 + 20
    assert data.warmup is not None and len(data.warmup.values) == 30
    assert data.warmup.marks == (10, 20, 30)
    assert data.scores is not None and sum(data.scores.picked) == 18
    assert (less.folder / "report.html").stat().st_size > 500_000


def test_groups_by_field_and_mixed_files(tmp_path: Path, model_folder: Path) -> None:
    a, b = (
        write_rows(tmp_path / "a.jsonl", rows(20)),
        write_rows(tmp_path / "b.jsonl", rows(20, seed=4)),
    )
    chosen = select("random", a, model_folder, tmp_path / "r", budget=6, pool_group="kind")
    data = ReportData.model_validate_json((chosen.folder / "report.json").read_bytes())
    assert {g.name for g in data.groups} == {"back", "twice"}
    two = gradsift.select(
        "random",
        pool=[f"first={a}", f"second={b}"],
        model=str(model_folder),
        run=tmp_path / "r2",
        budget="50%",
        settings=SETTINGS,
    )
    assert len(two) == 20
    assert set(pq.read_table(two.folder / "scores.parquet")["group"].to_pylist()) == {
        "first",
        "second",
    }


def test_dropped_rows_are_listed_and_shares_count_what_was_read(
    tmp_path: Path, model_folder: Path
) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", rows(50))
    pool.write_text(
        pool.read_text()
        + "{broken\n"
        + json.dumps({"id": "x", "messages": [{"role": "user", "content": "?"}]})
        + "\n"
    )
    chosen = select("random", pool, model_folder, tmp_path / "r", budget="50%")
    assert len(chosen) == 26  # of 52 rows read
    dropped = [
        json.loads(line) for line in (chosen.folder / "dropped.jsonl").read_text().splitlines()
    ]
    assert [d["line"] for d in dropped] == [51, 52]
    assert all(d["fix"] for d in dropped)


def test_exact_duplicates_can_be_dropped(tmp_path: Path, model_folder: Path) -> None:
    items = rows(20)
    pool = write_rows(
        tmp_path / "pool.jsonl",
        items + [{**item, "id": f"again{i}"} for i, item in enumerate(items[:5])],
    )
    settings = {**SETTINGS, "pool": {"dedup": "exact"}}
    chosen = select("length", pool, model_folder, tmp_path / "r", budget=20, settings=settings)
    assert sorted(chosen.ids) == sorted(item["id"] for item in items)


def test_scores_can_be_written_into_the_rows(
    tmp_path: Path, pool_file: Path, model_folder: Path
) -> None:
    chosen = select("length", pool_file, model_folder, tmp_path / "r", budget=5, add_scores=True)
    first = json.loads(chosen.subset_path.read_text().splitlines()[0])
    assert first["gradsift_rank"] in range(1, 6)
    assert first["messages"]


def test_the_subset_is_copied_where_asked(
    tmp_path: Path, pool_file: Path, model_folder: Path
) -> None:
    out = tmp_path / "out" / "chosen.jsonl"
    chosen = select("random", pool_file, model_folder, tmp_path / "r", budget=5, out=out)
    assert chosen.subset_path == out
    assert out.read_bytes() == (chosen.folder / "selected.jsonl").read_bytes()
    with pytest.raises(UserError, match="input file"):
        select("random", pool_file, model_folder, tmp_path / "r", budget=5, out=pool_file)


def test_the_suffix_of_out_decides_what_is_written(
    tmp_path: Path, pool_file: Path, model_folder: Path
) -> None:
    run = tmp_path / "r"
    plain = select("random", pool_file, model_folder, run, budget=5)
    lines = plain.subset_path.read_bytes()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert plain.converted is None
    packed = tmp_path / "picks.jsonl.gz"
    chosen = select("random", pool_file, model_folder, run, budget=5, out=packed)
    assert gzip.decompress(packed.read_bytes()) == lines and chosen.converted is None
    array = tmp_path / "picks.json"
    chosen = select("random", pool_file, model_folder, run, budget=5, out=array)
    assert json.loads(array.read_bytes()) == rows
    assert chosen.lines()[-1] == (f"subset    {array} (rows are converted from .jsonl to .json)")
    assert chosen.summary()["converted"] == "rows are converted from .jsonl to .json"
    for name, wrong in (("picks.txt", "names no container"), ("picks.parquet", "types would")):
        with pytest.raises(UserError, match=wrong):
            select("random", pool_file, model_folder, tmp_path / "n", budget=5, out=tmp_path / name)
    assert not (tmp_path / "n").exists()


def test_each_side_is_read_under_its_own_names(
    tmp_path: Path, pool_file: Path, model_folder: Path
) -> None:
    asked = [{"question": f"q {i}", "answer": f"a {i}"} for i in range(6)]
    target = write_rows(tmp_path / "t.jsonl", asked)
    mapping = {"instruction": "question", "output": "answer"}
    settings = {**SETTINGS, "target": {"mapping": mapping, "format": "alpaca"}}
    with pytest.raises(DataError, match="--target-map"):
        select("rds", pool_file, model_folder, tmp_path / "r", budget=5, target=target)
    chosen = select(
        "rds", pool_file, model_folder, tmp_path / "r", budget=5, target=target, settings=settings
    )
    assert len(chosen) == 5


def test_wrong_questions_are_refused_before_anything_is_made(
    tmp_path: Path, pool_file: Path, target_file: Path, model_folder: Path
) -> None:
    run = tmp_path / "r"
    with pytest.raises(UserError, match="less selects toward a target"):
        select("less", pool_file, model_folder, run)
    with pytest.raises(UserError, match="tagcos takes no target"):
        select("tagcos", pool_file, model_folder, run, target=target_file)
    with pytest.raises(UnknownName, match="'tagcos'"):
        select("tagcos2", pool_file, model_folder, run)
    with pytest.raises(UnknownName, match="'clusters'"):
        select("tagcos", pool_file, model_folder, run, options={"cluster": 3})
    with pytest.raises(BudgetError, match="nothing to choose"):
        select("random", pool_file, model_folder, run, budget=0)
    with pytest.raises(ConfigError, match="no model"):
        gradsift.select("random", pool=pool_file, run=run, budget=3)
    with pytest.raises(UserError, match=r"nothere\.jsonl"):
        select("random", tmp_path / "nothere.jsonl", model_folder, run)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError):
        select("random", empty, model_folder, tmp_path / "r2")


def test_a_budget_over_the_pool_needs_allow_short(
    tmp_path: Path, pool_file: Path, model_folder: Path
) -> None:
    with pytest.raises(BudgetError, match="100 rows and 72 are usable"):
        select("random", pool_file, model_folder, tmp_path / "r", budget=100)
    assert (
        len(select("random", pool_file, model_folder, tmp_path / "r", budget=100, allow_short=True))
        == 72
    )


def test_a_run_keeps_its_settings_and_names_the_one_that_differs(
    tmp_path: Path, pool_file: Path, model_folder: Path
) -> None:
    run = tmp_path / "r"
    select("random", pool_file, model_folder, run, budget=5)
    # model and settings are the run's
    again = gradsift.select("random", pool=pool_file, run=run, budget=4)
    assert len(again) == 4
    with pytest.raises(MismatchError, match=r"gradients\.dim = 64, and 128 is asked"):
        select(
            "random", pool_file, model_folder, run, budget=5, settings={"gradients": {"dim": 128}}
        )
    with pytest.raises(MismatchError, match=r"machine\.threads = 1"):
        select(
            "random", pool_file, model_folder, run, budget=5, settings={"machine": {"threads": 2}}
        )
    # 0: the run's own
    again = select(
        "random", pool_file, model_folder, run, budget=5, settings={"machine": {"threads": 0}}
    )
    assert len(again) == 5
    with pytest.raises(MismatchError, match=r"model\.name"):
        gradsift.select("random", pool=pool_file, run=run, budget=4, model="tiny")


def test_a_folder_that_is_no_run_is_left_alone(
    tmp_path: Path, pool_file: Path, model_folder: Path
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not a run"):
        select("random", pool_file, model_folder, tmp_path, budget=5)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_target_rows_inside_the_pool_are_pointed_out(
    tmp_path: Path, pool_file: Path, model_folder: Path, run: Path, tagcos: Selection
) -> None:
    target = write_rows(tmp_path / "dev.jsonl", rows(72)[:3])
    chosen = select("less", pool_file, model_folder, run, target=target, budget=5)
    assert any("3 target rows stand in the pool" in warning for warning in chosen.warnings)


def test_holdings_list_check_and_compare(run: Path, tagcos: Selection, less: Selection) -> None:
    shown = runs.show(run)
    assert {line["stage"] for line in shown["stages"]} >= {
        "encode",
        "warmup",
        "gradients",
        "mean",
        "influence",
        "select",
    }
    assert all(line["complete"] for line in shown["stages"])
    assert runs.verify(run) == []
    assert less.report in runs.report(run)
    table = ReportData.model_validate_json((less.folder / "report.json").read_bytes()).agreement
    assert table is not None
    names = [
        f"{m} {s.folder.name.rpartition('-')[2][:6]}"
        for m, s in (("tagcos", tagcos), ("less", less))
    ]
    cells = {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}
    common = len(set(tagcos.indices.tolist()) & set(less.indices.tolist()))
    share = round(common / min(len(tagcos), len(less)), 3)
    assert (
        cells[names[0]][names[1]] == cells[names[1]][names[0]] == share
        and cells[names[0]][names[0]] == 1
    )
    assert (
        "Which selections agree" in less.report.read_text()
        and "Which selections agree" in less.report.with_suffix(".md").read_text()
    )
    found = runs.diff(tagcos.folder, less.folder)
    assert found["common"] == len(set(tagcos.indices.tolist()) & set(less.indices.tolist()))
    assert found["settings"]["config.method"] == ["tagcos", "less"]
    first, second = tagcos.indices.tolist(), less.indices.tolist()
    assert list(found["overlap_at"]) == [10, min(len(first), len(second))]
    assert found["overlap_at"][10] == len(set(first[:10]) & set(second[:10])) / 10
    scores = [
        pq.read_table(s.folder / "scores.parquet")["score"].to_numpy() for s in (tagcos, less)
    ]
    good = np.isfinite(scores[0]) & np.isfinite(scores[1])
    assert found["spearman"] == pytest.approx(spearmanr(scores[0][good], scores[1][good])[0])
    assert (
        runs.diff(less.folder, less.folder)["spearman"] == pytest.approx(1)
        and runs.diff(less.folder, less.folder)["jaccard"] == 1
    )
    assert all(line["seconds"] >= 0 for line in shown["stages"])
    with pytest.raises(UserError, match="not a run"):
        runs.show(run.parent / "none")


def test_folders_name_their_method_and_those_of_before_are_found_again(
    tmp_path: Path, pool_file: Path, model_folder: Path
) -> None:
    run = tmp_path / "run"
    first = select("length", pool_file, model_folder, run, budget=5)
    digest = first.folder.name.rpartition("-")[2]
    assert first.folder.name == f"select-length-{digest}" and len(digest) == 12
    assert [a.path.name for a in Run(run).artifacts("select")] == [first.folder.name]
    before = first.folder.rename(run / f"select-{digest}")
    again = select("length", pool_file, model_folder, run, budget=5)
    assert again.folder == before and all(timing.reused for timing in again.timings)
    assert runs.verify(run) == []
    assert runs.diff(before, run)["selections"] == [str(before), str(before)]
    (run / "select-length-000000000000").mkdir()  # of another digest: not this one's


def test_a_diff_says_which_selections_it_took(
    tmp_path: Path, pool_file: Path, model_folder: Path
) -> None:
    for name, budgets in (("a", (4, 6)), ("b", (5,))):
        for budget in budgets:
            last = select("length", pool_file, model_folder, tmp_path / name, budget=budget)
        assert len(last) == budgets[-1]
    found = runs.diff(tmp_path / "a", tmp_path / "b")
    assert found["among"] == [2, 1] and (found["a"], found["b"]) == (6, 5)
    told = CliRunner().invoke(app, ["diff", str(tmp_path / "a"), str(tmp_path / "b")])
    lines = told.stdout.splitlines()
    assert lines[0].startswith(f"a         {tmp_path / 'a' / 'select-length-'}")
    assert lines[0].endswith("  (the newest of 2 selections there)")
    assert lines[1] == f"b         {last.folder}"
    assert "name its select-... folder" in told.stderr
    named = runs.diff(last.folder, last.folder)
    assert named["among"] == [1, 1]


def test_warnings_of_the_verdict_are_told_in_the_terminal_too(tmp_path: Path) -> None:
    """Picks whose answers are far shorter than the pool's: the line stands in the report, in the
    result and on stdout, quiet or not.
    """
    items = [
        {"id": f"r{i}", "messages": turns("yes yes" if i % 4 == 0 else "no " * 60)}
        for i in range(40)
    ]
    pool = write_rows(tmp_path / "pool.jsonl", items)
    target = write_rows(tmp_path / "dev.jsonl", [{"id": "t", "messages": turns("yes yes")}])
    given = ["dsir", "--pool", pool, "--target", target, "--budget", "8", "--run", tmp_path / "run"]
    more = ["--model", "tiny", "-o", "draw=top", "--threads", "1"]
    told = CliRunner().invoke(app, ["select", *map(str, [*given, *more]), "-q"])
    assert told.exit_code == 0, told.output
    (line,) = [line for line in told.stdout.splitlines() if "mean answer" in line]
    assert re.fullmatch(r"warning   They hold .*; mean answer \d+ tokens, in the pool \d+", line)
    again = CliRunner().invoke(app, ["select", *map(str, [*given, *more]), "--json"])
    assert line.removeprefix("warning   ") in json.loads(again.stdout)["warnings"]
    (folder,) = (tmp_path / "run").glob("select-dsir-*")
    data = ReportData.model_validate_json((folder / "report.json").read_bytes())
    warned = [item.text for item in data.verdict if item.level == "warn"]
    assert f"{line.removeprefix('warning   ')}." in warned
    assert data.map is not None and data.map.title == "Map of the scores"
    near = {row.nearest.how for row in data.best if row.nearest is not None}
    assert near and all(how.startswith("by their words alone: cosine") for how in near)


def turns(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": answer}]


def test_the_map_of_a_large_pool_is_a_sample_that_holds_picks_and_target(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pool_file: Path,
    target_file: Path,
    model_folder: Path,
) -> None:
    monkeypatch.setattr("gradsift.commands.select.map.POOL_SHOWN", 10)
    drawn = []
    for name in ("a", "b"):
        chosen = select(
            "rds", pool_file, model_folder, tmp_path / name, budget=6, target=target_file
        )
        data = ReportData.model_validate_json((chosen.folder / "report.json").read_bytes())
        assert data.map is not None
        drawn.append(data.map)
    assert drawn[0] == drawn[1]
    kinds = [point.kind for point in drawn[0].points]
    assert kinds == ["picked"] * 6 + ["target"] * 20 + ["pool"] * 10
    assert [point.rank for point in drawn[0].points[:6]] == [1, 2, 3, 4, 5, 6]
    assert "a random 10 of the 66 other rows" in drawn[0].note
    assert "Embeddings of the base model" in drawn[0].note


def test_selections_of_the_same_rows_are_compared_across_runs(
    tmp_path: Path, pool_file: Path, model_folder: Path
) -> None:
    first = select("length", pool_file, model_folder, tmp_path / "a", budget=8)
    other = {**SETTINGS, "encode": {"max_length": 500}}  # another encoding of the same rows
    second = select("length", pool_file, model_folder, tmp_path / "b", budget=8, settings=other)
    common = len(set(first.indices.tolist()) & set(second.indices.tolist()))
    assert runs.diff(first.folder, second.folder)["common"] == common
    fewer = write_rows(tmp_path / "fewer.jsonl", rows(72)[:50])
    with pytest.raises(MismatchError, match="different pools"):
        runs.diff(
            first.folder, select("length", fewer, model_folder, tmp_path / "c", budget=8).folder
        )


def test_a_flipped_bit_is_found_and_mended(
    tmp_path: Path, pool_file: Path, model_folder: Path
) -> None:
    run = tmp_path / "r"
    chosen = select("perplexity", pool_file, model_folder, run, budget=5)
    (path,) = run.glob("loss-*/loss.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    (problem,) = runs.verify(run)
    assert "loss.safetensors" in problem
    runs.verify(run, repair=True)
    again = select("perplexity", pool_file, model_folder, run, budget=4)
    assert set(again.indices.tolist()) < set(chosen.indices.tolist())
    assert runs.verify(run) == []


@pytest.mark.slow
def test_a_run_of_ones_own_serves_as_the_warm_up(
    tmp_path: Path,
    tagcos: Selection,
    run: Path,
    pool_file: Path,
    target_file: Path,
    model_folder: Path,
) -> None:
    (warmup,) = run.glob("warmup-*")
    own = tmp_path / "own"
    shutil.copytree(
        warmup, own, ignore=shutil.ignore_patterns("manifest.json", "recipe.json", "stats.json")
    )
    chosen = select(
        "tagcos", pool_file, model_folder, tmp_path / "r", warmup_from=own, options={"clusters": 4}
    )
    assert chosen.indices.tolist() == tagcos.indices.tolist()
    for moments in own.glob("*/moments.safetensors"):
        moments.unlink()
    with pytest.raises(GradsiftError, match=r"moments\.safetensors: is missing"):
        select(
            "less", pool_file, model_folder, tmp_path / "r2", warmup_from=own, target=target_file
        )


def test_an_adapter_without_moments_offers_plain_gradients(
    tmp_path: Path,
    run: Path,
    tagcos: Selection,
    pool_file: Path,
    target_file: Path,
    model_folder: Path,
) -> None:
    own = tmp_path / "own"
    source = sorted(run.glob("warmup-*/checkpoint-*"))[-1]
    shutil.copytree(
        source,
        own / source.name,
        ignore=shutil.ignore_patterns("moments.safetensors", "checkpoint.json"),
    )
    more = {"warmup_from": own, "target": target_file}
    with pytest.raises(GradsiftError, match="transform=none"):
        select("less", pool_file, model_folder, tmp_path / "r", **more)
    plain = select(
        "less", pool_file, model_folder, tmp_path / "r", options={"transform": "none"}, **more
    )
    assert len(plain) == 18


def test_what_happens_is_said_aloud(
    tmp_path: Path, pool_file: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select(
        "tagcos", pool_file, model_folder, tmp_path / "r", options={"clusters": 4}, progress=Lines()
    )
    said = capsys.readouterr().err
    assert "pool.jsonl: messages rows" in said
    assert re.search(
        r"checkpoint \d+: \d+ modules, 100.0% of the trainable parameters; mean pairwise cosine",
        said,
    )


@pytest.mark.slow
def test_any_backend_under_a_methods_rule_reads_the_rows_that_backend_takes(
    run: Path, pool_file: Path, target_file: Path, model_folder: Path, less: Selection
) -> None:
    given = {"target": target_file, "budget": 6}
    cosine = select("less", pool_file, model_folder, run, options={"backend": "cosine"}, **given)
    assert reads(cosine) == {"none"} and reads(less) == {"adam", "none"}
    adam = select(
        "gdig", pool_file, model_folder, run, options={"backend": "less", "clusters": 3}, **given
    )
    assert "adam" in reads(adam)
    through = select("bids", pool_file, model_folder, run, options={"backend": "ekfac"}, **given)
    assert len(through) == 6 and {t.stage for t in through.timings} >= {"curvature", "influence"}
    margin = select("bids", pool_file, model_folder, run, options={"backend": "trak"}, **given)
    assert {artifact.recipe["config"].get("loss") for artifact in gradients_of(margin)} == {
        "margin"
    }
    with pytest.raises(UnknownName, match="backend"):
        select("bids", pool_file, model_folder, run, options={"backend": "ekfak"}, **given)


def gradients_of(chosen: Selection) -> list[Artifact]:
    """The stored gradients that a selection was made of, target rows' included."""
    found = [
        Artifact.load(chosen.folder.parent / f"gradients-{t.digest[:12]}")
        for t in chosen.timings
        if t.stage == "gradients"
    ]
    return [artifact for artifact in found if artifact is not None]


def reads(chosen: Selection) -> set[str]:
    return {str(artifact.recipe["config"]["transform"]) for artifact in gradients_of(chosen)}


@pytest.mark.slow
def test_all_linear_layers_by_two_sided_products(
    tmp_path: Path, pool_file: Path, target_file: Path, model_folder: Path
) -> None:
    gradients = {
        **SETTINGS["gradients"],
        "modules": "linear",
        "projection": "rademacher",
        "dim": [4, 4],
        "norms": "sketched",
    }
    settings = {**SETTINGS, "gradients": gradients}
    with pytest.raises(UserError, match="Adam moments are those of its LoRA layers"):
        # before anything is trained
        select(
            "less", pool_file, model_folder, tmp_path / "a", target=target_file, settings=settings
        )
    assert not list((tmp_path / "a").glob("warmup-*"))
    chosen = select(
        "less",
        pool_file,
        model_folder,
        tmp_path / "a",
        target=target_file,
        settings=settings,
        options={"transform": "none"},
    )
    store = RowStore.open(next((tmp_path / "a").glob("gradients-*")))
    assert store.shape[1] % 16 == 0 and store.shape[1] > 64 and len(chosen) == 18
    with pytest.raises(ConfigError, match="rademacher"):
        select(
            "tagcos",
            pool_file,
            model_folder,
            tmp_path / "b",
            settings={**SETTINGS, "gradients": {"dim": [4, 4]}},
        )


def test_a_mixed_selection_says_of_every_row_how_it_came_in(
    pool_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    chosen = select(
        "length",
        pool=pool_file,
        model=str(model_folder),
        run=tmp_path / "run",
        budget=20,
        constraints={"mix": 0.4},
        settings=SETTINGS,
    )
    table = pq.read_table(chosen.folder / "scores.parquet").to_pydict()
    by = dict(zip(table["id"], table["picked_by"], strict=True))
    assert [by[i] for i in chosen.ids] == ["score"] * 8 + ["draw"] * 12
    assert sum(value is None for value in by.values()) == len(by) - 20
    artifact = Artifact.load(chosen.folder)
    assert artifact is not None and artifact.manifest["counts"]["drawn"] == 12
    data = ReportData.model_validate_json((chosen.folder / "report.json").read_bytes())
    assert any("12 of 20 rows are drawn" in line.text for line in data.verdict)
    # rows on both sides of the cut: a drawn one is on neither
    assert {by[row.id] for row in data.borderline} == {"score", None}
    drawn = [row for row in data.best if by[row.id] == "draw"]
    assert drawn and all(row.why == "drawn at random (--mix)" for row in drawn)
