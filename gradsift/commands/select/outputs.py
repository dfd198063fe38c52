"""The files of a finished selection: the chosen rows as they were, a score for every row, what was dropped, and how trainers read them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.data.files import Table
from gradsift.data.pool import Pool
from gradsift.data.reader import Dropped
from gradsift.data.write import subset_suffix, write_dropped, write_subset
from gradsift.errors import UnknownName, UserError
from gradsift.store.artifact import make_folder, write_atomic
from gradsift.types import Subset

# Text is data here: Parquet has no formulas, so an id such as "=cmd|..." stays a text wherever the file is opened.
SCORES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("selected", pa.bool_(), nullable=False),
        pa.field("rank", pa.int32()),
        pa.field("gain", pa.float64()),
        pa.field("weight", pa.float64()),
        pa.field("score", pa.float64()),
        pa.field("influence", pa.float64()),
        pa.field("cluster", pa.int32()),
        pa.field("norm", pa.float32()),
        pa.field("tokens", pa.int32()),
        pa.field("loss", pa.float32()),
        pa.field("why", pa.string()),
    ]
)
ADDED = ("rank", "gain", "weight", "influence", "cluster")  # what --add-scores writes into the rows, as gradsift_NAME
SNIPPET = Path(__file__).parent / "train_trl.py.j2"


def write_outputs(
    folder: Path,
    pool: Pool,
    subset: Subset,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    add_scores: bool = False,
    model: str | None = None,
    max_length: int = 1024,
    template: str | None = None,
    say: Callable[[str], None] | None = None,
    left_out: Sequence[Dropped] = (),
) -> list[Path]:
    """Write a selection into `folder` (made if missing) and return the files written.

    `subset.indices` are pool rows. `columns`: further columns of scores.parquet, each of length n over the pool (see SCORES; NaN, None and
    a negative cluster mean unknown); `selected` and `rank` always come from the subset. `model`, `max_length` and `template` (a chat
    template that is not the tokenizer's own) become the defaults of the TRL script. `say` is told where a chosen row could not stay as it
    was. `left_out`: rows that were not to be chosen, listed in dropped.jsonl after the quarantine. Raises UserError for indices or columns
    that do not fit the pool, DiskFull and ResourceError.
    """
    folder = Path(folder)
    make_folder(folder)
    table = score_table(pool, subset, columns or {})
    selected = folder / f"selected{_suffix(pool)}"
    notes = write_subset(pool, subset, selected, add=_added(table, subset) if add_scores else None)
    if say:
        for note in notes:
            say(note)
    written = [selected, folder / "scores.parquet", folder / "dropped.jsonl"]
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(written[1], sink.getvalue())
    write_dropped(pool, written[2], left_out)
    if subset.weights is not None:
        written.append(folder / "weights.jsonl")
        write_atomic(written[-1], _weight_lines(pool, subset))
    trainers = folder / "trainers"
    make_folder(trainers)
    for name, text in trainer_files(pool, subset, selected.name, model=model, max_length=max_length, template=template).items():
        written.append(trainers / name)
        write_atomic(written[-1], text.encode())
    return written


def score_table(pool: Pool, subset: Subset, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """One row per pool row, in pool order, of the schema SCORES. `rank` counts from 1 in pick order; unknown values are null."""
    n, picks = len(pool), _picks(pool, subset)
    found: dict[str, Any] = {"id": pa.array(list(pool.ids), pa.string()), "group": pa.array(list(pool.groups), pa.string())}
    for name, values in columns.items():
        if name not in SCORES.names:
            raise UnknownName("score column", name, SCORES.names)
        if len(values) != n:
            raise UserError(f"the column {name!r} has {len(values):,} values for a pool of {n:,} rows")
        found.setdefault(name, values)
    selected, rank = np.zeros(n, dtype=bool), np.full(n, np.nan)
    selected[picks], rank[picks] = True, np.arange(1, len(picks) + 1)
    found |= {"selected": selected, "rank": rank}
    for name, values in (("gain", subset.gains), ("weight", subset.weights)):
        if values is not None:
            full = np.full(n, np.nan) if name not in columns else np.array(columns[name], dtype=np.float64)
            full[picks] = np.asarray(values, dtype=np.float64)
            found[name] = full
    return pa.table([_typed(field, found.get(field.name), n) for field in SCORES], schema=SCORES)


def _picks(pool: Pool, subset: Subset) -> np.ndarray:
    picks = np.asarray(subset.indices, dtype=np.int64)
    if len(picks) and (picks.min() < 0 or picks.max() >= len(pool)):
        raise UserError(f"a selection holds the row {int(picks[np.abs(picks).argmax()]):,} of a pool of {len(pool):,} rows")
    if len(np.unique(picks)) != len(picks):
        raise UserError("a selection holds a row twice")
    for name in ("gains", "weights"):
        values = getattr(subset, name)
        if values is not None and len(values) != len(picks):
            raise UserError(f"a selection has {len(values):,} {name} for {len(picks):,} rows")
    return picks


def _typed(field: pa.Field, values: Any, n: int) -> pa.Array:
    if values is None:
        return pa.nulls(n, field.type)
    if isinstance(values, pa.Array):
        return values
    if pa.types.is_string(field.type):
        return pa.array([None if value is None else str(value) for value in values], field.type)
    if pa.types.is_boolean(field.type):
        return pa.array(np.asarray(values, dtype=bool))
    numbers = np.array([np.nan if value is None else value for value in values] if isinstance(values, list) else values, dtype=np.float64)
    unknown = ~np.isfinite(numbers)
    if field.name == "cluster":
        unknown |= numbers < 0
    return pa.array(np.where(unknown, 0, numbers), mask=unknown).cast(field.type)


def _added(table: pa.Table, subset: Subset) -> dict[str, list[Any]]:
    picked = table.take(pa.array(np.asarray(subset.indices, dtype=np.int64)))
    return {f"gradsift_{name}": picked[name].to_pylist() for name in ADDED if picked[name].null_count < len(picked)}


def _weight_lines(pool: Pool, subset: Subset) -> bytes:
    """One line per line of the selected rows, in that order (file order, not pick order)."""
    picks, weights = _picks(pool, subset), np.asarray(subset.weights, dtype=np.float64)
    order = np.argsort(picks, kind="stable")
    lines = (json.dumps({"id": pool.ids[int(picks[i])], "weight": float(weights[i])}, ensure_ascii=False) for i in order)
    return "".join(line + "\n" for line in lines).encode()


# --- what trainers read


def trainer_files(
    pool: Pool, subset: Subset, selected: str, *, model: str | None = None, max_length: int = 1024, template: str | None = None
) -> dict[str, str]:
    """File name -> text. LLaMA-Factory and Axolotl know one format per file, so theirs are left out for a pool of mixed formats."""
    formats = set(pool.formats.values())
    fields = dict(pool.arguments.get("mapping") or {})
    name = formats.pop() if len(formats) == 1 else None
    files = {"train_trl.py": _trl(selected, model=model, max_length=max_length, template=template, format=name, fields=fields)}
    if name is None:
        return files
    shape = _Shape(pool, subset, fields)
    info = _llama_factory(name, shape, selected)
    if info is not None:
        files["dataset_info.json"] = json.dumps({"gradsift": info}, indent=2, ensure_ascii=False) + "\n"
    axolotl = _axolotl(name, shape, selected)
    if axolotl is not None:
        files["axolotl.yml"] = axolotl
    return files


class _Shape:
    """Which fields the selected rows have: trainers fail on a named column that no row has."""

    def __init__(self, pool: Pool, subset: Subset, mapping: Mapping[str, str]) -> None:
        self.mapping = mapping
        self.present: set[str] = set()
        self.calls, self.lists = False, False  # tool calls in a turn; prompts that are lists of turns
        for index in subset.indices:
            record = pool.record(int(index))
            self.present.update(key for key, value in record.items() if value is not None)
            turns = record.get(self.name("messages"))
            self.calls |= isinstance(turns, list) and any(isinstance(turn, dict) and turn.get("tool_calls") for turn in turns)
            self.lists |= isinstance(record.get(self.name("prompt")), list)

    def name(self, ours: str) -> str:
        return self.mapping.get(ours, ours)

    def columns(self, **wanted: str) -> dict[str, str]:
        """LLaMA-Factory's name of a column -> the file's, for the fields that some row has."""
        named = {theirs: self.name(ours) for theirs, ours in wanted.items()}
        return {theirs: column for theirs, column in named.items() if column in self.present}


def _trl(selected: str, **constants: Any) -> str:
    source = SNIPPET.read_text(encoding="utf-8")
    script = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(source)
    return script.render({name: repr(value) for name, value in {"selected": selected, **constants}.items()})


def _llama_factory(format: str, shape: _Shape, selected: str) -> dict[str, Any] | None:
    """An entry of dataset_info.json, or None for a format that LLaMA-Factory does not read. The file lies one folder up."""
    info: dict[str, Any] = {"file_name": f"../{selected}"}
    if format == "alpaca":
        return info | {
            "formatting": "alpaca",
            "columns": shape.columns(prompt="instruction", query="input", response="output", system="system", history="history"),
        }
    if format == "prompt-completion" and not shape.lists:
        return info | {"formatting": "alpaca", "columns": shape.columns(prompt="prompt", response="completion")}
    if format == "text":
        return info | {"formatting": "alpaca", "columns": shape.columns(prompt="text")}
    if format == "sharegpt":
        tags = {"role_tag": shape.name("from"), "content_tag": shape.name("value"), "user_tag": "human", "assistant_tag": "gpt"}
        tags |= {"observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}
        columns = shape.columns(messages="conversations", system="system", tools="tools")
        return info | {"formatting": "sharegpt", "columns": columns, "tags": tags}
    if format == "messages":
        tags = {"role_tag": shape.name("role"), "content_tag": shape.name("content"), "user_tag": "user", "assistant_tag": "assistant"}
        tags |= {"observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"}
        columns = shape.columns(messages="messages", tools="tools")
        return info | {"formatting": "openai" if shape.calls else "sharegpt", "columns": columns, "tags": tags}
    return None


def _yaml(text: str) -> str:
    """A JSON string is a YAML string, except that YAML knows no surrogate pairs and more line breaks: those are escaped its way."""
    body = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in body)


def _axolotl(format: str, shape: _Shape, selected: str) -> str | None:
    """The `datasets` part of an Axolotl configuration, or None for a format that Axolotl has no reader for."""
    quoted = _yaml
    kind = {".parquet": "parquet", ".arrow": "arrow"}.get(Path(selected).suffix, "json")
    lines = [f"  - path: {quoted('../' + selected)}", f"    ds_type: {kind}"]
    note = "# Axolotl resolves the path from the folder it is started in: start it here, or write the full path."
    if format in ("messages", "sharegpt"):
        chat = {"messages": ("messages", "role", "content"), "sharegpt": ("conversations", "from", "value")}[format]
        turns, role, content = (quoted(shape.name(part)) for part in chat)
        lines += ["    type: chat_template", f"    field_messages: {turns}"]
        lines += ["    message_property_mappings:", f"      role: {role}", f"      content: {content}"]
        lines += [f"    field_{name}: {quoted(shape.name(name))}" for name in ("system", "tools") if shape.name(name) in shape.present]
        if format == "sharegpt":
            lines += ["    roles:", "      user: [human, user]", "      assistant: [gpt, assistant, function_call]"]
            lines += ["      tool: [observation, tool]", "      system: [system]"]
        lines += ["    roles_to_train: [assistant]", "    train_on_eos: turn"]
    elif format == "alpaca" or (format == "prompt-completion" and not shape.lists):
        asked, answer = ("instruction", "output") if format == "alpaca" else ("prompt", "completion")
        prompt = "{instruction}\\n\\n{input}" if format == "alpaca" else "{instruction}"
        if format == "alpaca":
            note += "\n# The rows become plain text here; gradsift scored them through the chat template, as train_trl.py trains them."
        lines += ["    type:", '      system_prompt: ""', f"      field_instruction: {quoted(shape.name(asked))}"]
        lines += [f"      field_input: {quoted(shape.name('input'))}", f"      field_output: {quoted(shape.name(answer))}"]
        lines += [f"      field_system: {quoted(shape.name('system'))}"] if shape.name("system") in shape.present else []
        lines += [f'      format: "{prompt}"', '      no_input_format: "{instruction}"']
    elif format == "text":
        lines += ["    type: completion", f"    field: {quoted(shape.name('text'))}"]
    elif format == "tokenised" and "attention_mask" in shape.present:  # Axolotl wants all three columns
        lines += ["    type:"]
    else:
        return None
    body = ["# The selection for Axolotl. Copy `datasets` into your configuration.", note, "datasets:", *lines]
    return "\n".join([*body, "train_on_inputs: false", "sample_packing: false"]) + "\n"


def _suffix(pool: Pool) -> str:
    suffix = subset_suffix(pool)
    tables = [file.table.schema for file in pool.files if isinstance(file, Table)]
    return suffix if all(schema.equals(tables[0]) for schema in tables) else ".jsonl"  # one table cannot hold two schemas
