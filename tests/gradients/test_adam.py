"""The Adam transform: the published numbers, the real optimizer, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gradsift.errors import ConfigError, MismatchError
from gradsift.gradients.adam import Adam, FactoredAdam
from gradsift.gradients.passes import extract
from gradsift.gradients.projection import Projection
from gradsift.model.layers import tracked_modules
from gradsift.types import Transform
from tests import tolerances as tol
from tests.gradients.one_by_one import build, collect, make_rows

M, V, G = torch.tensor([[0.0, 0.1]]), torch.tensor([[0.0, 0.01]]), torch.tensor([[[1.0, -1.0]]])


def test_released_form() -> None:
    adam = Adam({"p": M}, {"p": V}, step=0)
    assert adam.materialised("p", G)[0, 0].tolist() == pytest.approx(
        [3.16226, -0.09539], abs=tol.ADAM_ATOL
    )


def test_eps_inside_or_outside_the_root() -> None:
    inside = Adam({"p": M}, {"p": V}, step=0, eps=1e-4).materialised("p", G)[0, 0]
    expected = torch.tensor([0.1, -0.01]) / (torch.tensor([0.001, 0.01099]) + 1e-4).sqrt()
    torch.testing.assert_close(inside, expected)


def test_paper_form_has_bias_correction_at_the_next_step() -> None:
    adam = Adam({"p": M}, {"p": V}, step=0, form="paper")
    assert adam.materialised("p", G)[0, 0].tolist() == pytest.approx([1.0, -0.0302], abs=5e-5)
    # no correction left: eps outside the root only
    late = Adam({"p": M}, {"p": V}, step=10**6, form="paper")
    assert late.materialised("p", G)[0, 0].tolist() == pytest.approx(
        [3.16228, -0.09539], abs=tol.ADAM_ATOL
    )


def test_paper_form_is_the_step_that_torch_takes() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = torch.optim.Adam([p], lr=0.01, betas=(0.8, 0.95), eps=1e-3)
    for _ in range(5):
        p.grad = torch.randn_like(p)
        optimizer.step()
    state = optimizer.state[p]
    adam = Adam(
        {"p": state["exp_avg"].clone()},
        {"p": state["exp_avg_sq"].clone()},
        step=5,
        betas=(0.8, 0.95),
        eps=1e-3,
        form="paper",
    )
    p.grad = torch.randn_like(p)
    direction = adam.materialised("p", p.grad[None].float())[0]
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(
        direction, ((before - p.detach()) / 0.01).float(), rtol=1e-4, atol=1e-5
    )


def test_fresh_moments_saturate() -> None:
    zero = torch.zeros(5, 6)
    g = torch.rand(3, 5, 6) + 0.3
    got = Adam({"p": zero}, {"p": zero}, step=0).materialised(
        "p", torch.where(torch.rand(3, 5, 6) < 0.5, g, -g)
    )
    torch.testing.assert_close(got.abs(), torch.full_like(got, 3.1623), rtol=1e-4, atol=0)


def test_each_example_alone_and_the_gradient_untouched() -> None:
    torch.manual_seed(0)
    adam = Adam({"p": torch.randn(4, 5)}, {"p": torch.rand(4, 5)}, step=3)
    g = torch.randn(6, 4, 5)
    kept = g.clone()
    whole = adam.materialised("p", g)
    assert torch.equal(g, kept)
    torch.testing.assert_close(
        whole, torch.cat([adam.materialised("p", g[k : k + 1]) for k in range(6)])
    )


@pytest.mark.parametrize("stored", ["a.b", "a.b.weight"])
@pytest.mark.parametrize("asked", ["a.b", "a.b.weight"])
def test_names_with_and_without_weight(stored: str, asked: str) -> None:
    adam = Adam({stored: M}, {stored: V}, step=0)
    adam.check({asked: (1, 2)})
    assert adam.materialised(asked, G).shape == G.shape


def test_missing_or_misshapen_moments_name_the_parameter() -> None:
    adam = Adam({"a.weight": M}, {}, step=0)
    with pytest.raises(MismatchError, match=r"second moment for parameter a\."):
        adam.check({"a": (1, 2)})
    with pytest.raises(MismatchError, match="first moment for parameter other"):
        adam.materialised("other", G)
    with pytest.raises(
        MismatchError, match=r"first moment of a has shape \(1, 2\), the parameter \(2, 2\)"
    ):
        Adam({"a": M}, {"a": V}, step=0).materialised("a", torch.ones(1, 2, 2))


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("bad", [-1e-12, float("nan"), float("inf")])
def test_a_second_moment_that_is_no_mean_of_squares_names_the_parameter(
    form: Any, bad: float
) -> None:
    broken = torch.tensor([[bad, 0.01]])
    with pytest.raises(ConfigError, match="second moment of p is negative or not finite"):
        Adam({"p": M}, {"p": broken}, step=3, form=form).materialised("p", G)


def test_a_first_moment_that_is_not_finite_names_the_parameter() -> None:
    with pytest.raises(ConfigError, match="first moment of p is not finite"):
        Adam({"p": torch.tensor([[float("nan"), 0.1]])}, {"p": V}, step=3).materialised("p", G)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="released, paper"):
        Adam({}, {}, step=0, form="other")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="step=-1"):
        Adam({}, {}, step=-1)


def test_it_is_a_transform_that_never_factors() -> None:
    adam = Adam({"p": M}, {"p": V}, step=0)
    assert isinstance(adam, Transform)
    assert adam.factors("p") is None


V2 = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])  # of rank 1


def test_factored_adam_divides_by_the_root_of_row_sums_times_column_sums_over_the_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    v, g = torch.rand(4, 5, generator=generator) * 1e-4, torch.randn(3, 4, 5, generator=generator)
    corrected = v.double() / (1 - 0.99**7) + 1e-16
    expected = g.double() / (corrected.sum(1)[:, None] * corrected.sum(0) / corrected.sum()).sqrt()
    kept = g.clone()
    got = FactoredAdam({"p.weight": v}, 7, beta=0.99).materialised("p", g)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(g, kept)


def test_a_second_moment_of_rank_one_is_exact_and_a_dead_row_stays_finite() -> None:
    got = FactoredAdam({"p": V2}, 0).materialised("p", torch.ones(1, 2, 3))
    torch.testing.assert_close(got[0], V2.rsqrt())
    dead = FactoredAdam({"p": torch.zeros(2, 3)}, 5).materialised("p", torch.ones(1, 2, 3))
    torch.testing.assert_close(dead, torch.full((1, 2, 3), 1e8))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factored_rows_equal_materialised_rows_and_it_says_which_it_used(family: str) -> None:
    model, rows = build(family, lora=False), make_rows()
    generator = torch.Generator().manual_seed(1)
    shapes = {n: m.weight.shape for n, m in tracked_modules(model, "linear").items()}  # type: ignore[union-attr]
    v = {
        f"{n}.weight": torch.rand(shape, generator=generator) * 1e-3 for n, shape in shapes.items()
    }  # type: ignore[arg-type]
    two_sided = Projection((5, 7), kind="rademacher", per_module=True)

    class Materialised(FactoredAdam):
        def factors(self, name: str) -> None:  # type: ignore[override]
            return None

    ours, twin = FactoredAdam(v, 40), Materialised(v, 40)
    taken, formed = (
        collect(
            extract(
                model, rows, projection=two_sided, transform=t, modules="linear", token_budget=60
            ),
            len(rows),
        )
        for t in (ours, twin)
    )
    torch.testing.assert_close(
        taken.rows, formed.rows, rtol=tol.GRADIENT_RTOL, atol=1e-5 * float(formed.rows.abs().max())
    )
    torch.testing.assert_close(taken.norms, formed.norms, rtol=tol.NORM_RTOL, atol=0)
    assert set(ours.used.values()) == {"factored"} and set(twin.used.values()) == {"materialised"}
    assert str(ours) == f"FactoredAdam: {len(shapes)} parameters factored, 0 materialised"
    sketched = FactoredAdam(v, 40)
    list(extract(model, rows[:2], projection=Projection(16), transform=sketched, modules="linear"))
    assert str(sketched) == f"FactoredAdam: 0 parameters factored, {len(shapes)} materialised"


def test_factored_adam_refuses_what_it_cannot_use() -> None:
    assert isinstance(FactoredAdam({"p": V2}, 1), Transform)
    with pytest.raises(MismatchError, match="no second moment for parameter other"):
        FactoredAdam({"p": V2}, 1).factors("other")
    with pytest.raises(
        MismatchError, match=r"second moment of p has shape \(2, 3\), the parameter \(3, 3\)"
    ):
        FactoredAdam({"p": V2}, 1).check({"p": (3, 3)})
    with pytest.raises(ConfigError, match="negative or not finite"):
        FactoredAdam({"p": -V2}, 1).factors("p")
    with pytest.raises(ConfigError, match="step=-1"):
        FactoredAdam({}, -1)
