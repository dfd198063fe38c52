"""The command line as a user meets it: real processes, exit codes, one-line errors, help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradsift import methods
from gradsift.cli.app import app
from gradsift.cli.listing import listing
from gradsift.methods.options import MEANINGS, options
from tests.conftest import rows, write_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)


def gradsift(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "gradsift"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def check_refused(code: int, what: str, *arguments: str | Path) -> None:
    """The process ends with this code, nothing on stdout, and one last line on stderr that says
    what; before it, at most what was read.
    """
    found = gradsift(*arguments)
    *before, last = found.stderr.strip().splitlines()
    assert (found.returncode, found.stdout) == (code, ""), found.stderr
    assert last.startswith("gradsift: ") and re.search(what, last), last
    assert all(line.endswith(" rows") for line in before), found.stderr


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory, pool_file: Path, model_folder: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    run = tmp_path_factory.mktemp("cli") / "run"
    command = [
        "select",
        "length",
        "--pool",
        pool_file,
        "--model",
        model_folder,
        "--budget",
        "10%",
        "--run",
        run,
        "--threads",
        "1",
    ]
    return run, gradsift(*command)


def test_select_prints_where_things_are(
    done: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, found = done
    assert found.returncode == 0, found.stderr
    assert "selected  7 (9.72% of the rows read) with length" in found.stdout
    subset = Path(found.stdout.split("subset")[-1].strip())
    assert subset.read_bytes().count(b"\n") == 7
    assert (subset.parent / "report.html").exists()


@pytest.mark.slow
def test_listings_speak_json(
    done: tuple[Path, subprocess.CompletedProcess[str]], pool_file: Path
) -> None:
    run, _ = done
    names = [method["name"] for method in json.loads(gradsift("methods", "--json").stdout)]
    assert names == sorted(names) and {"less", "tagcos", "random"} <= set(names)
    shown = json.loads(gradsift("show", run, "--json").stdout)
    assert {line["stage"] for line in shown["stages"]} == {"encode", "select"}
    assert shown["commands"][0].startswith("gradsift select length")
    assert json.loads(gradsift("verify", run, "--json").stdout) == {"problems": []}
    again = gradsift(
        "select",
        "length",
        "--pool",
        pool_file,
        "--budget",
        "10%",
        "--run",
        run,
        "--json",
        "--threads",
        "1",
    )
    assert json.loads(again.stdout)["selected"] == 7


def test_methods_are_listed_for_a_person() -> None:
    """A table of option, default, what it takes and what it means, and nothing of Python."""
    text = gradsift("methods").stdout
    for name, cls in ((name, methods.load(name)) for name in methods.METHODS):
        assert f"\n{name}\n" in f"\n{text}"
        for option in options(name, cls):
            assert option.meaning and option.values, f"{name}.{option.name} says nothing"
            line = rf"-o {option.name} +{re.escape(option.default)} +{re.escape(option.values)} +"
            assert re.search(line + re.escape(option.meaning), text)
    assert not re.search(r"=None|=True|=False|\bNone\b|Literal|Positive", text)
    assert re.search(r"-o ridge +by preset +number from 0 +added to the diagonal", text)
    known = {name: {o.name for o in options(name, methods.load(name))} for name in methods.METHODS}
    for key in MEANINGS:  # no words on an option that is gone
        name, _, option = key.rpartition(".")
        assert option in known.get(name, set().union(*known.values())), key


@pytest.mark.parametrize("columns", [70, 120])
def test_the_list_of_methods_fits_the_terminal(columns: int) -> None:
    lines = list(listing(methods.describe(), columns))
    assert max(map(len, lines)) <= columns or columns < 100
    assert " ".join(" ".join(lines).split()) == " ".join(
        " ".join(listing(methods.describe(), 1_000)).split()
    )


def test_verify_names_damage_and_ends_with_5(
    done: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(done[0], run)
    (scores,) = run.glob("select-*/scores.parquet")
    scores.write_bytes(scores.read_bytes()[:-5])
    found = gradsift("verify", run)
    assert found.returncode == 5
    assert "scores.parquet" in found.stdout


def test_errors_are_one_line_with_a_remedy_and_the_right_code(
    pool_file: Path, target_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    base = ("--pool", pool_file, "--model", model_folder, "--run", tmp_path / "r", "--budget")
    check_refused(2, r"unknown method 'tagcoss'.*'tagcos'", "select", "tagcoss", *base, "5%")
    check_refused(
        2,
        r"unknown option of tagcos 'cluster'.*'clusters'",
        "select",
        "tagcos",
        *base,
        "5%",
        "-o",
        "cluster=3",
    )
    check_refused(2, r"not KEY=VALUE", "select", "tagcos", *base, "5%", "-o", "clusters")
    check_refused(2, r"nothing to choose", "select", "random", *base, "0")
    check_refused(2, r"72 are usable", "select", "random", *base, "500")
    check_refused(2, r"less selects toward a target.*--target", "select", "less", *base, "5%")
    check_refused(
        2,
        r"takes no target.*Drop --target",
        "select",
        "tagcos",
        *base,
        "5%",
        "--target",
        target_file,
    )
    check_refused(
        2,
        r"pool\.json.*(no such|not there|does not exist)",
        "select",
        "random",
        "--pool",
        pool_file.with_suffix(".json"),
        *base[2:],
        "5%",
    )
    check_refused(
        2,
        r"unknown setting 'warmup\.epoch'",
        "select",
        "random",
        *base,
        "5%",
        "--config",
        toml(tmp_path, "[warmup]\nepoch = 3\n"),
    )
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n" * 30)
    check_refused(3, r"broken\.jsonl", "select", "random", "--pool", broken, *base[2:], "5%")
    check_refused(2, r"not a run folder", "show", tmp_path / "none")


def toml(folder: Path, text: str) -> Path:
    path = folder / "c.toml"
    path.write_text(text)
    return path


def test_a_typo_in_a_flag_is_answered_by_the_parser() -> None:
    found = gradsift("select", "random", "--buget", "5%")
    assert found.returncode == 2
    assert "--budget" in found.stderr


@pytest.mark.parametrize(
    "name", [command.name or command.callback.__name__ for command in app.registered_commands]
)  # type: ignore[union-attr]
def test_every_help_text_ends_with_an_example(name: str) -> None:
    found = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert found.exit_code == 0
    assert f"Example: gradsift {name}" in found.output.strip().splitlines()[-1]


def test_inspect_shows_the_funnel_and_the_supervised_tokens(
    tmp_path: Path, model_folder: Path
) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", rows(3))
    pool.write_text(pool.read_text() + "{broken\n")
    found = gradsift(
        "inspect", "--pool", pool, "--model", model_folder, "--rows", "2", "--max-bad-rows", "3"
    )
    assert found.returncode == 0, found.stderr
    assert "4 read" in found.stdout
    assert "pool.jsonl:4" in found.stdout
    assert "r000" in found.stdout and "tokens supervised" in found.stdout


def test_the_cli_reference_is_what_the_help_says() -> None:
    """docs/cli.md is generated by `python docs/generate_cli.py`."""
    root = Path(__file__).resolve().parents[2]
    made = subprocess.run(
        [sys.executable, root / "docs" / "generate_cli.py", "--print"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == (root / "docs" / "cli.md").read_text()


def test_version() -> None:
    assert gradsift("--version").stdout.startswith("gradsift ")
