"""Products by oneDNN: the same numbers as torch's usual ones, wherever the operands lie, forward and backward, and only where they apply."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradsift import dense, machine
from gradsift.signals.loss import row_losses
from tests import tolerances as tol
from tests.parity.parts import build, make_rows

pytestmark = pytest.mark.skipif(not machine._has_onednn_linear(), reason="this build of torch has no oneDNN")


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch's own"], autouse=True)
def preferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways, whatever processor the tests run on."""
    monkeypatch.setattr(dense, "prefers_onednn", lambda: request.param)
    return request.param


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tol.GRADIENT_RTOL * scale)


LAID: dict[str, Callable[[int, int], Tensor]] = {
    "by rows": numbers,
    "by columns": lambda m, n: numbers(n, m).t(),
    "part of rows": lambda m, n: numbers(m + 5, n + 64)[5:, 32 : 32 + n],
    "part of columns": lambda m, n: numbers(n + 5, m + 64)[5:, 32 : 32 + m].t(),
}


@pytest.mark.parametrize("left", LAID)
@pytest.mark.parametrize("right", LAID)
def test_products_are_those_of_float64_however_operands_lie(left: str, right: str) -> None:
    a, b = LAID[left](192, 160), LAID[right](160, 224)
    expected = a.double() @ b.double()
    close(dense.matmul(a, b), expected)
    close(dense.linear(a, b.t(), numbers(224)), expected + numbers(224).double())
    total = numbers(192, 224)
    dense.add_matmul(total, a, b, 0.5)
    close(total, numbers(192, 224).double() + 0.5 * expected)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_batch_of_products_is_one_by_one(rows: int) -> None:
    a, b = numbers(rows, 150, 128).transpose(1, 2), numbers(rows, 150, 96)
    expected, out = torch.bmm(a.double(), b.double()), torch.empty(rows, 128, 96)
    assert dense.bmm(a, b, out=out).data_ptr() == out.data_ptr()
    for found in (dense.bmm(a, b), out):
        assert found.shape == expected.shape
        if rows:
            close(found, expected)


def test_a_layer_gives_the_gradients_of_its_own_forward() -> None:
    layer, x, wanted = nn.Linear(160, 224), numbers(3, 64, 160).requires_grad_(True), numbers(3, 64, 224)
    inputs = [x, layer.weight, layer.bias]
    expected = torch.autograd.grad(layer.double()(x.double()), [x, layer.weight, layer.bias], wanted.double())
    layer.float()
    with dense.quick_layers([layer]):
        out = layer(x)
    out.add_(1)  # as models do with a residual: the output is no view
    for found, right in zip(torch.autograd.grad(out, inputs, wanted), expected, strict=True):
        close(found, right.double())
    assert "forward" not in layer.__dict__


def test_direct_products_do_not_lose_a_gradient() -> None:
    a, b = numbers(192, 160).requires_grad_(True), numbers(160, 224)
    dense.matmul(a, b).sum().backward()
    assert a.grad is not None
    close(a.grad, b.double().sum(1).expand(192, 160))


def test_what_does_not_apply_is_left_to_torch(preferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    own = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, weight, bias=None: (calls.append("own"), own(x, weight, bias))[1])
    a, b = numbers(192, 160), numbers(224, 160)
    dense.linear(a, b)
    assert calls == ([] if preferred else ["own"])
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dense.linear(a, b).dtype == torch.bfloat16
    dense.linear(a.double(), b.double())
    dense.linear(a.bfloat16(), b.bfloat16())
    dense.linear(a[:4], b[:4])  # so small that the way there costs more
    assert len(calls) == 4


def test_losses_of_a_model_are_the_same_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_LEAST", 1)
    model, rows = build("llama", lora=False), make_rows(6)
    found = row_losses(model, rows).total
    monkeypatch.setattr(dense, "prefers_onednn", lambda: False)
    torch.testing.assert_close(found, row_losses(model, rows).total, rtol=tol.LOSS_RTOL, atol=0)


def test_the_kind_of_cpu_says_which_products_it_takes(preferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "prefers_onednn", lambda: preferred)
    assert machine.cpu_kind().endswith("-oneDNN") == preferred
