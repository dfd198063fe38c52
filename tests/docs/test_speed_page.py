"""docs/speed.md: the shape of the page, and what its generator makes of results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.pages import check_measured

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "generate_speed", ROOT / "docs" / "generate_speed.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_shape_of_the_results(speed: ModuleType) -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    check_measured(page, speed.page(ROOT / "bench" / "results"), "python docs/generate_speed.py")


def test_a_missed_goal_stands_beside_its_figure(speed: ModuleType, tmp_path: Path) -> None:
    arm = {"cpu_ratio": [0.9, 0.8, 1.0], "goal": 0.75, "memory_ratio": 0.5, "tokens_per_s": 1234}
    found = {
        "parameters": 7e6,
        "rows": 4,
        "rounds": 5,
        "cpu": "x",
        "store": {},
        "left_out": {"peer": "not installed"},
        "arms": {"floor-lora": arm, "lora-sketch-1024": arm, "peer-x": arm},
    }
    (tmp_path / "engine.json").write_text(json.dumps(found))
    page = speed.page(tmp_path)
    assert "| LoRA, one global row of 1,024 | 0.90 (0.80 to 1.00) | 0.75 | 0.50 | 1,234 |" in page
    assert "| *peer-x* | 0.90" in page and "`peer`: not installed" in page and "Ray" not in page
