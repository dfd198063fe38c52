"""docs/methods.md names every method, only options that exist, and the source that the docstring
states.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from gradsift import methods

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_every_section_is_a_method_and_its_options_exist() -> None:
    sections = re.split(r"^### ", PAGE, flags=re.M)[1:]
    named = [name for section in sections for name in section.splitlines()[0].split(", ")]
    assert sorted(named) == sorted(methods.METHODS)
    for section in sections:
        for name in section.splitlines()[0].split(", "):
            fields = {field.name for field in dataclasses.fields(methods.load(name))}
            assert set(re.findall(r"-o (\w+)=", section)) <= fields, name


def test_commands_in_the_tables_are_taken() -> None:
    found = re.findall(r"`(\w+)((?: -o \w+=[\w.-]+)+)`", PAGE)
    assert found
    for name, options in found:
        assert isinstance(
            methods.make(name, dict(re.findall(r"-o (\w+)=([\w.-]+)", options))), methods.load(name)
        )


def test_targets_and_sources_are_those_of_the_code() -> None:
    for name, target in re.findall(r"^\| `(\w+)` \| (none|required|optional) \|", PAGE, flags=re.M):
        assert methods.load(name).target == target, name
    for section in re.split(r"^### ", PAGE, flags=re.M)[1:]:
        for paper in re.findall(r"arxiv.org/abs/([\d.]+)", section):
            assert paper in (inspect.getdoc(methods.load(section.splitlines()[0])) or ""), paper
