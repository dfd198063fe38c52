"""The warm-up: what it trains on, that it is the plain fine-tune it claims to be, that it repeats,
and that it leaves no trace.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from gradsift.config import LoraSettings, WarmupSettings
from gradsift.errors import ConfigError, DataError, MismatchError, UnknownName
from gradsift.model.checkpoints import load_checkpoints, read_adam_state, read_moments
from gradsift.model.layers import tracked_modules
from gradsift.model.lora import adapter_state, attach_lora, load_adapter
from gradsift.model.warmup import cheapest_cuts, fewest_pieces, plan_warmup, warm_up
from gradsift.stages.rows import adam_transform
from gradsift.types import Checkpoint
from tests.model.small_models import gpt2, llama, token_rows

PAD = 256
SMALL = WarmupSettings(batch_size=6, min_rows=20, epochs=2, lora=LoraSettings(r=4))


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.md5(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Checkpoint]]:
    out = tmp_path_factory.mktemp("warm")
    return out, warm_up(llama(), token_rows(40), SMALL, out, pad_id=PAD)


# ---- the plan ----


def test_the_share_the_steps_and_the_batch() -> None:
    short = [{"input_ids": [1, 2], "labels": [-100, 2]}]
    plan = plan_warmup(short * 20_000, WarmupSettings())
    assert (len(plan.rows), plan.batch, len(plan.steps)) == (1000, 128, 32)
    plan = plan_warmup(short * 2000, WarmupSettings())
    assert (len(plan.rows), plan.batch, len(plan.steps)) == (512, 16, 125)
    plan = plan_warmup(short * 7, WarmupSettings())
    assert (len(plan.rows), plan.batch, len(plan.steps)) == (7, 7, 30)


def test_every_epoch_is_a_permutation_and_micro_batches_are_small() -> None:
    rows = token_rows(50, longest=40)
    plan = plan_warmup(rows, WarmupSettings(min_rows=30, share=0.01, batch_size=20, epochs=4))
    seen = [i for step in plan.steps for piece in step for i in piece]
    assert len(seen) == 30 * 20
    for epoch in range(0, len(seen) // 30, 2):  # 30 rows, batches of 20: three steps are two epochs
        pair = seen[epoch * 30 : (epoch + 2) * 30]
        assert sorted(pair) == sorted([*range(30), *range(30)])
    assert {len(step) for step in plan.steps} == {5}
    assert len(set(plan.rows.tolist())) == 30


def test_long_rows_make_smaller_micro_batches() -> None:
    rows = [{"input_ids": [1] * 1000, "labels": [1] * 1000}] * 8
    plan = plan_warmup(rows, WarmupSettings(batch_size=8))
    assert {len(piece) for step in plan.steps for piece in step} == {2}
    longer = [{"input_ids": [1] * 9000, "labels": [1] * 9000}] * 8
    assert {
        len(piece)
        for step in plan_warmup(longer, WarmupSettings(batch_size=8)).steps
        for piece in step
    } == {1}


def test_micro_batches_are_cut_where_padding_is_least() -> None:
    """Against every way to cut."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        n, limit = int(rng.integers(1, 10)), 2048
        lengths = np.sort(rng.integers(5, int(rng.choice([40, 6000])), size=n))
        k = max(fewest_pieces(lengths), int(rng.integers(1, n + 1)))

        def padded(
            cuts: tuple[int, ...] | list[int], lengths: np.ndarray = lengths, limit: int = limit
        ) -> float:
            parts = np.split(lengths, cuts)
            costs = [len(p) * int(p[-1]) for p in parts]
            return (
                math.inf
                if any(c > limit and len(p) > 1 for c, p in zip(costs, parts, strict=True))
                else sum(costs)
            )

        cuts = cheapest_cuts(lengths, k)
        assert len(cuts) == k - 1
        assert (
            padded(cuts)
            == min(padded(c) for c in itertools.combinations(range(1, n), k - 1))
            < math.inf
        )


def test_rows_without_supervised_tokens_are_left_out() -> None:
    rows = token_rows(10)
    # the first token is never predicted
    rows[3] = {"input_ids": [1, 2, 3], "labels": [1, -100, -100]}
    assert 3 not in plan_warmup(rows, WarmupSettings()).rows
    with pytest.raises(DataError, match="no usable row"):
        plan_warmup([rows[3]], WarmupSettings())


# ---- the training ----


def plain_fine_tune(
    rows: list[Any], settings: WarmupSettings
) -> tuple[PeftModel, torch.optim.AdamW, list[float]]:
    """The naive twin: whole batches, no accumulation, AdamW and the schedule written out."""
    plan = plan_warmup(rows, settings)
    model = attach_lora(llama(), settings.lora)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    total, ramp, rates = len(plan.steps), math.ceil(settings.warmup_ratio * len(plan.steps)), []
    for step, pieces in enumerate(plan.steps):
        rates.append(
            settings.lr * (step / ramp if step < ramp else (total - step) / (total - ramp))
        )
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        losses: list[torch.Tensor] = []
        for i in (i for piece in pieces for i in piece):
            row = rows[int(plan.rows[i])]
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            losses.append(
                cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
            )
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
    return model, optimizer, rates


def test_it_is_the_plain_fine_tune(run: tuple[Path, list[Checkpoint]]) -> None:
    out, checkpoints = run
    model, optimizer, rates = plain_fine_tune(token_rows(40), SMALL)
    record = json.loads((out / "warmup.json").read_text())
    assert record["rates"] == pytest.approx(rates)
    expected, found = (
        adapter_state(model),
        load_file(checkpoints[-1].path / "adapter_model.safetensors"),
    )
    assert max(float(found[n].abs().max()) for n in found if "lora_B" in n) > 1e-4  # it moved
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=2e-5), name
    moments = read_moments(checkpoints[-1])
    for name, p in model.named_parameters():
        if p.requires_grad:
            m, v = moments[name]
            scale = optimizer.state[p]["exp_avg"].abs().max()
            assert torch.allclose(m, optimizer.state[p]["exp_avg"], atol=1e-3 * float(scale)), name
            assert torch.allclose(v, optimizer.state[p]["exp_avg_sq"], rtol=1e-2, atol=1e-12), name


def test_checkpoints_say_where_they_stand(run: tuple[Path, list[Checkpoint]]) -> None:
    out, checkpoints = run
    rates = json.loads((out / "warmup.json").read_text())["rates"]
    assert [c.step for c in checkpoints] == [10, 20, 30]
    assert checkpoints == load_checkpoints(out)
    for c, (a, b) in zip(checkpoints, ((0, 10), (10, 20), (20, 30)), strict=True):
        assert c.lr == pytest.approx(rates[b - 1])
        assert c.mean_lr == pytest.approx(sum(rates[a:b]) / 10)
        assert read_adam_state(c).step == c.step
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-30",
        "warmup.json",
    ]
    assert sorted(p.name for p in checkpoints[0].path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint.json",
        "moments.safetensors",
    ]


def test_adapter_names_and_moment_names_agree(run: tuple[Path, list[Checkpoint]]) -> None:
    _, checkpoints = run
    model = load_adapter(llama(), checkpoints[1].path)
    moments = read_moments(checkpoints[1])
    tracked = tracked_modules(model)
    assert moments.keys() == {f"{n}.weight" for n in tracked}
    assert all(
        m.shape == v.shape == tracked[n.removesuffix(".weight")].weight.shape
        for n, (m, v) in moments.items()
    )
    assert all(
        bool((v >= 0).all()) and float(v.max()) > 0
        for n, (_, v) in moments.items()
        if "lora_B" in n
    )
    adam_transform(checkpoints[1]).check({n: tuple(m.weight.shape) for n, m in tracked.items()})
    # peft itself reads the folder
    peft = PeftModel.from_pretrained(llama(), str(checkpoints[1].path))
    assert all(
        torch.equal(a, b)
        for a, b in zip(adapter_state(peft).values(), adapter_state(model).values(), strict=True)
    )


def test_same_seed_same_bytes_and_another_seed_other_rows(
    run: tuple[Path, list[Checkpoint]], tmp_path: Path
) -> None:
    out, _ = run
    torch.manual_seed(1234)
    warm_up(llama(), token_rows(40), SMALL, tmp_path / "again", pad_id=PAD)
    assert digests(tmp_path / "again") == digests(out)
    plans = [
        plan_warmup(token_rows(40), SMALL.model_copy(update={"seed": s})).rows.tolist()
        for s in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.slow
def test_another_process_and_hash_seed_give_the_same_bytes(
    run: tuple[Path, list[Checkpoint]], tmp_path: Path
) -> None:
    out, _ = run
    code = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(int(sys.argv[2]));from"
        " tests.model.test_warmup import *; warm_up(llama(), token_rows(40), SMALL,"
        " Path(sys.argv[1]), pad_id=PAD)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "p"), str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
    assert digests(tmp_path / "p") == digests(out)


@pytest.mark.slow
def test_an_interrupted_warm_up_starts_again(
    run: tuple[Path, list[Checkpoint]], tmp_path: Path
) -> None:
    class Stop:
        count = 0

        def start(self, total: int, unit: str, label: str = "") -> None:
            assert (total, unit) == (30, "steps")

        def advance(self, k: int = 1) -> None:
            self.count += k
            if self.count == 15:
                raise KeyboardInterrupt

        def note(self, text: str) -> None: ...
        def done(self) -> None: ...

    model = llama()
    with pytest.raises(KeyboardInterrupt):
        warm_up(model, token_rows(40), SMALL, tmp_path / "w", pad_id=PAD, progress=Stop())
    assert [c.step for c in load_checkpoints(tmp_path / "w")] == [10]
    warm_up(model, token_rows(40), SMALL, tmp_path / "w", pad_id=PAD)
    assert digests(tmp_path / "w") == digests(run[0])


def test_it_leaves_no_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = llama()
    base.train()
    base.lm_head.weight.requires_grad_(False)
    modules, values = (
        {n: id(m) for n, m in base.named_modules()},
        {n: p.clone() for n, p in base.named_parameters()},
    )
    wanted, config = {n: p.requires_grad for n, p in base.named_parameters()}, base.config.to_dict()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    legacy = np.random.get_state()[1].tolist()  # noqa: NPY002
    before = random.getstate(), legacy, torch.get_rng_state()
    warm_up(base, token_rows(40), SMALL, tmp_path / "w", pad_id=PAD)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert {n: id(m) for n, m in base.named_modules()} == modules
    assert all(torch.equal(p, values[n]) for n, p in base.named_parameters())
    assert {n: p.requires_grad for n, p in base.named_parameters()} == wanted
    assert base.training
    assert all(p.grad is None for p in base.parameters())
    assert base.config.to_dict() == config
    assert not hasattr(base, "peft_config")
    assert capfd.readouterr() == ("", "")


def test_a_bfloat16_base_has_float32_weights_and_moments(tmp_path: Path) -> None:
    checkpoints = warm_up(
        llama().to(torch.bfloat16), token_rows(40), SMALL, tmp_path / "w", pad_id=PAD
    )
    for file in ("adapter_model.safetensors", "moments.safetensors"):
        assert {t.dtype for t in load_file(checkpoints[-1].path / file).values()} == {torch.float32}


def test_gpt2_trains_too(tmp_path: Path) -> None:
    checkpoints = warm_up(gpt2(), token_rows(24), SMALL, tmp_path / "w", pad_id=0)
    assert read_moments(checkpoints[0]).keys() == {
        f"{n}.weight" for n in tracked_modules(load_adapter(gpt2(), checkpoints[0].path))
    }


# ---- refusals ----


def test_too_few_steps_are_refused_before_training(tmp_path: Path) -> None:
    settings = SMALL.model_copy(update={"min_steps": 12, "epochs": 0.5})
    with pytest.raises(ConfigError, match=r"step 4.*Train 30 steps"):
        warm_up(llama(), token_rows(24), settings, tmp_path / "w", pad_id=PAD)
    assert not (tmp_path / "w").exists()
    checkpoints = warm_up(llama(), token_rows(24), settings, tmp_path / "w", pad_id=PAD, force=True)
    assert [c.step for c in checkpoints] == [4, 8, 12]
    assert read_moments(checkpoints[0])  # the force of the warm-up is remembered
    state = json.loads((checkpoints[0].path / "checkpoint.json").read_text())
    (checkpoints[0].path / "checkpoint.json").write_text(json.dumps({**state, "forced": False}))
    with pytest.raises(MismatchError, match=r"4 updates.*transform=none"):
        read_moments(checkpoints[0])
    assert read_moments(checkpoints[0], force=True)


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="linear"):
        warm_up(
            llama(),
            token_rows(24),
            SMALL.model_copy(update={"scheduler": "liner"}),
            tmp_path / "w",
            pad_id=PAD,
        )
    with pytest.raises(ConfigError, match="fewer than 40 checkpoints"):
        warm_up(
            llama(),
            token_rows(24),
            SMALL.model_copy(update={"checkpoints": 40}),
            tmp_path / "w",
            pad_id=PAD,
        )
    base = llama()
    attach_lora(base)
    with pytest.raises(MismatchError, match="adapter layers already"):
        warm_up(base, token_rows(24), SMALL, tmp_path / "w", pad_id=PAD)


def test_training_that_diverges_says_so(tmp_path: Path) -> None:
    base = llama()
    with torch.no_grad():
        base.model.norm.weight.fill_(float("inf"))
    with pytest.raises(DataError, match=r"diverged by step 10.*learning rate"):
        warm_up(base, token_rows(40), SMALL, tmp_path / "w", pad_id=PAD)
    assert not list((tmp_path / "w").glob("*/checkpoint.json"))


@pytest.mark.parametrize(
    ("rows", "share", "batch", "steps"),
    # the share; 512 of 600 rows: one pass over the pool; of 8,000: four over the share; of few: 30
    [(600, 512, 16, 38), (8_000, 512, 16, 128), (100_000, 5_000, 128, 157), (40, 40, 16, 30)],
)
def test_a_small_pool_is_passed_over_once(rows: int, share: int, batch: int, steps: int) -> None:
    assert WarmupSettings().steps_for(share, rows, batch) == steps
    # a number given holds as it is
    assert WarmupSettings(epochs=4).steps_for(share, rows, batch) == max(
        30, math.ceil(4 * share / batch)
    )
