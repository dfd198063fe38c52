"""Curvature fitted and influence streamed on small real models, against one-by-one automatic differentiation in plain lines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradsift.curvature import Curvature, Fitting, fit, influence_scores, prepare_targets, rank_agreement, score_pool, scores, trak_target
from gradsift.curvature.walk import IGNORED, row, sample, uniforms
from gradsift.errors import ConfigError, DataError, IntegrityError, MismatchError, UserError
from gradsift.gradients import extract
from gradsift.projection import Projection
from gradsift.store import RowStore

VOCAB = 64


def base(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes})).eval()


def lora() -> nn.Module:
    model = get_peft_model(base(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj"]))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, n_inner=24)).eval()


MODELS = {"linear": (base, "linear"), "lora": (lora, None), "gpt2": (gpt2, "linear")}


def make_rows(n: int = 10, seed: int = 0, longest: int = 20) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(5, longest, n):
        ids = rng.integers(0, VOCAB, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return rows


def sampled(model: nn.Module, rows: list[dict[str, list[int]]], seed: int) -> list[dict[str, list[int]]]:
    """The same rows with labels drawn from the model, one row at a time."""
    out = []
    for n, r in enumerate(rows):
        labels, places = list(r["labels"]), [t for t in range(1, len(r["labels"])) if r["labels"][t] != -100]
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([r["input_ids"]])).logits[0].softmax(-1).double().cumsum(-1)
        for place, u in zip(places, uniforms(seed, n, len(places)), strict=True):
            labels[place] = int((chances[place - 1] <= u * chances[place - 1, -1]).sum())
        out.append({"input_ids": r["input_ids"], "labels": labels})
    return out


class Naive:
    """Inputs, output gradients and gradients of every tracked weight, row by row, without padding, by autograd."""

    def __init__(self, model: nn.Module, names: list[str], rows: list[dict[str, list[int]]], *, whole: bool = False) -> None:
        modules = dict(model.named_modules())
        self.a: dict[str, list[Tensor]] = {n: [] for n in names}
        self.d: dict[str, list[Tensor]] = {n: [] for n in names}
        self.grads: dict[str, list[Tensor]] = {n: [] for n in names}
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        for r in rows:
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            keep = seen.__setitem__
            hooks = {n: (lambda m, args, out, n=n, keep=keep: keep(n, (args[0].detach(), out))) for n in names}
            handles = [modules[n].register_forward_hook(hook) for n, hook in hooks.items()]
            labels = torch.tensor(r["labels"])
            logits = model(input_ids=torch.tensor([r["input_ids"]])).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, labels[1:])
            for handle in handles:
                handle.remove()
            wanted = [seen[n][1] for n in names] + [modules[n].weight for n in names]
            found = torch.autograd.grad(loss, wanted)  # type: ignore[arg-type]
            last = len(labels) if whole else int((labels[1:] != -100).nonzero()[-1]) + 1
            for k, n in enumerate(names):
                self.a[n].append(seen[n][0][0, :last].double())
                self.d[n].append(found[k][0, :last].double())
                self.grads[n].append(found[k + len(names)].double())

    def factors(self, name: str, form: str) -> tuple[Tensor, Tensor]:
        def factor(parts: list[Tensor]) -> Tensor:
            if form == "reduce":
                sums = torch.stack([p.sum(0) for p in parts])
                return sums.t() @ sums / len(parts)
            flat = torch.cat(parts)
            return flat.t() @ flat / (len(flat) if form == "expand" else len(parts))

        return factor(self.a[name]), factor(self.d[name])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return float((a.double() - b.double()).abs().max()) <= tolerance * float(b.double().abs().max()) + 1e-30


def gather(stream: Iterator[tuple[np.ndarray, Tensor]], n: int) -> Tensor:
    parts = list(stream)
    order = np.concatenate([indices for indices, _ in parts])
    assert sorted(order.tolist()) == list(range(n))
    return torch.cat([s for _, s in parts])[torch.from_numpy(order).argsort()]


def naive_scores(inverse: Any, pool: Naive, target: Naive) -> Tensor:
    """[n, m] in fp64."""
    total = torch.zeros(len(next(iter(pool.grads.values()))), len(next(iter(target.grads.values()))), dtype=torch.float64)
    for name in pool.grads:
        p, q = torch.stack(pool.grads[name]), torch.stack(target.grads[name])
        total += p.flatten(1) @ (q if inverse is None else inverse.apply_inverse(name, q)).flatten(1).t()
    return total


# --- fitting


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
        assert close(e.values, (e.left.t().double() @ grads @ e.right.double()).square().mean(0)), name
        assert float(e.values.sum()) == pytest.approx(float(grads.square().sum() / len(rows)), rel=1e-4)  # T2.4: the trace of the Fisher
        assert close(e.left.t() @ e.left, torch.eye(len(e.left)), 1e-5)


def test_layers_that_read_the_same_inputs_share_a_factor() -> None:
    curvature = fit(base(), make_rows(4), modules="linear", correct=False)
    groups = {n.removeprefix("model.layers."): v["group"].removeprefix("model.layers.") for n, v in curvature.spec["layers"].items()}
    assert groups["0.self_attn.v_proj"] == groups["0.self_attn.k_proj"] == "0.self_attn.q_proj"
    assert groups["1.mlp.up_proj"] == "1.mlp.gate_proj"
    assert groups["1.mlp.down_proj"] == "1.mlp.down_proj"
    adapted = fit(lora(), make_rows(4), correct=False)
    stem = "base_model.model.model.layers.0.self_attn."
    assert adapted.spec["layers"][stem + "v_proj.lora_A.default"]["group"] == stem + "q_proj.lora_A.default"
    assert adapted.spec["layers"][stem + "v_proj.lora_B.default"]["group"] == stem + "v_proj.lora_B.default"


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
    assert any(not close(other.tensors[key], tensor, 1e-2) for key, tensor in theirs.tensors.items() if key[0] == "G")


def test_ids_key_the_draws_instead_of_positions() -> None:
    model, rows = base(), make_rows(6)
    ids = [f"row {n}" for n in range(6)]
    ahead = fit(model, rows, modules="linear", labels="sampled", ids=ids, correct=False)
    back = fit(model, rows[::-1], modules="linear", labels="sampled", ids=ids[::-1], correct=False)
    assert all(close(back.tensors[key], tensor, 1e-5) for key, tensor in ahead.tensors.items() if key[0] in "AG")


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
    for options in ({"token_budget": 200}, {"token_budget": 60, "shard_rows": 4}, {"shard_rows": 1}):
        other = fit(model, rows, modules="linear", form=form, **options)
        for name in plain.names:
            ours, theirs = (c.inverse(0.1, "pi") for c in (other, plain))
            grad = torch.randn(plain.shapes[name], generator=torch.Generator().manual_seed(1))
            assert close(ours.apply_inverse(name, grad), theirs.apply_inverse(name, grad), 1e-3)
            if form == "expand":  # 13 sums of tokens leave part of the eigenbasis, and so the correction, open
                assert close(other.inverse().apply_inverse(name, grad), plain.inverse().apply_inverse(name, grad), 1e-2)


def test_rows_without_supervised_tokens_are_left_out() -> None:
    model, rows = base(), make_rows(5)
    silent = {"input_ids": [1, 2, 3], "labels": [-100] * 3}
    plain, mixed = fit(model, rows, modules="linear"), fit(model, [rows[0], silent, *rows[1:]], modules="linear")
    assert mixed.spec["rows"] == 5
    assert all(close(mixed.tensors[key], tensor) for key, tensor in plain.tensors.items() if key[0] in "AG")
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
    """Two layers that share one weight, one of them in the last feed-forward layer: its gradient is the sum over both uses."""
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
        assert close(e.values, (e.left.t().double() @ grads @ e.right.double()).square().mean(0)), name
    found = gather(influence_scores(model, rows, rows, curvature.inverse(), modules="linear", token_budget=64), 7)
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
def test_a_shard_that_is_gone_or_damaged_is_made_again_byte_for_byte(tmp_path: Path, gone: str, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = dict(modules="linear", shard_rows=4, token_budget=60)
    model, rows, folder = base(), make_rows(11), tmp_path / "fit"
    first = fit(model, rows, store=folder, **options)
    before = files(folder)
    shards = {f"{kind}-0000{n}.safetensors" for kind in ("factors", "eigenvalues") for n in range(3)}
    assert set(before) == {"curvature.json", "basis.safetensors"} | shards
    path = folder / f"{gone}.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    for damage in (lambda: path.unlink(), lambda: path.write_bytes(data)):
        damage()
        again = fit(model, rows, store=folder, **options)
        assert files(folder) == before
        assert all(torch.equal(again.tensors[key], tensor) for key, tensor in first.tensors.items())
    assert "not what was written" in caplog.text
    memory = fit(model, rows, **options)
    assert all(torch.equal(memory.tensors[key], tensor) for key, tensor in first.tensors.items())


def test_workers_in_any_order_make_the_same_bytes(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(modules="linear", shard_rows=4, token_budget=60)
    model, rows = base(), make_rows(11)
    fit(model, rows, store=tmp_path / "one", **options)
    workers = [Fitting(model, rows, store=tmp_path / "three", **options) for _ in range(3)]
    for shard in (2, 0, 1):
        workers[shard].factors(shard)
    for shard in (1, 2, 0):
        workers[shard].eigenvalues(shard)
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_a_store_of_other_settings_rows_or_weights_is_refused(tmp_path: Path) -> None:
    model, rows = base(), make_rows(5)
    fit(model, rows, modules="linear", store=tmp_path, correct=False)
    with pytest.raises(MismatchError, match="form = 'expand', not 'reduce'"):
        fit(model, rows, modules="linear", store=tmp_path, correct=False, form="reduce")
    with pytest.raises(MismatchError, match="data = "):
        fit(model, [*rows[1:], rows[0]], modules="linear", store=tmp_path, correct=False)
    with pytest.raises(MismatchError, match="identity"):
        fit(model, rows, modules="linear", store=tmp_path, correct=False, identity="another model")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)  # type: ignore[operator,union-attr]
    with pytest.raises(MismatchError, match="weights = "):
        fit(model, rows, modules="linear", store=tmp_path, correct=False)


def test_saved_and_loaded_curvature_is_the_same(tmp_path: Path) -> None:
    curvature = fit(base(), make_rows(5), modules="linear")
    path = tmp_path / "curvature.safetensors"
    curvature.save(path)
    loaded = Curvature.load(path)
    assert loaded.spec == curvature.spec
    assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in curvature.tensors.items())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="not what was written"):
        Curvature.load(path)


def test_damping_is_reported_and_options_are_checked() -> None:
    model, rows = base(), make_rows(6)
    plain = fit(model, rows, modules="linear", correct=False)
    assert [d.ratio for d in plain.inverse(0.25).damped] == pytest.approx([0.25] * len(plain.names))
    assert all(d.ratio > 1e3 for d in plain.inverse(0.5, "pi", absolute=True).damped)  # the released 0.5 drowns the curvature
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


# --- influence


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("style", ["ekfac", "kfac", "pi", "none"])
def test_scores_are_those_of_dense_gradients(kind: str, style: str) -> None:
    make, modules = MODELS[kind]
    model, pool, target = make(), make_rows(9), make_rows(4, seed=1)
    curvature = fit(model, pool, modules=modules)
    inverse = {
        "ekfac": lambda: curvature.inverse(),
        "kfac": lambda: curvature.inverse(corrected=False),
        "pi": lambda: curvature.inverse(style="pi"),
        "none": lambda: None,
    }[style]()
    expected = naive_scores(inverse, Naive(model, curvature.names, pool), Naive(model, curvature.names, target))
    for budget in (1, 50, 1000):
        found = gather(influence_scores(model, pool, target, inverse, modules=modules, token_budget=budget), 9)
        assert close(found, expected), budget
    dots = gather(influence_scores(model, pool, pool, inverse, modules=modules), 9)
    assert bool((dots.diagonal() >= 0).all())  # T2.6


def test_scores_are_g_times_the_dense_inverse_of_the_curvature() -> None:
    model, pool = base(), make_rows(6)
    name = "model.layers.1.mlp.down_proj"
    curvature = fit(model, pool, modules=[name], accumulate="float64")
    e = curvature.eigen(name)
    basis = torch.kron(e.left.double(), e.right.double())
    dense = basis @ torch.diag(e.values.double().flatten()) @ basis.t()
    damping = 0.1 * float(e.values.double().mean())
    grads = torch.stack(Naive(model, [name], pool).grads[name]).flatten(1)
    expected = grads @ torch.linalg.solve(dense + damping * torch.eye(len(dense), dtype=torch.float64), grads.t())
    assert close(gather(influence_scores(model, pool, pool, curvature.inverse(), modules=[name]), 6), expected)


def test_inner_products_of_projected_rows_agree_without_projection() -> None:
    """The projected backend is the same quantity: identity rows of the pool against preconditioned identity rows of the targets."""
    model, pool, target = base(), make_rows(6), make_rows(3, seed=1)
    inverse = fit(model, pool, modules="linear").inverse()
    flat = Projection(None, kind="identity")
    sides = []
    for rows, transform in ((pool, None), (target, inverse)):
        out = torch.zeros(len(rows), 0)
        for batch in extract(model, rows, projection=flat, modules="linear", transform=transform):
            out = torch.zeros(len(rows), batch.rows.shape[1]) if out.shape[1] == 0 else out
            out[torch.from_numpy(batch.indices)] = batch.rows
        sides.append(out)
    assert close(gather(influence_scores(model, pool, target, inverse, modules="linear"), 6), sides[0] @ sides[1].t())


def test_target_batches_are_token_weighted_means() -> None:
    model, pool, target = base(), make_rows(6), make_rows(5, seed=1)
    curvature = fit(model, pool, modules="linear")
    inverse = curvature.inverse()
    tokens = [sum(x != -100 for x in r["labels"][1:]) for r in target]
    single = naive_scores(inverse, Naive(model, curvature.names, pool), Naive(model, curvature.names, target))
    expected = torch.stack(
        [sum(tokens[i] * single[:, i] for i in part) / sum(tokens[i] for i in part) for part in ((0, 1), (2, 3), (4,))], dim=1
    )  # type: ignore[arg-type]
    pairs = gather(influence_scores(model, pool, target, inverse, modules="linear", target_batch=2), 6)
    assert close(pairs, expected)
    lost = prepare_targets(model, target, inverse, modules="linear", target_batch=2, drop_last=True)
    assert lost.members == ((0, 1), (2, 3))
    assert close(gather(score_pool(model, pool, lost, modules="linear"), 6), expected[:, :2])


def test_t26_duplicated_seeds_keep_the_filter_and_more_seeds_shrink_it() -> None:
    model, pool, target = base(), make_rows(40), make_rows(3, seed=1)
    inverse = fit(model, pool, modules="linear").inverse()

    def kept(seeds: list[dict[str, list[int]]]) -> set[int]:
        found = gather(influence_scores(model, pool, seeds, inverse, modules="linear", token_budget=200), 40)
        return set((found > 0).all(1).nonzero().flatten().tolist())

    assert kept(target) == kept([*target, target[0], target[2], target[0]])
    assert kept(target) <= kept(target[:2]) <= kept(target[:1])
    assert 0 < len(kept(target[:1])) < 40


@pytest.mark.parametrize("held", [0, 6, 1000])
@pytest.mark.parametrize("kind", MODELS)
def test_t27_full_rank_is_dense_and_lower_rank_is_its_compression(kind: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make, modules = MODELS[kind]
    model, pool, target = make(), make_rows(11), make_rows(4, seed=1)
    curvature = fit(model, pool, modules=modules)
    inverse = curvature.inverse()
    monkeypatch.setattr(scores, "_MANY", 1)
    size = 4 * sum(r * c for r, c in curvature.shapes.values())
    monkeypatch.setattr(scores, "HELD", held * size)
    naive = Naive(model, curvature.names, pool), Naive(model, curvature.names, target)
    expected = naive_scores(inverse, *naive)
    for rank in (None, 24):
        assert close(gather(influence_scores(model, pool, target, inverse, modules=modules, rank=rank, token_budget=50), 11), expected)
    prepared = prepare_targets(model, target, inverse, modules=modules, rank=2)
    assert prepared.rank == 2
    low = torch.zeros(11, 4, dtype=torch.float64)
    for name in curvature.names:
        whole = inverse.apply_inverse(name, torch.stack(naive[1].grads[name]))
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        best = (u[:, :, :2] * s[:, None, :2]) @ vh[:, :2]
        if min(whole.shape[1:]) > 2:
            left, right = prepared.low[name]
            made = left.double() @ right.double().transpose(1, 2)
            assert float((made - whole).norm()) <= 1.01 * float((best - whole).norm()) + 1e-6 * float(whole.norm())
            assert prepared.kept[name] == pytest.approx(float((best.norm(dim=(1, 2)) / whole.norm(dim=(1, 2))).square().min()), rel=1e-2)
            whole = made
        low += torch.stack(naive[0].grads[name]).flatten(1) @ whole.flatten(1).t()
    for budget in (1, 50):
        assert close(gather(score_pool(model, pool, prepared, modules=modules, token_budget=budget), 11), low)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_low_rank_scores_agree_both_ways(by_tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool, target = base(), make_rows(8), make_rows(5, seed=1)
    inverse = fit(model, pool, modules="linear").inverse()
    prepared = prepare_targets(model, target, inverse, modules="linear", rank=3)
    expected = gather(score_pool(model, pool, prepared, modules="linear"), 8)
    monkeypatch.setattr(scores, "_by_tokens", lambda *sizes: by_tokens)
    monkeypatch.setattr(scores, "_CHUNK", {"cpu": 1000})
    assert close(gather(score_pool(model, pool, prepared, modules="linear"), 8), expected, 1e-5)


def test_rank_is_chosen_by_memory_and_chunks_do_not_matter(caplog: pytest.LogCaptureFixture) -> None:
    model, pool, target = base(hidden_size=64, intermediate_size=96), make_rows(8), make_rows(5, seed=1)
    curvature = fit(model, pool, modules="linear")
    inverse = curvature.inverse()
    size = 4 * sum(r * c for r, c in curvature.shapes.values())
    assert prepare_targets(model, target, inverse, modules="linear", memory=5 * size).rank is None
    with caplog.at_level("INFO"):
        small = prepare_targets(model, target, inverse, modules="linear", memory=2 * size)
    assert small.rank == 32
    assert "kept at rank 32" in caplog.text
    large = prepare_targets(model, target, inverse, modules="linear", rank=32)
    both = [gather(score_pool(model, pool, t, modules="linear"), 8) for t in (small, large)]
    assert close(both[0], both[1])
    agreement = rank_agreement(model, pool, target, inverse, rank=32, modules="linear")
    assert agreement.shape == (5,)
    assert bool((agreement > 0.5).all())
    plain = rank_agreement(model, pool, target, None, rank=32, modules="linear")
    assert torch.allclose(plain, torch.ones(5))  # a row of 20 tokens has a gradient of rank 20; its preconditioned gradient has not


def test_silent_rows_score_zero_and_broken_ones_nan() -> None:
    model, pool = base(), make_rows(4)
    pool = [{"input_ids": [i % 63 for i in r["input_ids"]], "labels": [min(x, 62) for x in r["labels"]]} for r in pool]
    inverse = fit(model, pool, modules="linear").inverse()
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = torch.nan  # type: ignore[operator,union-attr]
    silent, broken = {"input_ids": [1, 2], "labels": [-100, -100]}, {"input_ids": [63, 63, 63], "labels": [1, 2, 3]}
    found = gather(influence_scores(model, [*pool, silent, broken], pool[:2], inverse, modules="linear"), 6)
    assert bool(torch.isfinite(found[:5]).all())
    assert bool((found[4] == 0).all())
    assert bool(found[5].isnan().all())
    with pytest.raises(DataError, match="target row 1 has no supervised token"):
        influence_scores(model, pool, [pool[0], silent], inverse, modules="linear")
    with pytest.raises(DataError, match="target row 1 has a gradient that is not finite"):
        influence_scores(model, pool, [pool[0], broken], inverse, modules="linear")


def test_a_batch_that_runs_out_of_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = base(), make_rows(8)
    expected = gather(influence_scores(model, pool, pool[:2], None, modules="linear"), 8)
    show = scores.Walk.show

    def limited(self: Any, rows: Any, *args: Any) -> Tensor:
        if len(rows) > 2 or any(r.index == 5 for r in rows):
            raise torch.cuda.OutOfMemoryError("out of memory")
        return show(self, rows, *args)

    prepared = prepare_targets(model, pool[:2], None, modules="linear")
    monkeypatch.setattr(scores.Walk, "show", limited)
    found = gather(score_pool(model, pool, prepared, modules="linear", token_budget=100), 8)
    assert bool(found[5].isnan().all())
    others = [n for n in range(8) if n != 5]
    assert close(found[others], expected[others], 1e-5)


def test_mistakes_are_told() -> None:
    model, rows = base(), make_rows(4)
    inverse = fit(model, rows, modules=["*down_proj"]).inverse()
    with pytest.raises(MismatchError, match="has no curvature"):
        influence_scores(model, rows, rows, inverse, modules="linear")
    with pytest.raises(ConfigError, match="target_batch 0"):
        influence_scores(model, rows, rows, None, modules="linear", target_batch=0)
    with pytest.raises(DataError, match="no targets"):
        influence_scores(model, rows, rows[:1], None, modules="linear", target_batch=2, drop_last=True)
    prepared = prepare_targets(model, rows, None, modules=["*down_proj"])
    with pytest.raises(MismatchError, match="no gradient of"):
        score_pool(model, rows, prepared, modules="linear")


def test_a_row_ends_where_it_is_told() -> None:
    r = row([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}], 0, 3)
    assert r.ids.tolist() == [5, 6, 7]
    assert r.targets.tolist() == [6, 7, IGNORED]


# --- TRAK


def test_trak_with_an_invertible_matrix_is_the_hat_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    features, mix = torch.randn(12, 12, generator=generator), torch.randn(3, 12, generator=generator)
    scores_ = features @ trak_target(features, mix @ features).t()  # X (X^T X)^-1 X^T Q = Q
    assert torch.allclose(scores_, mix.t(), atol=1e-3)


def test_trak_is_ridge_regression_over_any_rows(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pool, target = torch.randn(3000, 8, generator=generator), torch.randn(4, 8, generator=generator)
    gram = pool.double().t() @ pool.double()
    for ridge, relative in ((0.0, False), (5.0, False), (0.1, True)):
        added = ridge * (float(gram.diagonal().mean()) if relative else 1.0)
        expected = torch.linalg.solve(gram + added * torch.eye(8), target.double().t()).t()
        assert close(trak_target(pool, target, ridge, relative=relative), expected, 1e-5)
    store = RowStore.create(tmp_path / "rows", recipe_digest="0" * 64, ids=[str(n) for n in range(3000)], dim=8, spec={})
    for shard, where in enumerate(store.shards):
        part = pool[where]
        ones = torch.ones(len(part))
        store.write(shard, part, norms=ones, losses=ones, tokens=ones.int())
    assert close(trak_target(store, target), torch.linalg.solve(gram, target.double().t()).t(), 1e-2)
    with pytest.raises(ConfigError, match="not invertible"):
        trak_target(pool[:3], target)
    with pytest.raises(UserError, match="8 dimensions and target rows 4"):
        trak_target(pool, target[:, :4])
    shutil.rmtree(tmp_path / "rows")
