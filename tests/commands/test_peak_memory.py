"""Peak memory: what a plan says beforehand is what a run takes, and more rows take no more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import TEMPLATE, write_rows
from tests.faults.forks import Server
from tests.model.small_models import llama, tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux", reason="peak memory can only be started anew on Linux"
    ),
]
WARMUP = {"min_rows": 16, "min_steps": 12, "epochs": 1, "batch_size": 4, "checkpoints": 1}
LORA = {"dim": 8192}
LINEAR = {"modules": "linear", "projection": "rademacher", "dim": (16, 16)}
LENGTHS = {"short": 12, "long": 220}  # letters of a question and of its answer, a token each
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("less", {}),
    "linear": ("tagcos", {"transform": "none", "clusters": 4}),
    "curved": ("gdig", {"clusters": 4}),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    serving = Server("tests.commands.peak_memory")
    yield serving
    serving.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its activations, not Python's own objects, are most of what is measured."""
    folder = tmp_path_factory.mktemp("model")
    llama(
        hidden_size=256, intermediate_size=688, vocab_size=4096, max_position_embeddings=1024
    ).save_pretrained(folder)
    made = tokenizer()
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def pool(path: Path, count: int, letters: int, seed: int) -> Path:
    """The longest row comes first, so that a pool six times as large has no longer one."""
    rng = np.random.default_rng(seed)
    sizes = [letters, *rng.integers(letters // 2, letters, count - 1)]
    texts = [["".join(rng.choice(list("abcdefgh"), size)) for _ in range(2)] for size in sizes]
    said = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
    return write_rows(
        path, [{"id": f"r{i:04d}", "messages": messages} for i, messages in enumerate(said)]
    )


def measured(
    server: Server,
    folder: Path,
    model: Path,
    kind: str,
    length: str,
    rows: int,
    *,
    planned: bool = False,
) -> dict[str, float]:
    method, options = METHODS[kind]
    wanted = 40 if kind == "curved" else 6  # from 32 on pool gradients are held back
    files = (
        pool(folder / f"{rows}.jsonl", rows, LENGTHS[length], 0),
        pool(folder / "target.jsonl", wanted, LENGTHS[length], 1),
    )
    gradients = {**(LORA if kind == "lora" else LINEAR), "shard_rows": 32}
    settings = {
        "encode": {"max_length": 1024},
        "warmup": WARMUP,
        "gradients": gradients,
        "machine": {"threads": 1},
    }
    server.order(
        plan=planned,
        method=method,
        pool=str(files[0]),
        target=[] if method == "tagcos" else [str(files[1])],
        model=str(model),
        run=str(folder / f"run-{rows}"),
        budget="25%",
        settings=settings,
        options=options,
    )
    answer = server.answer()
    assert answer["status"] == 0
    return answer["answer"]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", METHODS)
def test_the_planned_peak_is_the_run_s(
    server: Server, tmp_path: Path, model: Path, kind: str, length: str
) -> None:
    rows = 64 if length == "short" else 24
    planned = measured(server, tmp_path, model, kind, length, rows, planned=True)["peak"]
    found = measured(server, tmp_path, model, kind, length, rows)["peak"]
    assert planned == pytest.approx(found, rel=0.25)


def test_making_a_hundred_times_the_rows_takes_no_more_memory(
    server: Server, tmp_path: Path, model: Path
) -> None:
    few, many = (
        measured(server, tmp_path, model, "lora", "short", rows)["gradients"] for rows in (48, 4800)
    )
    # less than the added rows take as they are stored: none is kept
    assert many - few < (4800 - 48) * 2 * 8192 / 1e6
