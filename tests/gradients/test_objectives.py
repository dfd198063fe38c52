"""Margins: their gradient against autograd's, at the logits and through a model, and where the
model is sure.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradsift.errors import UnknownName
from gradsift.gradients.objectives import margin
from gradsift.gradients.passes import extract
from gradsift.gradients.projection import Projection
from gradsift.model.layers import tracked_modules
from tests import tolerances as tol
from tests.gradients.one_by_one import build, collect, make_rows

IDENTITY = Projection(None, kind="identity")


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """log p - log(1 - p) of each row's target, as written."""
    log_p = logits.double().log_softmax(1)
    own = log_p.gather(1, targets[:, None])[:, 0]
    others = log_p.scatter(1, targets[:, None], -torch.inf).logsumexp(1)
    return own - others


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_margin_equals_autograd(in_place: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(300, 1000) * 5).to(dtype)
    targets, weights = torch.randint(0, 1000, (300,)), torch.rand(300)
    leaf = logits.float().requires_grad_()
    (-log_odds(leaf, targets) * weights).sum().backward()
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    nll, grad = margin(logits, targets, weights, in_place=in_place)
    assert (grad.data_ptr() == logits.data_ptr()) == in_place
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        grad.float(), leaf.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6
    )


def test_a_sure_model_still_has_a_margin_gradient() -> None:
    logits = torch.tensor([[90.0, 1.0, 0.0]])
    nll, grad = margin(logits, torch.tensor([0]), torch.ones(1), in_place=False)
    assert float(nll) == pytest.approx(0, abs=1e-30)
    assert grad[0].tolist() == pytest.approx(
        [-1.0, 1 / (1 + torch.e**-1), torch.e**-1 / (1 + torch.e**-1)]
    )


@pytest.mark.parametrize("lora", [True, False])
def test_rows_of_the_margin_equal_autograd_one_example_at_a_time(lora: bool) -> None:
    model, rows = build("llama", lora=lora), make_rows()
    modules = None if lora else "linear"
    weights = [module.weight for module in tracked_modules(model, modules).values()]
    for p in model.parameters():
        p.requires_grad_(any(p is w for w in weights))
    expected, losses = [], []
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1][
            labels != -100
        ]
        labels = labels[labels != -100]
        grads = torch.autograd.grad(-log_odds(logits, labels).mean(), weights)  # type: ignore[arg-type]
        expected.append(torch.cat([g.flatten() for g in grads]))
        losses.append(torch.nn.functional.cross_entropy(logits, labels).detach())
    got = collect(
        extract(model, rows, projection=IDENTITY, modules=modules, token_budget=60, loss="margin"),
        len(rows),
    )  # type: ignore[arg-type]
    torch.testing.assert_close(
        got.rows, torch.stack(expected), rtol=tol.GRADIENT_RTOL, atol=5 * tol.GRADIENT_ATOL
    )
    torch.testing.assert_close(got.losses, torch.stack(losses), rtol=tol.LOSS_RTOL, atol=0)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"unknown loss 'margn'\. Known: cross-entropy, margin"):
        extract(build("llama", lora=True), make_rows(), projection=IDENTITY, loss="margn")  # type: ignore[arg-type]
