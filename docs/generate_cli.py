"""Writes docs/cli.md from the commands themselves: `python docs/generate_cli.py` (with --print: to
stdout, for the test).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from typer.main import get_command

from gradsift.cli.app import app


def reference() -> str:
    group: Any = get_command(app)
    parts = [
        "# Command line",
        "",
        "Generated from the commands by `python docs/generate_cli.py`.",
        "",
    ]
    parts += [
        "Data goes to stdout, the log to stderr. Exit codes: 0 done, 1 the demo's check failed, 2 a"
        " wrong request, 3 unusable data"
    ]
    parts += [
        "(or nothing that `doctor` can advise), 4 disk, memory or device, 5 stored bytes that are"
        " not what was written, 130 stopped and"
    ]
    parts += ["resumable.", ""]
    for name, command in group.commands.items():
        parts += [f"## gradsift {name}", "", (command.help or "").strip(), ""]
        rows = [row for row in (describe(parameter) for parameter in command.params) if row]
        parts += [
            "| | |",
            "|---|---|",
            *rows,
            "",
            f"    {(command.epilog or '').removeprefix('Example: ')}",
            "",
        ]
    return "\n".join(parts)


def describe(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"| `{(parameter.metavar or parameter.name).upper()}` | {parameter.help or ''} |"
    flags = " ".join(f"`{option}`" for option in parameter.opts)
    value = (
        ""
        if parameter.is_flag or not parameter.metavar
        else f" `{parameter.metavar}`".replace("|", "\\|")
    )
    default = (
        ""
        if parameter.default in (None, False) or callable(parameter.default)
        else f" Default: {parameter.default}."
    )
    return f"| {flags}{value} | {(parameter.help or '').replace('|', chr(92) + '|')}{default} |"


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(reference())
    else:
        (Path(__file__).parent / "cli.md").write_text(reference(), encoding="utf-8")
