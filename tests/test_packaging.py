"""The wheel as a user gets it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def tracked(*folders: str) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *folders],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).exists())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tracked files alone: no leftover of an earlier build can get into it."""
    if not (ROOT / ".git").exists():
        pytest.skip("the wheel is compared with the files that git tracks")
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        folder / "dist",
        folder / "source",
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = (folder / "dist").glob("gradsift-*.whl")
    return built


def test_the_wheel_holds_the_files_of_the_tree_and_no_others(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = sorted(name for name in files.namelist() if ".dist-info/" not in name)
    assert names == tracked("gradsift")
    assert {Path(name).suffix for name in names} == {".py", ".typed", ".j2", ".css"}


@pytest.mark.skipif(
    "GRADSIFT_TEST_WHEEL" not in os.environ,
    reason="set GRADSIFT_TEST_WHEEL=1 to install the wheel into an environment",
)
@pytest.mark.timeout(1500)
def test_the_wheel_installs_into_a_clean_environment_and_answers(
    wheel: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "torch"], check=True
    )
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel], check=True
    )
    ran = subprocess.run(
        [tmp_path / "env" / "bin" / "gradsift", "--version"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.stdout.startswith("gradsift 0.")
