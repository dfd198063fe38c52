"""Writes docs/settings.md from the records of gradsift/config.py: `python docs/generate_settings.py`
(with --print: to stdout, for the test).
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, get_args

from gradsift.config import Config, Settings

INTRO = """# Settings

Generated from the settings records by `python docs/generate_settings.py`.

Every key of a TOML file that `--config FILE.toml` names. A flag of the same name stands above the file, the file above the defaults. An
unknown key is an error that names the nearest one.

```toml
[pool]
mapping = {instruction = "question", output = "answer"}

[encode]
max_length = 2048

[warmup.lora]
r = 32
```
"""


def page() -> str:
    parts = [INTRO]
    for name, field in Config.model_fields.items():
        parts += section(name, field.annotation)
    return "\n".join(parts)


def section(name: str, record: Any) -> list[str]:
    """The table of one section, and those of the records in it."""
    words = " ".join((inspect.getdoc(record) or "").split())
    parts = [f"## [{name}]", "", words, "", "| key | value | default |", "|---|---|---|"]
    inside: list[str] = []
    for key, field in record.model_fields.items():
        kind = field.annotation
        held = next((one for one in (kind, *get_args(kind)) if is_record(one)), None)
        if held is None:
            parts.append(f"| `{key}` | {said(kind)} | {shown(field.default)} |")
        else:
            own = f"{name}.{key}" + ("" if kind is held else ".NAME")
            parts.append(f"| `{key}` | a section `[{own}]` | |")
            inside += section(own, held)
    return [*parts, "", *inside]


def is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Settings)


def said(kind: Any) -> str:
    """A type in the words of TOML."""
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if kind in words:
        return words[kind]
    text = str(kind)
    if text.startswith("dict"):
        return "table of texts"
    if text.startswith("typing.Literal"):
        return ", ".join(f'`"{value}"`' for value in get_args(kind))
    arguments = [one for one in get_args(kind) if one is not type(None)]
    if text.startswith("typing.Annotated"):
        return said(arguments[0])
    if re.match(r"(builtins\.)?tuple", text):
        # of any length, or of so many
        if Ellipsis in arguments:
            return f"list of {said(arguments[0])}s"
        return f"list of {len(arguments)} {said(arguments[0])}s"
    return " or ".join(dict.fromkeys(said(one) for one in arguments))


def shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f'`"{default}"`' if isinstance(default, str) else f"{default:g}"


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(page())
    else:
        (Path(__file__).parent / "settings.md").write_text(page(), encoding="utf-8")
