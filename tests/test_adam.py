"""The Adam transform: the published numbers, the real optimizer, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradsift.errors import ConfigError, MismatchError
from gradsift.transforms.adam import Adam
from gradsift.types import Transform
from tests import tolerances as tol

M, V, G = torch.tensor([[0.0, 0.1]]), torch.tensor([[0.0, 0.01]]), torch.tensor([[[1.0, -1.0]]])


def test_released_form() -> None:
    adam = Adam({"p": M}, {"p": V}, step=0)
    assert adam.materialised("p", G)[0, 0].tolist() == pytest.approx([3.16226, -0.09539], abs=tol.ADAM_ATOL)


def test_eps_inside_or_outside_the_root() -> None:
    inside = Adam({"p": M}, {"p": V}, step=0, eps=1e-4).materialised("p", G)[0, 0]
    expected = torch.tensor([0.1, -0.01]) / (torch.tensor([0.001, 0.01099]) + 1e-4).sqrt()
    torch.testing.assert_close(inside, expected)


def test_paper_form_has_bias_correction_at_the_next_step() -> None:
    adam = Adam({"p": M}, {"p": V}, step=0, form="paper")
    assert adam.materialised("p", G)[0, 0].tolist() == pytest.approx([1.0, -0.0302], abs=5e-5)
    late = Adam({"p": M}, {"p": V}, step=10**6, form="paper")  # no correction left: eps outside the root only
    assert late.materialised("p", G)[0, 0].tolist() == pytest.approx([3.16228, -0.09539], abs=tol.ADAM_ATOL)


def test_paper_form_is_the_step_that_torch_takes() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = torch.optim.Adam([p], lr=0.01, betas=(0.8, 0.95), eps=1e-3)
    for _ in range(5):
        p.grad = torch.randn_like(p)
        optimizer.step()
    state = optimizer.state[p]
    adam = Adam({"p": state["exp_avg"].clone()}, {"p": state["exp_avg_sq"].clone()}, step=5, betas=(0.8, 0.95), eps=1e-3, form="paper")
    p.grad = torch.randn_like(p)
    direction = adam.materialised("p", p.grad[None].float())[0]
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(direction, ((before - p.detach()) / 0.01).float(), rtol=1e-4, atol=1e-5)


def test_fresh_moments_saturate() -> None:
    zero = torch.zeros(5, 6)
    g = torch.rand(3, 5, 6) + 0.3
    got = Adam({"p": zero}, {"p": zero}, step=0).materialised("p", torch.where(torch.rand(3, 5, 6) < 0.5, g, -g))
    torch.testing.assert_close(got.abs(), torch.full_like(got, 3.1623), rtol=1e-4, atol=0)


def test_each_example_alone_and_the_gradient_untouched() -> None:
    torch.manual_seed(0)
    adam = Adam({"p": torch.randn(4, 5)}, {"p": torch.rand(4, 5)}, step=3)
    g = torch.randn(6, 4, 5)
    kept = g.clone()
    whole = adam.materialised("p", g)
    assert torch.equal(g, kept)
    torch.testing.assert_close(whole, torch.cat([adam.materialised("p", g[k : k + 1]) for k in range(6)]))


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
    with pytest.raises(MismatchError, match=r"first moment of a has shape \(1, 2\), the parameter \(2, 2\)"):
        Adam({"a": M}, {"a": V}, step=0).materialised("a", torch.ones(1, 2, 2))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="released, paper"):
        Adam({}, {}, step=0, form="other")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="step=-1"):
        Adam({}, {}, step=-1)


def test_it_is_a_transform_that_never_factors() -> None:
    adam = Adam({"p": M}, {"p": V}, step=0)
    assert isinstance(adam, Transform)
    assert adam.factors("p") is None
