"""Damage anywhere in a finished run: the command refuses it or has no use for it, verify names it
with exit 5, and after that the next run makes only it anew, says so, and keeps the damaged bytes
aside.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gradsift
from gradsift.cli.app import app
from gradsift.commands.runs import report, verify
from gradsift.commands.select.select import Selection
from gradsift.errors import IntegrityError, MismatchError
from gradsift.store.run import Run
from tests.conftest import SETTINGS
from tests.faults.killed import digests, finished

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
    ),
]


@pytest.fixture(scope="module")
def select(pool_file: Path, target_file: Path, model_folder: Path) -> Callable[..., Selection]:
    settings = {**SETTINGS, "warmup": {**SETTINGS["warmup"], "checkpoints": 2}}

    def call(run: Path, budget: str = "25%") -> Selection:
        return gradsift.select(
            "less",
            pool=pool_file,
            target=target_file,
            model=str(model_folder),
            run=run,
            budget=budget,
            settings=settings,
        )

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, select: Callable[..., Selection]) -> Path:
    run = tmp_path_factory.mktemp("damage") / "run"
    select(run)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def named(run: Path) -> list[str]:
    """Every file that a manifest of the run names."""
    found = []
    for manifest in sorted(run.glob("*/manifest.json")):
        found += [
            f"{manifest.parent.name}/{name}" for name in json.loads(manifest.read_bytes())["files"]
        ]
    return found


def done(run: Path) -> dict[str, str]:
    """The content digest of every complete artifact."""
    return {
        artifact.path.name: artifact.content
        for artifact in Run(run).artifacts()
        if artifact.complete
    }


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes() or b"x")
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def told(run: Path) -> list[str]:
    """What `gradsift verify` prints; it ends with 5."""
    found = CliRunner().invoke(app, ["verify", str(run)])
    assert found.exit_code == 5, found.output
    return [line for line in found.output.splitlines() if line.strip()]


def check_mended(run: Path) -> None:
    assert CliRunner().invoke(app, ["verify", str(run), "--repair"]).exit_code == 5
    assert CliRunner().invoke(app, ["verify", str(run)]).exit_code == 0


def test_a_flipped_bit_in_every_file_of_a_run(run: Path, select: Callable[..., Selection]) -> None:
    """All at once: each is named. One by one, the next command would meet only the first."""
    files, contents = named(run), digests(run)
    for name in files:
        flip(run / name)
    damaged = {name: (run / name).read_bytes() for name in files}
    lines = told(run)
    for name in files:
        assert any(line.startswith(name) for line in lines), name
    again = select(run)
    assert digests(run) == contents
    assert verify(run) == []
    for name, data in damaged.items():
        assert any(text.startswith(f"set aside as damaged: {name} ") for text in again.warnings), (
            name
        )
        folder, file = name.split("/")[0], name.split("/")[-1]
        assert data in [
            path.read_bytes() for path in (run / "damaged" / folder).glob(f"{file}*")
        ], name
    assert not [text for text in select(run).warnings if "damaged" in text]


def kinds(run: Path) -> list[str]:
    """One file of every stage and name."""
    found = {}
    for name in named(run):
        stage, _, rest = name.partition("/")
        found.setdefault((stage.rpartition("-")[0], rest), name)
    return sorted(found.values())


def outcome(
    select: Callable[..., Selection], run: Path, budget: str
) -> tuple[list[str], IntegrityError | None]:
    """The chosen ids, or the refusal."""
    try:
        return select(run, budget).ids, None
    except IntegrityError as error:
        return [], error


def test_a_flipped_bit_is_refused_or_of_no_use_and_only_it_is_made_anew(
    whole: Path, tmp_path: Path, select: Callable[..., Selection]
) -> None:
    """A later command over the same rows either names the damaged file, or never reads it and
    chooses the same rows.
    """
    budget, contents = "30%", digests(whole)
    expected = select(shutil.copytree(whole, tmp_path / "same"), budget).ids
    refused = set()
    for number, name in enumerate(kinds(whole)):
        run = shutil.copytree(whole, tmp_path / str(number))
        flip(run / name)
        before = finished(run)
        chosen, error = outcome(select, run, budget)
        if error is None:
            assert chosen == expected, name
        else:
            refused.add(name.partition("-")[0])
            assert name.rpartition("/")[2] in str(error), name
            assert error.remedy
        assert any(line.startswith(name) for line in told(run)), name
        select(run)
        after = finished(run)
        gone = {file for file in before if before[file] != after.get(file)}
        folder = name.partition("/")[0]
        if "rows-" in name:
            assert gone == {name, f"{folder}/manifest.json"}
        assert {file.partition("/")[0] for file in gone} == {folder}, name
        assert contents.items() <= done(run).items(), name
        shutil.rmtree(run)
    assert {"encode", "gradients"} <= refused


def shards(run: Path) -> list[Path]:
    """The shards of the largest store."""
    folder = max(run.glob("gradients-*"), key=lambda path: len(list(path.glob("rows-*"))))
    return sorted(folder.glob("rows-*"))


def swap(run: Path) -> set[str]:
    one, two = shards(run)[:2]
    one.rename(run / "aside")
    two.rename(one)
    (run / "aside").rename(two)
    return {one.name, two.name}


def duplicate(run: Path) -> set[str]:
    one, two = shards(run)[:2]
    shutil.copy(one, two)
    return {two.name}


def duplicate_under_a_new_name(run: Path) -> set[str]:
    one = shards(run)[0]
    shutil.copy(one, one.with_name("rows-00099.safetensors"))
    return {"rows-00099.safetensors"}


def foreign(run: Path) -> set[str]:
    one = shards(run)[0]
    (other,) = [
        path
        for path in run.glob("gradients-*")
        if path != one.parent and len(list(path.glob("rows-*"))) == len(shards(run))
    ][:1]
    shutil.copy(other / one.name, one)
    return {one.name}


def remove(run: Path) -> set[str]:
    one = shards(run)[1]
    one.unlink()
    return {one.name}


def edit(run: Path) -> set[str]:
    manifest = shards(run)[0].with_name("manifest.json")
    manifest.write_bytes(manifest.read_bytes().replace(b'"rows": 72', b'"rows": 71'))
    return {"manifest.json"}


def zero(run: Path) -> set[str]:
    shards(run)[2].write_bytes(b"\0" * shards(run)[2].stat().st_size)
    return {shards(run)[2].name}


@pytest.mark.parametrize(
    "harm",
    [swap, duplicate, duplicate_under_a_new_name, foreign, remove, edit, zero],
    ids=lambda harm: harm.__name__,
)
def test_what_is_wrong_with_shards_is_named_and_only_they_are_rewritten(
    run: Path, select: Callable[..., Selection], harm: Callable[[Path], set[str]]
) -> None:
    contents, before, folder = digests(run), finished(run), shards(run)[0].parent.name
    wrong = harm(run)
    if harm is not duplicate_under_a_new_name:
        with pytest.raises(IntegrityError):
            select(run, "30%")
    lines = told(run)
    assert {line.split()[0] for line in lines if line.startswith(folder)} == {
        f"{folder}/{name}" for name in wrong
    }, lines
    select(run)
    assert {path.name for path in (run / "damaged").rglob("*.*")} == (
        set() if harm is remove else wrong
    )
    assert done(run) == contents
    after = finished(run)
    rewritten = {name for name in before if before[name] != after[name]}
    assert rewritten == {
        f"{folder}/{name}" for name in {*wrong, "manifest.json"} if f"{folder}/{name}" in before
    }


@pytest.mark.parametrize(
    "how",
    [lambda data: b"", lambda data: b"\0" * len(data), lambda data: data[:-9]],
    ids=["empty", "zero", "cut"],
)
@pytest.mark.parametrize("name", ["run.json", "settings.json"])
def test_the_runs_own_files_are_checked_too(
    run: Path, select: Callable[..., Selection], name: str, how: Callable[[bytes], bytes]
) -> None:
    contents = digests(run)
    (run / name).write_bytes(how((run / name).read_bytes()))
    assert told(run)[0] == f"{name} is damaged"
    if name == "settings.json":
        with pytest.raises(IntegrityError, match=r"settings\.json: is damaged"):
            select(run)
    check_mended(run)
    select(run)
    assert digests(run) == contents
    assert verify(run) == []


def test_a_run_of_a_newer_gradsift_is_refused_and_nothing_in_it_is_touched(
    run: Path, select: Callable[..., Selection]
) -> None:
    manifest = shards(run)[0].with_name("manifest.json")
    manifest.write_bytes(manifest.read_bytes().replace(b'"schema": 1', b'"schema": 2'))
    before = finished(run)
    with pytest.raises(MismatchError, match=r"schema 2; this gradsift reads up to 1.*Upgrade"):
        select(run, "30%")
    assert finished(run) == before


def test_a_damaged_report_is_an_error_with_a_remedy(run: Path) -> None:
    (folder,) = run.glob("select-*")
    (folder / "report.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"report\.json") as error:
        report(run)
    assert error.value.remedy


def test_links_in_a_run_are_never_followed(
    run: Path, tmp_path: Path, select: Callable[..., Selection]
) -> None:
    """A shard, a folder and a manifest that are links to files outside: refused; what they lead to
    is neither read as ours nor changed.
    """
    outside = tmp_path / "outside"
    shutil.copytree(shards(run)[0].parent, outside)
    kept = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    shard = shards(run)[0]
    shard.unlink()
    shard.symlink_to(outside / shard.name)
    with pytest.raises(IntegrityError, match="symbolic link"):
        select(run, "30%")
    assert any("symbolic link" in line for line in told(run))
    select(run)
    assert (run / "damaged" / shard.parent.name / shard.name).is_symlink()
    assert Run(run).verify() == []
    folder = shard.parent
    shutil.rmtree(folder)
    folder.symlink_to(outside)
    with pytest.raises(IntegrityError, match="symbolic link"):
        select(run, "30%")
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("file", ["checkpoint.json", "adapter_config.json", "moments.safetensors"])
def test_a_changed_warmup_makes_no_other_numbers_under_the_same_name(
    run: Path, pool_file: Path, model_folder: Path, file: str
) -> None:
    """A second method takes more from the checkpoints than is stored already: it must not take it
    from files that were changed since.
    """
    settings = {**SETTINGS, "warmup": {**SETTINGS["warmup"], "checkpoints": 2}}

    def tagcos() -> Selection:
        return gradsift.select(
            "tagcos",
            pool=pool_file,
            model=str(model_folder),
            run=run,
            budget=6,
            settings=settings,
            options={"clusters": 3},
        )

    changed = next(
        path for path in sorted(run.glob("warmup-*/checkpoint-*/*")) if path.name == file
    )
    before = changed.read_bytes()
    changed.write_bytes(
        before.replace(b'"mean_lr":', b'"mean_lr":1')
        if file == "checkpoint.json"
        else before[:-1] + b" "
    )
    assert changed.read_bytes() != before
    with pytest.raises(IntegrityError, match=file):
        tagcos()
    assert verify(run)
    tagcos()  # the warm-up is made anew, and all that came of it is still its own
    assert changed.read_bytes() == before and verify(run) == []


def test_a_checkpoint_that_somebody_put_there_is_none(
    run: Path, select: Callable[..., Selection]
) -> None:
    stages = digests(run)
    first = sorted(run.glob("warmup-*/checkpoint-*"))[0]
    shutil.copytree(first, first.parent / "checkpoint-1")
    assert len(select(run, "30%")) == 22
    assert {name: digest for name, digest in digests(run).items() if name in stages} == stages
