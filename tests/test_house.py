"""The rules of the house that no linter of the Makefile holds: its layers, its size, its names, and
what its tests may use.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gradsift"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted(path for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py"))
WINGS = [
    "cli",
    "commands",
    "compute",
    "data",
    "gradients",
    "methods",
    "model",
    "report",
    "rules",
    "signals",
    "stages",
    "store",
]
# beginnings of the names of functions that assert
CHECKS = ("check_", "assert_", "raises", "warns")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != "__pycache__"]


def test_the_contracts_of_import_linter_hold() -> None:
    ran = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout


def test_the_root_holds_the_twelve_wings_and_little_else() -> None:
    folders = sorted(path.name for path in entries(PACKAGE) if path.is_dir())
    assert folders == WINGS
    assert len(entries(PACKAGE)) <= 18


def test_a_folder_can_be_read_at_one_glance() -> None:
    for folder in {path.parent for path in FILES} - {PACKAGE / "methods", PACKAGE / "rules"}:
        files = [path for path in entries(folder) if path.is_file()]
        assert len(files) <= 14, f"{relative(folder)} has {len(files)} files"


def test_every_folder_says_its_job() -> None:
    for folder in {path.parent for path in FILES}:
        face = folder / "__init__.py"
        assert face.exists(), f"{relative(folder)} has no __init__.py"
        assert ast.get_docstring(ast.parse(face.read_text(encoding="utf-8"))), relative(face)


def test_no_room_is_called_utils() -> None:
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert not {"utils", "core", "base", "helpers", "common"} & names


def test_nothing_unpickles() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "load"
            ):
                owner = getattr(node.func.value, "id", "")
                assert owner not in {"pickle", "joblib", "dill"}
                if owner == "torch":
                    assert any(
                        k.arg == "weights_only" and getattr(k.value, "value", None) is True
                        for k in node.keywords
                    ), path


def test_public_names_are_sorted_and_importable() -> None:
    import gradsift

    assert list(gradsift.__all__) == sorted(gradsift.__all__)
    assert all(getattr(gradsift, name) is not None for name in gradsift.__all__)
    with pytest.raises(AttributeError, match="no attribute"):
        gradsift.nothing  # noqa: B018


def test_help_imports_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "pyarrow", "altair", "numpy", "pydantic")
    code = f"import sys, gradsift.cli.app; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )


# --- what tests may use


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def root_of(node: ast.expr) -> str:
    """The name that a chain of attributes begins with; "" for anything else."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_uses(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every private name of the package that a test imports, reads or replaces."""
    tree = ast.parse(source)
    ours: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours |= {
                alias.asname or "gradsift"
                for alias in node.names
                if alias.name.split(".")[0] == "gradsift"
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gradsift":
            ours |= {alias.asname or alias.name for alias in node.names}
            for alias in node.names:
                if any(map(private, (*(node.module or "").split("."), alias.name))):
                    yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and root_of(node) in ours:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and getattr(
            node.func, "attr", getattr(node.func, "id", "")
        ) in ("setattr", "delattr", "getattr"):
            texts = [
                arg.value if isinstance(arg, ast.Constant) and isinstance(arg.value, str) else ""
                for arg in node.args[:2]
            ]
            replaced = texts[0].startswith("gradsift.") and any(map(private, texts[0].split(".")))
            if replaced or (
                len(texts) == 2 and private(texts[1]) and root_of(node.args[0]) in ours
            ):
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize(
    "source",
    [
        "from gradsift.rules.omp import _x",
        "from gradsift import _x",
        "from gradsift.rules import omp\nomp._x()",
        "import gradsift.rules.omp\ngradsift.rules.omp._X.y",
        "from gradsift.rules import omp as room\npatch.setattr(room, '_x', 1)",
        "patch.setattr('gradsift.rules.omp._x', 1)",
    ],
)
def test_a_private_use_is_seen(source: str) -> None:
    assert len(list(private_uses(source))) == 1
    assert not list(private_uses(source.replace("_x", "x").replace("_X", "X")))


def test_no_test_uses_a_private_name_of_the_package() -> None:
    uses = [
        f"{relative(path)}:{line} {text}"
        for path in TESTS
        for line, text in private_uses(path.read_text(encoding="utf-8"))
    ]
    assert uses == []


def asserts(function: ast.FunctionDef) -> bool:
    """True if a function asserts, or calls one whose name says that it does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call) and getattr(
            node.func, "attr", getattr(node.func, "id", "")
        ).startswith(CHECKS):
            return True
    return False


def test_every_test_asserts_something() -> None:
    silent = [
        f"{relative(path)}::{node.name}"
        for path in TESTS
        if path.name.startswith("test_")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not asserts(node)
    ]
    assert silent == []
