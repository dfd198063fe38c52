"""`gradsift inspect`: rows as the model sees them, and the funnel of counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from gradsift.commands.preflight import as_list, read_side
from gradsift.compute.progress import silent
from gradsift.config import build
from gradsift.data.encode import encode
from gradsift.errors import DataError
from gradsift.model.load import tokenizer_from_settings, vocabulary
from gradsift.stages.checks import check_vocabulary
from gradsift.types import IGNORE, Encoded, counted

if TYPE_CHECKING:
    from rich.console import RenderableType


def inspect(
    pool: Sequence[str | Path] | str | Path,
    *,
    model: str | None = None,
    rows: int = 3,
    start: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    pool_group: str | None = None,
) -> list[RenderableType]:
    """What `gradsift inspect` prints: the funnel, the quarantine, notes of the encoder, and `rows`
    rows with the supervised tokens coloured.
    """
    sections = {name: dict(values) for name, values in (settings or {}).items()}
    sections.setdefault("model", {})["name"] = model or sections.get("model", {}).get(
        "name", "tiny"
    )
    config = build(sections, "settings")
    candidates = read_side(as_list(pool), config, pool_group or config.pool.group_field, silent())
    tokenizer = tokenizer_from_settings(config.model)
    shown = range(min(start, len(candidates)), min(start + rows, len(candidates)))
    taken = candidates.take(shown)
    encoded = encode(taken, tokenizer, config.encode, strict=False)
    lines: list[RenderableType] = [*candidates.read_as()]
    funnel = {**candidates.funnel, **encoded.funnel()}
    lines.append(", ".join(f"{count:,} {name}" for name, count in funnel.items()))
    lines += [f"dropped {dropped}" for dropped in candidates.dropped[:10]]
    lines += [f"warning: {text}" for text in candidates.warnings]
    lines += encoded.notes
    try:
        check_vocabulary(taken, encoded, vocabulary(config.model))
    except DataError as error:  # rows are shown all the same
        lines.append(str(error))
    for i, row in enumerate(shown):
        code = int(encoded.codes[i])
        what = (
            f"{encoded.reasons[code]} ({encoded.details[i]})"
            if code
            else f"{encoded.supervised[i]} of {counted(int(encoded.lengths[i]), 'token')}"
            " supervised"
        )
        lines.append(
            f"\n{candidates.place(row)}  {candidates.ids[row]}  ({candidates.groups[row]}): {what}"
        )
        if not code:
            lines.append(coloured(encoded[i], tokenizer))
    return lines


def coloured(row: Encoded | Mapping[str, list[int]], tokenizer: Any) -> Text:
    """The row as the model sees it: supervised tokens green, the rest dim, special tokens bold.
    Control characters are made visible.
    """
    special = set(tokenizer.all_special_ids)
    shown = Text()
    run: list[int] = []
    style = ""
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        now = ("bold " if token in special else "") + (
            "green" if label != IGNORE else "dim" if token not in special else "magenta"
        )
        if now != style and run:
            shown.append(_visible(tokenizer.decode(run)), style)
            run = []
        style = now
        run.append(token)
    if run:
        shown.append(_visible(tokenizer.decode(run)), style)
    return shown


def _visible(text: str) -> str:
    """Control characters but tab and new line as their pictures, so that no row can steer the
    terminal it is shown on.
    """
    return "".join(
        (
            chr(0x2400 + ord(c))
            if ord(c) < 32 and c not in "\t\n"
            else "\u2421"
            if 127 <= ord(c) < 160
            else c
        )
        for c in text
    )
