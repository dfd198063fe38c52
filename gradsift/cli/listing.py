"""The list of methods as a person reads it."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradsift import methods
from gradsift.methods.options import options
from gradsift.report.text import table

NARROWEST = 60


def width() -> int | None:
    """The columns of the terminal; None where the output goes elsewhere, and no line is cut."""
    return max(NARROWEST, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def listing(found: Sequence[Mapping[str, Any]], columns: int | None) -> Iterator[str]:
    """Lines on each method of `methods.describe`: what it does, what it needs, and a table of its
    options. Texts are wrapped to `columns`.
    """
    for place, method in enumerate(found):
        yield from ("",) if place else ()
        yield method["name"]
        yield from _wrapped(method["summary"], "    ", columns)
        facts = {"target": method["target"], "reads": ", ".join(method["needs"]) or "nothing"}
        for name, text in {**facts, "source": method["source"], "cost": method["cost"]}.items():
            if text:
                yield from _wrapped(f"{name}: {text}", "    ", columns, hanging="  ")
        yield from _options(method["name"], columns)


def _options(name: str, columns: int | None) -> Iterator[str]:
    known = options(name, methods.load(name))
    if not known:
        return
    head = ["option", "default", "takes", "meaning"]
    rows = [[f"-o {option.name}", option.default, option.values] for option in known]
    left = table([[*head[:3], ""], *([*row, ""] for row in rows)])
    start = 4 + max(map(len, left)) + 2
    for line, meaning in zip(left, [head[3], *(option.meaning for option in known)], strict=True):
        first = f"    {line}".ljust(start)
        if columns is None or columns - start < 20:
            yield f"{first}{meaning}".rstrip()
            continue
        parts = textwrap.wrap(meaning, columns - start, break_on_hyphens=False) or [""]
        yield f"{first}{parts[0]}".rstrip()
        yield from (" " * start + part for part in parts[1:])


def _wrapped(text: str, indent: str, columns: int | None, hanging: str = "") -> list[str]:
    if columns is None:
        return [indent + text]
    return textwrap.wrap(
        text,
        columns,
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        break_on_hyphens=False,
    )
