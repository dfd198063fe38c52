"""RowStore against plain tensors: what is read is what was written, row for row, with the odd rows
quarantined.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import DiskFull, IntegrityError, MismatchError
from gradsift.store.artifact import Artifact, recipe
from gradsift.store.packing import (
    ABSURD,
    NO_TOKEN,
    NON_FINITE,
    OUT_OF_MEMORY,
    QUARANTINE,
    ZERO,
    Ids,
    StoreDtype,
    pack,
)
from gradsift.store.rows import RowStore, RowView
from gradsift.types import Rows

N, D, SHARD = 53, 24, 10


def raw(n: int = N, d: int = D) -> torch.Tensor:
    return (
        torch.randn(n, d, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-3, 3, n)[:, None]
    )


def make(
    path: Path,
    *,
    dtype: StoreDtype = "float16",
    dim: int = D,
    ids: list[str] | None = None,
    digest: str = "ab",
) -> RowStore:
    ids = [f"row-{i}" for i in range(N)] if ids is None else ids
    return RowStore.create(
        path,
        recipe_digest=digest,
        ids=ids,
        dim=dim,
        spec={"projection": "sketch"},
        shard_rows=SHARD,
        dtype=dtype,
    )


def fill(
    store: RowStore, rows: torch.Tensor | None = None, shards: list[int] | None = None
) -> RowStore:
    rows = raw(*store.shape) if rows is None else rows
    for shard in store.missing() if shards is None else shards:
        here = store.shards[shard]
        at = torch.arange(here.start, here.stop)
        store.write(shard, rows[here], norms=at + 1.0, losses=at / 7.0, tokens=at + 3)
    return store


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> RowStore:
    path = tmp_path_factory.mktemp("store") / "full"
    fill(make(path))
    return RowStore.open(path)


def test_rows_and_columns_come_back(full: RowStore) -> None:
    rows = raw()
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert full.shape == (N, D)
    assert len(full) == N
    assert isinstance(full, Rows)
    assert full[0:N].dtype == torch.float16
    assert torch.equal(full[:], unit.half())
    assert torch.allclose(full.scales, rows.norm(dim=1))
    assert torch.allclose(full[:].float() * full.scales[:, None], rows, rtol=2**-10, atol=0)
    assert torch.equal(full.norms, torch.arange(N) + 1.0)
    assert torch.equal(full.losses, torch.arange(N) / 7.0)
    assert torch.equal(full.tokens, (torch.arange(N) + 3).int())
    assert full.tokens.dtype == torch.int32
    assert full.usable.all()
    assert list(full.ids) == [f"row-{i}" for i in range(N)]
    assert full.spec == {"projection": "sketch"}
    assert full.digest == "ab"
    assert full.shards[-1] == slice(50, 53)


def test_any_slice_is_the_slice_of_all_rows(full: RowStore) -> None:
    every = full[:].clone()
    for a in range(N + 1):
        for b in range(a, N + 1):
            assert torch.equal(full[a:b], every[a:b])
    assert torch.equal(full[-4:], every[-4:])
    assert torch.equal(full[50:500], every[50:])
    assert full[9:3].shape == (0, D)
    with pytest.raises(ValueError, match="step of 1"):
        full[::2]


def test_raw_rows_have_the_length_that_was_written(full: RowStore) -> None:
    rows = full.raw()
    assert rows.shape == full.shape
    assert torch.equal(rows[3:40], full[3:40].float() * full.scales[3:40, None])
    torch.testing.assert_close(rows[0 : len(full)].norm(dim=1), full.scales, rtol=1e-3, atol=0)


def test_writing_to_what_was_read_changes_nothing(full: RowStore) -> None:
    before = full[0:5].clone()
    full[0:5].zero_()
    assert torch.equal(full[0:5], before)


@pytest.mark.parametrize("d", [3, 64, 1000])
def test_int8_is_within_its_stated_error(tmp_path: Path, d: int) -> None:
    rows = raw(N, d)
    store = fill(make(tmp_path / "q", dtype="int8", dim=d), rows)
    unit = rows / rows.norm(dim=1, keepdim=True)
    step = unit.abs().amax(dim=1, keepdim=True) / 127
    got = store[:]
    assert got.dtype == torch.float32
    assert ((got - unit).abs() <= step * 0.5001).all()
    cosine = torch.nn.functional.cosine_similarity(got, unit)
    assert (1 - cosine <= 2 * d * step[:, 0] ** 2 / 24 + 1e-6).all()
    assert torch.equal(store[7:33], got[7:33])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_odd_rows_are_quarantined_with_a_code_and_huge_and_tiny_ones_are_not(
    dtype: StoreDtype,
) -> None:
    one = torch.linspace(-1, 1, D)
    rows = torch.stack(
        [
            one,
            one * 0,
            one * 1e37,
            one * 1e-30,
            one * torch.nan,
            one,
            one,
            one,
            one,
            one,
            one * 3e38,
            one * 1e-45,
        ]
    )
    rows[5, 3] = torch.inf
    norms = torch.ones(12)
    losses = torch.ones(12)
    tokens = torch.full((12,), 5)
    codes = torch.zeros(12, dtype=torch.uint8)
    norms[6], losses[7], tokens[8], codes[9] = torch.inf, torch.nan, 0, OUT_OF_MEMORY
    losses[8] = torch.nan  # the mean over no token
    packed = pack(rows, norms=norms, losses=losses, tokens=tokens, codes=codes, dtype=dtype)
    expected = [
        0,
        ZERO,
        0,
        0,
        NON_FINITE,
        NON_FINITE,
        ABSURD,
        NON_FINITE,
        NO_TOKEN,
        OUT_OF_MEMORY,
        ABSURD,
        ZERO,
    ]
    assert packed["codes"].tolist() == expected
    got = packed["rows"].float() * (packed["steps"][:, None] if dtype == "int8" else 1)
    bad = packed["codes"] != 0
    assert not got[bad].any()
    assert not packed["scales"][bad].any()
    assert torch.allclose(got[~bad], (one / one.norm()).expand(3, D), atol=2e-3)
    assert torch.allclose(
        packed["scales"][~bad].double(),
        one.norm().double() * torch.tensor([1, 1e37, 1e-30], dtype=torch.float64),
        rtol=1e-5,
    )
    assert all(tensor.isfinite().all() for tensor in packed.values() if tensor.is_floating_point())


def test_a_zero_gradient_is_quarantined_even_where_moments_give_it_a_direction() -> None:
    packed = pack(
        torch.ones(2, 4),
        norms=torch.tensor([0.0, 1.0]),
        losses=torch.zeros(2),
        tokens=torch.ones(2),
    )
    assert packed["codes"].tolist() == [ZERO, 0]


def test_quarantine_is_counted_by_reason(tmp_path: Path) -> None:
    rows = raw()
    rows[4], rows[17], rows[18] = 0, torch.nan, torch.nan
    store = fill(make(tmp_path / "s"), rows)
    assert store.quarantined() == {QUARANTINE[ZERO]: 1, QUARANTINE[NON_FINITE]: 2}
    assert store.counts() == {
        "rows": N,
        "usable": N - 3,
        "tokens": int(sum(range(3, N + 3))),
        "quarantined": store.quarantined(),
    }
    assert (~store.usable).nonzero()[:, 0].tolist() == [4, 17, 18]
    assert not store[17:19].any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=30))
def test_ids_are_kept_exactly(ids: list[str]) -> None:
    packed = Ids.of(ids)
    assert packed == ids
    assert [packed[i] for i in range(len(ids))] == ids
    assert packed[1:3] == ids[1:3]


def test_odd_ids_come_back_from_disk(tmp_path: Path) -> None:
    ids = ["1", "007", "", "é", "e\u0301", "\u2028", "\ud800", "a\0b", "../x", "x" * 1000]
    store = make(tmp_path / "s", ids=ids)
    fill(store)
    assert list(RowStore.open(tmp_path / "s").ids) == ids
    assert store.ids[-1] == "x" * 1000
    with pytest.raises(IndexError):
        store.ids[len(ids)]


def test_what_a_row_costs_besides_its_values(tmp_path: Path) -> None:
    n = 4096
    ids = [f"{i:08x}" for i in range(n)]
    store = RowStore.create(tmp_path / "s", recipe_digest="ab", ids=ids, dim=16, spec={})
    fill(store, torch.ones(n, 16))
    size = sum(path.stat().st_size for path in (tmp_path / "s").iterdir())
    assert (size - n * 16 * 2 - n * 8) / n < 32  # the promise is 64


def test_a_view_gathers_as_a_tensor_would(full: RowStore) -> None:
    every = full[:].clone()
    rng = np.random.default_rng(0)
    patterns = [
        np.arange(N),
        np.arange(5, 30),
        np.flatnonzero(rng.random(N) < 0.7),
        rng.permutation(N)[:20],
        np.array([3, 3, 52, 0, 3]),
        np.array([], dtype=int),
        np.array([0, 52]),
    ]
    for indices in patterns:
        view, plain = RowView(full, indices), RowView(every, indices)
        assert view.shape == (len(indices), D)
        assert isinstance(view, Rows)
        for a, b in [(0, len(indices)), (1, 4), (3, 100)]:
            assert torch.equal(view[a:b], every[indices][a:b])
            assert torch.equal(plain[a:b], every[indices][a:b])
    with pytest.raises(ValueError, match=r"0\.\.52"):
        RowView(full, [53])


def test_finished_shards_are_not_written_again(tmp_path: Path) -> None:
    store = fill(make(tmp_path / "s"), shards=[0, 2])
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "s").iterdir()}
    again = make(tmp_path / "s")
    assert again.missing() == [1, 3, 4, 5]
    assert again.problems == []
    fill(again, shards=[0, 1, 2])
    after = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "s").iterdir()}
    assert {name: after[name] for name in before} == before
    assert store.missing() == again.missing() == [3, 4, 5]


def test_what_is_not_there_yet_cannot_be_read(tmp_path: Path) -> None:
    store = fill(make(tmp_path / "s"), shards=[0])
    assert store[0:10].shape == (10, D)
    with pytest.raises(IntegrityError, match=r"rows-00001\.safetensors: is missing"):
        store[5:15]
    with pytest.raises(IntegrityError, match="is missing"):
        _ = store.norms
    with pytest.raises(IntegrityError, match="5 of 6 shards are missing"):
        store.files()
    with pytest.raises(IntegrityError, match=r"rows-00001\.safetensors is missing.*verify"):
        RowStore.open(tmp_path / "s")


@pytest.mark.parametrize(
    "field, other",
    [
        ("dim", {"dim": D + 1}),
        ("ids", {"ids": [f"row-{i}" for i in reversed(range(N))]}),
        ("dtype", {"dtype": "int8"}),
        ("recipe", {"digest": "cd"}),
    ],
)
def test_a_store_of_other_settings_is_refused_naming_the_field(
    tmp_path: Path, field: str, other: dict
) -> None:
    make(tmp_path / "s")
    with pytest.raises(MismatchError, match=f"made with {field} = "):
        make(tmp_path / "s", **other)


def test_space_is_checked_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(DiskFull) as caught:
        RowStore.create(tmp_path / "s", recipe_digest="ab", ids=["a"] * 4096, dim=1 << 40, spec={})
    assert caught.value.needed is not None
    assert caught.value.needed >= 4096 * 2 << 40


def test_wrong_shapes_are_refused(tmp_path: Path) -> None:
    store = make(tmp_path / "s")
    with pytest.raises(ValueError, match="shard 0 takes rows"):
        store.write(
            0, torch.zeros(9, D), norms=torch.ones(9), losses=torch.ones(9), tokens=torch.ones(9)
        )
    with pytest.raises(ValueError, match="columns"):
        store.write(
            0, torch.zeros(10, D), norms=torch.ones(9), losses=torch.ones(10), tokens=torch.ones(10)
        )
    assert store.missing() == list(range(6))


def test_an_empty_store(tmp_path: Path) -> None:
    store = make(tmp_path / "s", ids=[])
    assert store.shards == []
    assert store.missing() == []
    assert store[:].shape == (0, D)
    assert store.norms.shape == (0,)
    assert set(store.files()) == {"store.json", "ids.safetensors"}


def test_a_sealed_store_is_an_artifact_whose_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    made_by = recipe("gradients", version=1, config={}, inputs={}, identity={})
    contents = []
    for root, order in (("a", [0, 1, 2, 3, 4, 5]), ("b", [5, 3, 1, 0, 2, 4])):
        artifact = Artifact(tmp_path / root, made_by)
        store = fill(make(artifact.path, digest=artifact.digest), shards=order)
        store.seal(artifact)
        assert RowStore.open(artifact.path, verify=True).files() == artifact.manifest["files"]
        contents.append((artifact.content, (artifact.path / "manifest.json").read_bytes()))
    assert contents[0] == contents[1]


def test_many_shards_do_not_keep_many_files_open(tmp_path: Path) -> None:
    store = RowStore.create(
        tmp_path / "s",
        recipe_digest="ab",
        ids=[str(i) for i in range(150)],
        dim=4,
        spec={},
        shard_rows=1,
    )
    fill(store, raw(150, 4))
    store = RowStore.open(tmp_path / "s")
    assert store[:].shape == (150, 4)
    assert (
        len(list(Path("/proc/self/fd").iterdir())) < 150 if Path("/proc/self/fd").exists() else True
    )
    assert torch.equal(store[0:150], torch.cat([store[i : i + 1] for i in range(150)]))
