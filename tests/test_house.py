"""The floors of the house: who may import whom, and what may not exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gradsift"

FLOORS = {
    0: "errors types config budget redaction",
    1: "durable provenance artifact progress machine formats tables containers packing reading writing pool chat encode projection store methods"
    " contamination constraints choice remote halving swaps dense",
    2: "modules model transforms families",
    3: "measures trainer_output checkpoints warmup objectives tail attention rmsnorm lowrank products capture gradients signals",
    4: "influence curvature",
    5: "agreement curved projected scalars tuned run checking execute stages rowwork targets pipeline findings outputs selection delivery scoring"
    " doctor plan holdings execute_ray raywork workers parts plan_ray evaluate judging comparison arms trials tiny playground demo report",
    6: "cli flags __main__ __init__",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The top-level module or package a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of gradsift that a file imports anywhere, type-checking blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "gradsift" and len(parts) > 1 and (PACKAGE / f"{parts[1]}.py").exists() | (PACKAGE / parts[1]).is_dir():
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_its_own_and_lower_floors(path: Path) -> None:
    own = room(path)
    if own == "rules":
        assert imports(path) <= {"rules"}
    elif own == "methods":
        assert imports(path) <= {"rules", "types", "methods"} | ({"errors"} if path.name == "__init__.py" else set())
    else:
        assert own in FLOOR, f"{own} has no floor; place it in FLOORS"
        above = {other for other in imports(path) if other != "rules" and FLOOR[other] > FLOOR[own]}
        assert not above


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small_or_say_why(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 400 or "lines because" in (ast.get_docstring(tree) or ""), f"{path.name} has {text.count(chr(10))} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            size = (node.end_lineno or 0) - node.body[0].lineno + 1  # a command's signature holds its flags, one a line
            assert size <= 60 or "lines because" in (ast.get_docstring(node) or ""), f"{path.name}:{node.name} has {size} lines"


def test_no_room_is_called_utils() -> None:
    assert not {"utils", "core", "base", "helpers", "common"} & {path.stem for path in FILES}


def test_nothing_unpickles() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                owner = getattr(node.func.value, "id", "")
                assert owner not in {"pickle", "joblib", "dill"}
                if owner == "torch":
                    assert any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords), path


def test_public_names_are_sorted_and_importable() -> None:
    import gradsift

    assert list(gradsift.__all__) == sorted(gradsift.__all__)
    assert all(getattr(gradsift, name) is not None for name in gradsift.__all__)
    with pytest.raises(AttributeError, match="no attribute"):
        gradsift.nothing  # noqa: B018


def test_help_imports_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "pyarrow", "altair", "numpy", "pydantic")
    code = f"import sys, gradsift.cli.app; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
