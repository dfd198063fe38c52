"""Chat templates: an example -> the text the model sees and the character spans it should learn.

A template needs no `{% generation %}` marks. Whatever a learned turn says is found again in what is
learned, or the row is a fault, or the loss is counted: a template may drop calls or reasoning.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from gradsift.data.chat.pieces import Turn, common
from gradsift.data.chat.rendered import (
    ANSWER_LOST,
    NO_SUPERVISED,
    REFUSED,
    EncodeFault,
    Rendered,
)
from gradsift.data.chat.said import holds, lost_of, written_as_python
from gradsift.data.chat.spans import (
    EXACT_TURNS,
    PROBE,
    TAG,
    Conversation,
    Spans,
    by_beginnings,
    by_marks,
    by_places,
    outside_tag,
    without_opener,
    without_thought,
)
from gradsift.data.chat.template import chat_template
from gradsift.data.chat.turns import (
    RESULTS,
    Form,
    calls_in_text,
    results_as_user,
    system_in_user,
    template_turns,
)
from gradsift.data.formats import supervised
from gradsift.types import Example, Message

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

_KINDS = {"system": "system", "developer": "system", "user": "user"}


class Renderer:
    """The template of a tokenizer, ready to render. `notes` says what a user should know; `counts`
    how spans were found and what templates leave out; `firsts` has the first row of a count.

    calls, system: see `config.EncodeSettings`. limit: text -> the character behind which nothing
    is kept, for turns there need no span.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        *,
        calls: str = "template",
        system: str = "template",
        limit: Callable[[str], int] = len,
    ) -> None:
        self.tokenizer, self.calls, self.system, self.limit = tokenizer, calls, system, limit
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()
        self.firsts: dict[str, str] = {}
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
        return [self._one(example) for example in examples]

    def _one(self, example: Example) -> Rendered | EncodeFault:
        try:
            raw = not example.messages or example.messages[0].role in ("text", "prompt")
            return self._raw(example.messages) if raw else self._chat(example)
        except EncodeFault as fault:
            return fault

    def _raw(self, messages: Sequence[Message]) -> Rendered:
        if messages and messages[0].role == "text":
            return Rendered(messages[0].content, ((0, len(messages[0].content)),), ends=True)
        if messages and messages[0].role == "prompt" and len(messages) == 2:
            prompt, text = messages[0].content, messages[0].content + messages[1].content
            return Rendered(text, ((len(prompt), len(text)),), ends=True)
        raise EncodeFault(NO_SUPERVISED, "no assistant turn to learn from")

    def _chat(self, example: Example) -> Rendered:
        messages = self._placed(example.messages)
        learned = [k for k, message in enumerate(messages) if supervised(message)]
        if not learned:
            raise EncodeFault(NO_SUPERVISED, "no assistant turn to learn from")
        # Turns after the last one to learn carry no loss and, in a causal model, change none: they
        # are not rendered.
        messages = messages[: learned[-1] + 1]
        called = [message for message in messages if (message.extra or {}).get("tool_calls")]
        # Some templates write an empty answer behind the calls unless the content is null; others
        # write "None" where it is.
        blanks = ("", None) if any(not message.content for message in called) else ("",)
        best = self._best(example, messages, learned, [Form(blank=blank) for blank in blanks])
        if best.as_python or (called and best.fault is not None):
            forms = [Form("text", blank) for blank in blanks]
            texts = self._best(example, messages, learned, forms)
            if texts.fault is None:
                best = texts
                best.counted["arguments as text"] = ""
        if (
            self.calls == "text"
            and not self._knows_results
            and any(message.role in RESULTS for message in example.messages)
        ):
            best.counted["results as user"] = ""
        if best.rendered is None:
            raise best.fault or AssertionError("neither a text nor a fault")
        for name, where in best.counted.items():
            self.count(name, example, where)
        return best.rendered

    def _best(
        self,
        example: Example,
        messages: Sequence[Message],
        learned: Sequence[int],
        forms: Sequence[Form],
    ) -> _Attempt:
        """The first attempt, or a later one that fails less or writes less."""
        best, *others = [self._try(example, messages, learned, form) for form in forms]
        for other in others:
            best = other if other.better_than(best) else best
        return best

    def _try(
        self, example: Example, messages: Sequence[Message], learned: Sequence[int], form: Form
    ) -> _Attempt:
        made = _Attempt(form)
        tools = example.tools
        try:
            row = Conversation(
                template_turns(messages, form),
                learned,
                lambda turns, prompt: self._draw(turns, tools, prompt),
                self._opener,
                self._header,
            )
            limit = self.limit(row.full) if len(learned) > EXACT_TURNS else len(row.full)
            spans = self._spans(row, tools, limit)
            made.counted = {**_judged(row, spans), **_left_out(row, tools)}
        except EncodeFault as fault:
            made.fault = fault
            return made
        ranges = tuple(
            (begin, self._without_trail(row.full, begin, close))
            for turn in sorted(spans.of)
            for start, end in spans.of[turn]
            for begin, close in self._as_answers(row.full, start, end)
        )
        if not row.full[: ranges[-1][1]].endswith(self._markers):
            made.counted["no end of turn"] = ""
        made.rendered = Rendered(row.full, ranges)
        made.as_python = any(written_as_python(turn, row.full) for turn in row.turns)
        return made

    def _spans(self, row: Conversation, tools: tuple[Any, ...], limit: int) -> Spans:
        spans = by_beginnings(row, limit)
        if spans is None and (marks := self._marks(row, tools)) is not None:
            spans = by_marks(row, marks)
            try:
                _judged(row, spans or Spans({}))
            except EncodeFault:  # the marks do not hold the turns: look for their texts
                spans = None
        return by_places(row, limit) if spans is None else spans

    def _marks(self, row: Conversation, tools: tuple[Any, ...]) -> list[tuple[int, int]] | None:
        template = self._template_for(tools)
        if not _MARKS.search(template):
            return None
        try:
            texts, marks = self._rendered(row.turns, tools, return_assistant_tokens_mask=True)
        except Exception:  # as in _draw
            return None
        found = [(int(start), int(end)) for start, end in marks[0]]
        return found if texts[0].startswith(row.full) else None

    def _placed(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        if self.system == "user":
            messages = system_in_user(messages)
        if self.calls == "text":
            messages = tuple(map(calls_in_text, messages))
            if not self._knows_results:
                messages = tuple(map(results_as_user, messages))
        return tuple(messages)

    def _as_answers(self, full: str, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of a span that the model writes: where the template makes two answers of one
        turn, the header of the second is not its.
        """
        eos, header = self.tokenizer.eos_token, self._header
        if not eos or not header:
            return [(start, end)]
        parts = []
        while (at := full.find(eos + header, start, end)) >= 0:
            parts.append((start, at + len(eos)))
            start = at + len(eos) + len(header)
        parts.append((start, end))
        # an answer that the template makes of no text is not learned
        return [part for part in parts if TAG.sub("", full[slice(*part)]).strip()] or parts[:1]

    def _without_trail(self, full: str, start: int, end: int) -> int:
        """White space after the end-of-turn token is the template's, written after the model has
        stopped: it is not learned.
        """
        kept = full[start:end].rstrip()
        return start + len(kept) if kept.endswith(self._markers) else end

    def _template_for(self, tools: tuple[Any, ...]) -> str:
        return self.tool_template if tools else self.template

    def _draw(self, turns: list[Turn], tools: tuple[Any, ...], prompt: bool) -> str:
        text = self._written(turns, tools, prompt)
        return text if prompt else text.removesuffix(self._standing)

    def _written(self, turns: list[Turn], tools: tuple[Any, ...], prompt: bool) -> str:
        try:
            if any(turn["content"] is None for turn in turns):
                # `apply_chat_template` takes nulls out, and some templates ask for them
                return self._rendered(turns, tools, add_generation_prompt=prompt)[0][0]
            return self.tokenizer.apply_chat_template(
                turns,
                tools=list(tools) or None,
                chat_template=self._template_for(tools),
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:
            # a template is its author's program: whatever it raises for a row is a fact about that
            # row
            raise EncodeFault(
                REFUSED,
                f"the chat template refuses the row: {str(error) or type(error).__name__}"[:300],
            ) from None

    def count(self, name: str, example: Example, where: str = "") -> None:
        """One more row of a count; the first row is kept by its id and turns."""
        self.counts[name] += 1
        self.firsts.setdefault(name, f"row {example.id!r}" + (f", {where}" if where else ""))

    def _rendered(self, turns: list[Turn], tools: tuple[Any, ...], **how: bool) -> Any:
        """([text], [marks]) of one chat."""
        return render_jinja_template(
            conversations=[turns],
            tools=list(tools) or None,
            chat_template=self._template_for(tools),
            **how,
            **self.tokenizer.special_tokens_map,
        )

    # --- what the template does with chats of two or three turns

    @functools.cached_property
    def _opener(self) -> str:
        """The marker that begins a turn: the first one of a chat, behind its BOS."""
        text = self._small("user") or ""
        bos = self.tokenizer.bos_token or ""
        tag = TAG.search(text, len(bos) if text.startswith(bos) else 0)
        return tag.group() if tag and tag.start() < text.find(PROBE) else ""

    @functools.cached_property
    def _header(self) -> str:
        """What stands in front of an answer, without the reasoning that a prompt opens."""
        asked, prompt = self._small("user"), self._small("user", prompt=True)
        if asked is None or prompt is None:
            return ""
        if prompt == asked:
            return self._standing
        # not all of `asked`: it may end with an EOS that the prompt does not have
        return without_thought(prompt[outside_tag(prompt, common(asked, prompt), 0) :])

    @functools.cached_property
    def _standing(self) -> str:
        """The generation prompt of a template that writes it at the end of every chat, asked or
        not.
        """
        asked, answered = self._small("user"), self._small("user", "assistant")
        followed = self._small("user", "assistant", "user")
        if not asked or not answered or not followed or asked != self._small("user", prompt=True):
            return ""
        behind = answered.rpartition(PROBE)[2]
        length = common(behind, followed.split(PROBE)[2])
        end = outside_tag(behind, length, 0)
        header = behind[without_opener(behind, 0, end, self._opener) :].lstrip()
        eos = self.tokenizer.eos_token
        return header if header.strip() not in ("", eos) and asked.endswith(header) else ""

    @functools.cached_property
    def _knows_results(self) -> bool:
        """Whether the template has a turn for the results of calls."""
        text = self._small("user", "assistant", "tool", "assistant")
        return text is not None and text.count(PROBE) == 4

    def _small(self, *roles: str, prompt: bool = False) -> str | None:
        """The text of a small chat whose turns are a probe each; None where the template refuses
        it.
        """
        named = {"tool_call_id": "abcdefghi", "name": "f"}
        turns = [
            {"role": role, "content": PROBE, **(named if role == "tool" else {})} for role in roles
        ]
        try:
            return self._written(turns, (), prompt)
        except EncodeFault:
            return None


class _Attempt:
    """What came of rendering a row in one form: `rendered`, or a `fault`."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.rendered: Rendered | None = None
        self.fault: EncodeFault | None = None
        self.counted: dict[str, str] = {}  # name of a count -> the turns
        self.as_python = False

    def better_than(self, other: _Attempt) -> bool:
        if self.rendered is None or other.rendered is None:
            return self.rendered is not None
        return len(self.rendered.text) < len(other.rendered.text)


def _judged(row: Conversation, spans: Spans) -> dict[str, str]:
    """What is to be counted of how the spans were found and of what they lack: name -> the turns.
    Raises EncodeFault for a turn whose content or calls are not in what is learned of it.
    """
    counted = {f"by {spans.how}": ""} if spans.how else {}
    if spans.headers:
        counted["by header"] = _turns(spans.headers)
    silent = []
    for turn, ranges in spans.of.items():
        text = "\0".join(row.full[start:end] for start, end in ranges)
        lost = lost_of(row.turns[turn], text)
        what = ["its text"] * lost.content + [f"the call of {name}" for name in lost.calls]
        if not lost.found:
            what += ["its reasoning"] * lost.reasoning
            raise EncodeFault(
                ANSWER_LOST,
                f"turn {turn + 1} would teach an empty answer: "
                + (f"the template leaves out {', '.join(what)}" if what else "it says nothing"),
            )
        if what:
            raise EncodeFault(
                ANSWER_LOST, f"the template leaves out {', '.join(what)} in turn {turn + 1}"
            )
        if lost.reasoning:
            silent.append(turn)
    return {**counted, "reasoning lost": _turns(silent)} if silent else counted


def _left_out(row: Conversation, tools: tuple[Any, ...]) -> dict[str, str]:
    """The same for what the template leaves out of the tools and of the turns of others."""
    counted = {}
    about = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    names = [str(tool["name"]) for tool in about if isinstance(tool, dict) and tool.get("name")]
    if any(name not in row.full for name in names):
        counted["tools lost"] = ""
    for k, turn in enumerate(row.turns):
        if turn["role"] != "assistant" and turn["content"] and not holds(row.full, turn["content"]):
            counted.setdefault(f"{_KINDS.get(turn['role'], 'tool')} lost", _turns([k]))
    return counted


def _turns(turns: Sequence[int]) -> str:
    return f"turn{'s' * (len(turns) > 1)} {', '.join(str(turn + 1) for turn in turns)}"
