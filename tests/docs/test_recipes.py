"""Every published setting in recipes/: a valid config whose own command line works, for a method
that exists.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradsift import methods
from gradsift.cli.app import app
from gradsift.config import Config, build, read_toml
from tests.model.small_models import llama

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
BY_NAME = pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)


def command(path: Path) -> list[str]:
    """METHOD and its options as the recipe's own first comment names them, without the dots that
    stand for files.
    """
    text = re.sub(r"\n#\s*", " ", path.read_text(encoding="utf-8").split("\n\n")[0])
    found = re.search(r"Use: gradsift (?:select|compare) (\S+)(.*?) --config recipes/(\S+)", text)
    assert found and found[3] == path.name, text
    return [found[1], *(word for word in shlex.split(found[2]) if word not in methods.METHODS)]


@BY_NAME
def test_every_recipe_is_a_valid_config(path: Path) -> None:
    assert build(read_toml(path), path) != Config()
    assert path.read_text().startswith("#")


@BY_NAME
def test_its_command_line_plans_a_selection(
    path: Path, pool_file: Path, target_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    method, *options = command(path)
    if path.stem == "gdig-released":  # its layers are those of a model of 32 blocks
        model_folder = Path(shutil.copytree(model_folder, tmp_path / "deep"))
        llama(num_hidden_layers=32).save_pretrained(model_folder)
    files = [
        "--pool",
        pool_file,
        *(["--target", target_file] if methods.load(method).target == "required" else []),
    ]
    budget = [] if "--budget" in options else ["--budget", "10%"]
    given = [
        method,
        *options,
        *budget,
        *files,
        "--config",
        path,
        "--model",
        model_folder,
        "--run",
        tmp_path / "run",
        "--threads",
        "1",
        "--json",
    ]
    found = CliRunner().invoke(app, ["plan", *map(str, given)])
    assert found.exit_code == 0, (found.output, found.exception)
    assert json.loads(found.stdout)["method"] == method


def test_the_papers_have_their_recipe_and_the_guide_names_each() -> None:
    named = {path.stem.split("-")[0] for path in RECIPES}
    assert named == {
        "bids",
        "dsir",
        "g2is",
        "gdig",
        "gist",
        "gradmatch",
        "ifd",
        "less",
        "rds",
        "selffilter",
        "tagcos",
    }
    guide = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+-\w+\.toml)`", guide)) == {path.name for path in RECIPES}


@pytest.mark.slow
def test_dsir_reads_no_model_and_leaves_no_long_row_out(tmp_path: Path) -> None:
    turns = [
        [
            {"role": "user", "content": f"row {i} " * (1 if i else 9000)},
            {"role": "assistant", "content": "yes"},
        ]
        for i in range(8)
    ]
    pool = tmp_path / "pool.jsonl"
    pool.write_text(
        "".join(json.dumps({"id": f"r{i}", "messages": m}) + "\n" for i, m in enumerate(turns))
    )
    given = [
        "dsir",
        "--pool",
        pool,
        "--target",
        pool,
        "--budget",
        "8",
        "--config",
        ROOT / "recipes" / "dsir-paper.toml",
        "--run",
        tmp_path / "run",
    ]
    found = CliRunner().invoke(app, ["select", *map(str, given), "--threads", "1", "--json"])
    assert found.exit_code == 0, (found.output, found.exception)
    assert json.loads(found.stdout)["selected"] == 8
