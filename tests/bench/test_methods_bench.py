"""What bench/methods.py says about picks, on cases with known answers."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.docs.pages import check_measured

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("methods")


def test_picks_are_read_in_their_order_the_first_ones_and_some_of_the_rest(
    bench: ModuleType,
) -> None:
    table = {"rank": [3, None, 1, None, 2]}
    assert bench.order(table).tolist() == [2, 4, 0]
    read = bench.to_read(np.arange(400) * 2)
    assert read[:10].tolist() == list(range(0, 20, 2)) and len(read) == 20 and read[-1] == 798
    assert bench.to_read(np.arange(14)).tolist() == list(range(14)) and bench.to_read(
        np.arange(7)
    ).tolist() == list(range(7))


def test_shares_of_sources_in_pool_and_picks(bench: ModuleType) -> None:
    assert bench.shares(["a", "b", "a", "c"], np.array([1, 3])) == {
        "b": [0.25, 0.5],
        "c": [0.25, 0.5],
        "a": [0.5, 0.0],
    }
    assert bench.rounded(float("nan")) is None and bench.rounded(0.12345) == 0.123


def test_every_method_is_measured_once(bench: ModuleType, tmp_path: Path) -> None:
    from gradsift.methods import METHODS

    given = argparse.Namespace(run=tmp_path, out=tmp_path / "out.json", shared=tmp_path, only="")
    arms = bench.Bench(given).arms
    assert {arm.partition(":")[0] for arm in arms} == set(METHODS) and len(set(arms)) == len(arms)
    given.only = "rds,tagcos"
    assert bench.Bench(given).arms == ["rds", "tagcos", "tagcos:preset=released"]
    assert bench.selector_of("tagcos:preset=released").preset == "released"


def test_the_page_has_the_shape_of_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = BENCH.parent / "docs"
    monkeypatch.syspath_prepend(str(docs))
    results = json.loads((BENCH / "results" / "methods.json").read_text(encoding="utf-8"))
    page = importlib.import_module("generate_methods").page(results)
    written = (docs / "methods-measured.md").read_text(encoding="utf-8")
    check_measured(written, page, "python docs/generate_methods.py")
    assert page.count("| `") == len(results["methods"]) >= 8


def test_the_guides_table_is_what_the_methods_say(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradsift.methods import METHODS, describe

    docs = BENCH.parent / "docs"
    monkeypatch.syspath_prepend(str(docs))
    text = (docs / "methods.md").read_text(encoding="utf-8")
    assert importlib.import_module("generate_methods").guided(text) == text
    assert {method["name"] for method in describe()} == set(METHODS) and all(
        method["source"] and method["cost"] for method in describe()
    )
