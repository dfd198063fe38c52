"""A consumer of the engine is told of every parameter once, and can make of it what `extract`
does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.gradients.capture import Batch, Call, Capture
from gradsift.gradients.passes import extract
from gradsift.gradients.projection import Projection
from gradsift.gradients.weight_grads import product
from tests import tolerances as tol
from tests.gradients.one_by_one import build, collect, make_rows


class Whole:
    """Keeps every gradient [b, o, i] by name, and what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.grads: dict[str, Tensor] = {}

    def begin(self, batch: Batch) -> None:
        self.told.append("begin")
        self.grads = {}

    def gradient(self, name: str, calls: list[Call]) -> None:
        assert not torch.is_grad_enabled()
        self.told.append(name)
        self.grads[name] = torch.stack([product(source.by_example, g) for source, g in calls]).sum(
            0
        )


def labelled(rows: list[dict[str, list[int]]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array(row["input_ids"][:-1]), np.array(row["labels"][1:])) for row in rows]


def test_a_consumer_is_told_of_the_batch_and_then_of_every_parameter_once() -> None:
    model, rows, whole = build("llama", lora=False), make_rows(5), Whole()
    capture = Capture(model, "linear")
    losses = capture.run(labelled(rows), whole)
    assert whole.told[0] == "begin" and sorted(whole.told[1:]) == sorted(capture.shapes)
    expected = collect(
        extract(model, rows, modules="linear", projection=Projection(None, kind="identity")), 5
    )
    norms = (
        torch.stack([grad.flatten(1).square().sum(1) for grad in whole.grads.values()])
        .sum(0)
        .sqrt()
    )
    torch.testing.assert_close(norms, expected.norms, rtol=tol.NORM_RTOL, atol=0)
    torch.testing.assert_close(losses, expected.losses, rtol=tol.LOSS_RTOL, atol=0)


def test_other_labels_come_from_the_logits_of_the_same_rows() -> None:
    model, rows, whole = build("llama", lora=False), make_rows(4), Whole()
    given = labelled(rows)
    seen: list[Any] = []

    def likeliest(logits: Tensor) -> Tensor:
        assert whole.told == []  # before the pass that is differentiated
        seen.append(logits)
        return logits.argmax(1)

    losses = Capture(model, "linear").run(given, whole, likeliest)
    (logits,) = seen
    counts = [int((labels >= 0).sum()) for _, labels in given]
    nats = torch.split(-logits.log_softmax(1).amax(1), counts)
    torch.testing.assert_close(
        losses, torch.stack([part.mean() for part in nats]), rtol=tol.LOSS_RTOL, atol=0
    )
