"""What a plan says of memory and what a run takes, each in a process forked from one that has
imported everything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import gradsift
from gradsift.commands.plan.plan import plan
from gradsift.compute import machine

# Imported here, so that what it takes is held before.
from gradsift.model.warmup import warm_up  # noqa: F401
from tests.faults.forks import serve


def work(order: dict[str, Any]) -> dict[str, float]:
    """MB beyond what the process held at first: {"peak"} of a selection, and {"gradients"}, the
    peak at the end of that stage; or {"peak"} as planned.
    """
    machine.settle(1)
    machine.forget_peak()
    held = machine.peak_bytes()
    arguments = {
        name: order[name]
        for name in ("pool", "target", "model", "run", "budget", "settings", "options")
    }
    if order["plan"]:
        return {"peak": (plan(order["method"], **arguments).peak_bytes - held) / 1e6}
    made = gradsift.select(order["method"], **arguments)
    assert Path(order["run"]).exists()
    gradients = max(t.peak_bytes for t in made.timings if t.stage == "gradients")
    return {"peak": (machine.peak_bytes() - held) / 1e6, "gradients": (gradients - held) / 1e6}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(work)
