"""Every hostile input of the corpus comes to what it should: rows read, rows quarantined by line
and code, or one error with a remedy.

They are read in another process with a limit on its memory, so that a crash or a bomb is told by
name and ends no test run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.corpus import CORPUS, Reads

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # that all of them may take together without a word from the process: a hang


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> what __main__.py told; a case that ended the process has {"died": how}, and the rest
    is read by a new one.
    """
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(CORPUS):
        rest = [name for name in CORPUS if name not in found]
        place = folder / str(len(found))
        place.mkdir()
        command = [sys.executable, "-m", "tests.faults.corpus", str(place), *rest]
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hub"),
        }
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS
            )
            told, how = done.stdout, f"ended with {done.returncode}: {done.stderr[-2000:]}"
        except subprocess.TimeoutExpired as error:
            told, how = (error.stdout or b"").decode(), f"hung for {SECONDS} s"
        last = None
        for line in told.splitlines():
            last = json.loads(line)
            if "outcome" in last:
                found[last["name"]] = {**last["outcome"], "seconds": last["seconds"]}
                last = None
        if last is None and len(found) < len(CORPUS):
            pytest.fail(f"the reading process could not work: {how}")
        if last is not None:
            found[last["name"]] = {"died": how}
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return read_all(tmp_path_factory.mktemp("corpus"))


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 150


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPUS)
def test_it_comes_to_what_it_should(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    found, expected = outcomes[name], CORPUS[name][1]
    assert "died" not in found, found
    assert found.get("error") != "traceback", found["text"]
    assert not found["ran"], "code of the input ran"
    assert found["added"] == [], "reading made files"
    assert found["seconds"] < 30
    if isinstance(expected, Reads):
        assert "error" not in found, found["text"]
        assert found["rows"] == expected.rows
        assert [tuple(row) for row in found["dropped"]] == list(expected.dropped)
        assert not expected.ids or tuple(found["ids"]) == expected.ids
    else:
        assert re.fullmatch(expected.error, found.get("error", f"read {found.get('rows')} rows")), (
            found
        )
        assert re.search(expected.words, found["text"]), found["text"]
        assert found["remedy"]
        assert "\n" not in found["text"]
