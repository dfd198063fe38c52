"""What every entry of METHODS promises, whatever it does inside."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from gradsift import methods
from gradsift.errors import ConfigError, UnknownName
from gradsift.methods.g2is import G2is
from gradsift.methods.tagcos import Tagcos, lopsided
from gradsift.types import Rows, Selector, Signal, Signals, Subset, UndeclaredSignal

N, D, M = 40, 16, 6
GROUPS = ["a", "a", "b", "b", "b", "c"]


class Reading(Mapping[Signal, Any]):
    """Signal values that note which of them were read."""

    def __init__(self, values: dict[Signal, Any]) -> None:
        self.values_, self.read = values, set[Signal]()

    def __getitem__(self, signal: Signal) -> Any:
        self.read.add(signal)
        return self.values_[signal]

    def __contains__(self, signal: object) -> bool:
        return signal in self.values_

    def __iter__(self) -> Any:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def value(signal: Signal, n: int, seed: int, kind: str = "random") -> Any:
    generator = torch.Generator().manual_seed(seed)
    rows = n if signal.side == "pool" else M
    if signal.name in ("rows", "embeddings", "features"):
        made = torch.nn.functional.normalize(torch.randn(rows, D, generator=generator), dim=1)
    elif signal.name == "influence":
        made = (
            torch.randn(
                n, len(set(GROUPS)) if signal.backend == "less-mean" else M, generator=generator
            )
            * 0.1
        )
    elif signal.name == "bm25":
        made = torch.rand(n, M, generator=generator)
    elif signal.name == "ifd":
        made = torch.rand(n, 2, generator=generator) + 0.5
    elif signal.name == "tuned":
        made = torch.rand(n, len(set(GROUPS)), generator=generator)
    else:
        made = torch.rand(n, generator=generator) + 0.5
    if kind == "equal":
        made = made[:1].expand_as(made).clone()
    if kind == "duplicates":
        made = made[torch.arange(len(made)) // 2 * 2]
    return [made, made.flip(1) if made.ndim > 1 else made] if signal.checkpoints == "each" else made


def signals(
    selector: Selector,
    n: int = N,
    seed: int = 0,
    kind: str = "random",
    order: np.ndarray | None = None,
) -> Signals:
    values = {}
    for signal in sorted(selector.needs(), key=repr):
        made = value(signal, n, seed, kind)
        if order is not None and signal.side == "pool":
            made = [m[order] for m in made] if isinstance(made, list) else made[order]
        values[signal] = made
    tokens = np.random.default_rng(seed).permutation(np.arange(5, 5 + 3 * n))[:n].astype(np.int32)
    tokens = tokens if kind == "random" else np.full(n, 9, dtype=np.int32)
    tokens = tokens if order is None else tokens[order]
    return Signals(Reading(values), n, tokens=tokens, groups=["pool"] * n, target_groups=GROUPS)


def choose(selector: Selector, budget: int, given: Signals | None = None, seed: int = 0) -> Subset:
    return selector.select(given or signals(selector), budget, rng=np.random.default_rng(seed))


def cases() -> list[Any]:
    found = []
    for name in methods.table():
        fields = {f.name for f in dataclasses.fields(methods.load(name))}
        options = {"clusters": 4} if "clusters" in fields else {}
        found.append(pytest.param(methods.make(name, options), id=name))
        if "preset" in fields:
            default, *others = get_args(get_type_hints(methods.load(name))["preset"])
            assert methods.make(name).preset == default  # type: ignore[attr-defined]
            found += [
                pytest.param(
                    methods.make(name, {**options, "preset": preset}), id=f"{name}-{preset}"
                )
                for preset in others
            ]
    return [
        *found,
        pytest.param(
            methods.make("selffilter", {"features": "quality, vector"}), id="selffilter-features"
        ),
    ]


def floored(selector: Selector) -> bool:
    """Whether fewer rows than asked may come back, as the docstring says: released TAGCOS rounds
    its clusters' budgets down.
    """
    return isinstance(selector, Tagcos) and not selector.exact


@pytest.fixture(params=cases())
def selector(request: pytest.FixtureRequest) -> Selector:
    return request.param


@pytest.mark.parametrize("budget", [1, 7, N])
@pytest.mark.parametrize("kind", ["random", "equal", "duplicates"])
def test_exact_size_no_repeats_in_range(selector: Selector, budget: int, kind: str) -> None:
    if kind == "equal" and isinstance(selector, G2is) and selector.preset in ("paper", "released"):
        with pytest.raises(ValueError, match="no principal direction"):
            # centred, equal target rows leave none
            choose(selector, budget, signals(selector, kind=kind))
        return
    chosen = choose(selector, budget, signals(selector, kind=kind))
    if floored(selector):
        assert len(chosen) <= budget
    else:
        assert len(chosen) == budget
    assert len(set(chosen.indices.tolist())) == len(chosen)
    assert set(chosen.indices.tolist()) <= set(range(N))
    if chosen.gains is not None:
        assert len(chosen.gains) == len(chosen) and np.isfinite(chosen.gains).all()


def test_the_same_rng_gives_the_same_subset_and_the_input_is_left_alone(selector: Selector) -> None:
    given = signals(selector)
    before = {
        s: [t.clone() for t in (v if isinstance(v, list) else [v])]
        for s, v in given.values.values_.items()
    }  # type: ignore[attr-defined]
    first, second = choose(selector, 7, given), choose(selector, 7, signals(selector))
    assert first.indices.tolist() == second.indices.tolist()
    for s, tensors in before.items():
        now = given.values.values_[s]  # type: ignore[attr-defined]
        assert all(
            torch.equal(a, b)
            for a, b in zip(tensors, now if isinstance(now, list) else [now], strict=True)
        )


@pytest.mark.parametrize("budget", [7, N])
def test_a_nan_row_is_refused_and_never_picked(selector: Selector, budget: int) -> None:
    given = signals(selector)
    names = {signal.name for signal in given.values if signal.side == "pool"}
    for signal, made in given.values.items():
        for tensor in (made if isinstance(made, list) else [made]) if signal.side == "pool" else []:
            tensor[3] = torch.nan
    if not names:  # random and length read no signal
        assert len(choose(selector, budget, given)) == budget
        return
    scores = names - {"rows", "embeddings", "features"}
    with pytest.raises(
        ValueError,
        match=(
            rf"({'|'.join(scores)}) is NaN or infinite in 1 of {N}" if scores else "NaN or infinite"
        ),
    ):
        choose(selector, budget, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_signals_are_read_as_the_numbers_they_are(
    selector: Selector, dtype: torch.dtype
) -> None:
    half, same = signals(selector), signals(selector)
    for given, kind in ((half, dtype), (same, torch.float32)):
        for signal, made in given.values.items():
            halved = [m.to(dtype).to(kind) for m in (made if isinstance(made, list) else [made])]
            given.values.values_[signal] = halved if isinstance(made, list) else halved[0]  # type: ignore[attr-defined]
    found, wanted = choose(selector, 7, half), choose(selector, 7, same)
    assert found.indices.tolist() == wanted.indices.tolist()
    assert found.gains is None or np.allclose(found.gains, wanted.gains, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def test_minus_infinity_is_a_weight_that_dsir_never_draws() -> None:
    selector = methods.make("dsir")
    given = signals(selector)
    given.values[Signal("ngrams")][3] = -torch.inf
    assert sorted(choose(selector, N - 1, given).indices.tolist()) == [
        i for i in range(N) if i != 3
    ]
    with pytest.raises(ValueError, match="ngrams is NaN or infinite in 1 of"):
        choose(methods.make("dsir", {"draw": "top"}), 7, given)


def test_permuting_the_pool_permutes_the_choice(selector: Selector) -> None:
    if type(selector).__name__ in {"Dsir", "Gdig", "Kcenter", "Random", "Tagcos"}:
        pytest.skip(
            "draws by position (random, dsir) or starts from a drawn row (tagcos, gdig, kcenter)"
        )
    order = np.random.default_rng(1).permutation(N)
    plain, permuted = choose(selector, 7), choose(selector, 7, signals(selector, order=order))
    assert sorted(order[permuted.indices].tolist()) == sorted(plain.indices.tolist())


def test_reads_exactly_the_signals_it_declares(selector: Selector) -> None:
    given = signals(selector)
    choose(selector, 7, given)
    assert given.values.read == set(selector.needs())  # type: ignore[attr-defined]
    with pytest.raises(UndeclaredSignal):
        Signals({}, N)[Signal("rows")]


def test_docstring_states_source_cost_and_differences(selector: Selector) -> None:
    text = inspect.getdoc(type(selector)) or ""
    assert "Source:" in text and "Cost" in text and "Differences from the paper" in text
    assert selector.target in ("required", "optional", "none")
    assert dataclasses.is_dataclass(selector) and selector.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_rows_may_be_anything_that_slices(selector: Selector) -> None:
    class Sliced:
        def __init__(self, rows: torch.Tensor) -> None:
            self.rows, self.shape = rows, tuple(rows.shape)

        def __getitem__(self, where: slice) -> torch.Tensor:
            assert isinstance(where, slice)
            return self.rows[where].clone()

    if not any(s.name in ("rows", "embeddings", "features") for s in selector.needs()):
        pytest.skip("reads no rows")
    assert isinstance(Sliced(torch.zeros(2, 2)), Rows)
    plain = choose(selector, 7)
    given = signals(selector)
    wrapped = {
        s: Sliced(v) if s.name in ("rows", "embeddings", "features") else v
        for s, v in given.values.values_.items()
    }  # type: ignore[attr-defined]
    again = choose(selector, 7, dataclasses.replace(given, values=wrapped))
    assert again.indices.tolist() == plain.indices.tolist()


def test_options_are_converted_and_wrong_ones_refused_with_the_nearest_name() -> None:
    assert methods.make("tagcos", {"clusters": "50", "cosine": "true"}) == methods.load("tagcos")(
        clusters=50, cosine=True
    )
    with pytest.raises(UnknownName, match="'clusters'"):
        methods.make("tagcos", {"cluster": "50"})
    with pytest.raises(UnknownName, match="'tagcos'"):
        methods.make("tagcoss")
    with pytest.raises(ConfigError, match="clusters"):
        methods.make("tagcos", {"clusters": "many"})
    with pytest.raises(ConfigError, match="preset"):
        methods.make("less", {"preset": "newest"})


NONSENSE: dict[str, dict[str, list[Any]]] = {
    "dsir": {"temperature": [0, -1, "nan"]},
    "gdig": {"clusters": [0, -2], "iterations": [0], "restarts": [0]},
    # keep: its range is looked at before its core
    "g2is": {"keep": [0, -1], "neighbours": [-3], "consistency": [-1]},
    "gist": {"rank": [0, -1], "variance": [0, 1.5]},
    "gradmatch": {"ridge": [-1], "tol": [-1e-4]},
    "ifd": {"most": [0, -1]},
    "selffilter": {"neighbours": [-3], "gamma": [-1, "nan"]},
    "tagcos": {
        "clusters": [0],
        "iterations": [0],
        "restarts": [0],
        "ridge": [-1, "-1"],
        "tol": [-1],
    },
}


@pytest.mark.parametrize(
    ("name", "key", "wrong"),
    [(m, key, v) for m, of in NONSENSE.items() for key, vs in of.items() for v in vs],
)
def test_a_value_outside_an_options_range_is_refused_by_name(
    name: str, key: str, wrong: Any
) -> None:
    with pytest.raises(ConfigError, match=rf"option {key} of {name}: .*not '?{wrong}"):
        methods.make(name, {key: wrong})


def test_the_ends_of_a_range_and_every_default_are_taken() -> None:
    for name in methods.METHODS:
        assert methods.make(name, methods.options_of(methods.make(name))) == methods.make(name)
    assert methods.make("selffilter", {"neighbours": 0, "gamma": "0"}) == methods.load(
        "selffilter"
    )(neighbours=0, gamma=0)
    assert methods.make("tagcos", {"clusters": 1, "ridge": 0, "tol": 0}) == methods.load("tagcos")(
        clusters=1, ridge=0, tol=0
    )
    assert methods.make("gist", {"rank": 1, "variance": 1}) == methods.load("gist")(
        rank=1, variance=1
    )


def test_advice_on_a_lopsided_clustering_never_asks_for_more_clusters() -> None:
    assert "-o clusters=20" in lopsided(np.array([900] + [1] * 99))
    assert "-o clusters" not in lopsided(np.array([272, 29, 1, 1, 1, 1, 1]))
