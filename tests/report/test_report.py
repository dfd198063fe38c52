"""The report's data, its Markdown and its page as text; the page in a browser is in
test_report_browser.py.
"""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pydantic import ValidationError

from gradsift.report import (
    Cluster,
    Compared,
    Comparison,
    Curve,
    Group,
    Histogram,
    Map,
    Method,
    Near,
    Point,
    ReportData,
    Reproduce,
    Row,
    Step,
    Table,
    Timing,
    Verdict,
    histogram,
    row_card,
    write_report,
)
from gradsift.report.charts import charts
from gradsift.report.data import MAX_CHARACTERS, MAX_TURNS
from gradsift.report.markdown import fenced, plain
from gradsift.report.page import inline_script, script_json
from gradsift.report.text import excerpt, number, seconds, size, visible
from gradsift.types import Example, Message

EVIL = (
    "<script>window.__pwned=1</script><img src=x"
    ' onerror="window.__pwned=1"></script><!--<script><svg onload=window.__pwned=1> {{7*7}} {%'
    " raw %} [click](javascript:window.__pwned=1) https://example.org =cmd|' /C calc'!A0 \u202etxet"
    " desrever\u202c \u2066x\u2069 \x00 `` ``` &lt; end"
)


def card(number: int, *, evil: bool = False, rank: int | None = None) -> Row:
    question = EVIL if evil else f"A pen costs {number + 2} euros. What do three pens cost?"
    messages = (
        Message("system", "You are a careful tutor."),
        Message("user", question),
        Message("assistant", f"{3 * number + 6} euros."),
    )
    example = Example(
        id=EVIL if evil else f"math-{number:05d}", messages=messages, group=EVIL if evil else "math"
    )
    return row_card(
        example,
        place=EVIL if evil else f"math.jsonl:{number}",
        rank=rank,
        gain=0.4 - 0.01 * number,
        tokens=9,
        why=EVIL if evil else "",
        nearest=Near(
            id=EVIL if evil else "t1", place="dev.jsonl:3", opening=EVIL, how="cosine 0.21"
        ),
    )


def drawn() -> Map:
    """Two picks, a target row and three rows of the pool, the first two in one place; one of them
    hostile.
    """
    named = [
        ("picked", 0.1, 0.2, "first pick", 1),
        ("picked", 0.3, -0.2, EVIL, 2),
        ("target", 0.25, 0.05, "a target row", None),
        *(("pool", -0.1 * i, 0.1 * i, f"pool row {i}", None) for i in range(3)),
    ]
    return Map(
        x="first principal direction (12.0% of the variance)",
        y="second principal direction (5.0%)",
        note="Gradients of two picks, one target row and three others.",
        points=tuple(
            Point(
                kind=kind,
                x=x,
                y=y,
                id=words,
                group="math",
                place="math.jsonl:1",
                rank=rank,
                text=f"user: {words}\n\nassistant: yes",
                cut=3,
            )
            for kind, x, y, words, rank in named
        ),
    )


def full() -> ReportData:
    """A report with every part filled, from 5,521 made-up rows; one of the rows and one of the
    groups is hostile.
    """
    rng = np.random.default_rng(0)
    n, k = 5_521, 276
    scores = rng.normal(0.02, 0.06, n) + rng.exponential(0.02, n)
    order = np.argsort(-scores)
    picked = np.zeros(n, bool)
    picked[order[:k]] = True
    lengths = np.exp(rng.normal(5, 0.8, n)).astype(int)
    names = ["math", "code", "chat", "translation", EVIL]
    sizes, chosen = [2_000, 1_500, 1_000, 900, 121], [150, 60, 30, 26, 10]
    return ReportData(
        title="gradsift: a pool on tiny",
        method=Method(
            name="tagcos",
            summary="Cluster, then match the mean gradient.",
            options={"clusters": 40, "ridge": 1.0, "refill": "repeat"},
        ),
        verdict=(
            Verdict(text="Selected 276 of 5,521 rows (5.0 %)"),
            Verdict(text="Spearman of the score with length is 0.08.", level="ok"),
            Verdict(text="The mean pairwise cosine of the stored rows is 0.31.", level="note"),
            Verdict(text="41 exact duplicates are in the pool.", level="warn"),
        ),
        funnel=(
            Step(name="read", count=5_530, note=EVIL),
            Step(name="usable", count=n),
            Step(name="selected", count=k, note="5 %"),
        ),
        groups=tuple(
            Group(
                name=name,
                pool_rows=size,
                picked_rows=part,
                pool_tokens=180 * size,
                picked_tokens=200 * part,
            )
            for name, size, part in zip(names, sizes, chosen, strict=True)
        ),
        scores=histogram(scores, picked, label="gain", cut=float(scores[order[k - 1]])),
        clusters=tuple(
            Cluster(name=str(place), rows=int(rows), picked=int(rows) // 20, norm=float(norm))
            for place, (rows, norm) in enumerate(
                zip(rng.gamma(2, 70, 40) + 5, rng.beta(3, 5, 40), strict=True)
            )
        ),
        lengths=histogram(lengths, picked, label="supervised tokens", upper=0.99),
        best=(*(card(i, rank=i + 1) for i in range(3)), card(3, evil=True, rank=4)),
        borderline=(card(5, rank=276), card(6)),
        worst=(card(50),),
        map=drawn(),
        warmup=Curve(
            label="loss (nats per token)",
            values=tuple(2 + 1 / step for step in range(1, 31)),
            marks=(10, 20, 30),
        ),
        coverage=Table(
            columns=("module", "parameters", "share"),
            rows=(("q_proj", 4096, 1.0), (EVIL, 0, None)),
            caption="All of LoRA.",
        ),
        timings=(
            Timing(
                stage="gradients",
                seconds=189.9,
                peak_bytes=4_100_000_000,
                digest="cd34ef567890ab12",
                state="reused",
            ),
            Timing(stage="select", seconds=1.2, peak_bytes=900_000_000, digest="ef567890ab12cd34"),
        ),
        comparison=Comparison(
            results=(
                Compared(
                    name="tagcos", value=1.412, low=1.401, high=1.423, seeds=5, rows=276, share=0.05
                ),
                Compared(
                    name="random",
                    kind="control",
                    value=1.455,
                    low=1.439,
                    high=1.470,
                    seeds=5,
                    rows=276,
                    share=0.05,
                ),
                Compared(
                    name="length",
                    kind="control",
                    value=1.441,
                    seeds=5,
                    rows=276,
                    share=0.05,
                    note=EVIL,
                ),
            )
        ),
        reproduce=Reproduce(
            command=(
                "gradsift select tagcos --pool math.jsonl --model tiny --budget 5% --run runs/a"
            ),
            seeds={"run": 0},
            versions={"gradsift": "0.1.0"},
            digests={"pool": "9f2c" * 8},
            notes=("Byte-identical for the same torch build.",),
        ),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(full(), tmp_path_factory.mktemp("report")).parent


# --- the data


def test_json_round_trip_is_exact(folder: Path) -> None:
    data = full()
    assert ReportData.model_validate_json(data.model_dump_json()) == data
    assert ReportData.model_validate_json((folder / "report.json").read_bytes()) == data


def test_data_is_frozen_strict_and_takes_numpy() -> None:
    group = Group(name="a", pool_rows=np.int64(3), picked_rows=np.int32(1))  # type: ignore[arg-type]
    assert (type(group.pool_rows), group.picked_rows) == (int, 1)
    with pytest.raises(ValidationError, match="frozen"):
        group.name = "b"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Group(name="a", pool_rows=1, picked_rows=1, colour="red")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="valid integer"):
        Group(name="a", pool_rows="3", picked_rows=1)  # type: ignore[arg-type]
    assert Cluster(name="0", rows=1, picked=0, norm=float("nan")).norm is None
    with pytest.raises(ValidationError, match="finite"):
        Histogram(label="x", edges=(0.0, float("inf")), counts=(1,), picked=(0,))
    assert Verdict(text="half \ud83d pair").text == "half ? pair"


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="one edge more"):
        Histogram(label="x", edges=(0.0, 1.0), counts=(1, 2), picked=(0, 0))
    with pytest.raises(ValidationError, match="one cell per column"):
        Table(columns=("a", "b"), rows=(("x",),))
    with pytest.raises(ValueError, match="one length"):
        histogram([1.0, 2.0], [True])


def naive_counts(values: list[float], edges: tuple[float, ...]) -> list[int]:
    counts = [0] * (len(edges) - 1)
    for value in values:
        if math.isfinite(value):
            counts[max(i for i in range(len(counts)) if i == 0 or edges[i] <= value)] += 1
    return counts


FLOATS = st.floats(-1e6, 1e6, allow_nan=False, width=32) | st.sampled_from(
    [float("nan"), float("inf"), 0.0, 1.0]
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(FLOATS, st.booleans()), max_size=60),
    st.integers(1, 12),
    st.sampled_from([None, 0.5, 0.9, 1.0]),
)
def test_histogram_counts_like_a_loop(
    pairs: list[tuple[float, bool]], bins: int, upper: float | None
) -> None:
    values, mask = [value for value, _ in pairs], [flag for _, flag in pairs]
    found = histogram(values, mask, bins, upper=upper)
    finite = [value for value in values if math.isfinite(value)]
    assert found.missing == len(values) - len(finite)
    assert sum(found.counts) == len(finite)
    assert list(found.edges) == sorted(set(found.edges))
    assert len(found.counts) <= bins + 1
    if finite:
        assert list(found.counts) == naive_counts(values, found.edges)
        assert list(found.picked) == naive_counts([v for v, flag in pairs if flag], found.edges)
        assert found.edges[0] <= min(finite)
        assert max(finite) <= found.edges[-1] or found.above > 0


def test_histogram_of_whole_numbers_has_whole_bins_and_a_last_bin_for_the_tail() -> None:
    found = histogram([1, 1, 2, 3, 900], [True, False, False, True, True], 60, upper=0.75)
    assert found.edges == (1.0, 2.0, 3.0, 4.0)
    assert (found.counts, found.picked, found.above) == ((2, 1, 2), (1, 0, 2), 1)


def test_row_card_says_what_it_left_out() -> None:
    messages = tuple(Message("user", "x" * (MAX_CHARACTERS + 7)) for _ in range(MAX_TURNS + 2))
    found = row_card(Example("7", messages, "g"))
    assert (len(found.turns), found.turns_cut, found.turns[0].cut, len(found.turns[0].content)) == (
        MAX_TURNS,
        2,
        7,
        MAX_CHARACTERS,
    )
    assert row_card(Example("7", (), "g", tokens=((5, 6), (-100, 6)))).turns[0].content == "5 6"
    assert card(1).opening == "A pen costs 3 euros. What do three pens cost?"


# --- text


def test_numbers_and_units() -> None:
    assert [number(value) for value in (None, 3, 12_345, 0.39, 1.0, 123456.7, 1e-5, True)] == [
        *("", "3", "12,345", "0.3900", "1", "123,457", "1.000e-05", "yes")
    ]
    assert [seconds(value) for value in (None, 1.24, 60.0, 3_725.0)] == [
        "",
        "1.2 s",
        "1 min 00 s",
        "1 h 02 min",
    ]
    assert [size(value) for value in (None, 512, 4_100_000_000)] == ["", "512 B", "3.8 GiB"]


def test_text_that_reorders_or_hides_is_shown() -> None:
    assert visible("a\u202eb\u2066c\x00\u200bd\ne") == "a[U+202E]b[U+2066]c[U+0000][U+200B]d e"
    # joiners belong to the script
    assert visible("👩\u200d💻 नम\u200cस्ते") == "👩\u200d💻 नम\u200cस्ते"
    assert excerpt("word " * 50, 20) == "word word word word…"


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=60)
    | st.text(alphabet="`*_[]()<>!#|~$&@\\-+=1. :/ahtpw\n", max_size=40)
    | st.just(EVIL)
)
def test_markdown_shows_text_as_it_is(text: str) -> None:
    """A CommonMark reader renders `plain(text)` to exactly the text."""
    shown = visible(text)
    tokens = MarkdownIt("commonmark").parse("x " + plain(text) + " x")
    inline = [child for token in tokens for child in token.children or []]
    assert "".join(child.content for child in inline) == f"x {shown} x" if shown else True
    assert {child.type for child in inline} <= {"text", "text_special"}
    if shown and not shown[0].isspace():
        assert MarkdownIt("commonmark").parse(plain(text))[0].type == "paragraph_open"


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="`~a\n <>", max_size=40))
def test_a_fence_holds_its_text(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse("\n".join(fenced(text)))
    assert [(token.type, token.content) for token in tokens] == [("fence", text + "\n")]


# --- the three files


def test_the_same_data_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_report(full(), tmp_path / "again")
    for name in ("report.html", "report.json", "report.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == [
        "report.digests.json",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_markdown_has_the_facts_and_no_markup_from_rows(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# gradsift: a pool on tiny\n\n**Selected 276 of 5,521 rows (5.0 %)**\n")
    assert "- Warning: 41 exact duplicates are in the pool." in text
    assert "| math | 2,000 | 150 | 36.2 % | 54.3 % | 360,000 | 30,000 |" in text
    assert "| tagcos | method | 1.412 | 1.401 | 1.423 | 276 | 5.0 % | 5 |" in text
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or []]
    assert {token.type for token in tokens}.isdisjoint({"html_block"})
    assert {child.type for child in inline}.isdisjoint(
        {"html_inline", "link_open", "image", "code_inline", "em_open"}
    )
    assert not any(character in text for character in "\u202e\u2066\x00")


class Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:
            self.inside.append((self.tags[-1][0], data))


def test_the_page_holds_only_its_own_tags(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert 850_000 < len(text) < 1_200_000
    reader = Reader()
    reader.feed(text)
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("script") == 3
    assert {"img", "iframe", "a", "object", "form"}.isdisjoint(tags)
    names = {name for _, attributes in reader.tags for name in attributes}
    assert not any(
        name.startswith("on") or name in ("src", "style", "srcdoc", "action") for name in names
    )
    assert [attributes["href"] for _, attributes in reader.tags if "href" in attributes] == [
        "data:,"
    ]
    assert "49" not in text.split("{{7*7}}")[0][-3:]
    assert text.count("{{7*7}}") > 5


def test_the_policy_names_the_scripts_by_hash(folder: Path) -> None:
    reader = Reader()
    reader.feed((folder / "report.html").read_text(encoding="utf-8"))
    policy = next(
        a["content"]
        for tag, a in reader.tags
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; ")
    code = [data for tag, data in reader.inside if not data.startswith('{"')]
    assert len(code) == 3  # the style sheet, the bundle, the drawing
    for data in code:
        assert base64.b64encode(hashlib.sha256(data.encode()).digest()).decode() in policy


def test_json_inside_a_script_cannot_end_it() -> None:
    value = {"x": "</script><!--<script>&\u2028", "y": [1, None]}
    text = script_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value
    for bad in ("a</SCRIPT b", "<!-- x", "a\rb"):
        with pytest.raises(ValueError, match="cannot be inlined"):
            inline_script(bad)


def test_charts_carry_the_numbers() -> None:
    data = full()
    specs = charts(data)
    assert list(specs) == ["groups", "scores", "clusters", "lengths", "map", "warmup", "comparison"]

    def values(name: str, keep: Callable[[dict], bool] = lambda row: True) -> list[dict]:
        text = json.dumps(specs[name])
        found = [
            item["data"]["values"]
            for item in (specs[name], *specs[name]["layer"])
            if "data" in item
        ]
        assert "http" not in text.replace("https://vega.github.io/schema/vega-lite/", "").replace(
            "https://example.org", ""
        )
        return [row for rows in found for row in rows if keep(row)]

    math_row = next(row for row in values("groups") if row["group"] == "math")
    assert (math_row["before"], math_row["after"]) == pytest.approx((2_000 / 5_521, 150 / 276))
    assert data.scores is not None
    bars = values("scores", lambda row: "all" in row)
    assert tuple(row["all"] for row in bars) == data.scores.counts
    assert next(row for row in values("scores") if "cut" in row)["cut"] == data.scores.cut
    shares = values("lengths", lambda row: "pool share" in row)
    assert sum(row["pool share"] for row in shares) == pytest.approx(1)
    assert sum(row["picked share"] for row in shares) == pytest.approx(1)


def test_a_page_says_that_nothing_was_trained_only_where_nothing_was(tmp_path: Path) -> None:
    data = full()
    assert data.comparison is not None
    for shown, said in ((data, False), (data.model_copy(update={"comparison": None}), True)):
        page = write_report(shown, tmp_path)
        for path in (page, page.parent / "report.md"):
            assert ("is not measured on this page" in path.read_text(encoding="utf-8")) == said


def test_a_bare_report_needs_only_a_verdict(tmp_path: Path) -> None:
    data = ReportData(
        title="t", method=Method(name="random"), verdict=(Verdict(text="Selected 1 of 2 rows."),)
    )
    page = write_report(data, tmp_path / "new" / "folder")
    text = page.read_text(encoding="utf-8")
    assert charts(data) == {}
    assert "script-src 'none'" in text
    assert "<script" not in text
    assert "Selected 1 of 2 rows." in (page.parent / "report.md").read_text(encoding="utf-8")
