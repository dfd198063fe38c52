"""Runs: found by content, held by one process, explained and mended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradsift.commands.runs import verify
from gradsift.errors import IntegrityError, MismatchError, ResourceError, UserError
from gradsift.store import artifact as artifacts
from gradsift.store.artifact import Artifact
from gradsift.store.atomic import write_atomic
from gradsift.store.run import Run
from gradsift.store.verify import Problem

ROOT = Path(__file__).resolve().parents[2]


def make(run: Run, stage: str = "gradients", **config: object) -> Artifact:
    found = run.artifact(
        stage,
        version=1,
        config=config,
        inputs={"pool": "ab"},
        identity={"model": {"name": "tiny", "hash": "1"}},
    )
    if not found.complete:
        write_atomic(found.file("a.json"), json.dumps(config).encode())
        found.finish(counts={"rows": 1})
    return found


def holder(root: Path) -> subprocess.Popen[str]:
    """A second process that holds the run until its stdin closes."""
    code = (
        "import sys\nfrom gradsift.store.run import Run\nwith Run(sys.argv[1]).lock('gradsift"
        " select less --pool p.jsonl'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    other = holder(run.root)
    try:
        with pytest.raises(UserError) as caught, run.lock():
            pytest.fail("two holders")
        for part in (
            f"pid {other.pid} on {os.uname().nodename}",
            "since 20",
            "gradsift select less --pool p.jsonl",
            "Wait for it",
        ):
            assert part in str(caught.value)
        assert caught.value.exit_code == 2
        assert Run(tmp_path / "run").artifacts() == []  # reading is free
    finally:
        other.communicate()
    with run.lock("gradsift select tagcos"):
        assert run.commands == ["gradsift select less --pool p.jsonl", "gradsift select tagcos"]


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    other = holder(tmp_path / "run")
    other.kill()
    other.communicate()
    assert str(other.pid) in (tmp_path / "run" / ".gradsift-lock").read_text()
    with Run(tmp_path / "run").lock():
        assert str(other.pid) not in (tmp_path / "run" / ".gradsift-lock").read_text()


def test_a_lock_is_reentrant_for_its_run_and_for_no_other(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.lock():
        with run.lock():
            pass
        with pytest.raises(UserError, match=f"pid {os.getpid()}"), Run(tmp_path / "run").lock():
            pytest.fail("two holders")
    with Run(tmp_path / "run").lock():
        pass


def test_stages_of_other_settings_live_side_by_side(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.lock():
        first, second = make(run, seed=0), make(run, seed=1)
        assert first.path != second.path
        before = (first.path / "manifest.json").stat().st_mtime_ns
        assert make(run, seed=0).content == first.content
        assert (first.path / "manifest.json").stat().st_mtime_ns == before
        make(run, "warmup", epochs=4)
    assert {found.path.name for found in run.artifacts()} == {
        path.name for path in run.root.iterdir() if path.is_dir()
    }
    latest = run.latest("gradients")
    assert latest is not None
    assert latest.digest == second.digest
    assert run.latest("influence") is None


def test_an_unfinished_artifact_is_listed_and_is_not_the_latest(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    found = run.artifact("gradients", version=1, config={}, inputs={}, identity={})
    assert [(a.digest, a.complete) for a in run.artifacts()] == [(found.digest, False)]
    assert run.latest("gradients") is None
    assert run.verify() == []


def test_looking_makes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert not run.exists
    assert run.artifacts() == []
    assert run.verify() == []
    assert run.commands == []
    found = run.artifact("gradients", version=1, config={}, inputs={}, identity={}, create=False)
    assert not found.complete
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.tex").write_text("x")
    with pytest.raises(
        UserError,
        match=r"docs: is not a run: it holds 'thesis\.tex'\. Choose a new or empty folder",
    ):
        Run(tmp_path / "docs")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        Run(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"kind": "something else"}')
    with pytest.raises(UserError, match="is not a run"):
        Run(tmp_path / "other")


def test_an_empty_folder_and_one_that_a_killed_process_began_are_fine(tmp_path: Path) -> None:
    (tmp_path / ".gradsift-tmp-0123456789abcdef").write_bytes(b"x")
    run = Run(tmp_path)
    with run.lock():
        assert run.exists
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gradsift-lock", "run.json"]


def test_a_damaged_run_file_loses_no_work(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    found = make(run)
    (run.root / "run.json").write_bytes(b"\0" * 100)
    again = Run(tmp_path / "run")
    with again.lock("gradsift select less"):
        assert make(again).content == found.content
    assert (
        json.loads((run.root / "run.json").read_text())["commands"][0]["command"]
        == "gradsift select less"
    )


def test_a_run_of_a_newer_schema_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(Run(tmp_path / "run"))
    monkeypatch.setattr(artifacts, "SCHEMA", 0)
    with pytest.raises(MismatchError, match="schema 1"):
        Run(tmp_path / "run")


def test_a_run_in_a_folder_one_may_not_write_to_is_an_error_of_resources(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(ResourceError, match="Permission denied"), Run(closed / "run").lock():
            pytest.fail("locked")
    finally:
        os.seteuid(me)


def test_verify_names_every_file_and_discard_frees_just_that(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    found, other = make(run, seed=0), make(run, seed=1)
    content = found.content
    found.file("a.json").write_bytes(b"x")
    problems = run.verify()
    assert [(p.artifact, p.file) for p in problems] == [(found.path.name, "a.json")]
    assert "is not the file that the manifest names" in str(problems[0])
    with run.lock():
        run.discard(problems[0])
        assert run.verify() == []
        assert not Artifact(run.root, found.recipe).complete
        assert Artifact(run.root, other.recipe).complete
        assert make(run, seed=0).content == content


def test_the_next_run_sets_aside_what_verify_named_and_nothing_else(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    found, other = make(run, seed=0), make(run, seed=1)
    content, damaged = found.content, found.file("a.json")
    for number, data in enumerate((b"x", b"y"), start=1):
        # twice: the second does not take the place of the first
        damaged.write_bytes(data)
        told: list[str] = []
        assert len(verify(run.root, note=told.append)) == 1
        assert told == ["the next run sets aside what is damaged and makes just that anew"]
        again = Run(run.root)
        with again.lock():
            assert (
                [p.file for p in again.set_aside()] == [p.file for p in again.aside] == ["a.json"]
            )
            assert not Artifact(run.root, found.recipe).complete
            assert Artifact(run.root, other.recipe).complete
            assert make(again, seed=0).content == content
            assert Run(run.root).set_aside() == []
        aside = sorted((run.root / "damaged" / found.path.name).iterdir())
        assert [path.read_bytes() for path in aside] == [b"x", b"y"][:number]
    assert verify(run.root) == []


def test_a_file_put_right_after_verify_is_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    found = make(run)
    whole = found.file("a.json").read_bytes()
    found.file("a.json").write_bytes(b"x")
    verify(run.root)
    found.file("a.json").write_bytes(whole)
    before = found.file("manifest.json").stat().st_mtime_ns
    assert run.set_aside() == []
    assert found.file("manifest.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in run.root.iterdir()) == [found.path.name, "run.json"]


@pytest.mark.parametrize(
    "text",
    [
        b"\0" * 40,
        b'{"found": 3}',
        (
            b'{"found": [1, {"artifact": 1}, {"artifact": "..", "file": "precious"}, {"artifact":'
            b' "NAME", "file": "../../precious"}]}'
        ),
        (
            b'{"found": [{"artifact": "NAME", "file": "a.json"}, {"artifact": "NAME", "file":'
            b' "manifest.json"}]}'
        ),
    ],
    ids=["zero", "other", "outside", "whole"],
)
def test_a_forged_finding_moves_nothing(tmp_path: Path, text: bytes) -> None:
    run = Run(tmp_path / "run")
    found = make(run)
    (tmp_path / "precious").write_text("x")
    (run.root / "found-damaged.json").write_bytes(text.replace(b"NAME", found.path.name.encode()))
    assert run.set_aside() == []
    assert (tmp_path / "precious").exists()
    assert run.verify() == []
    assert not (run.root / "damaged").exists()


def test_what_only_the_user_can_mend_is_neither_set_aside_nor_removed(tmp_path: Path) -> None:
    """An artifact of a newer gradsift and a renamed folder: their remedy is told, and their bytes
    stay.
    """
    run = Run(tmp_path / "run")
    found, other = make(run, seed=0), make(run, seed=1)
    manifest = found.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"schema": 1', b'"schema": 2'))
    other.path.rename(run.root / "gradients-000000000000")
    lines = verify(run.root)
    assert any("was written in schema 2" in line and "Upgrade gradsift" in line for line in lines)
    assert any(
        "holds the recipe of" in line and "Give the folder its name back" in line for line in lines
    )
    assert run.set_aside() == []
    assert verify(run.root, repair=True) == lines
    assert b'"schema": 2' in manifest.read_bytes()
    assert not (run.root / "damaged").exists()


def test_a_finding_that_cannot_be_kept_is_told_all_the_same(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    found = make(run)
    found.file("a.json").write_bytes(b"x")
    (run.root / "found-damaged.json").mkdir()  # as a folder that may not be written, for root too
    told: list[str] = []
    assert len(verify(run.root, note=told.append)) == 1
    assert told[0].startswith("this cannot be kept for the next run: ")


@pytest.mark.parametrize("name", ["manifest.json", "recipe.json"])
@pytest.mark.parametrize("how", ["edit", "zero"])
def test_a_manifest_or_recipe_that_was_changed_is_mended(
    tmp_path: Path, name: str, how: str
) -> None:
    run = Run(tmp_path / "run")
    found = make(run, seed=0)
    content, path = found.content, found.path / name
    path.write_bytes(
        path.read_bytes().replace(b'"seed": 0', b'"seed": 3').replace(b'"seed":0', b'"seed":3')
        if how == "edit"
        else b"\0" * 50
    )
    if how == "edit":
        with pytest.raises(IntegrityError, match=name):
            make(run, seed=0)
    problems = run.verify()
    assert [problem.file for problem in problems] == [name]
    run.discard(problems[0])
    # which it repeats: nothing else is lost
    assert found.file("manifest.json").exists() == (name == "recipe.json")
    assert make(run, seed=0).content == content
    assert run.verify() == []


def test_discard_deletes_nothing_outside_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    found = make(run)
    precious = tmp_path / "precious"
    precious.write_text("x")
    (found.path / "link").symlink_to(tmp_path)
    for problem in (
        Problem("..", "precious", "?"),
        Problem(found.path.name, "../../precious", "?"),
        Problem(found.path.name, "link/precious", "?"),
        Problem("/", "etc/hostname", "?"),
    ):
        with pytest.raises(IntegrityError):
            run.discard(problem)
    assert precious.exists()
    run.discard(Problem(found.path.name, "link", "is a symbolic link"))
    assert precious.exists()
    assert not (found.path / "link").is_symlink()


def test_a_manifest_that_names_a_file_outside_is_a_problem_and_opens_nothing(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path / "run")
    found = make(run)
    manifest = {key: value for key, value in found.manifest.items() if key != "seal"}
    manifest["files"] = {"../../precious": "0"}
    manifest["seal"] = artifacts.recipe_digest(manifest)
    (found.path / "manifest.json").write_text(json.dumps(manifest))
    assert "points outside its folder" in run.verify()[0].what


def test_a_renamed_artifact_is_a_problem_of_its_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    found = make(run)
    found.path.rename(run.root / "gradients-000000000000")
    problem = run.verify()[0]
    assert (problem.artifact, problem.file) == ("gradients-000000000000", "")
    assert f"holds the recipe of {found.path.name}" in problem.what
    with pytest.raises(UserError, match="Give the folder its name back"):
        run.discard(problem)


def test_a_link_beside_the_artifacts_is_not_followed(tmp_path: Path) -> None:
    elsewhere = Run(tmp_path / "elsewhere")
    found = make(elsewhere)
    run = Run(tmp_path / "run")
    with run.lock():
        (run.root / found.path.name).symlink_to(found.path)
    assert run.artifacts() == []
    with pytest.raises(IntegrityError, match="symbolic link"):
        make(run)


def test_a_repeated_command_is_kept_once_as_the_last(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for command in ("gradsift a", "gradsift b", "gradsift a"):
        run.record(command)
    assert run.commands == ["gradsift b", "gradsift a"]
    assert json.loads((run.root / "run.json").read_text())["commands"][1]["folder"] == os.getcwd()


def test_work_that_fails_with_nothing_to_keep_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), Run(tmp_path / "a" / "b").lock("gradsift x"):
        raise ValueError("early")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="early"), Run(tmp_path / "mine").lock("gradsift x"):
        raise ValueError("early")
    assert not list((tmp_path / "mine").iterdir())


def test_work_that_fails_later_keeps_what_it_made_and_how_to_resume(tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    with pytest.raises(FileExistsError), run.lock("gradsift x"):
        _ = [(run.root / "settings.json").mkdir() for _ in range(2)]
    assert run.exists and run.commands == ["gradsift x"]
    # nor is a run that was there before taken away
    with run.lock("gradsift y"):
        (run.root / "settings.json").rmdir()
    with pytest.raises(ValueError, match="again"), run.lock("gradsift z"):
        raise ValueError("again")
    assert run.commands == ["gradsift x", "gradsift y", "gradsift z"]
