"""What must be told within a second loads no heavy library: the light modules, every face, and a
user's mistakes.
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import gradsift
from gradsift import methods
from tests.conftest import rows, write_rows

HEAVY = ("torch", "transformers", "peft", "pyarrow", "altair")
LIGHT = [
    "gradsift",
    "gradsift.cli",
    "gradsift.cli.app",
    "gradsift.cli.flags",
    "gradsift.commands.budget",
    "gradsift.commands.preflight",
    "gradsift.commands.compare.request",
    "gradsift.commands.runs",
    "gradsift.config",
    "gradsift.data.files",
    "gradsift.data.formats",
    "gradsift.data.pool",
    "gradsift.data.sources",
    "gradsift.errors",
    "gradsift.methods",
    "gradsift.redaction",
    "gradsift.signals.backends",
    "gradsift.store.canonical",
    "gradsift.store.run",
    "gradsift.types",
]


def packages() -> list[str]:
    """Every folder of the package: a wing, or a part of one."""
    return [
        module.name
        for module in pkgutil.walk_packages(gradsift.__path__, "gradsift.")
        if module.ispkg
    ]


def heavy_after(modules: list[str]) -> list[str]:
    """Which heavy libraries a fresh interpreter holds after it has imported `modules`, and what it
    misses of their faces.
    """
    code = (
        f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; print([h for h"
        f" in {HEAVY!r} if h in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.replace("'", '"'))


def test_light_modules_load_nothing_heavy() -> None:
    assert heavy_after(LIGHT) == []


def test_methods_load_nothing_heavy() -> None:
    modules = sorted({home.partition(":")[0] for home in methods.METHODS.values()})
    assert len(modules) == len(methods.METHODS)
    assert heavy_after(modules) == []


def test_faces_load_nothing_heavy() -> None:
    faces = packages()
    assert {
        "gradsift.store",
        "gradsift.report",
        "gradsift.rules",
        "gradsift.signals.curvature",
    } <= set(faces)
    assert heavy_after(faces) == []


@pytest.mark.parametrize("name", ["gradsift", *packages()])
def test_a_face_gives_what_it_lists_and_nothing_else(name: str) -> None:
    face = sys.modules.get(name) or __import__(name, fromlist=["_"])
    for public in getattr(face, "__all__", ()):
        assert getattr(face, public) is not None
        assert public in dir(face)
        # A function under the name of a file beside it would hide that file, or be hidden by it, as
        # the order of imports has it.
        beside = Path(str(face.__file__)).with_name(f"{public}.py")
        assert not beside.exists() or getattr(face, public).__name__ == f"{name}.{public}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = face.nothing


# The command line with every heavy library out of reach: what it says, it says without them.
BLOCKED = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise AssertionError(f"{{name}} was loaded")

sys.meta_path.insert(0, Blocker())
from gradsift.cli.app import main
main()
"""
POOL = ["--pool", "pool.jsonl", "--model", "tiny", "--run", "new"]
SELECT = ["select", "length", *POOL, "--budget", "5"]
LESS = ["select", "less", *POOL, "--budget", "5", "--target", "pool.jsonl"]
MISTAKES: dict[str, tuple[list[str], str]] = {
    "method": (
        ["select", "lesss", *POOL, "--budget", "5"],
        "unknown method 'lesss'. Did you mean 'less'?",
    ),
    "option": ([*SELECT, "-o", "ordr=longest"], "unknown option of length 'ordr'. Known: order."),
    "option without =": ([*SELECT, "-o", "order"], "order: not KEY=VALUE"),
    "value of an option": (
        [*SELECT, "-o", "order=widest"],
        "option order of length: Input should be 'longest' or 'shortest'",
    ),
    "budget": (["select", "length", *POOL, "--budget", "many"], "--budget many: not a budget"),
    "budget of 0": (
        ["select", "length", *POOL, "--budget", "0"],
        "nothing to choose. Give at least 1 row.",
    ),
    "budget over the pool": (
        ["select", "length", *POOL, "--budget", "13"],
        "the budget is 13 rows and 12 are usable. Lower --budget, or add --allow-short.",
    ),
    "mix": ([*SELECT, "--mix", "2"], "--mix 2: not a share of the budget"),
    "null without a target": ([*SELECT, "--null"], "length reads none"),
    "folder of checkpoints": ([*SELECT, "--warmup-from", "gone"], "gone: no such folder"),
    "model folder": (
        [
            "select",
            "length",
            "--pool",
            "pool.jsonl",
            "--model",
            "./gone",
            "--run",
            "new",
            "--budget",
            "5",
        ],
        "./gone: no such model folder",
    ),
    "missing target": (
        ["select", "less", *POOL, "--budget", "5"],
        "less selects toward a target and none was given. Add --target FILE.",
    ),
    "needless target": ([*SELECT, "--target", "pool.jsonl"], "length takes no target"),
    "pool file": (
        [
            "select",
            "length",
            "--pool",
            "pol.jsonl",
            "--model",
            "tiny",
            "--run",
            "new",
            "--budget",
            "5",
        ],
        "pol.jsonl: there is no such file. Did you mean pool.jsonl?",
    ),
    "target file": (
        ["select", "less", *POOL, "--target", "dev.jsonl", "--budget", "5"],
        "dev.jsonl: there is no such file",
    ),
    "folder of other files": (
        ["select", "length", "--pool", "other", "--model", "tiny", "--run", "new", "--budget", "5"],
        "other: is a folder, but not one that `datasets` saved",
    ),
    "kind of file": (
        [
            "select",
            "length",
            "--pool",
            "pool.xls",
            "--model",
            "tiny",
            "--run",
            "new",
            "--budget",
            "5",
        ],
        "pool.xls: .xls is not a kind of file gradsift reads",
    ),
    "pattern": (
        ["inspect", "--pool", "*.parquet"],
        "*.parquet: the pattern names no file",
    ),
    "group": (
        [*SELECT, "--pool-group", "kinds"],
        "no row has the field 'kinds' to group by. Did you mean 'kind'?",
    ),
    "map": ([*SELECT, "--map", "question"], "--map question: not OURS=THEIRS"),
    "field of a map": (
        [*SELECT, "--map", "instrucion=question"],
        "unknown field of the mapping 'instrucion'. Did you mean 'instruction'?",
    ),
    "name in a map": (
        [*SELECT, "--map", "instruction=qestion"],
        "no row has the field 'qestion' for 'instruction'",
    ),
    "map of the target": (
        [
            "select",
            "less",
            *POOL,
            "--budget",
            "5",
            "--target",
            "pool.jsonl",
            "--target-map",
            "output=ansr",
        ],
        "no row has the field 'ansr' for 'output'",
    ),
    "format of the target": (
        [
            "select",
            "less",
            *POOL,
            "--budget",
            "5",
            "--target",
            "pool.jsonl",
            "--target-format",
            "chatml",
        ],
        "unknown format 'chatml'",
    ),
    "out in a folder that is read": (
        [word.replace("pool.jsonl", "*.jsonl") for word in [*SELECT, "--out", "picks.jsonl"]],
        "picks.jsonl: the next command would read --out as rows of *.jsonl",
    ),
    "suffix of out": ([*SELECT, "--out", "picks.txt"], "picks.txt: its suffix names no container"),
    "kind of out": (
        [*SELECT, "--out", "picks.parquet"],
        "picks.parquet: .jsonl rows are not turned into .parquet: types would change",
    ),
    "suffix of scores": (
        ["score", "--backend", "dot", *POOL, "--target", "pool.jsonl", "--out", "scores.csv"],
        "scores.csv: scores are written as parquet alone",
    ),
    "format": ([*SELECT, "--format", "chatml"], "unknown format 'chatml'"),
    "TOML": ([*SELECT, "--config", "broken.toml"], "broken.toml: not valid TOML"),
    "TOML key": ([*SELECT, "--config", "key.toml"], "unknown setting 'gradients.dimension'"),
    "TOML value": (
        [*SELECT, "--config", "value.toml"],
        "Input should be a valid integer, not 'wide'. Correct that value.",
    ),
    "no model": (
        ["select", "length", "--pool", "pool.jsonl", "--run", "new", "--budget", "5"],
        "no model was named. Add --model NAME",
    ),
    "settings of another run": (
        [
            "select",
            "length",
            "--pool",
            "pool.jsonl",
            "--run",
            "made",
            "--budget",
            "5",
            "--dim",
            "64",
        ],
        "this run was made with gradients.dim = 8192, and 64 is asked now",
    ),
    "out names the pool": (
        [*SELECT, "--out", "pool.jsonl"],
        "pool.jsonl: --out names an input file",
    ),
    "run that is a file": (
        [
            "select",
            "length",
            "--pool",
            "pool.jsonl",
            "--model",
            "tiny",
            "--run",
            "pool.csv",
            "--budget",
            "5",
        ],
        "is a file, not a run folder",
    ),
    "plan": (["plan", "lesss", *POOL, "--budget", "5"], "unknown method 'lesss'"),
    "method of a comparison": (
        ["compare", "lesss", *POOL, "--test", "pool.jsonl", "--budget", "5"],
        "unknown method 'lesss'",
    ),
    "test of a comparison": (
        ["compare", "length", *POOL, "--test", "tst.jsonl", "--budget", "5"],
        "tst.jsonl: there is no such file",
    ),
    "control": (
        ["compare", "length", *POOL, "--test", "pool.jsonl", "--budget", "5", "--control", "rnd"],
        "unknown control 'rnd'",
    ),
    "backend": (
        ["score", "--backend", "dott", *POOL, "--target", "pool.jsonl"],
        "unknown influence backend 'dott'",
    ),
    "rows of a doctor": (
        ["doctor", "--model", "tiny", "--pool", "pol.jsonl"],
        "pol.jsonl: there is no such file",
    ),
    "rows to inspect": (["inspect", "--pool", "pol.jsonl"], "pol.jsonl: there is no such file"),
    "show": (
        ["show", "nowhere"],
        "nowhere: is not a run folder. Give the folder that --run named.",
    ),
    "verify": (["verify", "nowhere"], "nowhere: is not a run folder"),
    "report": (["report", "nowhere"], "nowhere: is not a run folder"),
    "diff": (["diff", "nowhere", "nowhere"], "nowhere: is not a run folder"),
}


# The same of files, which are a fault of the data.
DAMAGE: dict[str, tuple[list[str], str]] = {
    "fields": (
        ["inspect", "--pool", "pool.csv"],
        "pool.csv: no known format fits its fields: 'question', 'answer'. Name your fields by a"
        " mapping: --map instruction=question,output=answer",
    ),
    "list of strings": (
        ["inspect", "--pool", "strings.json"],
        "strings.json: is a JSON list of strings, not of rows",
    ),
    "preference rows": (
        [
            "plan",
            "length",
            "--pool",
            "pairs.jsonl",
            "--model",
            "tiny",
            "--run",
            "new",
            "--budget",
            "1",
        ],
        "pairs.jsonl: holds preference rows, not rows with one answer",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of twelve rows, files of other kinds, configurations, and a run that has settings
    alone.
    """
    root = tmp_path_factory.mktemp("mistakes")
    write_rows(root / "pool.jsonl", rows(12))
    (root / "pool.csv").write_text("question,answer\n2 + 2,4\n")
    (root / "pool.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    (root / "strings.json").write_text('["a", "b"]')
    write_rows(root / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    (root / "broken.toml").write_text("[gradients\n")
    (root / "key.toml").write_text("[gradients]\ndimension = 64\n")
    (root / "value.toml").write_text('[gradients]\ndim = "wide"\n')
    (root / "other").mkdir()
    (root / "made").mkdir()
    (root / "made" / "run.json").write_text('{"commands":[],"kind":"gradsift run","schema":1}\n')
    (root / "made" / "settings.json").write_text('{"model":{"name":"tiny"}}\n')
    return root


def blocked(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(gradsift.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    command = [sys.executable, "-c", BLOCKED, *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_without_heavy_libraries(name: str, folder: Path) -> None:
    words, said = MISTAKES[name]
    done = blocked(words, folder)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "new").exists()  # what is refused leaves nothing behind


@pytest.mark.parametrize("name", DAMAGE)
def test_an_unusable_file_is_told_without_heavy_libraries(name: str, folder: Path) -> None:
    words, said = DAMAGE[name]
    done = blocked(words, folder)
    assert done.returncode == 3, done.stderr
    assert said in done.stderr and done.stdout == ""
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["select", "--help"],
        ["verify", "--help"],
        ["methods"],
        ["show", "made"],
        ["verify", "made"],
    ],
    ids=" ".join,
)
def test_what_needs_no_model_loads_nothing_heavy(words: list[str], folder: Path) -> None:
    done = blocked(words, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout
