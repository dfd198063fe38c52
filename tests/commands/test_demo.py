"""The demo as `make demo` runs it: offline, and its own check must pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gradsift.commands.compare.statistics import Interval
from gradsift.commands.demo.demo import Demo, Line
from gradsift.report import ReportData


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_passes_its_own_check(tmp_path: Path) -> None:
    gradsift = str(Path(sys.executable).parent / "gradsift")
    ran = subprocess.run([gradsift, "demo", "--run", str(tmp_path / "demo")], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "The targeted method beats random." in ran.stdout
    reports = list(tmp_path.glob("demo/run/select-*/report.json"))
    compared = [ReportData.model_validate_json(path.read_bytes()).comparison for path in reports]
    names = {tuple(result.name for result in found.results) for found in compared if found is not None}
    assert names == {("less", "tagcos", "random", "untrained")}


@pytest.mark.parametrize(
    ("loss", "family", "noise", "passed"),
    [(1.0, 0.6, 0.05, True), (1.3, 0.6, 0.05, False), (1.0, 0.2, 0.05, False), (1.0, 0.6, 0.15, False)],
)
def test_the_check_can_fail(loss: float, family: float, noise: float, passed: bool) -> None:
    gap = Interval(loss - 1.2, loss - 1.3, loss - 1.1, 0.95)
    lines = [Line("less", loss, gap, family, noise, 10), Line("random", 1.2, None, 0.1, 0.2, 10)]
    assert Demo(lines, 1.5, {}, 1.0).passed is passed
