"""Curvature fitted on small real models, against one-by-one automatic differentiation in plain
lines; its store, and resuming.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gradsift.errors import ConfigError, DataError, IntegrityError, MismatchError
from gradsift.signals.curvature.exact import influence_scores
from gradsift.signals.curvature.fit import Fitting, fit
from gradsift.signals.curvature.fitted import Curvature
from gradsift.signals.curvature.passes import sample, uniforms
from gradsift.store.partial import Pieces
from gradsift.store.tensors import TensorFile
from tests.signals.curvature.naive import (
    MODELS,
    Naive,
    base,
    close,
    gather,
    lora,
    make_rows,
    naive_scores,
    sampled,
)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("form", ["expand", "expand-sum", "reduce"])
def test_factors_and_corrected_eigenvalues_are_those_of_single_rows(kind: str, form: Any) -> None:
    make, modules = MODELS[kind]
    model, rows = make(), make_rows()
    curvature = fit(model, rows, modules=modules, form=form, token_budget=64)
    naive = Naive(model, curvature.names, rows, whole=form == "reduce")
    assert curvature.spec["rows"] == len(rows)
    for name in curvature.names:
        a, g = naive.factors(name, form)
        left, right = curvature.factors(name)
        if kind == "gpt2":  # Conv1D keeps [in, out]
            left, right = right, left
        assert close(left, g), name
        assert close(right, a), name
        e = curvature.eigen(name)
        grads = torch.stack(naive.grads[name])
        assert grads.shape[1:] == curvature.shapes[name]
        assert close(e.values, (e.left.t().double() @ grads @ e.right.double()).square().mean(0)), (
            name
        )
        # T2.4: the trace of the Fisher
        assert float(e.values.sum()) == pytest.approx(
            float(grads.square().sum() / len(rows)), rel=1e-4
        )
        assert close(e.left.t() @ e.left, torch.eye(len(e.left)), 1e-5)


def test_layers_that_read_the_same_inputs_share_a_factor() -> None:
    curvature = fit(base(), make_rows(4), modules="linear", correct=False)
    groups = {
        n.removeprefix("model.layers."): v["group"].removeprefix("model.layers.")
        for n, v in curvature.spec["layers"].items()
    }
    assert groups["0.self_attn.v_proj"] == groups["0.self_attn.k_proj"] == "0.self_attn.q_proj"
    assert groups["1.mlp.up_proj"] == "1.mlp.gate_proj"
    assert groups["1.mlp.down_proj"] == "1.mlp.down_proj"
    adapted = fit(lora(), make_rows(4), correct=False)
    stem = "base_model.model.model.layers.0.self_attn."
    assert (
        adapted.spec["layers"][stem + "v_proj.lora_A.default"]["group"]
        == stem + "q_proj.lora_A.default"
    )
    assert (
        adapted.spec["layers"][stem + "v_proj.lora_B.default"]["group"]
        == stem + "v_proj.lora_B.default"
    )


@pytest.mark.parametrize("kind", ["linear", "lora"])
def test_sampled_labels_are_the_rows_own(kind: str) -> None:
    make, modules = MODELS[kind]
    model, rows = make(), make_rows(8)
    drawn = sampled(model, rows, seed=7)
    assert drawn != rows
    ours = fit(model, rows, modules=modules, labels="sampled", seed=7, token_budget=64)
    theirs = fit(model, drawn, modules=modules, token_budget=64)
    alone = fit(model, rows, modules=modules, labels="sampled", seed=7, token_budget=1)
    other = fit(model, rows, modules=modules, labels="sampled", seed=8, token_budget=64)
    for key, tensor in theirs.tensors.items():
        if key[0] in "AG":
            assert close(ours.tensors[key], tensor, 1e-5)
            assert close(alone.tensors[key], tensor, 1e-4)
    assert any(
        not close(other.tensors[key], tensor, 1e-2)
        for key, tensor in theirs.tensors.items()
        if key[0] == "G"
    )


def test_ids_key_the_draws_instead_of_positions() -> None:
    model, rows = base(), make_rows(6)
    ids = [f"row {n}" for n in range(6)]
    ahead = fit(model, rows, modules="linear", labels="sampled", ids=ids, correct=False)
    back = fit(model, rows[::-1], modules="linear", labels="sampled", ids=ids[::-1], correct=False)
    assert all(
        close(back.tensors[key], tensor, 1e-5)
        for key, tensor in ahead.tensors.items()
        if key[0] in "AG"
    )


def test_draws_follow_the_models_distribution() -> None:
    chances = torch.tensor([0.1, 0.0, 0.6, 0.3])
    picked = sample(chances.log()[None].expand(20000, 4), torch.from_numpy(uniforms(0, 1, 20000)))
    counts = torch.bincount(picked, minlength=4) / 20000
    assert torch.allclose(counts, chances, atol=0.015)
    assert counts[1] == 0
    assert np.array_equal(uniforms(3, 5, 4), uniforms(3, 5, 9)[:4])
    assert not np.array_equal(uniforms(3, 5, 4), uniforms(3, 6, 4))


@pytest.mark.parametrize("form", ["expand", "reduce"])
def test_batches_padding_and_shards_do_not_matter(form: Any) -> None:
    model, rows = base(), make_rows(13)
    plain = fit(model, rows, modules="linear", form=form, token_budget=1, accumulate="float64")
    for options in (
        {"token_budget": 200},
        {"token_budget": 60, "shard_rows": 4},
        {"shard_rows": 1},
    ):
        other = fit(model, rows, modules="linear", form=form, **options)
        for name in plain.names:
            ours, theirs = (c.inverse(0.1, "pi") for c in (other, plain))
            grad = torch.randn(plain.shapes[name], generator=torch.Generator().manual_seed(1))
            assert close(ours.apply_inverse(name, grad), theirs.apply_inverse(name, grad), 1e-3)
            if form == "expand":
                # 13 sums of tokens leave part of the eigenbasis, and so the correction, open
                assert close(
                    other.inverse().apply_inverse(name, grad),
                    plain.inverse().apply_inverse(name, grad),
                    1e-2,
                )


def test_rows_without_supervised_tokens_are_left_out() -> None:
    model, rows = base(), make_rows(5)
    silent = {"input_ids": [1, 2, 3], "labels": [-100] * 3}
    plain, mixed = (
        fit(model, rows, modules="linear"),
        fit(model, [rows[0], silent, *rows[1:]], modules="linear"),
    )
    assert mixed.spec["rows"] == 5
    assert all(
        close(mixed.tensors[key], tensor) for key, tensor in plain.tensors.items() if key[0] in "AG"
    )
    with pytest.raises(DataError, match="nothing to fit"):
        fit(model, [silent], modules="linear")


def test_a_loss_that_is_not_finite_names_the_row() -> None:
    model, rows = base(), make_rows(5)
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = torch.nan  # type: ignore[operator,union-attr]
    rows = [{"input_ids": [i % 63 for i in r["input_ids"]], "labels": r["labels"]} for r in rows]
    rows[3] = {"input_ids": [63, 63, 63], "labels": [63, 63, 63]}
    with pytest.raises(DataError, match="loss of row 3 is not finite"):
        fit(model, rows, modules="linear")


def test_the_model_is_left_as_it_was() -> None:
    model, rows = lora(), make_rows(4)
    model.train()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    gather(influence_scores(model, rows, rows[:2], fit(model, rows).inverse()), 4)
    assert all(m.training for m in model.modules())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def tied() -> nn.Module:
    """Two layers that share one weight, one of them in the last feed-forward layer: its gradient is
    the sum over both uses.
    """
    model = base()
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight  # type: ignore[union-attr,index]
    return model


def checkpointed() -> nn.Module:
    model = base()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


@pytest.mark.parametrize("make", [tied, checkpointed])
def test_shared_weights_and_checkpointing_change_nothing(make: Any) -> None:
    model, rows = make(), make_rows(7)
    curvature = fit(model, rows, modules="linear", token_budget=64)
    naive = Naive(model.eval(), curvature.names, rows)
    for name in curvature.names:
        e, grads = curvature.eigen(name), torch.stack(naive.grads[name])
        assert close(e.values, (e.left.t().double() @ grads @ e.right.double()).square().mean(0)), (
            name
        )
    found = gather(
        influence_scores(model, rows, rows, curvature.inverse(), modules="linear", token_budget=64),
        7,
    )
    assert close(found, naive_scores(curvature.inverse(), naive, naive))


def test_half_precision_models_are_summed_in_single() -> None:
    rows, model = make_rows(7), base()
    inverse = fit(model, rows, modules="linear").inverse()
    expected = gather(influence_scores(model, rows, rows, inverse, modules="linear"), 7)
    half = fit(model.bfloat16(), rows, modules="linear")
    assert all(tensor.dtype == torch.float32 for tensor in half.tensors.values())
    found = gather(influence_scores(model, rows, rows, inverse, modules="linear"), 7)
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.995


# --- stores, resume


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("gone", ["factors-00001", "basis", "eigenvalues-00002"])
def test_a_shard_that_is_gone_or_damaged_is_made_again_byte_for_byte(
    tmp_path: Path, gone: str, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = dict(modules="linear", shard_rows=4, token_budget=60)
    model, rows, folder = base(), make_rows(11), tmp_path / "fit"
    first = fit(model, rows, store=Pieces(folder), **options)
    before = files(folder)
    shards = {
        f"{kind}-0000{n}.safetensors" for kind in ("factors", "eigenvalues") for n in range(3)
    }
    assert set(before) == {"curvature.json", "basis.safetensors"} | shards
    path = folder / f"{gone}.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    for damage in (lambda: path.unlink(), lambda: path.write_bytes(data)):
        damage()
        again = fit(model, rows, store=Pieces(folder), **options)
        assert files(folder) == before
        assert all(torch.equal(again.tensors[key], tensor) for key, tensor in first.tensors.items())
    assert "not what was written" in caplog.text
    memory = fit(model, rows, **options)
    assert all(torch.equal(memory.tensors[key], tensor) for key, tensor in first.tensors.items())


def test_the_files_of_a_fit_say_what_they_are_and_a_resumed_fit_writes_none_again(
    tmp_path: Path,
) -> None:
    """Names and metadata are those of every fit before: one that was stopped under an older version
    goes on.
    """
    options: dict[str, Any] = dict(modules="linear", shard_rows=4, token_budget=60)
    model, rows = base(), make_rows(6)
    fit(model, rows, store=Pieces(tmp_path), **options)
    metas = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        with TensorFile(path) as file:
            metas[path.stem] = {
                name: value for name, value in file.meta.items() if name in ("fit", "part", "basis")
            }
    assert {stem: sorted(meta) for stem, meta in metas.items()} == {
        "basis": ["fit", "part"],
        **{f"factors-0000{k}": ["fit", "part"] for k in range(2)},
        **{f"eigenvalues-0000{k}": ["basis", "fit", "part"] for k in range(2)},
    }
    assert (
        all(meta["part"] == stem for stem, meta in metas.items())
        and len({meta["fit"] for meta in metas.values()}) == 1
    )
    before = {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()
    }
    fit(model, rows, store=Pieces(tmp_path), **options)
    assert {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()
    } == before


def test_workers_in_any_order_make_the_same_bytes(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(modules="linear", shard_rows=4, token_budget=60)
    model, rows = base(), make_rows(11)
    fit(model, rows, store=Pieces(tmp_path / "one"), **options)
    workers = [Fitting(model, rows, store=Pieces(tmp_path / "three"), **options) for _ in range(3)]
    for shard in (2, 0, 1):
        workers[shard].factors(shard)
    for shard in (1, 2, 0):
        workers[shard].eigenvalues(shard)
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_a_store_of_other_settings_rows_or_weights_is_refused(tmp_path: Path) -> None:
    model, rows = base(), make_rows(5)
    fit(model, rows, modules="linear", store=Pieces(tmp_path), correct=False)
    with pytest.raises(MismatchError, match="form = 'expand', not 'reduce'"):
        fit(model, rows, modules="linear", store=Pieces(tmp_path), correct=False, form="reduce")
    with pytest.raises(MismatchError, match="data = "):
        fit(model, [*rows[1:], rows[0]], modules="linear", store=Pieces(tmp_path), correct=False)
    with pytest.raises(MismatchError, match="identity"):
        fit(
            model,
            rows,
            modules="linear",
            store=Pieces(tmp_path),
            correct=False,
            identity="another model",
        )
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)  # type: ignore[operator,union-attr]
    with pytest.raises(MismatchError, match="weights = "):
        fit(model, rows, modules="linear", store=Pieces(tmp_path), correct=False)


def test_saved_and_loaded_curvature_is_the_same(tmp_path: Path) -> None:
    curvature = fit(base(), make_rows(5), modules="linear")
    path = tmp_path / "curvature.safetensors"
    curvature.save(path)
    loaded = Curvature.load(path)
    assert loaded.spec == curvature.spec
    assert all(
        torch.equal(loaded.tensors[key], tensor) for key, tensor in curvature.tensors.items()
    )
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="not what was written"):
        Curvature.load(path)


def test_damping_is_reported_and_options_are_checked() -> None:
    model, rows = base(), make_rows(6)
    plain = fit(model, rows, modules="linear", correct=False)
    assert [d.ratio for d in plain.inverse(0.25).damped] == pytest.approx([0.25] * len(plain.names))
    # the released 0.5 drowns the curvature
    assert all(d.ratio > 1e3 for d in plain.inverse(0.5, "pi", absolute=True).damped)
    values = [torch.linalg.eigvalsh(factor) for factor in plain.factors(plain.names[0])]
    assert close(plain.eigen(plain.names[0]).values, torch.outer(*values))
    with pytest.raises(ConfigError, match="no corrected eigenvalues"):
        plain.inverse(corrected=True)
    with pytest.raises(ConfigError, match="damping style"):
        plain.inverse(style="diagonal")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="form is 'both'"):
        fit(model, rows, modules="linear", form="both")  # type: ignore[arg-type]
    fresh = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"lora_A.default: every gradient of the fit is zero"):
        fit(fresh, rows).inverse()
