"""`gradsift verify` covers every file of a run: whatever byte of whatever kind of file changes, it
is named, and only it is made anew.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gradsift
from gradsift.cli.app import app
from gradsift.commands.runs import report, verify
from gradsift.commands.select.select import Selection
from gradsift.errors import IntegrityError
from gradsift.store.artifact import STATS, SUMS, Artifact
from gradsift.store.canonical import recipe_digest, sealed
from gradsift.store.run import ASIDE, LOCK_FILE, Run
from gradsift.store.verify import check_folder
from tests.conftest import SETTINGS

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)

Files = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def files(pool_file: Path, target_file: Path, model_folder: Path) -> Files:
    return pool_file, target_file, model_folder


def select(run: Path, files: Files, method: str = "less", **given: object) -> Selection:
    pool, target, model = files
    targets = () if method in ("ifd", "perplexity") else [target]
    settings = {
        **SETTINGS,
        "warmup": {**SETTINGS["warmup"], "checkpoints": 2},
        "curvature": {"fit_rows": 24},
    }
    return gradsift.select(
        method,
        pool=pool,
        target=targets,
        model=str(model),
        run=run,
        budget="25%",
        settings=settings,
        **given,
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, files: Files) -> Path:
    """A run with all kinds of stages but trainings to compare."""
    run = tmp_path_factory.mktemp("verify") / "run"
    select(run, files)
    for method, options in (
        ("less", {"backend": "ekfac"}),
        ("ifd", {}),
        ("rds", {}),
        ("dsir", {}),
        ("perplexity", {}),
    ):
        select(run, files, method, options=options)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def held(run: Path) -> list[str]:
    """Every file of a run, but the lock, which is empty while nobody holds it."""
    return sorted(
        path.relative_to(run).as_posix()
        for path in run.rglob("*")
        if path.is_file() and path.name != LOCK_FILE
    )


def kinds(run: Path) -> list[str]:
    """One file of every stage and name, numbers aside; all of what a run holds."""
    found: dict[str, str] = {}
    for name in held(run):
        found.setdefault(re.sub(r"-[0-9a-f]{12}(?=/)|\d+", "", name), name)
    return sorted(found.values())


def spots(data: bytes, name: str) -> list[int]:
    """Bytes to flip: both ends and some between; many in the small JSON files, whose every key and
    value matters.
    """
    step = max(1, len(data) // (40 if name.endswith(".json") and len(data) < 5000 else 3))
    return sorted({0, max(len(data) - 1, 0), *range(step // 2, len(data), step)})


@pytest.mark.slow
def test_a_flipped_byte_in_every_kind_of_file_is_named(run: Path) -> None:
    assert verify(run) == []
    every = kinds(run)
    assert {Path(name).name for name in every} >= {
        "run.json",
        "settings.json",
        "recipe.json",
        STATS,
        "manifest.json",
        SUMS,
        "report.html",
    }
    assert {name.partition("-")[0] for name in every} >= {
        "warmup",
        "gradients",
        "curvature",
        "influence",
        "embeddings",
        "ifd",
        "loss",
        "ngrams",
    }
    # the run's own files alone: those of its stages need not be hashed for each spot
    bare = run.parent / "bare"
    bare.mkdir()
    (small,) = list(run.glob("encode-*"))[:1]
    shutil.copytree(small, bare / small.name)
    for name in every:
        data, (folder, _, file) = (
            (run / name).read_bytes(),
            name.partition("/") if "/" in name else ("", "", name),
        )
        for spot in spots(data, name):
            place = run / name if folder else bare / name
            place.write_bytes(
                data[:spot] + bytes([data[spot] ^ 4]) + data[spot + 1 :] if data else b"x"
            )
            found = check_folder(run / folder) if folder else Run(bare).verify()
            assert [problem.file for problem in found] in ([file], [""]), (name, spot, found)
            assert found[0].file == file or file in ("manifest.json", "recipe.json"), (
                name,
                spot,
                found,
            )
            place.write_bytes(data)
    assert verify(run) == []
    names = every[:: max(1, len(every) // 3)]
    for name in names:
        (run / name).write_bytes(b"")
    told = CliRunner().invoke(app, ["verify", str(run)])
    assert told.exit_code == 5 and all(
        any(line.startswith(f"{name} ") for line in told.output.splitlines()) for name in names
    )


def test_a_missing_file_of_any_kind_is_named(run: Path) -> None:
    for name in kinds(run):
        if name == "run.json":
            # without it a folder is no run, and no command touches what it holds
            continue
        (run / name).rename(run.parent / "aside")
        named = [f"{problem.artifact}/{problem.file}".lstrip("/") for problem in Run(run).verify()]
        # then the run or stage is to be made, not damaged
        optional = name == "settings.json" or name.endswith("manifest.json")
        assert named == ([] if optional else [name]), named
        (run.parent / "aside").rename(run / name)


@pytest.mark.parametrize("name", ["recipe.json", STATS])
def test_what_the_manifest_repeats_or_does_not_need_costs_no_other_file(
    run: Path, files: Files, name: str
) -> None:
    folders = [path.parent for path in run.glob("*/manifest.json")]
    for folder in folders:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data.replace(b'"', b"'", 1))
    before = {
        path: path.stat().st_mtime_ns
        for path in run.rglob("*")
        if path.is_file() and path.name not in (name, "run.json", LOCK_FILE)
    }
    assert len(verify(run)) == len(folders)
    again = select(run, files)
    assert verify(run) == [] and len(list(run.glob(f"{ASIDE}/*/{name}"))) == len(folders)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert all(timing.reused for timing in again.timings)
    assert any(f"/{name} " in text for text in again.warnings)


def test_a_damaged_report_is_made_anew_with_its_selection_alone(run: Path, files: Files) -> None:
    folder = select(run, files).folder
    whole, others = (
        (folder / "report.md").read_bytes(),
        {path: path.stat().st_mtime_ns for path in run.glob("[!s]*-*/*") if path.is_file()},
    )
    (folder / "report.md").write_bytes(whole[:-2])
    assert [line.split()[0] for line in verify(run)] == [f"{folder.name}/report.md"]
    select(run, files)
    assert verify(run) == [] and (folder / "report.md").exists()
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_reports_that_are_written_anew_keep_their_digests(run: Path) -> None:
    assert len(report(run)) == 6
    assert verify(run) == []


def test_settings_that_were_changed_are_refused(run: Path, files: Files) -> None:
    path = run / "settings.json"
    path.write_bytes(path.read_bytes().replace(b'"threads": ', b'"threads": 1'))
    with pytest.raises(IntegrityError, match=r"settings\.json: was changed after it was written"):
        select(run, files)
    assert verify(run, repair=True) == ["settings.json was changed after it was written"]
    select(run, files)
    assert verify(run) == []


def test_parts_of_an_unfinished_stage_are_checked_and_only_they_are_made_anew(
    run: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The influence through the curvature, stopped when all its parts but the last are there."""
    (folder,) = [
        path.parent for path in run.glob("influence-*/recipe.json") if b"ekfac" in path.read_bytes()
    ]
    content = Artifact.load(folder).content  # type: ignore[union-attr]
    shutil.rmtree(folder)
    from gradsift.store.partial import Partial

    keep = Partial.keep

    def stop(self: Partial, shard: int, *given: Any) -> None:
        if shard == len(self.shards) - 1:
            raise KeyboardInterrupt
        keep(self, shard, *given)

    monkeypatch.setattr(Partial, "keep", stop)
    with pytest.raises(BaseException, match=r"stopped|^$"):
        select(run, files, options={"backend": "ekfac"}, seed=1)
    monkeypatch.undo()
    parts = sorted(folder.glob("parts/*"))
    assert len(parts) >= 2 and verify(run) == []
    data = bytearray(parts[1].read_bytes())
    data[-1] ^= 4
    parts[1].write_bytes(data)
    assert [line.split()[0] for line in verify(run)] == [f"{folder.name}/parts/{parts[1].name}"]
    made: list[int] = []
    monkeypatch.setattr(
        Partial,
        "keep",
        lambda self, shard, *given: (made.append(shard), keep(self, shard, *given))[1],
    )
    select(run, files, options={"backend": "ekfac"}, seed=1)
    assert made == [1, len(parts)]
    assert verify(run) == [] and Artifact.load(folder).content == content  # type: ignore[union-attr]
    assert bytes(data) == (run / ASIDE / folder.name / parts[1].name).read_bytes()


def test_files_of_a_run_without_seals_are_read_as_they_were(run: Path, files: Files) -> None:
    """As an older gradsift wrote them: what cannot be checked is taken, and what is unreadable is
    named.
    """
    for name in ("run.json", "settings.json"):
        found = json.loads((run / name).read_bytes())
        (run / name).write_text(
            json.dumps({key: value for key, value in found.items() if key != "seal"})
        )
    for manifest in run.glob("*/manifest.json"):
        found = json.loads(manifest.read_bytes())
        del found["sealed"]
        manifest.write_text(json.dumps(sealed(found)))
        stats = json.loads((manifest.parent / STATS).read_bytes())
        assert stats.pop("seal") == recipe_digest(stats)
        (manifest.parent / STATS).write_text(json.dumps(stats))
        (manifest.parent / SUMS).unlink(missing_ok=True)
    assert verify(run) == []
    assert all(timing.reused for timing in select(run, files).timings)
    stats = next(iter(run.glob("gradients-*"))) / STATS
    stats.write_bytes(stats.read_bytes()[:-1])
    assert [line for line in verify(run) if line.endswith("stats.json is damaged")]
