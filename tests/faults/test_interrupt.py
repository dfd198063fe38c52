"""A real SIGTERM and a real SIGINT to a real `gradsift select`, in the warm-up and between two
shards.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forks import ROOT, Server
from tests.faults.killed import digests, finished, prepare

pytestmark = pytest.mark.slow


@dataclass
class Alone:
    """A run that nothing interrupted, and what makes another like it."""

    folder: Path
    command: list[str]
    server: Server
    digests: dict[str, str]
    subset: bytes

    def run(self, arguments: list[str]) -> dict[str, Any]:
        self.server.order(arguments=arguments, log=str(self.folder / "log"))
        return self.server.answer()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    folder = tmp_path_factory.mktemp("signals")
    command, server = prepare(folder), Server("tests.faults.job")
    try:
        found = Alone(folder, command, server, {}, b"")
        assert found.run(
            [*command, "--run", str(folder / "alone"), "--out", str(folder / "alone.jsonl")]
        ) == {"status": 0, "answer": 0}
        found.digests, found.subset = (
            digests(folder / "alone"),
            (folder / "alone.jsonl").read_bytes(),
        )
        yield found
    finally:
        server.close()


def stopped(
    arguments: list[str], number: signal.Signals, run: Path, reached: str
) -> tuple[int, str, str]:
    """Runs the command, sends it the signal once `reached` is there, and returns its status, stdout
    and stderr.
    """
    command = [str(Path(sys.executable).parent / "gradsift"), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 600
        while not list(run.glob(reached)) and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(number)
        said, told = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, said, told


@pytest.mark.parametrize(
    ("number", "reached"), [(signal.SIGTERM, "gradients-*/rows-*"), (signal.SIGINT, "warmup-*")]
)
def test_a_signal_ends_the_process_with_130_and_the_command_it_names_resumes(
    number: signal.Signals, reached: str, alone: Alone
) -> None:
    status, attempt, until = 0, 0, time.monotonic() + 600
    while status == 0:  # on a busy machine the job may end before it is seen to have begun
        assert time.monotonic() < until
        attempt += 1
        run, out = (
            alone.folder / f"{number.name}{attempt}",
            alone.folder / f"{number.name}{attempt}.jsonl",
        )
        status, said, told = stopped(
            [*alone.command, "--run", str(run), "--out", str(out)], number, run, reached
        )
    assert status == 130, told
    assert said == ""
    assert f"stopped by {number.name}" in told
    assert not out.exists()
    assert not list(run.glob("select-*/manifest.json"))
    (line,) = [line for line in told.splitlines() if "Resume with: " in line]
    program, *arguments = shlex.split(line.partition("Resume with: ")[2])
    assert program == "gradsift"
    kept = finished(run)
    assert any("rows-" in name for name in kept) == ("rows-" in reached)
    assert alone.run(arguments) == {"status": 0, "answer": 0}
    assert kept.items() <= finished(run).items()
    assert digests(run) == alone.digests
    assert out.read_bytes() == alone.subset
