"""SIGKILL at random instants over a real run: ten here, two hundred in `make faults`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.killed import kill

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1200)  # many real runs, on whatever machine
def test_a_run_killed_at_random_instants_ends_as_if_left_alone(tmp_path: Path) -> None:
    kills = int(os.environ.get("GRADSIFT_KILLS", "10"))
    seed = int(os.environ.get("GRADSIFT_KILL_SEED", "0"))
    tally = kill(tmp_path, kills, seed)
    print(f"seed {seed}: {tally}")
    assert tally.kills == kills
    assert tally.runs >= 1
    assert tally.shards > 0
    assert len(tally.struck) > 2
