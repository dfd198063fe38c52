"""Retraining: the steps against a plain loop, the losses against single rows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from gradsift.commands.demo.playground import generate
from gradsift.config import FinetuneSettings, LoraSettings
from gradsift.data.encode import encode
from gradsift.errors import ConfigError, DataError
from gradsift.model import finetune as finetuning
from gradsift.model.finetune import HeldOut, finetune, heldout_loss, rate_factor, step_rows
from gradsift.model.load import load_model, load_tokenizer
from gradsift.model.losses import token_nats
from gradsift.model.tiny import TinySettings, tiny_model
from gradsift.types import Example, Message

Rows = list[dict[str, list[int]]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    settings = TinySettings(hidden=32, layers=2, heads=2, intermediate=64, steps=12, tokens=512)
    return str(tiny_model(tmp_path_factory.mktemp("cache"), settings=settings))


def encoded(tiny: str, rows: list[dict[str, Any]]) -> Rows:
    examples = [
        Example(str(i), tuple(Message(**m) for m in row["messages"]), "g")
        for i, row in enumerate(rows)
    ]
    return list(encode(examples, load_tokenizer(tiny)))


@pytest.fixture(scope="module")
def pool(tiny: str) -> Rows:
    return encoded(tiny, generate(0, 100))


def nats(model: torch.nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
    """Summed loss of one row, by itself and token by token."""
    ids = torch.tensor([row["input_ids"]])
    logs = model(input_ids=ids).logits[0].log_softmax(-1)
    return -sum(
        (logs[t - 1, label] for t, label in enumerate(row["labels"]) if t and label != -100),
        torch.zeros(()),
    )


def supervised(row: dict[str, list[int]]) -> int:
    return sum(label != -100 for label in row["labels"][1:])


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_held_out_losses_are_those_of_single_rows(tiny: str, pool: Rows) -> None:
    model = load_model(tiny).train()
    model.model.layers[0].eval()
    silent = {"input_ids": pool[0]["input_ids"], "labels": [-100] * len(pool[0]["input_ids"])}
    rows = [*pool[:12], silent]
    held = heldout_loss(model, rows, token_budget=150)
    assert (model.training, model.model.layers[0].training, model.model.layers[1].training) == (
        True,
        False,
        True,
    )
    model.eval()
    with torch.no_grad():
        expected = [float(nats(model, row)) for row in rows]
    np.testing.assert_allclose(held.sums, expected, rtol=1e-5, atol=1e-6)
    assert held.tokens.tolist() == [*map(supervised, pool[:12]), 0]
    assert held.loss == pytest.approx(sum(expected) / sum(map(supervised, pool[:12])))
    with pytest.raises(DataError, match="no test row"):
        heldout_loss(model, [silent])


def test_the_first_token_is_never_counted(tiny: str) -> None:
    held = heldout_loss(load_model(tiny), [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    assert held.tokens.tolist() == [2]


def test_full_training_is_a_plain_adamw_loop(tiny: str, pool: Rows) -> None:
    settings = FinetuneSettings(
        mode="full",
        steps=4,
        batch_size=6,
        lr=2e-3,
        weight_decay=0.1,
        warmup_ratio=0.5,
        token_budget=120,
        max_grad_norm=0.7,
        seed=3,
    )
    rows, factors = pool[:10], np.linspace(0.5, 2.0, 10)
    state, seen = torch.get_rng_state(), []
    tuned = finetune(
        tiny,
        rows,
        settings=settings,
        weights=factors,
        progress=lambda step, steps: seen.append((step, steps)),
    )
    assert torch.equal(state, torch.get_rng_state())
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not tuned.training

    plain = load_model(tiny).train().requires_grad_(True)
    adam = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.1)
    for rate, chosen in zip(
        (1e-3, 2e-3, 4e-3 / 3, 2e-3 / 3), step_rows(10, 4, settings), strict=True
    ):
        adam.param_groups[0]["lr"] = rate
        total = sum(factors[i] * supervised(rows[i]) for i in chosen)
        loss = torch.stack([factors[i] / total * nats(plain, rows[i]) for i in chosen]).sum()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.7)
        adam.step()
    moved = (weights_of(plain) - weights_of(load_model(tiny))).abs().max()
    assert float(moved) > 1e-3
    # Adam divides by gradients near 0, where the order of a sum decides; hence the mean and not the
    # largest difference.
    assert float((weights_of(tuned) - weights_of(plain)).abs().mean()) < 1e-5
    assert heldout_loss(tuned, pool).loss == pytest.approx(heldout_loss(plain, pool).loss, abs=1e-4)


def test_mixed_precision_is_a_plain_loop_under_autocast(
    tiny: str, pool: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FinetuneSettings(
        mode="full", steps=1, batch_size=6, lr=2e-3, warmup_ratio=0, max_grad_norm=1e9, bf16=True
    )
    quick = finetune(tiny, pool[:6], settings=settings)
    # torch's own attention, as the loop below has it
    monkeypatch.setattr(finetuning, "short_rows", lambda wanted: nullcontext())
    tuned = finetune(tiny, pool[:6], settings=settings)
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}

    plain = load_model(tiny).train().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = token_nats(plain, [pool[i] for i in next(step_rows(6, 1, settings))])
    found.mean().backward()
    # half of the top rate: the schedule of a single step
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0)
    adam.step()
    full = finetune(tiny, pool[:6], settings=settings.model_copy(update={"bf16": False}))
    apart, rounded = (
        float((weights_of(other) - weights_of(tuned)).abs().mean()) for other in (plain, full)
    )
    assert rounded > 0
    assert apart < rounded / 10
    # another attention rounds elsewhere: no further from the loop than bf16 itself is from fp32
    assert 0 < float((weights_of(quick) - weights_of(plain)).abs().mean()) < rounded
    assert heldout_loss(tuned, pool).loss == pytest.approx(heldout_loss(full, pool).loss, rel=0.01)


def test_a_recipe_without_mixed_precision_keeps_its_digest() -> None:
    assert "bf16" not in FinetuneSettings().canonical()
    assert FinetuneSettings(bf16=True).canonical()["bf16"] is True


def test_the_schedule_rises_falls_and_never_stops() -> None:
    assert [rate_factor(step, 5, 0.4) for step in range(1, 6)] == pytest.approx(
        [0.5, 1.0, 0.75, 0.5, 0.25]
    )
    assert [rate_factor(step, 2, 0.0) for step in (1, 2)] == pytest.approx([2 / 3, 1 / 3])


def test_every_row_is_seen_once_a_pass() -> None:
    settings = FinetuneSettings(epochs=2, batch_size=4, seed=1)
    assert settings.steps_for(10) == 5
    order = np.concatenate(list(step_rows(10, 5, settings)))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert FinetuneSettings(steps=7).steps_for(10) == 7


def test_lora_leaves_the_base_alone_and_the_seed_decides_everything(tiny: str, pool: Rows) -> None:
    settings = FinetuneSettings(
        steps=3, batch_size=4, lr=1e-2, mode="lora", lora=LoraSettings(r=4, alpha=8, dropout=0.2)
    )
    one, two = (finetune(tiny, pool[:20], settings=settings) for _ in range(2))
    other = finetune(tiny, pool[:20], settings=settings.model_copy(update={"seed": 1}))
    base = dict(load_model(tiny).named_parameters())
    frozen = {name: p for name, p in one.named_parameters() if "lora_" not in name}
    for name, p in frozen.items():
        assert torch.equal(
            p, base[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        )
    assert torch.equal(weights_of(one), weights_of(two))
    assert not torch.equal(weights_of(one), weights_of(other))
    assert all(p.abs().sum() > 0 for name, p in one.named_parameters() if "lora_B" in name)


def test_rows_that_teach_nothing_are_left_out(tiny: str, pool: Rows) -> None:
    silent = {"input_ids": [5, 6], "labels": [5, -100]}
    settings = FinetuneSettings(mode="full", lr=5e-4, steps=2, batch_size=3)
    alone = finetune(tiny, pool[:6], settings=settings)
    among = finetune(
        tiny, [silent, *pool[:6], pool[7]], settings=settings, weights=np.array([1.0] * 7 + [0.0])
    )
    assert torch.equal(weights_of(alone), weights_of(among))
    with pytest.raises(DataError, match="no row to train on"):
        finetune(tiny, [silent], settings=settings)
    for bad in (np.ones(3), np.full(6, np.nan), np.full(6, -1.0)):
        with pytest.raises(ConfigError, match="weights"):
            finetune(tiny, pool[:6], settings=settings, weights=bad)


def test_a_diverging_training_says_so(tiny: str, pool: Rows) -> None:
    with pytest.raises(DataError, match="diverged at step"):
        finetune(
            tiny,
            pool[:8],
            settings=FinetuneSettings(
                mode="full", steps=8, batch_size=4, lr=1e30, max_grad_norm=1e30
            ),
        )


def test_a_held_out_loss_weighs_tokens() -> None:
    assert HeldOut(np.array([2.0, 4.0]), np.array([1, 3])).loss == pytest.approx(1.5)
