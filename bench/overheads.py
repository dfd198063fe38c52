"""What safety costs: the share of a run that goes into hashing, syncing and writing.

    python bench/overheads.py [--rounds 5] [--rows 400] [--dim 8192] [--shard-rows 128] [--folder
    DIR] [--json FILE]

Job: `gradsift select less` on the playground with a random Llama of hidden size 256, from an empty
folder. Two arms take turns within a round: "safe" is gradsift as it is, every call to the hash, to
fsync and to write being timed; "bare" does the same with an fsync that does nothing, and checks the
sum from outside. Then, in the safe run's folder, another budget is chosen: every stage is reused,
so what it hashes is what a later command pays for reading stored rows. Printed: medians over the
rounds (min, max), in percent of the run's seconds. `goal` is the bound the project set itself (2 %,
hashing and fsync together); nothing fails when it is missed. --folder: on which disk; the default
is that of temporary files, which in memory would make syncing free.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import steady  # noqa: F401

# isort: split
import torch
import xxhash
from transformers import LlamaConfig, LlamaForCausalLM

import gradsift
from gradsift.commands.demo.playground import write_playground
from tests.conftest import TEMPLATE
from tests.model.small_models import VOCAB, tokenizer

GOAL = 2.0  # percent


class Clock:
    """Seconds spent in some functions, which it wraps for as long as it is entered."""

    def __init__(self, *, sync: bool) -> None:
        self.seconds = {"hash": 0.0, "fsync": 0.0, "write": 0.0}
        self.calls = dict.fromkeys(self.seconds, 0)
        self._sync = sync
        self._real: tuple[Any, ...] = ()

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds[kind] += time.perf_counter() - started
                self.calls[kind] += 1

        return call

    def __enter__(self) -> Clock:
        clock, real = self, xxhash.xxh3_128

        class Hasher:
            def __init__(self, data: Any = b"") -> None:
                self._hasher = clock.timed("hash", real)(data)
                self.update = clock.timed("hash", self._hasher.update)
                self.hexdigest, self.digest = self._hasher.hexdigest, self._hasher.digest

        self._real = (xxhash.xxh3_128, os.fsync, os.write)
        xxhash.xxh3_128 = Hasher  # type: ignore[misc, assignment]
        os.fsync = self.timed("fsync", os.fsync if self._sync else lambda fd: None)
        os.write = self.timed("write", os.write)
        return self

    def __exit__(self, *_: object) -> None:
        xxhash.xxh3_128, os.fsync, os.write = self._real  # type: ignore[misc, assignment]


def prepare(folder: Path, rows: int) -> dict[str, Any]:
    files = write_playground(folder / "playground", rows=rows, dev=32, test=8)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
    }
    LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=256)).save_pretrained(folder / "model")
    made = tokenizer()
    made.chat_template = TEMPLATE
    made.save_pretrained(folder / "model")
    return {"pool": files.pool, "target": files.target, "model": str(folder / "model")}


def job(
    run: Path, budget: str, parts: dict[str, Any], settings: dict[str, Any], *, sync: bool
) -> dict[str, Any]:
    started = time.perf_counter()
    with Clock(sync=sync) as clock:
        chosen = gradsift.select("less", run=run, budget=budget, settings=settings, **parts)
    whole = time.perf_counter() - started
    return {"seconds": whole, **clock.seconds, "calls": clock.calls, "ids": chosen.ids}


def summary(values: list[float]) -> list[float]:
    return [round(value, 3) for value in (statistics.median(values), min(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--shard-rows", type=int, default=128)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = {
        "encode": {"max_length": 256},
        "gradients": {"dim": args.dim, "shard_rows": args.shard_rows},
        "warmup": {"min_rows": 64, "min_steps": 40},
        "machine": {"threads": 1},
    }
    found: dict[str, list[dict[str, Any]]] = {"safe": [], "bare": [], "reused": []}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="gradsift-overheads-") as name:
        folder = Path(name)
        parts = prepare(folder, args.rows)
        # imports and caches belong to no arm
        job(folder / "warm", "5%", parts, settings, sync=True)
        stored = sum(path.stat().st_size for path in (folder / "warm").rglob("*") if path.is_file())
        shutil.rmtree(folder / "warm")
        for number in range(args.rounds):
            for arm in ("safe", "bare") if number % 2 else ("bare", "safe"):
                found[arm].append(job(folder / arm, "5%", parts, settings, sync=arm == "safe"))
                if arm == "safe":
                    found["reused"].append(job(folder / arm, "6%", parts, settings, sync=True))
                shutil.rmtree(folder / arm)
    if any(one["ids"] != found["safe"][0]["ids"] for arm in ("safe", "bare") for one in found[arm]):
        sys.exit("the runs chose different rows")

    def share(arm: str, *kinds: str) -> list[float]:
        return summary(
            [100 * sum(one[kind] for kind in kinds) / one["seconds"] for one in found[arm]]
        )

    report = {
        "goal_percent": GOAL,
        "hash_and_fsync_percent": share("safe", "hash", "fsync"),
        "hash_percent": share("safe", "hash"),
        "fsync_percent": share("safe", "fsync"),
        "write_percent": share("safe", "write"),
        "safe_over_bare": summary(
            [a["seconds"] / b["seconds"] for a, b in zip(found["safe"], found["bare"], strict=True)]
        ),
        "seconds": summary([one["seconds"] for one in found["safe"]]),
        "reused_seconds": summary([one["seconds"] for one in found["reused"]]),
        "reused_hash_seconds": summary([one["hash"] for one in found["reused"]]),
        "calls": found["safe"][0]["calls"],
        "stored_bytes": stored,
        "rounds": args.rounds,
        "rows": args.rows,
        "dim": args.dim,
        "shard_rows": args.shard_rows,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
