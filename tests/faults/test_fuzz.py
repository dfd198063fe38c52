"""Damaged copies of valid files: each is an error of gradsift, or a pool whose counts add up and
which reads back as it was written.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.fuzz import ARRAY, KINDS, TEXT, check_read

ROOT = Path(__file__).resolve().parents[2]
COUNT = int(os.environ.get("GRADSIFT_FUZZ", "150"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_copies(tmp_path: Path, kind: str) -> None:
    """In a process of its own: what is wrong with a binary reader may end it."""
    command = [sys.executable, "-m", "tests.faults.fuzz", kind, "0", str(COUNT), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    at = (tmp_path / "at").read_text() if (tmp_path / "at").exists() else "start"
    assert done.returncode == 0, f"at {at}, ended with {done.returncode}: {done.stderr[-3000:]}"
    assert f" of {COUNT} read" in done.stdout


PLACES = st.lists(
    st.tuples(st.integers(0, 10_000), st.integers(0, 9), st.binary(max_size=6)), max_size=5
)


@settings(
    max_examples=COUNT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(base=st.sampled_from([TEXT, ARRAY]), changes=PLACES)
def test_any_bytes_put_anywhere(
    tmp_path: Path, base: bytes, changes: list[tuple[int, int, bytes]]
) -> None:
    data = base
    for at, gone, put in changes:
        at %= len(data) + 1
        data = data[:at] + put + data[at + gone :]
    path = tmp_path / ("p.json" if base is ARRAY else "p.jsonl")
    path.write_bytes(data)
    assert check_read(path) or changes


@settings(
    max_examples=COUNT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(max_size=200),
    st.sampled_from(
        [".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", "", ".txt"]
    ),
)
def test_any_bytes_under_any_name(tmp_path: Path, data: bytes, suffix: str) -> None:
    (tmp_path / f"p{suffix}").write_bytes(data)
    check_read(tmp_path / f"p{suffix}")
