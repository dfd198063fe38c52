"""Which stretches of a rendered conversation are learned.

A turn's span is found by rendering the turns before it and the turns up to it, and comparing texts:
where both are beginnings of the whole, the span is what lies between them. Where a template
rewrites earlier turns (drops their reasoning, closes the last turn another way), its generation
marks are used if it has any; else the turn's texts are found in the whole and in the shorter
rendering, and what follows or precedes them is compared from there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gradsift.data.chat.pieces import Places, Turn, common, find_places
from gradsift.data.chat.rendered import ANSWER_LOST, REWRITTEN, EncodeFault

PROBE = "\u00a4"
# Learned turns of a row up to which each costs two renderings. The turns of longer rows are read
# off those that stand between the same texts.
EXACT_TURNS = 8

TAG = re.compile(r"<[|\uff5c]?[^\s<>]{1,40}?[|\uff5c]?>|\[/?[A-Z_]{2,30}\]")
# what opens reasoning, in a prompt that opens or closes it for the model
_OPENS_THOUGHT = re.compile(
    r"<[|\uff5c]?/?(?:start_|begin_|end_)?(?:thinking|thought|think|reasoning|channel)[^\s<>]*>"
    r"|\[/?THINK\]",
    re.IGNORECASE,
)


@dataclass
class Spans:
    """of: turn -> the ranges [start, end) to learn of it. how: what found them, besides comparing
    beginnings. headers: turns that do not begin as the generation prompt does.
    """

    of: dict[int, list[tuple[int, int]]]
    how: Literal["", "marks", "places"] = ""
    headers: list[int] = field(default_factory=list)


class Conversation:
    """The turns of one row in one form, with their renderings. draw: (turns, generation prompt) ->
    text, raises EncodeFault. opener: the marker that begins a turn; header: what stands in front of
    an answer; both empty where the template has none.
    """

    def __init__(
        self,
        turns: list[Turn],
        learned: Sequence[int],
        draw: Callable[[list[Turn], bool], str],
        opener: str = "",
        header: str = "",
    ) -> None:
        self.turns, self.learned = turns, list(learned)
        self.opener, self.header = opener, header
        self._draw = draw
        self.full = draw(turns, False)

    def prompt(self, turn: int) -> str:
        """The turns before `turn`, with the generation prompt."""
        return self._draw(self.turns[:turn], True)

    def after(self, turn: int) -> str:
        """The turns up to `turn`."""
        return (
            self.full if turn == len(self.turns) - 1 else self._draw(self.turns[: turn + 1], False)
        )

    @functools.cached_property
    def places(self) -> Places:
        return self.places_in(self.turns, self.full, False)

    def places_in(self, turns: list[Turn], text: str, generation: bool) -> Places:
        return find_places(turns, text, lambda changed: self.try_draw(changed, generation))

    def try_draw(self, turns: list[Turn], generation: bool) -> str | None:
        try:
            return self._draw(turns, generation)
        except EncodeFault:
            return None


def by_beginnings(row: Conversation, limit: int) -> Spans | None:
    """The spans of turns that begin before the character `limit`; None where a rendering is not how
    the whole begins.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    gaps = _Gaps(row) if len(row.learned) > EXACT_TURNS else None
    for turn in row.learned:
        if turn == 0:
            return None
        start = gaps.place(turn - 1, "start") if gaps else None
        if start is None:
            text = row.prompt(turn)
            if not row.full.startswith(text):
                return None
            start = len(text)
            if gaps:
                gaps.learn(turn - 1, "start", start)
        if start >= limit and found:
            break
        end = gaps.place(turn, "end") if gaps else None
        if end is None:
            text = row.after(turn)
            if not row.full.startswith(text):
                return None
            end = len(text)
            if gaps:
                gaps.learn(turn, "end", end)
        if end <= start:
            return None
        found[turn] = [(start, end)]
    return Spans(found)


class _Gaps:
    """Where spans start and end in the texts between two turns. In a long conversation the same
    few texts come again and again: rendering each beginning would cost the square of the turns.
    """

    def __init__(self, row: Conversation) -> None:
        self.row = row
        self._offsets: dict[tuple[str, str, str, str], int] = {}

    def place(self, left: int, edge: str) -> int | None:
        """The edge of a span between the turns `left` and `left + 1`, if it is known."""
        key, begin = self._gap(left, edge)
        return begin + self._offsets[key] if key in self._offsets else None

    def learn(self, left: int, edge: str, place: int) -> None:
        key, begin = self._gap(left, edge)
        if key is not None and begin <= place <= begin + len(key[2]):
            self._offsets[key] = place - begin

    def _gap(self, left: int, edge: str) -> tuple[tuple[str, str, str, str] | None, int]:
        row = self.row
        begin, end = row.places.end(left), row.places.start(left + 1)
        if begin is None or end is None or end < begin:
            return None, 0
        roles = row.turns[left]["role"], row.turns[left + 1]["role"]
        return (*roles, row.full[begin:end], edge), begin


def by_marks(row: Conversation, marks: Sequence[tuple[int, int]]) -> Spans | None:
    """The spans that the template's generation marks say; None where they cannot be told apart."""
    answers = [k for k, turn in enumerate(row.turns) if turn["role"] == "assistant"]
    ranges = [(start, end) for start, end in marks if end > start]
    merged = _merged(ranges)
    told: dict[int, list[tuple[int, int]]] = {}
    for parts in (ranges, merged):
        if len(parts) == len(answers):
            told = {turn: [part] for turn, part in zip(answers, parts, strict=True)}
            break
    else:
        owner: list[int | None] = []
        for start, end in ranges:
            holds = {
                piece.turn for piece in row.places.pieces if piece.start < end and piece.end > start
            }
            if len(holds) > 1 or not holds <= set(answers):
                return None
            owner.append(next(iter(holds), None))
        # A mark around no text of its own (an end of turn, an empty block) goes with its
        # neighbours.
        for i, (start, end) in enumerate(ranges):
            if owner[i] is None:
                before = owner[i - 1] if i and ranges[i - 1][1] <= start else None
                apart = before is None or any(
                    piece.turn != before and ranges[i - 1][1] <= piece.start < end
                    for piece in row.places.pieces
                )
                after = next((turn for turn in owner[i + 1 :] if turn is not None), None)
                owner[i] = after if apart else before
            turn = owner[i]
            if turn is None:
                return None
            told.setdefault(turn, []).append((start, end))
    if any(not told.get(turn) for turn in row.learned):
        return None
    return Spans({turn: _merged(told[turn]) for turn in row.learned}, "marks")


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    made: list[tuple[int, int]] = []
    for start, end in ranges:
        if made and made[-1][1] == start:
            made[-1] = made[-1][0], end
        else:
            made.append((start, end))
    return made


def by_places(row: Conversation, limit: int) -> Spans:
    """The spans by where the turns' texts stand. Raises EncodeFault where they cannot be told
    apart, or a span would hold another turn's text.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    headers: list[int] = []
    last, rewritten = 0, False
    gaps = _Gaps(row) if len(row.learned) > EXACT_TURNS else None
    for turn in row.learned:
        begin, close = row.places.start(turn), row.places.end(turn)
        if begin is None or close is None:
            raise EncodeFault(
                ANSWER_LOST,
                f"the chat template writes nothing of what turn {turn + 1} says",
            )
        if begin >= limit and found:
            break
        start = gaps.place(turn - 1, "start") if gaps and turn else None
        if start is None:
            start, exact = _start(row, turn, begin)
            headers += [] if exact else [turn]
            if gaps and turn:
                gaps.learn(turn - 1, "start", start)
        end = gaps.place(turn, "end") if gaps else None
        if end is None:
            text = row.after(turn)
            if row.full.startswith(text):
                end = len(text)
            else:
                end, rewritten = _end(row, turn, text, close), True
            if gaps and turn < len(row.turns) - 1:
                gaps.learn(turn, "end", end)
        if start < last or end <= start:
            raise _apart(turn)
        other = row.places.others(turn, start, end)
        if other is not None:
            raise EncodeFault(
                REWRITTEN,
                f"the template writes text of turn {other + 1} in the middle of turn {turn + 1}",
            )
        found[turn] = [(start, end)]
        last = end
    return Spans(found, "places" if rewritten else "", headers)


def _apart(turn: int) -> EncodeFault:
    return EncodeFault(
        REWRITTEN,
        f"the template rewrites the turns around turn {turn + 1}, which cannot be told apart",
    )


def _start(row: Conversation, turn: int, begin: int) -> tuple[int, bool]:
    """Where the model begins to write the turn whose texts begin at `begin`, and whether that is
    the end of the generation prompt.
    """
    if turn == 0:
        at = row.full.rfind(row.header, 0, begin) if row.header else -1
        if at >= 0:
            return at + len(row.header), True
        return len(row.full[:begin].rstrip()), True
    prompt = row.prompt(turn)
    if row.full.startswith(prompt):
        return min(len(prompt), begin), True
    here = row.places.end(turn - 1)
    there = row.places_in(row.turns[:turn], prompt, True).end(turn - 1)
    if here is None or there is None or here > begin:
        here = there = 0
    tail = prompt[there:]
    length = common(tail, row.full[here:])
    if length == len(tail):
        return min(here + length, begin), True
    # The prompt goes on in another way than the turn: back to what all turns have in common.
    calls = [{"type": "function", "function": {"name": PROBE, "arguments": {}}}]
    for probe in (
        {"content": PROBE},
        {"content": PROBE, "thinking": PROBE, "reasoning_content": PROBE},
        {"content": "", "tool_calls": calls},
    ):
        told = [*row.turns[:turn], {"role": "assistant", **probe}]
        for turns in (told, [*told, {"role": "user", "content": PROBE}]):
            text = row.try_draw(turns, False)
            if text is not None and text.startswith(prompt[:there]):
                length = min(length, common(tail, text[there:]))
    length = min(length, len(without_thought(tail)))
    start = outside_tag(row.full, here + length, here)
    return min(start, begin), False


def without_thought(prompt: str) -> str:
    """A generation prompt up to where it opens the reasoning."""
    thought = _OPENS_THOUGHT.search(prompt)
    return prompt[: thought.start()] if thought else prompt


def _end(row: Conversation, turn: int, text: str, close: int) -> int:
    """Behind the end-of-turn text of the turn whose texts end at `close`; `text` is the rendering
    up to the turn.
    """
    there = row.places_in(row.turns[: turn + 1], text, False).end(turn)
    if there is None:
        return close
    tail = text[there:]
    length = common(tail, row.full[close:])
    if length == len(tail):
        return close + length
    end = close + length
    tag = next((m for m in TAG.finditer(row.full, close) if m.end() > end), None)
    if tag is not None and tag.start() < end:
        if not row.full[close : tag.start()].strip() and _ends_turns(row, turn, tag):
            return tag.end()
        end = tag.start()
    return without_opener(row.full, close, end, row.opener)


def _ends_turns(row: Conversation, turn: int, tag: re.Match[str]) -> bool:
    """Whether the marker behind the turn's texts is an end of turn of another name, and not what
    the next turn begins with.
    """
    following = row.places.start(turn + 1)
    if not row.full[tag.end() : following or len(row.full)].strip():
        return False  # the next turn's text follows: it is its header
    return row.turns[turn + 1]["role"] == "user" or any(
        row.turns[piece.turn]["role"] != "assistant"
        and row.full[piece.end :].lstrip().startswith(tag.group())
        for piece in row.places.pieces
    )


def without_opener(text: str, start: int, end: int, opener: str) -> int:
    kept = text[start:end].rstrip()
    return start + len(kept) - len(opener) if opener and kept.endswith(opener) else end


def outside_tag(text: str, place: int, least: int) -> int:
    """`place`, or the beginning of the marker that it stands in."""
    for tag in TAG.finditer(text, least, place + 60):
        if tag.start() < place < tag.end():
            return tag.start()
    return place
