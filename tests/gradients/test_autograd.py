"""The engine's gradients are those of autograd, one example at a time, for every family it is meant
for.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from gradsift.gradients.passes import extract
from gradsift.gradients.projection import Projection
from gradsift.model.layers import coverage, tracked_modules
from tests import tolerances as tol
from tests.gradients.one_by_one import (
    FAMILIES,
    VOCAB,
    build,
    collect,
    make_rows,
    one_by_one,
    stretched,
)

IDENTITY = Projection(None, kind="identity")
TWO_SIDED = Projection((5, 7), kind="rademacher", per_module=True)


def check_gradients(model: nn.Module, modules: object, *, token_budget: int = 60) -> None:
    rows = make_rows()
    tracked = tracked_modules(model, modules)  # type: ignore[arg-type]
    weights = list({id(m.weight): m.weight for m in tracked.values()}.values())
    grads, losses = one_by_one(model, rows, weights)  # type: ignore[arg-type]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])

    got = collect(
        extract(model, rows, projection=IDENTITY, modules=modules, token_budget=token_budget),
        len(rows),
    )  # type: ignore[arg-type]
    torch.testing.assert_close(got.rows, flat, rtol=tol.GRADIENT_RTOL, atol=tol.GRADIENT_ATOL)
    torch.testing.assert_close(got.norms, flat.norm(dim=1), rtol=tol.NORM_RTOL, atol=0)
    torch.testing.assert_close(got.losses, losses, rtol=tol.LOSS_RTOL, atol=0)

    # the same again where no gradient is formed: factors through a two-sided projection, norms from
    # token products
    names, owners = [], set()
    for name, module in tracked.items():
        if id(module.weight) not in owners:
            owners.add(id(module.weight))
            names.append(name)
    bound = TWO_SIDED.bind({n: tuple(w.shape) for n, w in zip(names, weights, strict=True)})  # type: ignore[misc]
    state = bound.start(len(rows))
    for k, name in enumerate(names):
        bound.add(state, name, torch.stack([row[k] for row in grads]))
    got = collect(
        extract(model, rows, projection=TWO_SIDED, modules=modules, token_budget=token_budget),
        len(rows),
    )  # type: ignore[arg-type]
    torch.testing.assert_close(
        got.rows, bound.finish(state), rtol=tol.GRADIENT_RTOL, atol=5 * tol.GRADIENT_ATOL
    )
    torch.testing.assert_close(got.norms, flat.norm(dim=1), rtol=tol.NORM_RTOL, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_gradients_equal_autograd(family: str) -> None:
    check_gradients(build(family, lora=True), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_gradients_equal_autograd(family: str) -> None:
    check_gradients(build(family, lora=False), "linear")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("lora", [True, False])
def test_gradient_checkpointing_changes_nothing(family: str, lora: bool) -> None:
    model = build(family, lora=lora)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    check_gradients(model, None if lora else "linear")
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_gradients_of_upper_modules_alone_equal_autograd() -> None:
    check_gradients(
        build("llama", lora=False), ["*layers.2.self_attn.v_proj", "*layers.2.mlp.down_proj"]
    )


def test_an_untied_head_can_be_tracked() -> None:
    check_gradients(build("llama", lora=False), ["*layers.1.mlp.*", "lm_head"])


@pytest.mark.parametrize(
    ("family", "reads"),
    [("mixtral", {"self_attn"}), ("qwen2-moe", {"self_attn", "shared_expert", "mlp"})],
)
def test_experts_that_no_row_sees_are_reported(family: str, reads: set[str]) -> None:
    model = build(family, lora=False)
    found = coverage(model, "linear")
    assert found.moe and len(found.experts) == 3
    tracked = {m.weight for m in tracked_modules(model, "linear").values()}  # type: ignore[union-attr]
    assert {row.kind.split(".")[0] for row in found.rows} == reads
    routed = {
        name for name, p in model.named_parameters() if ".experts." in name and p not in tracked
    }
    assert routed and set(found.uncovered) == routed
    assert found.share < 0.7  # what lies in the experts is missing from it


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_factors_that_follow_the_longest_row_are_told(kind: str) -> None:
    torch.manual_seed(0)
    model = stretched(kind).eval()
    assert coverage(model, "linear").rotary == (kind, 12)
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in ([(5 * k + i) % VOCAB for i in range(12)] for k in range(3))
    ]
    # near enough in length to share a batch with the others
    long = {"input_ids": list(range(14)), "labels": list(range(14))}
    options = {"projection": IDENTITY, "modules": "linear"}
    alone = collect(extract(model, rows, token_budget=1, **options), 3).rows  # type: ignore[arg-type]
    beside = collect(extract(model, rows, token_budget=400, **options), 3).rows  # type: ignore[arg-type]
    # none is over 12 tokens
    torch.testing.assert_close(beside, alone, rtol=tol.GRADIENT_RTOL, atol=tol.GRADIENT_ATOL)
    mixed = collect(extract(model, [*rows, long], token_budget=400, **options), 4).rows[:3]  # type: ignore[arg-type]
    assert float((mixed - alone).norm()) > 1e-4 * float(alone.norm())  # a hundred times rounding


def test_fixed_rotary_factors_are_nothing_to_tell() -> None:
    assert coverage(build("llama", lora=False), "linear").rotary is None
    assert coverage(build("gpt2", lora=False), "linear").rotary is None


class Recurrent(nn.Module):
    """One block used three times, and two linear layers that share their weight: the gradient of
    each parameter is a sum over its uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.first, self.second = (
            nn.Embedding(VOCAB, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
        )
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, VOCAB, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool = False
    ) -> SimpleNamespace:
        x = self.embed(input_ids)
        for _ in range(3):
            x = x + torch.tanh(self.block(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]))
        logits = self.head(self.second(torch.tanh(self.first(x))))
        loss = (
            None if labels is None else nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        )
        return SimpleNamespace(logits=logits, loss=loss)


def test_modules_called_again_and_shared_weights_accumulate() -> None:
    torch.manual_seed(0)
    check_gradients(Recurrent().eval(), ["block", "first", "second"])
