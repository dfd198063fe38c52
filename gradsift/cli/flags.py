"""The flags of the command line, each once; the table of those that several commands share, and
what they come to.

A new settings flag is one row of FLAGS.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gradsift.compute import threads

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
        help=(
            "Candidates: jsonl, json, csv, parquet, .gz, .zst, a folder of such files, a pattern"
            " such as 'data/*.parquet' in quotes, a datasets folder, hf:NAME, 'hf:NAME\\[SPLIT]',"
            " s3:// or other URLs. Repeatable."
        ),
        show_default=False,
    ),
]
TargetFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="[NAME=]FILE",
        help="Examples of what the model should get better at. Repeatable.",
        show_default=False,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME|PATH|tiny",
        help="The model to be trained later, or a small relative of it.",
        show_default=False,
    ),
]
BudgetText = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="5%|0.05|1000|10M-tokens",
        help=(
            "How many rows to choose: a share of the rows read, a count, or what so many tokens pay"
            " for."
        ),
        show_default=False,
    ),
]
RunFolder = Annotated[
    Path,
    typer.Option(
        "--run",
        metavar="DIR",
        help="Where all work is kept; the same folder again reuses it.",
        show_default=False,
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        metavar="FILE|URL",
        help="Also write the chosen rows here; the suffix says in which container.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the selection.")]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="A parameter of the method. Repeatable.",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE.toml", help="Settings of the stages.", show_default=False
    ),
]
PoolGroup = Annotated[
    str | None,
    typer.Option(
        "--pool-group",
        metavar="FIELD",
        help="Group pool rows by this field instead of by file.",
        show_default=False,
    ),
]
TargetGroup = Annotated[
    str | None,
    typer.Option(
        "--target-group",
        metavar="FIELD",
        help="Group target rows by this field instead of by file.",
        show_default=False,
    ),
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="[NAME:]OURS=THEIRS",
        help=(
            "Which field of the rows holds which of ours, such as instruction=question. Repeatable,"
            " or with commas; NAME: for one source alone."
        ),
        rich_help_panel=STAGES,
        show_default=False,
    ),
]
TargetFormat = Annotated[
    str | None,
    typer.Option(
        "--target-format",
        help="Row format of targets and tests. (default as the pool's, where that fits)",
        rich_help_panel=STAGES,
        show_default=False,
    ),
]
TargetMap = Annotated[
    list[str] | None,
    typer.Option(
        "--target-map",
        metavar="[NAME:]OURS=THEIRS",
        help="As --map, for targets and tests. (default as the pool's, where that fits)",
        rich_help_panel=STAGES,
        show_default=False,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Row format, instead of detecting it.",
        rich_help_panel=STAGES,
        show_default=False,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        help="Tokens kept of a row. (default 1024)",
        rich_help_panel=STAGES,
        show_default=False,
    ),
]
ToolCalls = Annotated[
    str | None,
    typer.Option(
        "--tool-calls",
        metavar="template|text",
        help="Who writes tool calls: the chat template, or gradsift as JSON text.",
        rich_help_panel=STAGES,
        show_default=False,
    ),
]
SystemText = Annotated[
    str | None,
    typer.Option(
        "--system",
        metavar="template|user",
        help="Where the system text goes: a turn of the template, or the first user turn.",
        rich_help_panel=STAGES,
        show_default=False,
    ),
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
    typer.Option(
        "--dedup",
        metavar="none|exact|near",
        help="Drop duplicates. (default none)",
        rich_help_panel=STAGES,
        show_default=False,
    ),
]
ExactDedup = Annotated[
    str | None,
    typer.Option(
        "--dedup",
        metavar="none|exact",
        help="Drop duplicates. (default none)",
        rich_help_panel=STAGES,
        show_default=False,
    ),
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
    Path | None,
    typer.Option(
        "--include-ids",
        metavar="FILE",
        help="Choose these rows, one id a line.",
        rich_help_panel=LIMITS,
    ),
]
ExcludeIds = Annotated[
    Path | None,
    typer.Option(
        "--exclude-ids",
        metavar="FILE",
        help="Never choose these rows, one id a line.",
        rich_help_panel=LIMITS,
    ),
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
    typer.Option(
        "--near",
        metavar="COSINE",
        help="What --dedup near drops. (default 0.95)",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
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
Mix = Annotated[
    str | None,
    typer.Option(
        "--mix",
        metavar="0.5|50%",
        help="Choose this part of the budget by score and draw the rest from what is left.",
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
    int | None,
    typer.Option(
        "--dim",
        help="Numbers stored per gradient row. (default 8192)",
        rich_help_panel=STAGES,
        show_default=False,
    ),
]
ShardRows = Annotated[
    int | None,
    typer.Option(
        "--shard-rows",
        help="Rows per shard: what a crash can lose. (default 2048)",
        rich_help_panel=STAGES,
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", help="Revision of a hub model.", rich_help_panel=MACHINE, show_default=False
    ),
]
RemoteCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code",
        help="Run the model's own code; needs --revision.",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda|cuda:1|mps|xpu",
        help="Where the model runs. (default auto: a GPU where there is one)",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="auto|float32|bfloat16|float16|nf4",
        help=(
            "Number format of the base model; nf4 is 4 bits. (default auto: on a GPU the"
            " checkpoint's 16-bit type, else float32)"
        ),
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="eager|sdpa",
        help=(
            "Attention implementation; `gradsift doctor` says which to take. (default the model's"
            " own)"
        ),
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Mode = Annotated[
    str | None,
    typer.Option(
        "--mode",
        metavar="lora|full",
        help="What is trained. (default lora)",
        rich_help_panel=TRAINING,
        show_default=False,
    ),
]
Epochs = Annotated[
    float | None,
    typer.Option(
        "--epochs",
        help="Passes over the control's rows. (default 3)",
        rich_help_panel=TRAINING,
        show_default=False,
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="Learning rate. (default 5e-4, full 2e-5)",
        rich_help_panel=TRAINING,
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        help="Rows of a step. (default 16)",
        rich_help_panel=TRAINING,
        show_default=False,
    ),
]
AllowShort = Annotated[
    bool,
    typer.Option(
        "--allow-short", help="Accept fewer rows than the budget when the pool has no more."
    ),
]
NullTarget = Annotated[
    bool,
    typer.Option(
        "--null",
        help=(
            "Also say how far the picks' scores stand above those toward rows drawn from the pool."
        ),
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        help="CPU threads. (default OMP_NUM_THREADS, else physical cores)",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
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
    int | None,
    typer.Option(
        "--workers",
        help="Ray workers. (default as many as fit)",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
GpusPerWorker = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-worker",
        help="GPUs that a Ray worker's model spans. (default 1)",
        rich_help_panel=MACHINE,
        show_default=False,
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
    typer.Option(
        "--force",
        help="Go on where a check says that the result will be poor.",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


# Where the value of a flag goes that is no setting: to an argument of the library call of the same
# name, among the constraints, or to the settings in a way of its own: as the file that holds the
# others, or as what the files of rows hold.
CALL = "call"
CONSTRAINT = "constraint"
FILE = "file"

# `plan` takes what `select` takes: it says what that would run
CHOOSE = frozenset({"select", "plan"})
RUN = CHOOSE | {"score", "compare"}  # these open a run: every setting of its stages stands on each
COMPARE = frozenset({"compare"})  # the one that trains on what was chosen
# `inspect` reads rows and encodes them, and loads no model: what rows and tokenizer depend on.
INSPECT = frozenset({"inspect"})
# `doctor` encodes rows too, and runs the model on a few of them in one process, where repeated rows
# and groups mean nothing. Which --attention and --dtype to try are lists of its own.
DOCTOR = frozenset({"doctor"})


@dataclass(frozen=True)
class Flag:
    """A row of FLAGS.

    Attributes:
        name: The parameter of the command, and the key in its section.
        annotation: What typer makes the flag of: a type with its `typer.Option`.
        section: A section of Config, or CALL, CONSTRAINT, FILE.
        commands: The commands that take the flag.
        default: The value of a flag that is not given. None leaves the settings of the run as they
            are.
        convert: From what typer read to what Config takes.
    """

    name: str
    annotation: Any
    section: str
    commands: Collection[str]
    default: Any = None
    convert: Callable[[Any], Any] | None = None


def number(text: str) -> float | int:
    """The value of --max-bad-rows: a share with a point in it, a count without. Raises
    ConfigError.
    """
    from gradsift.errors import ConfigError

    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ConfigError(
            f"--max-bad-rows {text}: not a number",
            remedy="Give a share like 0.05 or a count like 200.",
        ) from None


# In the order of the help.
FLAGS: tuple[Flag, ...] = (
    Flag("mode", Mode, "finetune", COMPARE),
    Flag("epochs", Epochs, "finetune", COMPARE),
    Flag("lr", LearningRate, "finetune", COMPARE),
    Flag("batch_size", BatchSize, "finetune", COMPARE),
    Flag("config", ConfigFile, FILE, RUN | INSPECT | DOCTOR),
    Flag("pool_group", PoolGroup, CALL, RUN | INSPECT),
    Flag("target_group", TargetGroup, CALL, RUN),
    Flag("format", Format, "pool", RUN | INSPECT | DOCTOR),
    Flag("map", Map, FILE, RUN | INSPECT | DOCTOR),
    Flag("target_format", TargetFormat, FILE, RUN),
    Flag("target_map", TargetMap, FILE, RUN),
    Flag("max_length", MaxLength, "encode", RUN | INSPECT | DOCTOR),
    Flag("tool_calls", ToolCalls, "encode", RUN | INSPECT | DOCTOR),
    Flag("system", SystemText, "encode", RUN | INSPECT | DOCTOR),
    Flag("max_bad_rows", MaxBad, "pool", RUN | INSPECT | DOCTOR, convert=number),
    Flag("dedup", Dedup, "pool", CHOOSE),
    Flag("dedup", ExactDedup, "pool", RUN - CHOOSE | INSPECT),
    Flag("warmup_from", WarmupFrom, CALL, RUN),
    Flag("dim", Dim, "gradients", RUN),
    Flag("shard_rows", ShardRows, "gradients", RUN),
    Flag("revision", Revision, "model", RUN | INSPECT | DOCTOR),
    Flag("trust_remote_code", RemoteCode, "model", RUN | INSPECT | DOCTOR),
    Flag("device", Device, "model", RUN | DOCTOR),
    Flag("dtype", Dtype, "model", RUN),
    Flag("attention", Attention, "model", RUN),
    Flag("threads", Threads, "machine", RUN | DOCTOR),
    Flag("executor", Engine, "machine", RUN),
    Flag("address", Address, "machine", RUN),
    Flag("workers", Workers, "machine", RUN),
    Flag("gpus_per_worker", GpusPerWorker, "machine", RUN),
    Flag("shard_timeout", ShardTimeout, "machine", RUN),
    Flag("force", Force, "machine", RUN),
    Flag("allow_short", AllowShort, CALL, CHOOSE, default=False),
    Flag("null", NullTarget, CALL, CHOOSE, default=False),
    Flag("per_group", PerGroup, CONSTRAINT, CHOOSE),
    Flag("include_ids", IncludeIds, CONSTRAINT, CHOOSE),
    Flag("exclude_ids", ExcludeIds, CONSTRAINT, CHOOSE),
    Flag("decontaminate", Decontaminate, CONSTRAINT, CHOOSE),
    # for every arm, so no constraint of one method
    Flag("decontaminate", Decontaminate, CALL, COMPARE),
    Flag("near", Near, CONSTRAINT, CHOOSE),
    Flag("near_by", NearBy, CONSTRAINT, CHOOSE),
    Flag("mix", Mix, CONSTRAINT, CHOOSE),
)


@dataclass(frozen=True)
class Given:
    """What the shared flags of a command come to, where the user gave them.

    Attributes:
        settings: Sections of Config: those of the file behind --config, flags on top.
        call: Further arguments of the library call.
        constraints: Its argument `constraints`.
    """

    settings: dict[str, dict[str, Any]]
    call: dict[str, Any]
    constraints: dict[str, Any]


def shared_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags that FLAGS has for its name, in place of its parameter of type
    Given, which they are handed over in.
    """
    signature = inspect.signature(command, eval_str=True)
    [slot] = [
        name for name, parameter in signature.parameters.items() if parameter.annotation is Given
    ]
    flags = [flag for flag in FLAGS if command.__name__ in flag.commands]
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name == slot:
            parameters += [
                inspect.Parameter(
                    flag.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=flag.default,
                    annotation=flag.annotation,
                )
                for flag in flags
            ]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**values: Any) -> None:
        threads.observe()
        shared = {flag.name: values.pop(flag.name) for flag in flags}
        command(**values, **{slot: given(flags, shared)})

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def given(flags: Iterable[Flag], values: Mapping[str, Any]) -> Given:
    """The values of `flags`, by name, each at its place. Raises ConfigError."""
    settings, call, constraints = sections(values["config"]), {}, {}
    for flag in flags:
        value = values[flag.name]
        if (
            value is None
            or value == []
            or flag.name == "config"
            or (flag.name == "dedup" and value == "near")
        ):
            continue
        if flag.section == FILE:
            _read_as(settings, flag.name, value)
        elif flag.section == CONSTRAINT:
            constraints[flag.name] = value
        elif flag.section == CALL:
            call[flag.name] = value
        else:
            settings.setdefault(flag.section, {})[flag.name] = (
                value if flag.convert is None else flag.convert(value)
            )
    return Given(
        settings,
        call,
        _near(values["dedup"] == "near", constraints) if "near" in values else constraints,
    )


def _read_as(settings: dict[str, dict[str, Any]], name: str, value: Any) -> None:
    """Puts among the settings how files are read, as a flag says it. Raises ConfigError."""
    from gradsift.errors import ConfigError

    section = settings.setdefault("target" if name.startswith("target") else "pool", {})
    if name == "target_format":
        section["format"] = value
        return
    flag = f"--{name.replace('_', '-')}"
    for pair in (pair for text in value for pair in text.split(",")):
        names, equals, theirs = pair.partition("=")
        source, _, ours = names.strip().rpartition(":")
        if not (equals and ours.strip() and theirs.strip()):
            raise ConfigError(
                f"{flag} {pair}: not OURS=THEIRS",
                remedy=f"Write it as {flag} instruction=question,output=answer.",
            )
        own = section
        if source:
            section["files"] = {**section.get("files", {})}
            own = section["files"][source] = {**section["files"].get(source, {})}
        own["mapping"] = {**(own.get("mapping") or {}), ours.strip(): theirs.strip()}


def sections(config: Path | None) -> dict[str, dict[str, Any]]:
    """The sections of the file behind --config. Raises ConfigError, also for a key above the first
    section.
    """
    from gradsift.config import read_toml
    from gradsift.errors import ConfigError

    found = read_toml(config) if config else {}
    for name, values in found.items():
        if not isinstance(values, dict):
            raise ConfigError(
                f"the key {name!r} is in no section",
                where=config,
                remedy="Put it below a section such as [pool].",
            )
    return {name: dict(values) for name, values in found.items()}


def _near(wanted: bool, constraints: Mapping[str, Any]) -> dict[str, Any]:
    """The constraints, with the threshold of --dedup near where it is `wanted`. Raises
    ConfigError.
    """
    from gradsift.errors import ConfigError

    if not wanted and ("near" in constraints or "near_by" in constraints):
        raise ConfigError(
            "--near and --near-by say how --dedup near works, which was not asked for",
            remedy="Add --dedup near.",
        )
    return {"near": 0.95, **constraints} if wanted else dict(constraints)
