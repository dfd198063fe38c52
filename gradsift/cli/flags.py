"""The flags of the command line, each once, and what they come to: the sections of settings, constraints and options of a method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

STAGES = "Settings of the run (one for all methods; also keys of --config)"
LIMITS = "Constraints on the selection, for any method"
MACHINE = "Machine"
TRAINING = r"Training that judges the subset (also keys of \[finetune] in --config)"

Method = Annotated[str, typer.Argument(help="A name from `gradsift methods`.", show_default=False)]
PoolFiles = Annotated[
    list[str],
    typer.Option(
        "--pool",
        metavar="[NAME=]FILE",
        help="Candidates: jsonl, json, parquet, .gz, .zst, a datasets folder, hf:NAME, s3:// or other URLs. Repeatable.",
        show_default=False,
    ),
]
TargetFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--target", metavar="[NAME=]FILE", help="Examples of what the model should get better at. Repeatable.", show_default=False
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME|PATH|tiny", help="The model to be trained later, or a small relative of it.", show_default=False),
]
BudgetText = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="5%|0.05|1000|10M-tokens",
        help="How many rows to choose: a share of the rows read, a count, or what so many tokens pay for.",
        show_default=False,
    ),
]
RunFolder = Annotated[
    Path, typer.Option("--run", metavar="DIR", help="Where all work is kept; the same folder again reuses it.", show_default=False)
]
Out = Annotated[str | None, typer.Option("--out", metavar="FILE|URL", help="Also copy the chosen rows here.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the selection.")]
MethodOptions = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="A parameter of the method. Repeatable.", show_default=False)
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE.toml", help="Settings of the stages.", show_default=False)]
PoolGroup = Annotated[
    str | None, typer.Option("--pool-group", metavar="FIELD", help="Group pool rows by this field instead of by file.", show_default=False)
]
TargetGroup = Annotated[
    str | None,
    typer.Option("--target-group", metavar="FIELD", help="Group target rows by this field instead of by file.", show_default=False),
]
Format = Annotated[
    str | None, typer.Option("--format", help="Row format, instead of detecting it.", rich_help_panel=STAGES, show_default=False)
]
MaxLength = Annotated[
    int | None, typer.Option("--max-length", help="Tokens kept of a row. (default 1024)", rich_help_panel=STAGES, show_default=False)
]
MaxBad = Annotated[
    str | None,
    typer.Option(
        "--max-bad-rows",
        metavar="N|SHARE",
        help="Stop above so many unreadable rows. (default 0.05)",
        rich_help_panel=STAGES,
        show_default=False,
    ),
]
Dedup = Annotated[
    str | None,
    typer.Option("--dedup", metavar="none|exact|near", help="Drop duplicates. (default none)", rich_help_panel=STAGES, show_default=False),
]
ExactDedup = Annotated[
    str | None,
    typer.Option("--dedup", metavar="none|exact", help="Drop duplicates. (default none)", rich_help_panel=STAGES, show_default=False),
]
PerGroup = Annotated[
    list[str] | None,
    typer.Option(
        "--per-group",
        metavar="NAME=MIN:MAX",
        help="Rows (100:500) or shares (10%:30%) of a pool group. Repeatable.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
IncludeIds = Annotated[
    Path | None, typer.Option("--include-ids", metavar="FILE", help="Choose these rows, one id a line.", rich_help_panel=LIMITS)
]
ExcludeIds = Annotated[
    Path | None, typer.Option("--exclude-ids", metavar="FILE", help="Never choose these rows, one id a line.", rich_help_panel=LIMITS)
]
Decontaminate = Annotated[
    list[str] | None,
    typer.Option(
        "--decontaminate",
        metavar="FILE",
        help="Leave out rows that share 13 words in a row with this test set. Repeatable.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
Near = Annotated[
    float | None,
    typer.Option("--near", metavar="COSINE", help="What --dedup near drops. (default 0.95)", rich_help_panel=LIMITS, show_default=False),
]
NearBy = Annotated[
    str | None,
    typer.Option(
        "--near-by",
        metavar="rows|embeddings",
        help="Cosine of gradient rows or of embeddings. (default rows)",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
WarmupFrom = Annotated[
    Path | None,
    typer.Option(
        "--warmup-from",
        metavar="DIR",
        help="Take the checkpoints of your own LoRA run instead of warming up.",
        rich_help_panel=STAGES,
        show_default=False,
    ),
]
Dim = Annotated[
    int | None, typer.Option("--dim", help="Numbers stored per gradient row. (default 8192)", rich_help_panel=STAGES, show_default=False)
]
ShardRows = Annotated[
    int | None,
    typer.Option("--shard-rows", help="Rows per shard: what a crash can lose. (default 2048)", rich_help_panel=STAGES, show_default=False),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Revision of a hub model.", rich_help_panel=MACHINE, show_default=False)]
RemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Run the model's own code; needs --revision.", rich_help_panel=MACHINE, show_default=False),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ... (default cpu)", rich_help_panel=MACHINE, show_default=False)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="float32|bfloat16|nf4",
        help="Number format of the base model; nf4 is 4 bits. (default float32)",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="eager|sdpa",
        help="Attention implementation; `gradsift doctor` says which to take. (default the model's own)",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads. (default physical cores)", rich_help_panel=MACHINE, show_default=False)
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="serial|ray",
        help="ray: several workers, GPUs or machines; the same bytes. (default serial)",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT|auto",
        help="A running Ray cluster. (default this machine)",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Ray workers. (default as many as fit)", rich_help_panel=MACHINE, show_default=False)
]
GpusPerWorker = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-worker", help="GPUs that a Ray worker's model spans. (default 1)", rich_help_panel=MACHINE, show_default=False
    ),
]
ShardTimeout = Annotated[
    float | None,
    typer.Option(
        "--shard-timeout",
        metavar="SECONDS",
        help="Replace a Ray worker that takes longer for a shard. (default 3600)",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Force = Annotated[
    bool | None,
    typer.Option("--force", help="Go on where a check says that the result will be poor.", rich_help_panel=MACHINE, show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def options_given(pairs: list[str] | None) -> dict[str, str]:
    from gradsift.errors import ConfigError

    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"-o {pair}: not KEY=VALUE", remedy="Write it as -o clusters=50.")
        found[key.strip().replace("-", "_")] = value.strip()
    return found


def settings_given(config: Path | None, **flags: Any) -> dict[str, dict[str, Any]]:
    """Sections with only what the user gave: the TOML file first, flags on top."""
    from gradsift.config import read_toml

    sections: dict[str, dict[str, Any]] = {name: dict(values) for name, values in (read_toml(config) if config else {}).items()}
    for path, value in flags.items():
        if value is not None:
            section, _, key = path.partition("__")
            sections.setdefault(section, {})[key] = value
    return sections


def number(text: str | None) -> float | int | None:
    from gradsift.errors import ConfigError

    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ConfigError(f"--max-bad-rows {text}: not a number", remedy="Give a share like 0.05 or a count like 200.") from None


def gather(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings sections from a command's arguments."""
    return settings_given(
        values["config"],
        pool__format=values["format"],
        pool__max_bad_rows=number(values["max_bad_rows"]),
        pool__dedup=None if values["dedup"] == "near" else values["dedup"],
        encode__max_length=values["max_length"],
        gradients__dim=values["dim"],
        gradients__shard_rows=values["shard_rows"],
        model__revision=values["revision"],
        model__trust_remote_code=values["trust_remote_code"],
        model__device=values["device"],
        model__dtype=values["dtype"],
        model__attention=values.get("attention"),
        machine__threads=values["threads"],
        machine__executor=values.get("executor"),
        machine__address=values.get("address"),
        machine__workers=values.get("workers"),
        machine__gpus_per_worker=values.get("gpus_per_worker"),
        machine__shard_timeout=values.get("shard_timeout"),
        machine__force=values["force"],
    )


def constraints_given(values: dict[str, Any]) -> dict[str, Any]:
    """Constraints from the arguments of `select`, only what the user gave."""
    from gradsift.errors import ConfigError

    near = values["dedup"] == "near"
    if not near and (values["near"] is not None or values["near_by"] is not None):
        raise ConfigError("--near and --near-by say how --dedup near works, which was not asked for", remedy="Add --dedup near.")
    found = {name: values[name] for name in ("per_group", "include_ids", "exclude_ids", "decontaminate", "near_by") if values[name]}
    return {**found, **({"near": 0.95 if values["near"] is None else values["near"]} if near else {})}
