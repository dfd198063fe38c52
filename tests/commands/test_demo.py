"""The demo as `make demo` runs it: offline, and its own check must pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gradsift.commands.compare.results import Arm, ArmResult, Comparison, Results
from gradsift.commands.demo.demo import Demo, Shares
from gradsift.report import ReportData


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_passes_its_own_check(tmp_path: Path) -> None:
    gradsift = str(Path(sys.executable).parent / "gradsift")
    ran = subprocess.run(
        [gradsift, "demo", "--run", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "The targeted method beats random." in ran.stdout
    reports = list(tmp_path.glob("demo/run/select-*/report.json"))
    compared = [ReportData.model_validate_json(path.read_bytes()).comparison for path in reports]
    names = {
        tuple(result.name for result in found.results) for found in compared if found is not None
    }
    assert names == {("less", "tagcos", "random", "untrained")}
    notes = {
        result.note
        for found in compared
        if found is not None
        for result in found.results
        if result.name == "less"
    }
    assert len(notes) == 1 and "of the target's family" in notes.pop()


@pytest.mark.parametrize(
    ("loss", "family", "noise", "passed"),
    [
        (1.0, 0.6, 0.05, True),
        (1.3, 0.6, 0.05, False),
        (1.0, 0.2, 0.05, False),
        (1.0, 0.6, 0.15, False),
    ],
)
def test_the_check_can_fail(loss: float, family: float, noise: float, passed: bool) -> None:
    arms = (
        Arm("less", "method", 10, 5, 0.0),
        Arm("random", "control", 10, 5, 0.0),
        Arm("untrained", "none", 0, 0, 0.0),
    )
    lines = (
        ArmResult("less", loss, (loss,), 5, loss - 1.2, loss - 1.3, loss - 1.1),
        ArmResult("random", 1.2, (1.2,), 5),
        ArmResult("untrained", 1.5, (1.5,), 0, 0.3, 0.2, 0.4),
    )
    comparison = Comparison("random", 0.95, arms, (Results("test", "loss", "steps", lines),))
    result = Demo(comparison, {"less": Shares(family, noise), "random": Shares(0.1, 0.2)}, 1.0)
    assert result.passed is passed
    head, less, random, untrained, _, _, verdict = result.table().split("\n")
    assert head.split() == [
        "held-out",
        "loss",
        "against",
        "random",
        "(95",
        "%)",
        "target",
        "family",
        "noise",
        "rows",
    ]
    gap = f"{loss - 1.2:+.3f} ({loss - 1.3:+.3f} to {loss - 1.1:+.3f})"
    assert less.split() == [
        "less",
        f"{loss:.3f}",
        *gap.split(),
        f"{family:.0%}",
        f"{noise:.0%}",
        "10",
    ]
    assert random.split() == ["random", "1.200", "10%", "20%", "10"]
    assert untrained.split() == ["untrained", "1.500"]
    assert ("this is a fault" in verdict) is not passed
