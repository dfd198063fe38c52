"""How long a command takes to say what is wrong, and to print what needs no model: CPU seconds of a
fresh process.

    python bench/start.py [--runs 5] [--json FILE]

Every line is the median, least and most of the user and system CPU seconds of `python -m
gradsift.cli ...`, started --runs times in turn, with the exit code it must end with (another
one ends the measurement). CPU time and not wall time: it is what the start costs, whatever else the
machine does. `python` is an interpreter that does nothing, to subtract. The goal is the project's
own: every mistake under 1.0 s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

GOAL = 1.0
ROOT = Path(__file__).resolve().parents[1]
POOL = ["--pool", "pool.jsonl", "--model", "tiny", "--run", "new"]
SELECT = ["select", "length", *POOL, "--budget", "5"]
# Name -> (exit code, arguments).
MISTAKES: dict[str, tuple[int, list[str]]] = {
    "method": (2, ["select", "lesss", *POOL, "--budget", "5"]),
    "option": (2, [*SELECT, "-o", "ordr=longest"]),
    "option without =": (2, [*SELECT, "-o", "order"]),
    "value of an option": (2, [*SELECT, "-o", "order=widest"]),
    "budget": (2, ["select", "length", *POOL, "--budget", "many"]),
    "budget of 0": (2, ["select", "length", *POOL, "--budget", "0"]),
    "budget over the pool": (2, ["select", "length", *POOL, "--budget", "61"]),
    "missing target": (2, ["select", "less", *POOL, "--budget", "5"]),
    "target for a method without": (2, [*SELECT, "--target", "pool.jsonl"]),
    "pool file": (
        2,
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
    ),
    "target file": (2, ["select", "less", *POOL, "--target", "dev.jsonl", "--budget", "5"]),
    "kind of file": (
        2,
        [
            "select",
            "length",
            "--pool",
            "pool.csv",
            "--model",
            "tiny",
            "--run",
            "new",
            "--budget",
            "5",
        ],
    ),
    "format": (2, [*SELECT, "--format", "chatml"]),
    "TOML": (2, [*SELECT, "--config", "broken.toml"]),
    "TOML key": (2, [*SELECT, "--config", "key.toml"]),
    "TOML value": (2, [*SELECT, "--config", "value.toml"]),
    "settings of another run": (
        2,
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
    ),
    "out names the pool": (2, [*SELECT, "--out", "pool.jsonl"]),
    "plan": (2, ["plan", "lesss", *POOL, "--budget", "5"]),
    "compare": (2, ["compare", "lesss", *POOL, "--test", "pool.jsonl", "--budget", "5"]),
    "score": (2, ["score", "--backend", "dott", *POOL, "--target", "pool.jsonl"]),
    "show": (2, ["show", "nowhere"]),
    "verify": (2, ["verify", "nowhere"]),
    "report": (2, ["report", "nowhere"]),
    "diff": (2, ["diff", "nowhere", "nowhere"]),
}
OTHERS: dict[str, tuple[int, list[str]]] = {
    "--help": (0, ["--help"]),
    "select --help": (0, ["select", "--help"]),
    "verify --help": (0, ["verify", "--help"]),
    "methods": (0, ["methods"]),
    "show a run": (0, ["show", "made"]),
}


def write_inputs(folder: Path) -> None:
    """The files that the commands name: a pool of 60 rows, a run with settings alone,
    configurations.
    """
    row = {
        "messages": [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    }
    lines = [json.dumps({"id": f"r{i}", **row}) for i in range(60)]
    (folder / "pool.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "pool.csv").write_text("question,answer\n2 + 2,4\n")
    (folder / "broken.toml").write_text("[gradients\n")
    (folder / "key.toml").write_text("[gradients]\ndimension = 64\n")
    (folder / "value.toml").write_text('[gradients]\ndim = "wide"\n')
    run = folder / "made"
    run.mkdir()
    (run / "run.json").write_text('{"commands":[],"kind":"gradsift run","schema":1}\n')
    (run / "settings.json").write_text('{"model":{"name":"tiny"}}\n')


def cpu_seconds(command: list[str], folder: Path, expected: int) -> float:
    """User and system CPU seconds of a child process. Raises SystemExit where it ends with another
    code than `expected`.
    """
    before = os.times()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    after = os.times()
    if done.returncode != expected:
        sys.exit(
            f"{' '.join(command)} ended with {done.returncode}, not {expected}:\n{done.stderr}"
        )
    return (
        after.children_user - before.children_user + after.children_system - before.children_system
    )


def measure(
    commands: Mapping[str, tuple[int, list[str]]], runs: int, folder: Path
) -> dict[str, dict[str, float]]:
    """Median, least and most CPU seconds of each command; in turns, so that what else the machine
    does falls on all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, (expected, command) in commands.items():
            seconds[name].append(cpu_seconds(command, folder, expected))
    return {
        name: {
            "median": round(statistics.median(each), 3),
            "least": round(min(each), 3),
            "most": round(max(each), 3),
        }
        for name, each in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    program = [sys.executable, "-m", "gradsift.cli"]
    commands = {"python": (0, [sys.executable, "-c", "pass"])}
    commands |= {
        name: (code, [*program, *words]) for name, (code, words) in {**MISTAKES, **OTHERS}.items()
    }
    with tempfile.TemporaryDirectory(prefix="gradsift-start-") as folder:
        write_inputs(Path(folder))
        found = measure(commands, options.runs, Path(folder))
    over = [name for name in MISTAKES if found[name]["median"] >= GOAL]
    result = {"runs": options.runs, "goal": GOAL, "over_the_goal": over, "cpu_seconds": found}
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
