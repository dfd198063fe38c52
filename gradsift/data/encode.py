"""Examples -> token ids and labels, by the model's own chat template; batches of similar length.

A token is supervised when it starts inside an assistant turn: at or after the first character the
model itself would write, up to and with the end-of-turn token. A token that straddles the beginning
is the prompt's. Labels are the ids, or -100 where nothing is learned.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from gradsift.config import EncodeSettings
from gradsift.data.chat.render import Renderer
from gradsift.data.chat.rendered import (
    ANSWER_LOST,
    CUT_AWAY,
    NO_SUPERVISED,
    OUTSIDE_VOCABULARY,
    REFUSED,
    REWRITTEN,
    TOO_LONG,
    EncodeFault,
    Rendered,
)
from gradsift.data.chat.spans import TAG
from gradsift.data.chat.template import adds_bos, chat_template
from gradsift.data.pool import Pool
from gradsift.data.records import Dropped
from gradsift.errors import DataError, IntegrityError
from gradsift.store.tensors import TensorFile, write_tensors
from gradsift.types import IGNORE, Example, counted

VERSION = 1  # of the file
RENDERING = 2  # of what is learned of a chat: rows of another are encoded again
# share of rows without anything to learn above which the template or the length is wrong, not the
# rows
MAX_EMPTY = 0.05
MAX_DETAILS = 1000  # quarantined rows whose exact fault is kept
_BATCH = 1000  # rows per call of the tokenizer
_FILE = "encoded.safetensors"

REASONS: Mapping[int, str] = {
    NO_SUPERVISED: (
        "no-supervised: no token to learn from. Check the format and the chat template with"
        " `gradsift inspect`."
    ),
    TOO_LONG: "too-long: longer than max_length, and the policy is drop. Raise max_length.",
    CUT_AWAY: "cut-away: all that is to be learned lies beyond max_length. Raise max_length.",
    REFUSED: (
        "template-refused: the chat template raised an error for the row. Correct the order of"
        " roles, or give another template. Where it takes no system text, `--system user`"
        " ([encode] system) puts that in front of the first user turn; where it takes no calls,"
        " `--tool-calls text` ([encode] tool_calls) writes them as JSON texts."
    ),
    REWRITTEN: (
        "template-rewrites: the template rewrites earlier turns. Give a template with {% generation"
        " %} marks."
    ),
    ANSWER_LOST: (
        "answer-lost: the chat template leaves out what an assistant's turn says. Give a template"
        " that writes it, or, for tool calls, `--tool-calls text` ([encode] tool_calls), which"
        " writes them as JSON texts."
    ),
    OUTSIDE_VOCABULARY: (
        "outside-vocabulary: a token id that the tokenizer does not have. Tokenise the rows with"
        " this model's tokenizer."
    ),
}


# what the renderer counts -> what a note says of it; `first` is the first row and its turns
NOTES: Mapping[str, str] = {
    "no end of turn": "the chat template writes no end-of-turn token, so none is learned",
    "by marks": "the template rewrites earlier turns; its generation marks were used",
    "by places": "the template rewrites earlier turns; answers were found by changing them",
    "by header": (
        "the generation prompt is not how a turn begins, so the turn is learned from its role"
        " header on (the first: {first})"
    ),
    "arguments as text": "the template takes a call's arguments as JSON text, and got that",
    "results as user": "the template has no turn for the results of calls; they are user turns",
    "reasoning lost": (
        "the chat template leaves out reasoning of learned turns, which is not learned then (the"
        " first: {first})"
    ),
    "tools lost": "the chat template leaves out the list of tools (the first: {first})",
    "system lost": "the chat template leaves out system texts (the first: {first})",
    "user lost": "the chat template leaves out text of user turns (the first: {first})",
    "tool lost": "the chat template leaves out results of calls (the first: {first})",
    "first word lost": (
        "the first token of an answer begins in the prompt and is not learned (the first: {first})"
    ),
}


class EncodedRows(Sequence[dict[str, list[int]]]):
    """n tokenised rows in flat arrays.

    lengths int32 [n]: tokens; supervised int32 [n]: labels that enter the loss (the first token's
    never does); codes uint8 [n]: 0 usable, else a key of `reasons`, and the row is empty;
    truncated: rows that were cut; notes: what a user should know; details: row -> what exactly
    happened, for the first quarantined rows.
    """

    def __init__(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        lengths: np.ndarray,
        supervised: np.ndarray,
        codes: np.ndarray,
        *,
        truncated: int = 0,
        notes: Sequence[str] = (),
        details: Mapping[int, str] | None = None,
    ) -> None:
        self.lengths, self.supervised, self.codes = lengths, supervised, codes
        self.truncated, self.notes, self.details = truncated, list(notes), dict(details or {})
        self.reasons: dict[int, str] = dict(REASONS)
        self._ids, self._labels = input_ids, labels
        self._begin = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        at = slice(int(self._begin[row]), int(self._begin[row + 1]))
        return {"input_ids": self._ids[at].tolist(), "labels": self._labels[at].tolist()}

    def first_over(self, tokens: int) -> tuple[int, int] | None:
        """(row, id) of the first id that is none of `tokens` tokens; None where all are."""
        if int(self._ids.max(initial=0)) < tokens:
            return None
        at = int(np.argmax(self._ids >= tokens))
        return int(np.searchsorted(self._begin, at, side="right")) - 1, int(self._ids[at])

    def dropped(self, pool: Pool) -> list[Dropped]:
        """The rows of `pool` that could not be encoded, with file, line, reason and remedy."""
        found = []
        for row in np.flatnonzero(self.codes).tolist():
            file, _, line = pool.place(row).rpartition(":")
            reason, _, fix = self.reasons[int(self.codes[row])].partition(". ")
            code, _, what = reason.partition(": ")
            text = f"{code}: {self.details.get(row, what)}"
            found.append(Dropped(file, int(line), pool.ids[row], text, fix))
        return found

    def funnel(self) -> dict[str, int]:
        """ "not encoded:CODE" -> how many rows."""
        codes, counts = np.unique(self.codes[self.codes != 0], return_counts=True)
        return {
            f"not encoded:{self.reasons[code].partition(':')[0]}": count
            for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
        }

    def part(self, rows: slice) -> EncodedRows:
        """Some neighbouring rows, without the notes: what a worker needs of a shard."""
        at = slice(int(self._begin[rows.start]), int(self._begin[rows.stop]))
        return EncodedRows(
            self._ids[at],
            self._labels[at],
            self.lengths[rows],
            self.supervised[rows],
            self.codes[rows],
        )

    def save(self, folder: str | Path) -> dict[str, str]:
        """Writes one tensor file into `folder`; returns {file name: digest}. Raises DiskFull,
        ResourceError.
        """
        arrays = dict(
            input_ids=self._ids,
            labels=self._labels,
            lengths=self.lengths,
            supervised=self.supervised,
            codes=self.codes,
        )
        about = {
            "truncated": self.truncated,
            "notes": self.notes,
            "details": sorted(self.details.items()),
        }
        meta = {"about": json.dumps(about, ensure_ascii=False), "version": str(VERSION)}
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()
        }
        return {_FILE: write_tensors(Path(folder) / _FILE, tensors, meta)}

    @classmethod
    def load(cls, folder: str | Path) -> EncodedRows:
        """Opens what `save` wrote, verified and memory-mapped. Raises IntegrityError."""
        path = Path(folder) / _FILE
        with TensorFile(path) as file:
            file.verify()
            file.expect({"version": str(VERSION)})
            about = json.loads(file.meta["about"])
            arrays = {name: file.tensor(name).numpy() for name in file.entries}
        try:
            names = ("input_ids", "labels", "lengths", "supervised", "codes")
            details = {int(row): text for row, text in about["details"]}
            return cls(
                *[arrays[name] for name in names],
                truncated=about["truncated"],
                notes=about["notes"],
                details=details,
            )
        except KeyError as error:
            raise IntegrityError(f"holds no {error}", where=path) from error


class _Encoder:
    def __init__(self, tokenizer: Any, settings: EncodeSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.renderer: Renderer | None = None
        self.bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
        self.eos = tokenizer.eos_token_id
        self.vocabulary = len(tokenizer)
        self.truncated = 0
        self.doubled = 0

    def rows(
        self, examples: Sequence[Example]
    ) -> Iterator[tuple[list[int], list[int]] | EncodeFault]:
        """(ids, labels) or the fault of each example, in order."""
        chats = [example for example in examples if example.tokens is None]
        rendered: list[Rendered | EncodeFault] = []
        if chats:
            self.renderer = self.renderer or Renderer(
                self.tokenizer,
                self.settings.template,
                calls=self.settings.tool_calls,
                system=self.settings.system,
                limit=self._limit,
            )
            rendered = self.renderer.render(chats)
        texts = [item.text for item in rendered if isinstance(item, Rendered)]
        tokenised = self._tokenise(texts) if texts else None
        text, chat = iter(range(len(texts))), iter(rendered)
        for example in examples:
            try:
                if example.tokens is not None:
                    yield self._fit(*self._checked(example.tokens))
                    continue
                item = next(chat)
                if isinstance(item, EncodeFault):
                    raise item
                yield self._fit(*self._labelled(example, item, tokenised, next(text)))
            except EncodeFault as fault:
                yield fault

    def _limit(self, text: str) -> int:
        """A character of a chat behind which no token is kept."""
        most = self.settings.max_length + 8  # a doubled BOS is taken away later
        if not self.tokenizer.is_fast or len(text.encode("utf-8", "replace")) <= most:
            return len(text)
        whole = self._tokenise([text])
        if len(whole["input_ids"][0]) <= most:
            return len(text)
        return whole[0].offsets[most][1]

    def _tokenise(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )

    def _checked(
        self, tokens: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> tuple[list[int], list[int]]:
        ids, labels = list(tokens[0]), list(tokens[1])
        if ids and max(max(ids), max(labels)) >= self.vocabulary:
            raise EncodeFault(
                OUTSIDE_VOCABULARY,
                f"the id {max(max(ids), max(labels))} is not among the tokenizer's"
                f" {self.vocabulary:,}",
            )
        return ids, labels

    def _check_border(
        self, example: Example, text: str, start: int, learned: int, end: int
    ) -> None:
        """Counts a turn whose first token begins in the prompt, so that its first word is not
        learned. Raises EncodeFault where nothing but markers is left of the turn.
        """
        if learned > start and text[start:learned].strip() and self.renderer:
            if not TAG.sub("", text[learned:end]).strip():
                raise EncodeFault(
                    ANSWER_LOST,
                    f"the answer {text[start:learned]!r} is one token with the end of the prompt",
                )
            self.renderer.count("first word lost", example)

    def _labelled(
        self, example: Example, item: Rendered, tokenised: Any, number: int
    ) -> tuple[list[int], list[int]]:
        ids = list(tokenised["input_ids"][number])
        edge = (
            self._edge_by_offsets(tokenised[number], item.text, ids)
            if self.tokenizer.is_fast
            else self._edge_by_ids(item.text, ids)
        )
        labels = [IGNORE] * len(ids)
        for start, end in item.spans:
            first, last = edge(start), edge(end)
            labels[first:last] = ids[first:last]
            if not item.ends and self.tokenizer.is_fast:
                chars = tokenised[number].token_to_chars(first) if first < last else None
                self._check_border(example, item.text, start, chars[0] if chars else end, end)
        if item.ends:
            if self.bos is not None and ids[:1] != [self.bos]:
                ids, labels = (
                    [self.bos, *ids],
                    [self.bos if item.spans[0][0] == 0 else IGNORE, *labels],
                )
            if self.eos is not None and ids[-1:] != [self.eos]:
                ids, labels = [*ids, self.eos], [*labels, self.eos]
        while (
            self.tokenizer.bos_token_id is not None and ids[:2] == [self.tokenizer.bos_token_id] * 2
        ):
            ids, labels, self.doubled = ids[1:], labels[1:], self.doubled + 1
        return ids, labels

    @staticmethod
    def _edge_by_offsets(encoding: Any, text: str, ids: list[int]) -> Any:
        """place -> index of the first token that starts at or after that character."""

        def edge(place: int) -> int:
            for character in range(place, len(text)):
                # a character may have no token, where the tokenizer drops white space
                token = encoding.char_to_token(character)
                if token is not None:
                    return token if encoding.token_to_chars(token)[0] >= place else token + 1
            return len(ids)

        return edge

    def _edge_by_ids(self, text: str, ids: list[int]) -> Any:
        """The same for tokenizers that tell no offsets: the ids of the text up to the place, as far
        as they agree with those of the whole.

        Where they part, a token straddles the place, and belongs to the side before it.
        """

        def edge(place: int) -> int:
            before = list(self._tokenise([text[:place]])["input_ids"][0]) if place else []
            same = next(
                (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b),
                min(len(before), len(ids)),
            )
            return min(same + (same < len(before)), len(ids))

        return edge

    def _fit(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        if all(label == IGNORE for label in labels[1:]):
            raise EncodeFault(
                NO_SUPERVISED, f"{counted(len(ids), 'token')}, none of them supervised"
            )
        most = self.settings.max_length
        if len(ids) > most:
            if self.settings.policy == "drop":
                raise EncodeFault(
                    TOO_LONG, f"{counted(len(ids), 'token')}, and max_length is {most:,}"
                )
            if all(label == IGNORE for label in labels[1:most]):
                raise EncodeFault(
                    CUT_AWAY, f"{counted(len(ids), 'token')}, the first {most:,} all prompt"
                )
            ids, labels = ids[:most], labels[:most]
            self.truncated += 1
        return ids, labels

    def notes(self) -> list[str]:
        found = list(self.renderer.notes) if self.renderer else []
        counts = self.renderer.counts if self.renderer else Counter()
        for name, text in NOTES.items():
            if counts[name] and self.renderer:
                first = self.renderer.firsts[name]
                found.append(f"{counted(counts[name], 'row')}: {text.format(first=first)}")
        if self.eos is None:
            found.append(
                "the tokenizer has no end-of-sequence token; completions and texts end without one"
            )
        if self.doubled:
            found.append(
                f"{self.doubled:,} beginning-of-sequence tokens that stood twice were removed"
            )
        if self.truncated:
            found.append(
                f"{counted(self.truncated, 'row is', 'rows are')} cut to"
                f" {self.settings.max_length:,} tokens"
            )
        return found


def encode(
    pool: Sequence[Example],
    tokenizer: Any,
    settings: EncodeSettings | None = None,
    *,
    progress: Any = None,
    strict: bool = True,
) -> EncodedRows:
    """Token ids and labels of every row, in order. A row that cannot be used is empty and has a
    code.

    settings: max_length and what happens beyond it ("truncate" keeps the head), and the chat
    template. progress: `progress.Progress`. strict: whether many bad rows stop. Raises DataError
    when more than 5 % of the rows have
    nothing to learn from, or all are unusable; UserError for a template that is none.
    """
    settings = settings or EncodeSettings()
    encoder = _Encoder(tokenizer, settings)
    n = len(pool)
    lengths, supervised, codes = np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, np.uint8)
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    details: dict[int, str] = {}
    if progress:
        progress.start(n, "rows", "encoding")
    for begin in range(0, n, _BATCH):
        # The second time that a row is parsed: reading checked it and kept its place alone, for a
        # million parsed rows would not fit in memory.
        part = [pool[i] for i in range(begin, min(begin + _BATCH, n))]
        flat_ids: list[int] = []
        flat_labels: list[int] = []
        for i, row in enumerate(encoder.rows(part), begin):
            if isinstance(row, EncodeFault):
                codes[i] = row.code
                if len(details) < MAX_DETAILS:
                    details[i] = row.detail
                continue
            lengths[i], supervised[i] = (
                len(row[0]),
                len(row[1]) - row[1].count(IGNORE) - (row[1][0] != IGNORE),
            )
            flat_ids += row[0]
            flat_labels += row[1]
        ids.append(np.array(flat_ids, dtype=np.int32))
        labels.append(np.array(flat_labels, dtype=np.int32))
        if progress:
            progress.advance(len(part))
    if progress:
        progress.done()
    if strict:
        _judge(pool, codes, details, settings)
    empty = [np.zeros(0, np.int32)]
    flat = np.concatenate(ids or empty), np.concatenate(labels or empty)
    return EncodedRows(
        *flat,
        lengths,
        supervised,
        codes,
        truncated=encoder.truncated,
        notes=encoder.notes(),
        details=details,
    )


def _judge(
    pool: Sequence[Example], codes: np.ndarray, details: Mapping[int, str], settings: EncodeSettings
) -> None:
    if not len(codes):
        return
    empty = np.isin(codes, [code for code in REASONS if code != TOO_LONG])
    unusable = codes != 0
    bad = empty if empty.mean() > MAX_EMPTY else unusable if unusable.all() else None
    if bad is None:
        return
    code = int(np.bincount(codes[bad]).argmax())
    row = int(np.flatnonzero(codes == code)[0])
    reason, _, remedy = REASONS[code].partition(". ")
    what = (
        f"{int(bad.sum()):,} of {len(codes):,} rows have nothing to learn from at max_length"
        f" {settings.max_length:,}; most: {reason}"
    )
    example = (
        f"row {pool[row].id!r} of the group {pool[row].group!r}:"
        f" {details.get(row, 'no details kept')}"
    )
    raise DataError(
        f"{what} ({example})",
        where=pool.place(row) if isinstance(pool, Pool) else None,
        remedy=remedy,
    )


def tokenizer_identity(tokenizer: Any, settings: EncodeSettings) -> dict[str, Any]:
    """What ids and labels depend on besides the rows and the settings: hashes of the tokenizer and
    of the templates as they are used.
    """
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("truncation", None)  # left there by the last call, whoever made it
        state.pop("padding", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    text = json.dumps(state, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    templates = [
        chat_template(tokenizer, settings.template, tools=tools) for tools in (False, True)
    ]
    special = {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    return {
        "version": RENDERING,
        "tokenizer": xxhash.xxh3_128_hexdigest(text),
        "template": xxhash.xxh3_128_hexdigest("\0".join(templates).encode()),
        "special": special,
        "adds_bos": adds_bos(tokenizer),
    }
