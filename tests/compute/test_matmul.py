"""Products by oneDNN: the same numbers as torch's usual ones, wherever the operands lie, forward
and backward, and only where they apply.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsift.compute import machine
from gradsift.compute.cpu import matmul
from gradsift.config import FinetuneSettings
from gradsift.gradients.passes import extract
from gradsift.gradients.projection import Projection
from gradsift.model.finetune import finetune
from gradsift.model.losses import row_losses
from gradsift.signals.curvature.fit import fit
from gradsift.signals.embeddings import embed
from tests import tolerances as tol
from tests.gradients.one_by_one import build, make_rows

pytestmark = pytest.mark.skipif(
    not machine.has_onednn_linear(), reason="this build of torch has no oneDNN"
)


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch's own"], autouse=True)
def preferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways, whatever processor the tests run on, for smaller products than otherwise."""
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: request.param)
    monkeypatch.setattr(matmul, "LEAST", 1 << 20)
    return request.param


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check_close(found: Tensor, expected: Tensor) -> None:
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
    check_close(matmul.matmul(a, b), expected)
    check_close(matmul.linear(a, b.t(), numbers(224)), expected + numbers(224).double())
    total = numbers(192, 224)
    matmul.add_matmul(total, a, b, 0.5)
    check_close(total, numbers(192, 224).double() + 0.5 * expected)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_batch_of_products_is_one_by_one(rows: int) -> None:
    a, b = numbers(rows, 150, 128).transpose(1, 2), numbers(rows, 150, 96)
    expected, out = torch.bmm(a.double(), b.double()), torch.empty(rows, 128, 96)
    assert matmul.bmm(a, b, out=out).data_ptr() == out.data_ptr()
    for found in (matmul.bmm(a, b), out):
        assert found.shape == expected.shape
        if rows:
            check_close(found, expected)


def test_a_layer_gives_the_gradients_of_its_own_forward(preferred: bool) -> None:
    layer, x, wanted = (
        nn.Linear(160, 224),
        numbers(3, 64, 160).requires_grad_(True),
        numbers(3, 64, 224),
    )
    inputs = [x, layer.weight, layer.bias]
    expected = torch.autograd.grad(
        layer.double()(x.double()), [x, layer.weight, layer.bias], wanted.double()
    )
    layer.float()
    with matmul.quick_layers([layer]):
        out = layer(x)
    assert ("_Linear" in type(out.grad_fn).__name__) == preferred
    out.add_(1)  # as models do with a residual: the output is no view
    for found, right in zip(torch.autograd.grad(out, inputs, wanted), expected, strict=True):
        check_close(found, right.double())
    assert "forward" not in layer.__dict__


def test_direct_products_do_not_lose_a_gradient() -> None:
    a, b, bias = (
        numbers(192, 160).requires_grad_(True),
        numbers(160, 224),
        torch.zeros(224, requires_grad=True),
    )
    matmul.matmul(a, b).sum().backward()
    assert a.grad is not None
    check_close(a.grad, b.double().sum(1).expand(192, 160))
    matmul.linear(a.detach(), b.t(), bias).sum().backward()
    check_close(bias.grad, torch.full((224,), 192.0, dtype=torch.float64))  # type: ignore[arg-type]
    left = numbers(2, 160, 128).requires_grad_(True)
    matmul.bmm(left, numbers(2, 128, 96)).sum().backward()
    check_close(left.grad, numbers(2, 128, 96).double().sum(2)[:, None].expand(2, 160, 128))  # type: ignore[arg-type]


def test_what_does_not_apply_is_left_to_torch(
    preferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    own = nn.functional.linear
    monkeypatch.setattr(
        nn.functional,
        "linear",
        lambda x, weight, bias=None: (calls.append("own"), own(x, weight, bias))[1],
    )
    a, b = numbers(192, 160), numbers(224, 160)
    matmul.linear(a, b)
    assert calls == ([] if preferred else ["own"])
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul.linear(a, b).dtype == torch.bfloat16
    matmul.linear(a.double(), b.double())
    matmul.linear(a.bfloat16(), b.bfloat16())
    matmul.linear(a[:4], b[:4])  # so small that the way there costs more
    assert len(calls) == 4


@pytest.fixture
def products(preferred: bool, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Products are worth the way however small they are; the list grows by one for each that takes
    it.
    """
    found: list[int] = []
    own = matmul.contiguous
    monkeypatch.setattr(matmul, "LEAST", 1)
    monkeypatch.setattr(matmul, "contiguous", lambda a: (found.append(1), own(a))[1])
    return found


def test_passes_of_a_model_take_them(preferred: bool, products: list[int]) -> None:
    model, rows = build("llama", lora=True), make_rows(6)
    works: list[Callable[[], object]] = [
        lambda: row_losses(model, rows),
        lambda: embed(model, rows),
        lambda: list(extract(model, rows, projection=Projection(64))),
        lambda: fit(model, rows),
        lambda: finetune(
            lambda: build("llama", lora=False),
            rows,
            settings=FinetuneSettings(mode="full", steps=1),
        ),
    ]
    for work in works:
        products.clear()
        work()
        assert bool(products) == preferred


@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_with_checkpointed_blocks_trains_alike(products: list[int], bf16: bool) -> None:
    def trained(checkpointed: bool) -> Tensor:
        def model() -> Any:
            made: Any = build("llama", lora=False)
            if checkpointed:
                made.gradient_checkpointing_enable()
            return made

        settings = FinetuneSettings(mode="full", steps=2, batch_size=4, bf16=bf16)
        return torch.cat(
            [
                p.detach().flatten()
                for p in finetune(model, make_rows(6), settings=settings).parameters()
            ]
        )

    assert torch.equal(trained(True), trained(False))


def test_a_layer_used_twice_whose_outputs_do_not_all_reach_the_loss(
    products: list[int], preferred: bool
) -> None:
    """What is still held when the backward pass is over is multiplied out then."""
    model: Any = build("llama", lora=False)
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) + own(2 * x).detach()
    batch = next(iter(extract(model, make_rows(2), projection=Projection(64), modules="linear")))
    assert torch.isfinite(batch.rows).all() and not batch.norms.requires_grad


def test_losses_of_a_model_are_the_same_both_ways(
    products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = build("llama", lora=False), make_rows(6)
    found = row_losses(model, rows).total
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: False)
    torch.testing.assert_close(found, row_losses(model, rows).total, rtol=tol.LOSS_RTOL, atol=0)


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
def test_the_processor_decides(
    vendor: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert machine.prefers_onednn.__wrapped__() == expected


def test_a_system_that_does_not_tell_its_processor_has_torch_s_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def denied(self: Path) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", denied)
    assert machine.prefers_onednn.__wrapped__() is False


def test_the_kind_of_cpu_says_which_products_it_takes(
    preferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "prefers_onednn", lambda: preferred)
    assert machine.cpu_kind().endswith("-oneDNN") == preferred
