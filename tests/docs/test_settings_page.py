"""The page of all settings says what the settings records say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_settings_is_made_from_the_records() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate_settings.py", "--print"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert made == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert "| `max_length` | whole number | 1024 | `--max-length` |" in made
    assert '| `name` | text | `"tiny"` | `--model` |' in made
    lines = [line for line in made.splitlines() if line.startswith("| `")]
    sections = [line for line in lines if "a section `[" in line]
    for line in set(lines) - set(sections):
        cells = line.replace("\\|", "/").strip("| ").split(" | ")
        assert len(cells) == 5 and cells[-1].endswith((".", ")")), line
    for key in ("| `mapping` | table of texts |", "## [target]", "## [warmup.lora]", "`id_field`"):
        assert key in made
