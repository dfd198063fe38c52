"""`inspect`: what a user sees of rows that are read in another way than they may think."""

from __future__ import annotations

from pathlib import Path

from gradsift.commands.inspect import inspect
from tests.conftest import write_rows


def test_warnings_of_the_reading_are_shown(tmp_path: Path, model_folder: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "no_loss": 1}]
    pool = write_rows(tmp_path / "p.jsonl", [{"messages": turns}])
    lines = [str(line) for line in inspect(pool, model=str(model_folder))]
    assert lines[0] == f"{pool}: messages"
    assert any(line.startswith("warning: 1 row has 'no_loss'") for line in lines)


def test_a_map_is_taken(tmp_path: Path, model_folder: Path) -> None:
    pool = write_rows(tmp_path / "p.jsonl", [{"question": "wxyz", "answer": "zyxw"}])
    mapping = {"instruction": "question", "output": "answer"}
    settings = {"pool": {"mapping": mapping}}
    lines = [str(line) for line in inspect(pool, model=str(model_folder), settings=settings)]
    assert lines[0] == f"{pool}: alpaca" and "wxyz" in lines[-1]
