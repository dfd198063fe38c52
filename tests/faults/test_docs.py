"""docs/faults.md names tests that exist, for every fault."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    line
    for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
]
ROWS = [line for line in LINES if not line.startswith("| fault |")]


def test_every_fault_names_tests_that_exist() -> None:
    assert len(ROWS) >= 30
    for row in ROWS:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            functions = {
                node.name
                for node in ast.parse((ROOT / path).read_text()).body
                if isinstance(node, ast.FunctionDef)
            }
            assert name in functions, f"{path}::{name}"


def test_every_test_of_this_folder_is_named() -> None:
    told = "\n".join(ROWS)
    files = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name}
    assert all(f"tests/faults/{name}::" in told for name in files), files
