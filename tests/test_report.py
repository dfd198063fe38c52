"""The report's data, its Markdown and its page as text; the page in a browser is in test_report_browser.py."""

from __future__ import annotations

import numpy as np

from gradsift.report import (
    Cluster,
    Compared,
    Comparison,
    Group,
    Method,
    ReportData,
    Reproduce,
    Row,
    Step,
    Table,
    Timing,
    Verdict,
    histogram,
    row_card,
)
from gradsift.types import Example, Message

EVIL = (
    '<script>window.__pwned=1</script><img src=x onerror="window.__pwned=1"></script><!--<script><svg onload=window.__pwned=1> '
    "{{7*7}} {% raw %} [click](javascript:window.__pwned=1) https://example.org =cmd|' /C calc'!A0 "
    "\u202etxet desrever\u202c \u2066x\u2069 \x00 `` ``` &lt; end"
)


def card(number: int, *, evil: bool = False, rank: int | None = None) -> Row:
    question = EVIL if evil else f"A pen costs {number + 2} euros. What do three pens cost?"
    messages = (Message("system", "You are a careful tutor."), Message("user", question), Message("assistant", f"{3 * number + 6} euros."))
    example = Example(id=EVIL if evil else f"math-{number:05d}", messages=messages, group=EVIL if evil else "math")
    return row_card(
        example, place=EVIL if evil else f"math.jsonl:{number}", rank=rank, gain=0.4 - 0.01 * number, tokens=9, why=EVIL if evil else ""
    )


def full() -> ReportData:
    """A report with every part filled, from 5,521 made-up rows; one of the rows and one of the groups is hostile."""
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
            name="tagcos", summary="Cluster, then match the mean gradient.", options={"clusters": 40, "ridge": 1.0, "refill": "repeat"}
        ),
        verdict=(
            Verdict(text="Selected 276 of 5,521 rows (5.0 %)"),
            Verdict(text="Spearman of the score with length is 0.08.", level="ok"),
            Verdict(text="The mean pairwise cosine of the stored rows is 0.31.", level="note"),
            Verdict(text="41 exact duplicates are in the pool.", level="warn"),
        ),
        funnel=(Step(name="read", count=5_530, note=EVIL), Step(name="usable", count=n), Step(name="selected", count=k, note="5 %")),
        groups=tuple(
            Group(name=name, pool_rows=size, picked_rows=part, pool_tokens=180 * size, picked_tokens=200 * part)
            for name, size, part in zip(names, sizes, chosen, strict=True)
        ),
        scores=histogram(scores, picked, label="gain", cut=float(scores[order[k - 1]])),
        clusters=tuple(
            Cluster(name=str(place), rows=int(rows), picked=int(rows) // 20, norm=float(norm))
            for place, (rows, norm) in enumerate(zip(rng.gamma(2, 70, 40) + 5, rng.beta(3, 5, 40), strict=True))
        ),
        lengths=histogram(lengths, picked, label="supervised tokens", upper=0.99),
        best=(*(card(i, rank=i + 1) for i in range(3)), card(3, evil=True, rank=4)),
        borderline=(card(5, rank=276), card(6)),
        worst=(card(50),),
        coverage=Table(columns=("module", "parameters", "share"), rows=(("q_proj", 4096, 1.0), (EVIL, 0, None)), caption="All of LoRA."),
        timings=(
            Timing(stage="gradients", seconds=189.9, peak_bytes=4_100_000_000, digest="cd34ef567890ab12", state="reused"),
            Timing(stage="select", seconds=1.2, peak_bytes=900_000_000, digest="ef567890ab12cd34"),
        ),
        comparison=Comparison(
            results=(
                Compared(name="tagcos", value=1.412, low=1.401, high=1.423, seeds=5, rows=276, share=0.05),
                Compared(name="random", kind="control", value=1.455, low=1.439, high=1.470, seeds=5, rows=276, share=0.05),
                Compared(name="length", kind="control", value=1.441, seeds=5, rows=276, share=0.05, note=EVIL),
            )
        ),
        reproduce=Reproduce(
            command="gradsift select tagcos --pool math.jsonl --model tiny --budget 5% --run runs/a",
            seeds={"run": 0},
            versions={"gradsift": "0.1.0"},
            digests={"pool": "9f2c" * 8},
            notes=("Byte-identical for the same torch build.",),
        ),
    )
