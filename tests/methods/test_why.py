"""Every method says why it picked a row, in words and with its own unit, and the numbers it says
are those of the scores.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import gradsift
from gradsift import methods
from gradsift.commands.select.select import Selection
from gradsift.methods.words import count, figure
from gradsift.report import ReportData
from gradsift.types import Facts
from tests.conftest import SETTINGS, rows, write_rows

SHORT = {**SETTINGS, "warmup": {**SETTINGS["warmup"], "checkpoints": 1}}
SHORT |= {"curvature": {"fit_rows": 16}, "tuning": {"epochs": 2, "batch_size": 4}}
OPTIONS: dict[str, dict[str, Any]] = {"tagcos": {"clusters": 4}, "gdig": {"clusters": 4}}
NOTES = {"nearest_group": "dev", "cluster": 3, "component": 0, "energy": 0.125}
# a word of the unit or the thing that each method measures
UNITS = {
    "bids": "standard deviations",
    "bm25": "BM25 score",
    "contrast": "nats likelier after 13 steps on your 20 rows of dev",
    "dsir": "nats likelier in the target than in the pool",
    "g2is": "cosine",
    "gdig": "influence",
    "gist": "cosine",
    "gradmatch": "product of its gradient",
    "ifd": "the loss of its 104-token answer is 0.457 times",
    "kcenter": "farthest",
    "length": "supervised tokens",
    "less": "cosine",
    "perplexity": "places from the middle",
    "random": "at random",
    "rds": "cosine",
    "selffilter": "difficulty",
    "tagcos": "mean gradient of its cluster 3",
}
SAYS_NO_NUMBER = {"kcenter", "random"}
GIVEN = Facts(
    rank=2,
    gain=10.2345,
    score=0.4567,
    tokens=104,
    loss=1.875,
    notes=NOTES,
    target_rows=20,
    tuned={"dev": (13, 20)},
    checkpoints=3,
)


def test_there_is_a_unit_for_every_method() -> None:
    assert set(UNITS) == set(methods.METHODS)


@pytest.mark.parametrize("name", sorted(UNITS))
def test_the_sentence_has_a_unit_and_the_number_of_the_pick(name: str) -> None:
    said = methods.load(name)().why(GIVEN)
    assert UNITS[name] in said
    assert not said.endswith(".") and "\n" not in said
    if name not in SAYS_NO_NUMBER:
        assert {figure(10.2345), figure(0.4567), "10 supervised"} & set(
            re.findall(r"\d[\d,.]*(?: supervised)?", said)
        ), said


def test_the_example_of_contrast_reads_as_a_person_would_say_it() -> None:
    assert methods.load("contrast")().why(GIVEN) == (
        "its 104-token answer became 10.2 nats likelier after 13 steps on your 20 rows of dev"
    )
    worse = Facts(score=-0.5, tokens=1, notes={"nearest_group": "dev"}, tuned={"dev": (1, 1)})
    assert methods.make("contrast", {"per": "token"}).why(worse) == (  # type: ignore[attr-defined]
        "its 1-token answer became 0.5 nats less likely per token after 1 step on your 1 row of dev"
    )


@pytest.mark.parametrize(
    "name, options, said",
    [
        (
            "less",
            {"preset": "released", "aggregate": "rows"},
            "cosine of 10.2 with the gradient of",
        ),
        ("less", {"transform": "none"}, "its gradient has a cosine"),
        ("less", {"backend": "ekfac", "aggregate": "max"}, "influence 10.2 by ekfac"),
        ("perplexity", {"band": "high"}, "loss on it is 10.2 nats per token"),
        ("g2is", {"preset": "paper"}, "principal directions"),
        ("gist", {"energy": "true"}, "cosine times share"),
        ("bids", {"standardise": "false"}, "stood 10.2 above the mean"),
        ("contrast", {"per": "sqrt"}, "nats likelier per square root of its tokens"),
        ("ifd", {"ratio": "perplexity"}, "the perplexity of its 104-token answer is"),
        ("kcenter", {"signal": "rows"}, "its gradient was the farthest"),
    ],
)
def test_options_that_change_the_unit_change_the_sentence(
    name: str, options: dict[str, str], said: str
) -> None:
    assert said in methods.make(name, options).why(GIVEN)  # type: ignore[attr-defined]


def test_numbers_are_written_for_people() -> None:
    written = [figure(value) for value in (0.0432, -1.5, 123456.0, 0.00001234, 0.0, 999.6)]
    assert written == ["0.0432", "-1.5", "123,456", "1.23e-05", "0", "1,000"]
    assert (count(1, "row"), count(2_000, "row")) == ("1 row", "2,000 rows")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("why")
    target = [item for item in rows(40, seed=9) if item["kind"] == "back"]
    return write_rows(folder / "pool.jsonl", rows(40)), write_rows(folder / "dev.jsonl", target)


@pytest.fixture(scope="module")
def select(files: tuple[Path, Path], model_folder: Path) -> Any:
    pool, target = files

    def chosen(method: str) -> Selection:
        wanted = methods.load(method).target != "none"
        return gradsift.select(
            method,
            pool=pool,
            target=[target] if wanted else [],
            model=str(model_folder),
            run=pool.parent / "run",
            budget=8,
            options=OPTIONS.get(method),
            settings=SHORT,
        )

    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(UNITS))
def test_a_selection_says_the_numbers_of_its_scores(
    name: str, select: Any, files: tuple[Path, Path]
) -> None:
    """The whole job: each pick's sentence holds its gain, or its score, as scores.parquet has it;
    the report repeats it, names a nearest target row, and draws every pick.
    """
    chosen: Selection = select(name)
    table = pq.read_table(chosen.folder / "scores.parquet").to_pylist()
    picked = [line for line in table if line["selected"]]
    assert len(picked) == 8
    for line in picked:
        numbers = {
            figure(abs(value)) for value in (line["gain"], line["score"]) if value is not None
        } | {count(round(abs(line["gain"] or 0)), "supervised token")}
        said = line["why"].replace("-", " ")
        if name not in SAYS_NO_NUMBER:
            found = (rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)" for number in numbers)
            assert any(re.search(number, said) for number in found), (said, numbers)
    # the same beside methods that have stored more in this run, as this test has it in any order
    data = ReportData.model_validate_json((chosen.folder / "report.json").read_bytes())
    why = {line["id"]: line["why"] for line in picked}
    assert data.best and all(row.why == why[row.id] for row in data.best)
    if methods.load(name).target != "none":
        places = {f"{files[1]}:{line + 1}" for line in range(20)}
        near = [row.nearest for row in (*data.best, *data.borderline)]
        assert all(row is not None and row.place in places and row.how for row in near)
    assert data.map is not None
    drawn = [point for point in data.map.points if point.kind == "picked"]
    if name in ("random", "length"):
        assert not data.map.points and data.map.note.startswith("No map: ")
        return
    assert [point.id for point in drawn] == chosen.ids
    assert len(data.map.points) >= 40
    texts = {json.loads(line)["id"]: line for line in files[0].read_text().splitlines()}
    assert all(point.text.split(": ")[1][:5] in texts[point.id] for point in drawn)
    stars = sum(point.kind == "target" for point in data.map.points)
    gradients = {"bids", "gist", "gradmatch", "g2is", "less", "rds"}
    assert stars == (20 if name in gradients else 0), data.map.note
