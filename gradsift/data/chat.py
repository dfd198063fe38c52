"""Chat templates: an example -> the text the model sees and the character spans it should learn.

A span is found by rendering prefixes of the conversation with the model's own template and
comparing texts, so a template needs no `{% generation %}` marks. Where a template rewrites earlier
turns (drops their thinking, say), its marks are used if it has any, else the turn is found by
changing its content and looking where the rendering changes. A row where none of these holds is a
fault, never a guess.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from gradsift.data.formats import supervised
from gradsift.errors import UserError
from gradsift.types import Example, Message

# For tokenizers without a template. Role names are plain text, since such a tokenizer has no tokens
# for them.
DEFAULT_TEMPLATE = (
    "{% if tools %}{{ '<|tools|>\\n' + (tools | tojson) + '\\n' }}{% endif %}{% for m in messages"
    " %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + ((m['tool_calls'] | tojson) if"
    " m['tool_calls'] else '') }}{% if m['role'] == 'assistant' %}{{ eos_token or '' }}{% endif"
    " %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
FIXED_DAY = {
    "%d %b %Y": "26 Jul 2024",
    "%Y-%m-%d": "2024-07-26",
    "%B %d, %Y": "July 26, 2024",
    "%d %B %Y": "26 July 2024",
}
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBES = ("\u00a4", "\u00b0")  # characters that stand in for a content's first


class EncodeFault(Exception):
    """A row that cannot be encoded. `code` is a key of encode.REASONS, `detail` what happened."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


NO_SUPERVISED, TOO_LONG, CUT_AWAY, REFUSED, REWRITTEN, OUTSIDE_VOCABULARY = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class Rendered:
    """`text` as the tokenizer gets it; `spans`: the character ranges [start, end) to learn. ends:
    whether a BOS and EOS go around it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    ends: bool = False


class Renderer:
    """The template of a tokenizer, ready to render. `notes` says what a user should know; `counts`
    how spans were found.
    """

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()
        self.template = chat_template(tokenizer, template)
        self.tool_template = chat_template(tokenizer, template, tools=True)
        if template is None and not tokenizer.chat_template:
            self.notes.append(
                "the tokenizer has no chat template; the default one is used (<|role|>, a new line,"
                " the text)"
            )
        if any("strftime_now" in text for text in (self.template, self.tool_template)):
            self.notes.append(
                "the template writes today's date; it is fixed at 2024-07-26, so that the same rows"
                " give the same tokens"
            )
        added = {
            str(token) for token in tokenizer.added_tokens_encoder if str(token).strip()
        } | set(tokenizer.all_special_tokens)
        self._markers = tuple(sorted(added))

    def render(self, examples: Sequence[Example]) -> list[Rendered | EncodeFault]:
        """One result per example; tokenised examples (without messages) are not for this."""
        wanted: list[tuple[list[dict[str, Any]], tuple[Any, ...], bool]] = []
        plans: list[tuple[Example, list[int]] | None] = []
        for example in examples:
            turns = [k for k, message in enumerate(example.messages) if supervised(message)]
            if not example.messages or example.messages[0].role in ("text", "prompt") or not turns:
                plans.append(None)
                continue
            # Turns after the last one to learn carry no loss and, in a causal model, change none:
            # they are not rendered.
            told = [_template_message(message) for message in example.messages[: turns[-1] + 1]]
            wanted.append((told, example.tools, False))
            wanted += [(told[:k], example.tools, True) for k in turns if k]
            wanted += [(told[: k + 1], example.tools, False) for k in turns[:-1]]
            plans.append(
                (
                    Example(
                        example.id, example.messages[: turns[-1] + 1], example.group, example.tools
                    ),
                    turns,
                )
            )
        texts = iter(self._render_all(wanted))
        return [
            self._raw(example) if plan is None else self._spans(*plan, texts)
            for example, plan in zip(examples, plans, strict=True)
        ]

    def _raw(self, example: Example) -> Rendered | EncodeFault:
        messages = example.messages
        if messages and messages[0].role == "text":
            return Rendered(messages[0].content, ((0, len(messages[0].content)),), ends=True)
        if messages and messages[0].role == "prompt" and len(messages) == 2:
            prompt, text = messages[0].content, messages[0].content + messages[1].content
            return Rendered(text, ((len(prompt), len(text)),), ends=True)
        return EncodeFault(NO_SUPERVISED, "no assistant turn to learn from")

    def _spans(self, example: Example, turns: list[int], texts: Any) -> Rendered | EncodeFault:
        full = next(texts)
        before = {k: next(texts) for k in turns if k}
        after = {k: next(texts) for k in turns[:-1]}
        try:
            if isinstance(full, EncodeFault):
                raise full
            starts = {k: _length(text, full) for k, text in before.items()}
            ends = {turns[-1]: len(full), **{k: _length(text, full) for k, text in after.items()}}
            spans = [(starts.get(k), ends[k]) for k in turns]
            if any(start is None or end is None or end <= start for start, end in spans):
                spans = self._by_marks(example, full, turns) or self._by_probes(
                    example, full, turns, starts, ends
                )
        except EncodeFault as fault:
            return fault
        trimmed = tuple(
            (start, self._without_trail(full, start, end))
            for start, end in cast(list[tuple[int, int]], spans)
        )
        if not full[: trimmed[-1][1]].endswith(self._markers):
            self.counts["no end of turn"] += 1
        return Rendered(full, trimmed)

    def _by_marks(
        self, example: Example, full: str, turns: list[int]
    ) -> list[tuple[int, int]] | None:
        template = self._template_for(example.tools)
        if not _MARKS.search(template):
            return None
        try:
            texts, marks = render_jinja_template(
                conversations=[[_template_message(message) for message in example.messages]],
                tools=list(example.tools) or None,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception:  # as in _render_one
            return None
        found = [(int(start), int(end)) for start, end in marks[0]]
        answers = [k for k, message in enumerate(example.messages) if message.role == "assistant"]
        if texts[0] != full or len(found) != len(answers):
            return None
        self.counts["by marks"] += 1
        return [span for k, span in zip(answers, found, strict=True) if k in turns]

    def _by_probes(
        self,
        example: Example,
        full: str,
        turns: list[int],
        starts: Mapping[int, int | None],
        ends: Mapping[int, int | None],
    ) -> list[tuple[int, int]]:
        """Fills in what prefixes did not tell. A start is where the rendering changes when the
        content's beginning does, an end the end-of-turn text after it.
        """
        told = [_template_message(message) for message in example.messages]
        tail = self._tail
        spans: list[tuple[int, int]] = []
        for k in turns:
            start, end = starts.get(k), ends[k]
            if start is None:
                start = self._probe(told, example.tools, full, k)
            if start is not None and end is None and tail and tail not in told[k]["content"]:
                found = full.find(tail, start)
                end = found + len(tail) if found >= 0 else None
            if start is None or end is None or end <= start or (spans and start < spans[-1][1]):
                raise EncodeFault(
                    REWRITTEN,
                    f"the template rewrites the turns around turn {k + 1}, which cannot be told"
                    " apart",
                )
            spans.append((start, end))
        if any(place is None for place in (*starts.values(), *ends.values())):
            self.counts["by probes"] += 1
        return spans

    def _probe(
        self, told: list[dict[str, Any]], tools: tuple[Any, ...], full: str, turn: int
    ) -> int | None:
        content = told[turn]["content"]
        cut = content.rfind("</think>") + len("</think>") if "</think>" in content else 0
        cut += len(content[cut:]) - len(content[cut:].lstrip())
        for at in dict.fromkeys((0, cut)):
            mark = _PROBES[content[at:].startswith(_PROBES[0])]
            changed = [
                *told[:turn],
                {**told[turn], "content": content[:at] + mark + content[at:]},
                *told[turn + 1 :],
            ]
            text = self._render_one(changed, tools, False)
            if isinstance(text, str) and text != full:
                return _common(full, text)
        return None

    @functools.cached_property
    def _tail(self) -> str:
        """What the template writes after an assistant turn, without the white space around it."""
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBES[0]}]
        text = self._render_one(chat, (), False)
        return text.rpartition(_PROBES[0])[2].strip() if isinstance(text, str) else ""

    def _without_trail(self, full: str, start: int, end: int) -> int:
        """White space after the end-of-turn token is the template's, written after the model has
        stopped: it is not learned.
        """
        kept = full[start:end].rstrip()
        return start + len(kept) if kept.endswith(self._markers) else end

    def _template_for(self, tools: tuple[Any, ...]) -> str:
        return self.tool_template if tools else self.template

    def _render_all(
        self, wanted: list[tuple[list[dict[str, Any]], tuple[Any, ...], bool]]
    ) -> list[str | EncodeFault]:
        """Conversations without tools go to the template together; where it refuses one, each goes
        alone.
        """
        results: list[Any] = [None] * len(wanted)
        for prompt in (False, True):
            plain = [
                i
                for i, (_, tools, generation) in enumerate(wanted)
                if not tools and generation is prompt
            ]
            try:
                texts = self._call([wanted[i][0] for i in plain], (), prompt) if plain else []
            except Exception:  # as in _render_one, which finds out whose
                continue
            for i, text in zip(plain, texts, strict=True):
                results[i] = text
        return [
            self._render_one(*wanted[i]) if text is None else text for i, text in enumerate(results)
        ]

    def _render_one(
        self, chat: list[dict[str, Any]], tools: tuple[Any, ...], prompt: bool
    ) -> str | EncodeFault:
        try:
            return self._call([chat], tools, prompt)[0]
        except Exception as error:
            # a template is its author's program: whatever it raises for a row is a fact about that
            # row
            return EncodeFault(
                REFUSED,
                f"the chat template refuses the row: {str(error) or type(error).__name__}"[:300],
            )

    def _call(
        self, chats: list[list[dict[str, Any]]], tools: tuple[Any, ...], prompt: bool
    ) -> list[str]:
        return self.tokenizer.apply_chat_template(
            chats,
            tools=list(tools) or None,
            chat_template=self._template_for(tools),
            tokenize=False,
            add_generation_prompt=prompt,
        )


def chat_template(tokenizer: Any, template: str | None, tools: bool = False) -> str:
    """The template text used: `template`, else the tokenizer's own (its tool_use one for rows with
    tools), else the default one.

    A call of `strftime_now` gives a fixed day. Raises UserError when the text is no template or no
    default can be told.
    """
    if template is None and not tokenizer.chat_template:
        text = ("{{ bos_token }}" if adds_bos(tokenizer) else "") + DEFAULT_TEMPLATE
    else:
        try:
            text = tokenizer.get_chat_template(template, tools=[{}] if tools else None)
        except ValueError as error:
            remedy = "Give one with the setting encode.template."
            raise UserError(
                f"no chat template can be chosen ({str(error)[:100]})",
                where=tokenizer.name_or_path,
                remedy=remedy,
            ) from error
    if "strftime_now" in text:
        text = _with_fixed_day(text)
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], chat_template=text, tokenize=False
        )
    except TemplateError as error:
        if type(error).__name__ == "TemplateSyntaxError":
            where, remedy = (
                f"line {getattr(error, 'lineno', '?')} of the chat template",
                "Correct the template.",
            )
            raise UserError(f"is not a template: {error}", where=where, remedy=remedy) from error
    except Exception:  # a template may want more than one turn
        pass
    return text


def _with_fixed_day(text: str) -> str:
    days = "".join(f"{{% elif f == {form!r} %}}{day}" for form, day in FIXED_DAY.items())
    # The empty expression keeps the template's own first new line, which a block tag would swallow.
    return (
        "{% macro strftime_now(f) %}{% if false %}"
        + days
        + "{% else %}2024-07-26{% endif %}{% endmacro %}{{ '' }}"
        + text
    )


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token in front of plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def _template_message(message: Message) -> dict[str, Any]:
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    for key, value in (message.extra or {}).items():
        if key == "tool_calls":
            value = (
                [_tool_call(call) for call in value] if isinstance(value, (list, tuple)) else value
            )
        if key not in ("weight", "train"):
            told[key] = value
    return told


def _tool_call(call: Any) -> Any:
    """Arguments that are a JSON text become the object: templates write them as JSON, and would
    quote a text once more.
    """
    if (
        isinstance(call, Mapping)
        and isinstance(call.get("function"), Mapping)
        and isinstance(call["function"].get("arguments"), str)
    ):
        try:
            arguments = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            return call
        return (
            {**call, "function": {**call["function"], "arguments": arguments}}
            if isinstance(arguments, dict)
            else call
        )
    return call


def _length(prefix: Any, full: str) -> int | None:
    """Length of a rendered prefix; None when it is a fault or not how `full` begins."""
    return len(prefix) if isinstance(prefix, str) and full.startswith(prefix) else None


def _common(one: str, other: str) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
