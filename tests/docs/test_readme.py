"""The README's quickstart runs as it stands, on real files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import rows, write_rows

ROOT = Path(__file__).resolve().parents[2]


def snippets(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path, model_folder: Path) -> None:
    write_rows(tmp_path / "pool.jsonl", rows(300))
    write_rows(tmp_path / "dev.jsonl", [row for row in rows(20, seed=5) if row["kind"] == "back"])
    shutil.copytree(model_folder, tmp_path / "my-model")
    script = snippets(ROOT / "README.md")[0]
    assert script == snippets(ROOT / "docs" / "quickstart.md")[0]
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    count, subset, report = ran.stdout.split()
    assert int(count) == 15
    assert len((tmp_path / subset).read_bytes().splitlines()) == 15
    assert Path(report).name == "report.html"


def test_the_rules_and_methods_take_any_vectors(tmp_path: Path) -> None:
    script = snippets(ROOT / "docs" / "quickstart.md")[-1] + "\nprint(len(subset))\n"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == "50", ran.stderr


def test_every_link_of_the_readme_and_docs_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
