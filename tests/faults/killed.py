"""Kills a real `gradsift select` at random instants, again and again, and checks what is left and what comes of it.

    python -m tests.faults.killed --kills 200 --seed 0

A run is killed until it ends by itself; then another begins. After every kill, each shard that had its name still is the same file (inode
and time of change), and so is every file of a finished artifact. Every run that ends has the content digests of one that was left alone,
and the same chosen bytes, verifies, and holds no file of a dead writer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from gradsift.run import Run
from tests.conftest import TEMPLATE
from tests.faults.forks import Server
from tests.lora_parts import llama, tokenizer

TOML = """
[encode]
max_length = 128
[warmup]
min_rows = 24
min_steps = 24
epochs = 1
batch_size = 4
checkpoints = 2
lora = {r = 2, alpha = 4}
[gradients]
dim = 64
shard_rows = 8
token_budget = 512
[machine]
threads = 1
"""


@dataclass
class Tally:
    """What came of it."""

    kills: int = 0
    runs: int = 0
    seconds: float = 0.0
    shards: int = 0

    def __str__(self) -> str:
        runs = f"{self.runs} runs ended with the digests of the uninterrupted one"
        return f"{self.kills} kills in {self.seconds:.0f} s; {runs}; {self.shards} finished shards were looked at, none was rewritten"


def prepare(folder: Path, rows: int = 100) -> list[str]:
    """A playground, a random model and the settings; returns the command without --run and --out."""
    from gradsift.playground import write_playground

    files = write_playground(folder / "playground", rows=rows, dev=16, test=16)
    llama(max_position_embeddings=256).save_pretrained(folder / "model")
    made = tokenizer()
    made.chat_template = TEMPLATE
    made.save_pretrained(folder / "model")
    (folder / "settings.toml").write_text(TOML)
    named = {"pool": files.pool, "target": files.target, "model": folder / "model", "config": folder / "settings.toml", "budget": "10%"}
    return ["select", "less", *(text for name, value in named.items() for text in (f"--{name}", str(value)))]


def digests(root: Path) -> dict[str, str]:
    """Content digest of every artifact of a run, by folder name. Asserts that all are complete."""
    return {artifact.path.name: artifact.content for artifact in Run(root).artifacts()}


def finished(root: Path) -> dict[str, tuple[int, int]]:
    """(inode, time of change) of every shard that has its name, and of every file that the manifest of an artifact names."""
    found = set(root.glob("*/rows-*.safetensors"))
    for manifest in root.glob("*/manifest.json"):
        found |= {manifest, *(manifest.parent / name for name in json.loads(manifest.read_bytes())["files"])}
    return {path.relative_to(root).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def strays(root: Path) -> list[str]:
    """Files of dead writers."""
    return sorted(path.name for path in root.rglob(".*") if path.name != ".gradsift-lock")


def kill(folder: Path, kills: int, seed: int, *, minutes: float = float("inf"), say: bool = False) -> Tally:
    """Kills runs in `folder` until `kills` have struck, or so many minutes are over, and the last run has ended by itself.

    Raises AssertionError.
    """
    command, rng, tally = prepare(folder), random.Random(seed), Tally()
    server = Server("tests.faults.job")
    try:
        alone, started = folder / "alone", time.monotonic()
        server.order(arguments=[*command, "--run", str(alone), "--out", str(folder / "alone.jsonl")], log=str(folder / "alone.log"))
        status = server.answer()
        assert (status["status"], status["answer"]) == (0, 0), (folder / "alone.log").read_text()[-2000:]
        wanted, bytes_out, whole = digests(alone), (folder / "alone.jsonl").read_bytes(), time.monotonic() - started
        if say:
            print(f"seed {seed}; a run takes {whole:.1f} s, has {len(wanted)} artifacts, {len(finished(alone))} files", flush=True)
        begun = time.monotonic()
        until = begun + 60 * minutes
        while tally.kills < kills and time.monotonic() < until:
            root, out = folder / f"run-{tally.runs}", folder / f"out-{tally.runs}.jsonl"
            order = {"arguments": [*command, "--run", str(root), "--out", str(out)], "log": str(folder / f"run-{tally.runs}.log")}
            before: dict[str, tuple[int, int]] = {}
            while True:
                pid = server.order(**order)
                if tally.kills < kills and time.monotonic() < until:
                    time.sleep(rng.uniform(0, whole))
                    os.kill(pid, signal.SIGKILL)
                status = server.answer()
                after = finished(root) if root.exists() else {}
                assert before.items() <= after.items(), (
                    f"rewritten after kill {tally.kills}: {sorted(dict(before.items() - after.items()))}"
                )
                before = after
                tally.shards += sum("rows-" in name for name in after)
                if status["status"] != -signal.SIGKILL:
                    whole *= 0.7  # what is left of a run grows shorter, and the machine may be faster now: strike earlier
                    break
                whole *= 1.05
                tally.kills += 1
                if say and not tally.kills % 20:
                    print(f"{tally.kills} kills, {tally.runs} runs ended, {time.monotonic() - begun:.0f} s", flush=True)
            assert (status["status"], status["answer"]) == (0, 0), Path(order["log"]).read_text()[-2000:]
            assert digests(root) == wanted
            assert out.read_bytes() == bytes_out
            assert Run(root).verify() == []
            assert strays(root) == []
            assert [path.name for path in folder.glob(".*")] == []
            shutil.rmtree(root)
            tally.runs += 1
        tally.seconds = time.monotonic() - begun
    finally:
        server.close()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gradsift-faults-") as folder:
        print(kill(Path(folder), arguments.kills, arguments.seed, minutes=arguments.minutes, say=True))


if __name__ == "__main__":
    sys.exit(main())
