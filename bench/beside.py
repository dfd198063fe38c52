"""What other busy processes cost `gradsift select`, by how its threads wait for each other.

    python bench/beside.py [--beside 0 1 2] [--waiting chosen spin passive bounded] [--seconds 8]
    [--rounds 1] [--model NAME] [--pool FILE] [--json FILE]

Job: warm-up steps and gradient rows of `gradsift select` on the playground, with a random Llama of
hidden size 256 (or on a model and a pool of yours), each for so many seconds, by as many threads as
there are cores, in a process of its own beside none, one or two processes that only spin. Waiting:
`chosen` as the command line chooses it by the load, `spin` as OpenMP does by itself, `passive`
(OMP_WAIT_POLICY=passive), `bounded` (GOMP_SPINCOUNT=20000). Printed: steps a minute, tokens a
second, and the share of the fastest arm beside nobody that is left (the geometric mean of both).
Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gradsift.compute import threads

POLICIES: dict[str, dict[str, str]] = {
    "chosen": {},
    "spin": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "bounded": {"GOMP_SPINCOUNT": "20000"},
}


def of_steps(steps: int) -> dict[str, dict[str, Any]]:
    """A warm-up of `steps` steps of 16 rows, by as many threads as there are cores."""
    return {
        "encode": {"max_length": 256},
        "gradients": {"shard_rows": 64},
        "warmup": {"checkpoints": 1, "min_rows": 128, "epochs": 1, "min_steps": steps},
        "machine": {"threads": threads.usable_cores()},
    }


# The run in which the warm-up is measured never gets to its end; the other one has a short one.
RUNS = {"cold": of_steps(1000), "warm": of_steps(10)}


# ends with the bench, however that ends
SPIN = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n for _ in range(10**6): pass"


class Enough(Exception):
    """The time of a stage is over."""


class Pace:
    """Progress that counts what a stage does after its first unit, and ends it after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.notes = seconds, list[str]()
        self.start(0, "")

    def start(self, total: int, unit: str, label: str = "") -> None:
        self.label, self.count, self.began = label, 0, 0.0

    def advance(self, k: int = 1) -> None:
        now = time.perf_counter()
        if not self.began:
            self.began = now
            return
        self.count += k
        if now - self.began > self.seconds:
            raise Enough

    def note(self, text: str) -> None:
        self.notes.append(text)

    def done(self) -> None: ...

    def rate(self) -> float:
        """Units a second, until now: a stage ends with a unit, or where one takes too long."""
        return self.count / (time.perf_counter() - self.began) if self.began else 0.0


def measure(job: dict[str, Any]) -> None:
    """The measured process: prints {"steps_per_minute", "tokens_per_second", "line"}."""
    if job["waiting"] == "chosen":
        threads.observe()
        threads.waiting().choose(0)
    from gradsift.commands.preflight import Inputs
    from gradsift.commands.session import opened
    from gradsift.stages.rows import gradients

    def enough(signum: int, frame: Any) -> None:
        raise Enough

    signal.signal(signal.SIGALRM, enough)
    rates, notes = {}, []
    for name, settings in RUNS.items():
        pace = Pace(job["seconds"])
        inputs = Inputs(job[name], job["pool"], model=job["model"], settings=settings)
        signal.setitimer(signal.ITIMER_REAL, 3 * job["seconds"])
        with contextlib.suppress(Enough), opened(inputs, progress=pace) as pipeline:
            if name == "cold":
                pipeline.checkpoints()
            else:
                gradients(pipeline, "pool", 0, "none")
        rates[name] = pace.rate()
        signal.setitimer(signal.ITIMER_REAL, 0)
        notes += [line for line in pace.notes if "while they wait" in line]
    found = {
        "steps_per_minute": round(60 * rates["cold"], 1),
        "tokens_per_second": round(rates["warm"], 1),
        "line": notes[0] if notes else None,
    }
    print(json.dumps(found))


def prepare(folder: Path, model: str | None, pool: str | None) -> None:
    """Prints pool and model, and makes two runs: one with encoded rows, and one with a warm-up."""
    from overheads import prepare as made

    parts = made(folder, 600)
    job = {"model": model or parts["model"], "pool": pool or str(parts["pool"])}
    from gradsift.commands.preflight import Inputs
    from gradsift.commands.session import opened

    for name, chosen in RUNS.items():
        inputs = Inputs(folder / name, job["pool"], model=job["model"], settings=chosen)
        with opened(inputs) as pipeline:
            pipeline.encoded("pool")
            if name == "warm":
                pipeline.checkpoints()
    print(json.dumps(job))


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that do nothing but spin."""
    others = [
        subprocess.Popen([sys.executable, "-c", SPIN, str(os.getpid())]) for _ in range(count)
    ]
    try:
        time.sleep(0.5)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def arm(job: dict[str, Any], waiting: str, beside: int) -> dict[str, Any]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in (*threads.WAITING, threads.COUNT)
    }
    folder = Path(job["folder"])
    runs = {name: str(shutil.copytree(folder / name, folder / f"{name}-now")) for name in RUNS}
    given = {**job, **runs, "waiting": waiting}
    with busy(beside):
        done = subprocess.run(
            [sys.executable, __file__, "--measure", json.dumps(given)],
            env=environment | POLICIES[waiting],
            capture_output=True,
            text=True,
        )
    for run in runs.values():
        shutil.rmtree(run)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def openmp() -> str:
    """The name of the OpenMP library that torch loads here."""
    import torch  # noqa: F401

    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    return next(iter(re.findall(r"lib(?:g|i|)omp[^/\s]*\.so[^/\s]*", loaded)), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--waiting", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--model")
    parser.add_argument("--pool")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        prepare(args.prepare, args.model, args.pool)
        return
    if args.measure:
        measure(json.loads(args.measure))
        return
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="gradsift-beside-") as name:
        job: dict[str, Any] = {"folder": name, "seconds": args.seconds}
        made = [sys.executable, __file__, *sys.argv[1:], "--prepare", name]
        done = subprocess.run(made, check=True, stdout=subprocess.PIPE, text=True)
        job |= json.loads(done.stdout.splitlines()[-1])
        for _ in range(args.rounds):
            for beside in args.beside:
                for waiting in args.waiting:
                    one = arm(job, waiting, beside)
                    print(waiting, beside, one, file=sys.stderr, flush=True)
                    found.setdefault((waiting, beside), []).append(one)
                    written(found, args)
    print(written(found, args))


def written(found: Mapping[tuple[str, int], list[dict[str, Any]]], args: argparse.Namespace) -> str:
    """The arms measured so far as JSON, which also goes to the file of --json."""
    arms = [
        {
            "waiting": waiting,
            "beside": beside,
            "steps_per_minute": statistics.median(one["steps_per_minute"] for one in rounds),
            "tokens_per_second": statistics.median(one["tokens_per_second"] for one in rounds),
            "line": rounds[-1]["line"],
        }
        for (waiting, beside), rounds in found.items()
    ]
    speeds = [(one["steps_per_minute"] * one["tokens_per_second"]) ** 0.5 for one in arms]
    alone = [s for s, one in zip(speeds, arms, strict=True) if not one["beside"]]
    for speed, one in zip(speeds, arms, strict=True):
        one["share_of_best_alone"] = round(speed / max(alone), 3) if alone else None
    result = {
        "arms": arms,
        "openmp": openmp(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": threads.usable_cores(),
        "machine": platform.machine(),
        "seconds": args.seconds,
        "rounds": args.rounds,
        "model": "a Llama of hidden size 256" if args.model is None else Path(args.model).name,
    }
    text = json.dumps(result, indent=1)
    if args.json:
        args.json.write_text(text + "\n")
    return text


if __name__ == "__main__":
    main()
