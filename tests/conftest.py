"""Small real parts for tests of the whole job: a random model with a byte tokenizer and a chat
template, a pool, a target.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.model.small_models import llama, tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}{% if"
    " add_generation_prompt %}<assistant>{% endif %}"
)
SETTINGS: dict[str, dict[str, Any]] = {
    "encode": {"max_length": 64},
    "warmup": {
        "min_rows": 24,
        "min_steps": 30,
        "epochs": 1,
        "batch_size": 4,
        "lora": {"r": 2, "alpha": 4},
    },
    "gradients": {"dim": 64, "shard_rows": 16, "token_budget": 128},
    "machine": {"threads": 1},
}


def shared() -> Path:
    """The folder of development data beside the checkout; tests that read it skip where it is
    missing.
    """
    folder = Path(os.environ.get("GRADSIFT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"development data is not at {folder} (set GRADSIFT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    made = tokenizer()
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two kinds of rows that differ in letters and in length, interleaved."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        letters = "abcd" if i % 2 else "wxyz"
        question = "".join(rng.choice(list(letters), 6))
        answer = question[::-1] if i % 2 else question * 2
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found.append(
            {"id": f"r{i:03d}", "kind": "back" if i % 2 else "twice", "messages": messages}
        )
    return found


def write_rows(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pool_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pool") / "pool.jsonl", rows(72))


@pytest.fixture(scope="session")
def target_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    items = [item for item in rows(40, seed=9) if item["kind"] == "back"]
    return write_rows(tmp_path_factory.mktemp("target") / "dev.jsonl", items)
