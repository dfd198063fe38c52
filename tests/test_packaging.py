"""The wheel as a user gets it. Slow (a second environment), so only where GRADSIFT_TEST_WHEEL is set, as continuous integration does."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif("GRADSIFT_TEST_WHEEL" not in os.environ, reason="set GRADSIFT_TEST_WHEEL=1 to build and install the wheel")
@pytest.mark.timeout(1500)
def test_the_wheel_installs_into_a_clean_environment_and_answers(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("gradsift-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "torch"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel], check=True)
    ran = subprocess.run([tmp_path / "env" / "bin" / "gradsift", "--version"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.startswith("gradsift 0.")
    files = subprocess.run(
        [
            python,
            "-c",
            "import gradsift.report.page, pathlib; print(*sorted(p.name for p in pathlib.Path(gradsift.__file__).parent.rglob('*.j2')))",
        ],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    assert "page.html.j2" in files
