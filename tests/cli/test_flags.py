"""The shared flags: on which commands they stand, and that what the user writes reaches the
settings and the library call.
"""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from gradsift.cli.app import app
from gradsift.cli.flags import CALL, CONSTRAINT, FILE, FLAGS, RUN
from gradsift.commands.preflight import settle_config
from gradsift.config import Config
from gradsift.errors import ConfigError, UnknownName
from gradsift.store.run import Run

SECTIONS = set(Config.model_fields)
SETTINGS = [flag for flag in FLAGS if flag.section in SECTIONS]
# The library call of each command that takes settings, and the least that its line needs.
CALLS = {
    "select": "gradsift.commands.select.select",
    "plan": "gradsift.commands.plan.plan",
    "score": "gradsift.commands.score",
    "compare": "gradsift.commands.compare.compare",
    "inspect": "gradsift.commands.inspect",
    "doctor": "gradsift.commands.doctor",
}
_CHOICE = [
    "less",
    "--pool",
    "p.jsonl",
    "--target",
    "t.jsonl",
    "--budget",
    "5%",
    "--run",
    "r",
    "--model",
    "tiny",
]
LEAST = {
    "select": _CHOICE,
    "plan": _CHOICE,
    "score": [
        "--backend",
        "dot",
        "--pool",
        "p.jsonl",
        "--target",
        "t.jsonl",
        "--run",
        "r",
        "--model",
        "tiny",
    ],
    "compare": [*_CHOICE, "--test", "t.jsonl"],
    "inspect": ["--pool", "p.jsonl"],
    "doctor": ["--pool", "p.jsonl", "--model", "tiny"],
}
# A value of each settings flag that is not the default: as the user writes it (nothing after a
# switch), and in Config.
VALUES: dict[str, tuple[list[str], Any]] = {
    "mode": (["full"], "full"),
    "epochs": (["2"], 2.0),
    "lr": (["1e-3"], 1e-3),
    "batch_size": (["7"], 7),
    "format": (["alpaca"], "alpaca"),
    "max_length": (["99"], 99),
    "tool_calls": (["text"], "text"),
    "system": (["user"], "user"),
    "max_bad_rows": (["7"], 7),
    "dedup": (["exact"], "exact"),
    "dim": (["77"], 77),
    "shard_rows": (["33"], 33),
    "revision": (["main"], "main"),
    "trust_remote_code": ([], True),
    "device": (["cuda:1"], "cuda:1"),
    "dtype": (["bfloat16"], "bfloat16"),
    "attention": (["eager"], "eager"),
    "threads": (["3"], 3),
    "executor": (["ray"], "ray"),
    "address": (["auto"], "auto"),
    "workers": (["5"], 5),
    "gpus_per_worker": (["2"], 2),
    "shard_timeout": (["9.5"], 9.5),
    "force": ([], True),
}


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files that the lines of LEAST name, in the folder where they run: they are checked before
    the library is called.
    """
    rows = [
        {"instruction": f"question {i}", "input": "", "output": f"answer {i}"} for i in range(40)
    ]
    for name in ("p.jsonl", "t.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)


class Reached(Exception):
    """The library was called with these arguments."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__("the library was called")
        self.arguments = arguments


def arguments(monkeypatch: pytest.MonkeyPatch, command: str, *flags: str) -> dict[str, Any]:
    """The arguments that the library call of a command gets from the command line; they fit its
    signature.
    """
    module = importlib.import_module(CALLS[command])
    signature = inspect.signature(getattr(module, command))

    def call(*positional: Any, **named: Any) -> None:
        raise Reached(dict(signature.bind(*positional, **named).arguments))

    with monkeypatch.context() as patch:
        patch.setattr(module, command, call)
        result = CliRunner().invoke(app, [command, *LEAST[command], *flags])
    if isinstance(result.exception, Reached):
        return result.exception.arguments
    assert result.exception is not None, "the command did not call the library"
    raise result.exception


def options(command: str) -> dict[str, str]:
    """The options of a command in the command tree: parameter -> what the user types."""
    group: Any = get_command(app)
    return {parameter.name: parameter.opts[0] for parameter in group.commands[command].params}


def test_the_table_names_settings_that_exist_and_a_value_for_each() -> None:
    assert {flag.section for flag in FLAGS} <= SECTIONS | {CALL, CONSTRAINT, FILE}
    assert {flag.name for flag in SETTINGS} == set(VALUES)
    usual = Config()
    for flag in SETTINGS:
        assert getattr(getattr(usual, flag.section), flag.name) != VALUES[flag.name][1], flag.name


def test_the_commands_of_the_table_are_those_that_take_a_run_and_settings() -> None:
    group: Any = get_command(app)
    assert {name for name in group.commands if {"run", "config"} <= set(options(name))} == set(RUN)
    assert {name for name in group.commands if "config" in options(name)} == set(CALLS)


@pytest.mark.parametrize("command", sorted(RUN))
def test_every_settings_flag_stands_on_every_command_that_opens_a_run(command: str) -> None:
    # Of the training that judges a subset, which `compare` alone does, the others take no flags.
    wanted = {flag.name for flag in SETTINGS if flag.section != "finetune" or command == "compare"}
    assert wanted <= set(options(command))


@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for flag in SETTINGS for command in sorted(flag.commands)]
)
def test_a_settings_flag_reaches_the_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, flag: Any
) -> None:
    typed, value = VALUES[flag.name]
    given = arguments(monkeypatch, command, options(command)[flag.name], *typed)
    config = settle_config(Run(tmp_path / "r"), "tiny", given["settings"], given.get("pool_group"))
    assert getattr(getattr(config, flag.section), flag.name) == value
    # And nothing else.
    assert config == Config().with_values(flag.section, **{flag.name: value})


@pytest.mark.parametrize("command", sorted(CALLS))
def test_flags_stand_above_the_file_and_the_file_above_the_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[pool]\nformat = "sharegpt"\nid_field = "key"\n[encode]\nmax_length = 50\n')
    given = arguments(monkeypatch, command, "--config", str(file), "--format", "alpaca")
    assert given["settings"] == {
        "pool": {"format": "alpaca", "id_field": "key"},
        "encode": {"max_length": 50},
    }
    file.write_text("max_length = 50\n")
    with pytest.raises(ConfigError, match=r"'max_length' is in no section.*\[pool\]"):
        arguments(monkeypatch, command, "--config", str(file))


@pytest.mark.parametrize("command", sorted(CALLS))
def test_a_command_without_flags_leaves_everything_to_the_library(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    given = arguments(monkeypatch, command)
    assert given["settings"] == {}
    assert not set(given) & {"pool_group", "target_group", "warmup_from", "decontaminate"}


@pytest.mark.parametrize("command", sorted(RUN))
def test_groups_and_checkpoints_of_the_users_own_reach_the_call(
    monkeypatch: pytest.MonkeyPatch, command: str, tmp_path: Path
) -> None:
    flags = ("--pool-group", "a", "--target-group", "b", "--warmup-from", str(tmp_path))
    given = arguments(monkeypatch, command, *flags)
    assert (given["pool_group"], given["target_group"], given["warmup_from"]) == (
        "a",
        "b",
        tmp_path,
    )


def test_a_plan_takes_what_a_selection_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [
        "--seed",
        "3",
        "--allow-short",
        "--per-group",
        "code=:5",
        "--per-group",
        "chat=2:",
        "--include-ids",
        "in.txt",
    ]
    flags += [
        "--exclude-ids",
        "out.txt",
        "--decontaminate",
        "exam.jsonl",
        "--dedup",
        "near",
        "--near",
        "0.9",
        "--near-by",
        "embeddings",
    ]
    flags += ["-o", "preset=released"]
    planned, selected = (
        arguments(monkeypatch, "plan", *flags),
        arguments(monkeypatch, "select", *flags),
    )
    assert {
        name: value
        for name, value in selected.items()
        if name not in ("out", "add_scores", "progress")
    } == {name: value for name, value in planned.items() if name != "progress"}
    assert (planned["seed"], planned["allow_short"], planned["options"]) == (
        3,
        True,
        {"preset": "released"},
    )
    assert planned["constraints"] == {
        "per_group": ["code=:5", "chat=2:"],
        "include_ids": Path("in.txt"),
        "exclude_ids": Path("out.txt"),
        "decontaminate": ["exam.jsonl"],
        "near": 0.9,
        "near_by": "embeddings",
    }
    only = {"out", "add_scores"}  # of what is written
    assert set(options("select")) - set(options("plan")) == only


@pytest.mark.parametrize("command", ["select", "plan"])
def test_near_duplicates_are_a_constraint_and_no_setting(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    given = arguments(monkeypatch, command, "--dedup", "near")
    assert given["settings"] == {} and given["constraints"] == {"near": 0.95}
    for flag in (["--near", "0.9"], ["--near-by", "rows"]):
        with pytest.raises(ConfigError, match=r"Add --dedup near\."):
            arguments(monkeypatch, command, *flag)


def test_a_comparison_takes_test_sets_to_leave_out_and_a_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = arguments(
        monkeypatch,
        "compare",
        "--decontaminate",
        "a.jsonl",
        "--decontaminate",
        "b.jsonl",
        "--level",
        "0.9",
    )
    assert (given["decontaminate"], given["level"]) == (["a.jsonl", "b.jsonl"], 0.9)
    assert arguments(monkeypatch, "compare")["level"] == 0.95
    refused = CliRunner().invoke(app, ["compare", *LEAST["compare"], "--level", "95"])
    assert refused.exit_code == 2


def test_options_of_a_method_are_read_by_one_parser() -> None:
    from gradsift.commands.compare.request import parse
    from gradsift.methods import options_from

    assert options_from(["a-b = 1", "c=x=y"], before="-o ", remedy="") == {"a_b": "1", "c": "x=y"}
    _, selector = parse(["less:aggregate=max,preset=released"], True)[
        "less:aggregate=max,preset=released"
    ]
    assert (selector.aggregate, selector.preset) == ("max", "released")  # type: ignore[attr-defined]
    for faulty in ("=5", " =5", "clusters"):
        with pytest.raises(ConfigError, match=f"^-o {faulty}: not KEY=VALUE"):
            options_from([faulty], before="-o ", remedy="Write it as -o clusters=50.")
        with pytest.raises(
            ConfigError, match=rf"less:{faulty}: not KEY=VALUE.*less:aggregate=max,preset=paper"
        ):
            parse([f"less:preset=paper,{faulty}"], True)


def test_the_command_line_loads_no_heavy_library() -> None:
    heavy = (
        "torch",
        "transformers",
        "pyarrow",
        "altair",
        "numpy",
        "pydantic",
        "gradsift.config",
        "gradsift.commands",
    )
    code = (
        f"import sys, gradsift.cli.app, gradsift.cli.flags; print([name for name in {heavy} if name"
        " in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )


# --- how files are read


def test_a_map_reaches_the_settings_of_its_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("p.jsonl", "t.jsonl"):
        (tmp_path / name).write_text('{"question": "q", "answer": "a", "uid": "1"}\n' * 40)
    both = ["--map", "instruction=question,output=answer", "--map", "id=uid"]
    for command in sorted(RUN | {"inspect", "doctor"}):
        given = arguments(monkeypatch, command, *both)
        assert given["settings"]["pool"] == {
            "mapping": {"instruction": "question", "output": "answer", "id": "uid"}
        }
    own = ["--map", "p:instruction=question", "--map", "p:output=answer", "--target-format"]
    given = arguments(
        monkeypatch, "select", *own, "alpaca", "--target-map", "instruction=question,output=answer"
    )
    assert given["settings"] == {
        "pool": {"files": {"p": {"mapping": {"instruction": "question", "output": "answer"}}}},
        "target": {
            "format": "alpaca",
            "mapping": {"instruction": "question", "output": "answer"},
        },
    }
    for wrong in ("instruction", "=question", "instruction="):
        with pytest.raises(ConfigError, match=r"not OURS=THEIRS"):
            arguments(monkeypatch, "select", "--map", wrong)


def test_a_map_stands_above_that_of_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("p.jsonl", "t.jsonl"):
        (tmp_path / name).write_text('{"question": "q", "answer": "a"}\n' * 40)
    file = tmp_path / "c.toml"
    file.write_text(
        '[pool]\nmapping = {instruction = "q", output = "answer"}\n'
        '[target.files.t]\nformat = "alpaca"\n'
    )
    given = arguments(monkeypatch, "select", "--config", str(file), "--map", "instruction=question")
    config = settle_config(Run(tmp_path / "r"), "tiny", given["settings"], None)
    assert config.pool.mapping == {"instruction": "question", "output": "answer"}
    assert config.target.files["t"].format == "alpaca"
    assert config.reading("target").mapping == config.pool.mapping
    file.write_text('[pool.files.p]\nformt = "alpaca"\n')
    with pytest.raises(UnknownName, match=r"unknown setting 'pool.files.p.formt'.*format"):
        arguments(monkeypatch, "select", "--config", str(file))
