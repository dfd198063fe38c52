"""Random projections: unbiased, as concentrated as the bound says, the same everywhere, and honest
about what they refuse.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import gradsift.gradients.projection as module
from gradsift.errors import ConfigError, MismatchError
from gradsift.gradients.projection import Projection, add_collected, add_scattered, canonical_names
from tests import tolerances as tol

PINNED_SKETCH = [2.0, 0.0, 7.0, 12.0, -12.0, -6.0, 5.0, 16.0]
PINNED_TWO_SIDED = [-1.0, 11.0, -1.0, 27.0]
SHAPES = {"model.a": (6, 50), "model.b": (40, 8)}


def project(projection: Projection, grads: dict[str, Tensor]) -> Tensor:
    bound = projection.bind({n: (g.shape[1], g.shape[2]) for n, g in grads.items()})
    state = bound.start(len(next(iter(grads.values()))))
    for name, g in grads.items():
        bound.add(state, name, g)
    return bound.finish(state)


def random_grads(b: int = 2, seed: int = 0, spiky: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grads = {n: torch.randn(b, *s, generator=generator) for n, s in SHAPES.items()}
    if spiky:  # a channel that dwarfs the others, as trained models have
        grads["model.a"][:, :, 7] *= 100
    return grads


@pytest.mark.parametrize("spiky", [False, True])
@pytest.mark.parametrize(
    "projection",
    [
        Projection(32),
        Projection(32, kind="rademacher"),
        Projection((6, 6), kind="rademacher", per_module=True),
        Projection(16, per_module=True),
    ],
    ids=["sketch", "rademacher", "two-sided", "sketch per module"],
)
def test_inner_products_are_kept_without_bias_and_within_the_bound(
    projection: Projection, spiky: bool
) -> None:
    grads = random_grads(spiky=spiky)
    flat = torch.cat([g.flatten(1) for g in grads.values()], 1).double()
    x, y = flat
    seeds = 400
    estimates = torch.empty(seeds, 2, dtype=torch.float64)
    for seed in range(seeds):
        rows = project(
            Projection(projection.dim, seed, projection.kind, projection.per_module), grads
        ).double()
        estimates[seed] = torch.stack([rows[0] @ rows[1], rows[0] @ rows[0]])
    truth = torch.stack([x @ y, x @ x])
    errors = (estimates - truth).mean(0).abs() / (estimates.std(0) / math.sqrt(seeds))
    assert errors.max() < tol.STANDARD_ERRORS
    if isinstance(projection.dim, tuple):
        a, b = projection.dim
        factor = 2 / a + 2 / b + 4 / (a * b)
        bound = torch.stack([factor * (x @ x) * (y @ y), factor * (x @ x) ** 2])
    else:
        bound = torch.stack([(x @ x) * (y @ y) + (x @ y) ** 2, 2 * (x @ x) ** 2]) / projection.dim
    assert (estimates.var(0) < tol.VARIANCE_SLACK * bound).all()


@pytest.mark.slow
def test_cosines_of_rows_at_right_angles_spread_as_one_over_the_root_of_the_width() -> None:  # T6.5
    # more numbers than columns: of fewer, less collide, and the spread is smaller
    shapes = {"model.a": (64, 512), "model.b": (512, 64)}
    x, y = torch.randn(
        2, sum(o * i for o, i in shapes.values()), generator=torch.Generator().manual_seed(3)
    )
    y = y - (x @ y) / (x @ x) * x
    parts = torch.stack([x, y]).split([o * i for o, i in shapes.values()], dim=1)
    grads = {
        name: part.unflatten(1, shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
    for dim, expected in ((8192, 0.01105), (1024, 0.03125)):
        rows = [project(Projection(dim, seed), grads) for seed in range(300)]
        spread = float(torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in rows]).std())
        # a standard error of 300 draws is one part in 24
        assert spread == pytest.approx(expected, rel=0.15)


def test_different_seeds_give_unrelated_rows() -> None:
    grads = random_grads(1)
    rows = torch.cat([project(Projection(2048, seed), grads) for seed in (0, 1)])
    cosine = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)
    assert cosine.abs() < tol.STANDARD_ERRORS / math.sqrt(2048)


@pytest.mark.parametrize("d", [16, 300, 1024])
def test_the_two_ways_to_apply_a_sketch_agree(d: int) -> None:
    bound = Projection(d).bind({"w": (7, 43)})
    buckets, signs = bound.sketch_map("w")
    assert torch.equal(buckets.sort(1).values, torch.arange(d).expand(buckets.shape))
    flat = torch.randn(3, 301)
    one, other = torch.zeros(3, d), torch.zeros(3, d)
    add_scattered(one, flat, buckets, signs)
    add_collected(other, flat, buckets, signs)
    torch.testing.assert_close(one, other)


def test_maps_do_not_change_between_releases() -> None:
    """Stored rows stay comparable only while the maps stay what they are."""
    rows = project(
        Projection(8, seed=3), {"layer.lora_A.default": torch.arange(12.0).view(1, 3, 4)}
    )
    assert rows[0].tolist() == PINNED_SKETCH
    two_sided = Projection((2, 2), seed=3, kind="rademacher", per_module=True)
    assert (
        project(two_sided, {"layer": torch.arange(12.0).view(1, 3, 4)})[0].tolist()
        == PINNED_TWO_SIDED
    )


def test_a_map_depends_on_its_own_parameter_only() -> None:
    grads = random_grads()
    alone = project(Projection(64), {"model.b": grads["model.b"]})
    silent = project(
        Projection(64), {"model.a": torch.zeros(2, 6, 50), "model.b": grads["model.b"]}
    )
    assert torch.equal(alone, silent)


def test_maps_that_do_not_fit_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = random_grads()
    for projection in (
        Projection(64),
        Projection(64, kind="rademacher"),
        Projection((4, 4), kind="rademacher", per_module=True),
    ):
        kept = project(projection, grads)
        with monkeypatch.context() as patch:
            patch.setattr(module, "CACHE_BYTES", 0)
            assert torch.equal(project(projection, grads), kept)
        with monkeypatch.context() as patch:
            patch.setattr(module, "DENSE_BLOCK", 64 * 7)
            bound = projection.bind(SHAPES)
            assert bound.width == kept.shape[1]


def test_factors_give_what_the_gradient_gives() -> None:
    torch.manual_seed(0)
    g, x = torch.randn(3, 9, 6), torch.randn(3, 9, 50)
    bound = Projection((4, 5), kind="rademacher", per_module=True).bind(SHAPES)
    one, other = bound.start(3), bound.start(3)
    bound.add(one, "model.a", g.transpose(1, 2) @ x)
    left, right = bound.sides("model.a")
    bound.add_product(other, "model.a", g @ left, x @ right)
    torch.testing.assert_close(one, other)


def test_identity_is_the_flat_gradient() -> None:
    grads = random_grads()
    assert torch.equal(
        project(Projection(None, kind="identity"), grads),
        torch.cat([g.flatten(1) for g in grads.values()], 1),
    )


@pytest.mark.parametrize(
    "projection, width", [(Projection(64), 64), (Projection(64, per_module=True), 128)]
)
def test_width(projection: Projection, width: int) -> None:
    assert projection.bind(SHAPES).width == width
    assert Projection((3, 4), kind="rademacher", per_module=True).bind(SHAPES).width == 24


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 0},
        {"dim": None},
        {"dim": True},
        {"dim": (4, 4)},
        {"dim": (4, 4), "kind": "rademacher"},
        {"dim": (4, 0), "kind": "rademacher", "per_module": True},
        {"dim": 8, "kind": "identity"},
        {"kind": "gauss"},
    ],
)
def test_combinations_without_meaning_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError):
        Projection(**options)


def test_a_gradient_of_another_shape_is_refused() -> None:
    bound = Projection(8).bind(SHAPES)
    with pytest.raises(MismatchError, match=r"model\.a"):
        bound.add(bound.start(1), "model.a", torch.zeros(1, 50, 6))


def test_wrappers_do_not_change_the_name_a_map_is_drawn_for() -> None:
    inner = "base_model.model.model.layers.0"
    names = [f"{inner}.q_proj.lora_A.default", f"{inner}.up_proj.base_layer", "module.x.weight"]
    assert list(canonical_names(dict.fromkeys(names)).values()) == [
        "model.layers.0.q_proj.lora_A",
        "model.layers.0.up_proj",
        "x",
    ]
    two = ["m.q.lora_A.first", "m.q.lora_A.second"]
    assert list(canonical_names(dict.fromkeys(two)).values()) == two


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_applies_the_same_map() -> None:
    grads = random_grads()
    for projection in (Projection(64), Projection((4, 4), kind="rademacher", per_module=True)):
        bound = projection.bind(SHAPES, "cuda")
        state = bound.start(2)
        for name, g in grads.items():
            bound.add(state, name, g.cuda())
        torch.testing.assert_close(bound.finish(state).cpu(), project(projection, grads))


def test_the_same_number_of_another_library_is_the_same_map() -> None:
    grads = random_grads()
    plain = project(Projection(32, seed=3), grads)
    assert torch.equal(project(Projection(np.int64(32), seed=np.uint8(3)), grads), plain)  # type: ignore[arg-type]
    pair = Projection([np.int64(4), 4], kind="rademacher", per_module=True)  # type: ignore[arg-type]
    assert torch.equal(
        project(pair, grads), project(Projection((4, 4), kind="rademacher", per_module=True), grads)
    )
    for seed in (True, 1.0, "1", None):
        with pytest.raises(ConfigError, match="seed"):
            Projection(32, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dim"):
        Projection(True)
