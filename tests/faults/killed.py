"""Kills real `gradsift select`s at random instants, again and again, and checks what is left and
what comes of it.

    python -m tests.faults.killed --kills 200 --seed 0

A run is a selection by each of METHODS in one folder: stored rows, the kept parts of a curvature
and its scores, means and graphs. Each is killed a few times, then left to end; then another run
begins. After every kill, each shard that had its name still is the same file (inode and time of
change), and so is every file of a finished artifact, and every part that is still there. Every run
that ends has the content digests of one that was left alone, and the same chosen bytes, verifies,
and holds no file of a dead writer.
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
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradsift.store.run import Run
from tests.conftest import TEMPLATE
from tests.faults.forks import Server
from tests.model.small_models import llama, tokenizer

METHODS = ("less", "gdig", "g2is", "tagcos")
MOST = 5  # kills of a method in one run: it shall also end

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
    struck: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    seconds: float = 0.0
    shards: int = 0
    parts: int = 0

    def __str__(self) -> str:
        runs = f"{self.runs} runs ended with the digests of the uninterrupted one"
        kills = (
            f"{self.kills} kills"
            f" ({', '.join(f'{name} {count}' for name, count in self.struck.items())}) in"
            f" {self.seconds:.0f} s"
        )
        return (
            f"{kills}; {runs}; {self.shards} finished shards and {self.parts} parts were looked at,"
            " none was rewritten"
        )


def prepare(folder: Path, rows: int = 100) -> list[str]:
    """A playground, a random model and the settings; returns the command of `less` without --run
    and --out.
    """
    from gradsift.commands.demo.playground import write_playground

    files = write_playground(folder / "playground", rows=rows, dev=16, test=16)
    llama(max_position_embeddings=256).save_pretrained(folder / "model")
    made = tokenizer()
    made.chat_template = TEMPLATE
    made.save_pretrained(folder / "model")
    (folder / "settings.toml").write_text(TOML)
    named = {
        "pool": files.pool,
        "target": files.target,
        "model": folder / "model",
        "config": folder / "settings.toml",
        "budget": "10%",
    }
    return [
        "select",
        "less",
        *(text for name, value in named.items() for text in (f"--{name}", str(value))),
    ]


def digests(root: Path) -> dict[str, str]:
    """Content digest of every artifact of a run, by folder name. Asserts that all are complete."""
    return {artifact.path.name: artifact.content for artifact in Run(root).artifacts()}


def finished(root: Path) -> dict[str, tuple[int, int]]:
    """(inode, time of change) of every shard that has its name, and of every file that the manifest
    of an artifact names.
    """
    found = set(root.glob("*/rows-*.safetensors"))
    for manifest in root.glob("*/manifest.json"):
        found |= {
            manifest,
            *(manifest.parent / name for name in json.loads(manifest.read_bytes())["files"]),
        }
    return {
        path.relative_to(root).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in found
    }


def parts(root: Path) -> dict[str, tuple[int, int]]:
    """The same of what finished shards of a stage gave: it goes when the stage is complete."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.glob("*/parts/*.safetensors")
    }


def strays(root: Path) -> list[str]:
    """Files of dead writers."""
    return sorted(path.name for path in root.rglob(".*") if path.name != ".gradsift-lock")


class _Runs:
    """What it takes to run a method in a folder, and to kill it there."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.tally = folder, random.Random(seed), Tally()
        self.command, self.server = prepare(folder), Server("tests.faults.job")
        self.seconds: dict[str, float] = {}  # about what each method takes

    def order(self, method: str, root: Path) -> dict[str, Any]:
        own = [method if word == "less" else word for word in self.command]
        if method == "tagcos":
            at = own.index("--target")
            del own[at : at + 2]
        out = self.folder / f"{root.name}-{method}.jsonl"
        return {
            "arguments": [*own, "--run", str(root), "--out", str(out)],
            "log": str(self.folder / f"{root.name}.log"),
        }

    def alone(self, root: Path) -> None:
        self.server.order(
            arguments=["methods"], log=str(self.folder / "warm.log")
        )  # the server imports now, not in the first method's time
        assert self.server.answer() == {"status": 0, "answer": 0}
        for method in METHODS:
            started, order = time.monotonic(), self.order(method, root)
            self.server.order(**order)
            status = self.server.answer()
            assert (status["status"], status["answer"]) == (0, 0), Path(order["log"]).read_text()[
                -2000:
            ]
            self.seconds[method] = time.monotonic() - started

    def killed(self, method: str, root: Path, kills: int) -> None:
        """Until it ends by itself, which it does once it was killed so often."""
        order, tally = self.order(method, root), self.tally
        before, parts_before = finished(root), parts(root)
        while True:
            pid = self.server.order(**order)
            if kills:
                time.sleep(self.rng.uniform(0, 0.6 * self.seconds[method]))
                os.kill(pid, signal.SIGKILL)
            status = self.server.answer()
            after, parts_after = finished(root), parts(root)
            lost = {name for name, stamp in before.items() if after.get(name) != stamp}
            lost |= {
                name
                for name, stamp in parts_before.items()
                if parts_after.get(name, stamp) != stamp
            }
            assert not lost, f"rewritten after kill {tally.kills}, of {method}: {sorted(lost)}"
            before, parts_before = after, parts_after
            tally.shards += sum("rows-" in name for name in after)
            tally.parts += len(parts_after)
            if status["status"] != -signal.SIGKILL:
                assert (status["status"], status["answer"]) == (0, 0), Path(
                    order["log"]
                ).read_text()[-2000:]
                # the machine may be faster now: strike earlier
                self.seconds[method] *= 0.7 if kills else 1.0
                return
            self.seconds[method] *= 1.05
            kills -= 1
            tally.kills += 1
            tally.struck[method] += 1


def kill(
    folder: Path, kills: int, seed: int, *, minutes: float = float("inf"), say: bool = False
) -> Tally:
    """Kills runs in `folder` until `kills` have struck, or so many minutes are over, and the last
    run has ended by itself.

    Raises AssertionError.
    """
    runs, alone = _Runs(folder, seed), folder / "alone"
    tally = runs.tally
    try:
        runs.alone(alone)
        wanted = digests(alone)
        if say:
            took = ", ".join(
                f"{method} {seconds:.1f} s" for method, seconds in runs.seconds.items()
            )
            print(
                f"seed {seed}; {took}; a run has {len(wanted)} artifacts, {len(finished(alone))}"
                " files",
                flush=True,
            )
        begun = time.monotonic()
        until = begun + 60 * minutes
        while tally.kills < kills and time.monotonic() < until:
            root = folder / f"run-{tally.runs}"
            for number, method in enumerate(METHODS):
                runs.killed(
                    method, root, min(MOST, -(-(kills - tally.kills) // (len(METHODS) - number)))
                )
            if say:
                print(
                    f"{tally.kills} kills, {tally.runs + 1} runs ended,"
                    f" {time.monotonic() - begun:.0f} s",
                    flush=True,
                )
            assert digests(root) == wanted
            for method in METHODS:
                name = f"{{}}-{method}.jsonl"
                assert (folder / name.format(root.name)).read_bytes() == (
                    folder / name.format("alone")
                ).read_bytes(), method
            assert Run(root).verify() == []
            assert strays(root) == []
            assert [path.name for path in folder.glob(".*")] == []
            shutil.rmtree(root)
            tally.runs += 1
        tally.seconds = time.monotonic() - begun
    finally:
        runs.server.close()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gradsift-faults-") as folder:
        print(
            kill(Path(folder), arguments.kills, arguments.seed, minutes=arguments.minutes, say=True)
        )


if __name__ == "__main__":
    sys.exit(main())
