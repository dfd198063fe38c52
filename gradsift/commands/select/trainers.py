"""Configuration snippets for trainers, beside the chosen rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from gradsift.data.pool import Pool
from gradsift.types import Subset

SNIPPET = Path(__file__).parent / "train_trl.py.j2"


def trainer_files(
    pool: Pool,
    subset: Subset,
    selected: str,
    *,
    model: str | None = None,
    max_length: int = 1024,
    template: str | None = None,
    tool_calls: str = "template",
    system: str = "template",
) -> dict[str, str]:
    """File name -> text. `tool_calls`, `system`: as in EncodeSettings. LLaMA-Factory and
    Axolotl know one format per file, so theirs are left out for a pool of mixed formats.
    """
    formats, mappings = set(pool.formats.values()), list(pool.mappings.values())
    fields = [mapping for k, mapping in enumerate(mappings) if mapping not in mappings[:k]]
    name = formats.pop() if len(formats) == 1 else None
    files = {
        "train_trl.py": _trl(
            selected,
            model=model,
            max_length=max_length,
            template=template,
            tool_calls=tool_calls,
            system=system,
            format=name,
            fields=fields,
        )
    }
    if name is None or len(fields) > 1:
        return files
    shape = _Shape(pool, subset, fields[0])
    if shape.odd:
        return files
    info = _llama_factory(name, shape, selected)
    if info is not None:
        files["dataset_info.json"] = (
            json.dumps({"gradsift": info}, indent=2, ensure_ascii=False) + "\n"
        )
    axolotl = _axolotl(name, shape, selected)
    if axolotl is not None:
        files["axolotl.yml"] = axolotl
    return files


class _Shape:
    """Which fields the selected rows have: trainers fail on a named column that no row has."""

    def __init__(self, pool: Pool, subset: Subset, mapping: Mapping[str, str]) -> None:
        self.mapping = mapping
        self.present: set[str] = set()
        # tool calls in a turn; prompts that are lists of turns
        self.calls, self.lists = False, False
        # names of turns that are not those of the format; turns that neither trainer can read
        self.roles, self.odd = False, False
        for index in subset.indices:
            record = pool.record(int(index))
            self.present.update(key for key, value in record.items() if value is not None)
            turns = record.get(self.name("messages"))
            self.calls |= isinstance(turns, list) and any(
                isinstance(turn, dict) and turn.get("tool_calls") for turn in turns
            )
            self.lists |= isinstance(record.get(self.name("prompt")), list)
            turns = turns or record.get(self.name("conversations"))
            if isinstance(turns, list):
                self._look_at(turns)
            elif turns is not None:
                self.odd = True

    def _look_at(self, turns: list[Any]) -> None:
        for turn in turns:
            spoken = turn.get(self.name("role")), turn.get(self.name("from"))
            content = turn.get(self.name("content")), turn.get(self.name("value"))
            self.roles |= spoken[0] is not None
            if content[0 if spoken[0] is not None else 1] is None and not turn.get("tool_calls"):
                self.odd = True

    @property
    def spoken(self) -> tuple[str, str]:
        """The fields of a turn: whose it is, and what it says."""
        ours = ("role", "content") if self.roles else ("from", "value")
        return self.name(ours[0]), self.name(ours[1])

    def name(self, ours: str) -> str:
        return self.mapping.get(ours, ours)

    def columns(self, **wanted: str) -> dict[str, str]:
        """LLaMA-Factory's name of a column -> the file's, for the fields that some row has."""
        named = {theirs: self.name(ours) for theirs, ours in wanted.items()}
        return {theirs: column for theirs, column in named.items() if column in self.present}


def _trl(selected: str, **constants: Any) -> str:
    source = SNIPPET.read_text(encoding="utf-8")
    script = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    ).from_string(source)
    return script.render(
        {name: repr(value) for name, value in {"selected": selected, **constants}.items()}
    )


def _llama_factory(format: str, shape: _Shape, selected: str) -> dict[str, Any] | None:
    """An entry of dataset_info.json, or None for a format that LLaMA-Factory does not read. The
    file lies one folder up.
    """
    info: dict[str, Any] = {"file_name": f"../{selected}"}
    if format == "alpaca":
        return info | {
            "formatting": "alpaca",
            "columns": shape.columns(
                prompt="instruction",
                query="input",
                response="output",
                system="system",
                history="history",
            ),
        }
    if format == "prompt-completion" and not shape.lists:
        return info | {
            "formatting": "alpaca",
            "columns": shape.columns(prompt="prompt", response="completion"),
        }
    if format == "text":
        return info | {"formatting": "alpaca", "columns": shape.columns(prompt="text")}
    if format == "sharegpt":
        tags = {
            "role_tag": shape.spoken[0],
            "content_tag": shape.spoken[1],
            "user_tag": "user" if shape.roles else "human",
            "assistant_tag": "assistant" if shape.roles else "gpt",
        }
        tags |= {
            "observation_tag": "observation",
            "function_tag": "function_call",
            "system_tag": "system",
        }
        columns = shape.columns(messages="conversations", system="system", tools="tools")
        return info | {"formatting": "sharegpt", "columns": columns, "tags": tags}
    if format == "messages":
        tags = {
            "role_tag": shape.spoken[0],
            "content_tag": shape.spoken[1],
            "user_tag": "user",
            "assistant_tag": "assistant",
        }
        tags |= {"observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"}
        columns = shape.columns(messages="messages", system="system", tools="tools")
        return info | {
            "formatting": "openai" if shape.calls else "sharegpt",
            "columns": columns,
            "tags": tags,
        }
    return None


def _yaml(text: str) -> str:
    """A JSON string is a YAML string, except that YAML knows no surrogate pairs and more line
    breaks: those are escaped its way.
    """
    body = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in body)


def _axolotl(format: str, shape: _Shape, selected: str) -> str | None:
    """The `datasets` part of an Axolotl configuration, or None for a format that Axolotl has no
    reader for.
    """
    quoted = _yaml
    kinds = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}
    kind = kinds.get(Path(selected).suffix, "json")
    lines = [f"  - path: {quoted('../' + selected)}", f"    ds_type: {kind}"]
    note = (
        "# Axolotl resolves the path from the folder it is started in: start it here, or write the"
        " full path."
    )
    if format in ("messages", "sharegpt"):
        turns = quoted(shape.name("messages" if format == "messages" else "conversations"))
        role, content = map(quoted, shape.spoken)
        lines += ["    type: chat_template", f"    field_messages: {turns}"]
        lines += [
            "    message_property_mappings:",
            f"      role: {role}",
            f"      content: {content}",
        ]
        lines += [
            f"    field_{name}: {quoted(shape.name(name))}"
            for name in ("system", "tools")
            if shape.name(name) in shape.present
        ]
        if format == "sharegpt":
            lines += [
                "    roles:",
                "      user: [human, user]",
                "      assistant: [gpt, assistant, function_call]",
            ]
            lines += ["      tool: [observation, tool]", "      system: [system]"]
        lines += ["    roles_to_train: [assistant]", "    train_on_eos: turn"]
    elif format == "alpaca" or (format == "prompt-completion" and not shape.lists):
        asked, answer = (
            ("instruction", "output") if format == "alpaca" else ("prompt", "completion")
        )
        prompt = "{instruction}\\n\\n{input}" if format == "alpaca" else "{instruction}"
        if format == "alpaca":
            note += (
                "\n# The rows become plain text here; gradsift scored them through the chat"
                " template, as train_trl.py trains them."
            )
        lines += [
            "    type:",
            '      system_prompt: ""',
            f"      field_instruction: {quoted(shape.name(asked))}",
        ]
        lines += [
            f"      field_input: {quoted(shape.name('input'))}",
            f"      field_output: {quoted(shape.name(answer))}",
        ]
        lines += (
            [f"      field_system: {quoted(shape.name('system'))}"]
            if shape.name("system") in shape.present
            else []
        )
        lines += [f'      format: "{prompt}"', '      no_input_format: "{instruction}"']
    elif format == "text":
        lines += ["    type: completion", f"    field: {quoted(shape.name('text'))}"]
    elif format == "tokenised" and "attention_mask" in shape.present:
        # Axolotl wants all three columns
        lines += ["    type:"]
    else:
        return None
    body = [
        "# The selection for Axolotl. Copy `datasets` into your configuration.",
        note,
        "datasets:",
        *lines,
    ]
    return "\n".join([*body, "train_on_inputs: false", "sample_packing: false"]) + "\n"
