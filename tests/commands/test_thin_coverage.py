"""Where gradients see less than half of what trains, the run says so before it computes them, and
the selection's warnings and verdict repeat it with names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import gradsift
from gradsift.compute.progress import Silent
from tests.conftest import SETTINGS
from tests.model.small_models import llama


class Notes(Silent):
    """Keeps the notes and the labels of stages, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)

    def start(self, total: int, unit: str, label: str = "") -> None:
        self.told.append(label)


@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {}])
def test_a_selection_says_what_its_gradients_do_not_see(
    extra: dict[str, Any], model_folder: Path, pool_file: Path, target_file: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    adapter = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **extra)
    )
    adapter.save_pretrained(str(tmp_path / "adapter"))
    progress = Notes()
    chosen = gradsift.select(
        "bids",
        pool=str(pool_file),
        target=str(target_file),
        budget=5,
        run=tmp_path / "run",
        model=str(model_folder),
        warmup_from=tmp_path / "adapter",
        settings=SETTINGS,
        progress=progress,
    )
    early = [k for k, text in enumerate(progress.told) if text.startswith("warning: gradients see")]
    page = Path(chosen.report).read_text(encoding="utf-8")
    if not extra:
        assert not early and "of the" in page and "not seen:" not in page
        return
    begun = next(k for k, text in enumerate(progress.told) if text.startswith("gradients of the"))
    assert early and early[0] < begun
    assert "lm_head.modules_to_save.default.weight" in progress.told[early[0]]
    [warned] = [text for text in chosen.warnings if "gradients see" in text]
    assert "parameters that train; not seen: " in warned and "lm_head" in warned
    assert warned in page
