"""Checkpoints of somebody else's training: TrajectoryCallback in real trainers, and the folders
that a plain Trainer leaves behind.

The two are each other's twin: one run is watched by the callback (names by identity of the
parameter) and saved by Trainer (names by position).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from gradsift.errors import ConfigError, IntegrityError, MismatchError, UserError
from gradsift.model.checkpoints import load_checkpoints, read_adam_state, read_moments
from gradsift.model.layers import tracked_modules
from gradsift.model.load import load_model
from gradsift.model.lora import load_adapter, remove_lora
from gradsift.model.warmup import TrajectoryCallback
from tests.model.small_models import llama, saved, token_rows, tokenizer

pytestmark = pytest.mark.slow

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# biases: a second, undecayed group
BIASED = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], bias="all", task_type="CAUSAL_LM")


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(r["input_ids"]) for r in rows)
    ids = torch.tensor([r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in rows])
    labels = torch.tensor([r["labels"] + [-100] * (width - len(r["labels"])) for r in rows])
    return {"input_ids": ids, "labels": labels}


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "max_steps": 30,
        "save_strategy": "steps",
        "save_steps": 10,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
    }
    plain = {
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "remove_unused_columns": False,
    }
    return TrainingArguments(output_dir=str(out), **{**settings, **plain, **changes})


def train(
    model: Any,
    out: Path,
    *callbacks: TrainerCallback,
    optimizers: Any = (None, None),
    **changes: Any,
) -> None:
    trainer = Trainer(
        model=model,
        args=arguments(out, **changes),
        train_dataset=token_rows(40),
        data_collator=collate,
        optimizers=optimizers,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def base_model(folder: Path) -> PreTrainedModel:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama(attention_bias=True), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["lora", "biased"])
def both(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """(base model, the callback's folder, Trainer's folder) of one run."""
    out = tmp_path_factory.mktemp(request.param)
    model = get_peft_model(base_model(base), LORA if request.param == "lora" else BIASED)
    train(model, out / "trainer", TrajectoryCallback(out / "ours"))
    return base, out / "ours", out / "trainer"


@pytest.fixture
def theirs(base: Path, both: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(both[2], tmp_path / "trainer")
    return tmp_path / "trainer"


# ---- the twins ----


def test_moments_by_position_are_the_moments_by_name(both: tuple[Path, Path, Path]) -> None:
    _, ours, trainer = both
    mine, plain = load_checkpoints(ours), load_checkpoints(trainer)
    assert [c.step for c in mine] == [c.step for c in plain] == [10, 20, 30]
    for a, b in zip(mine, plain, strict=True):
        left, right = read_adam_state(a), read_adam_state(b)
        assert left.m.keys() == right.m.keys()
        assert all(
            torch.equal(left.m[n], right.m[n]) and torch.equal(left.v[n], right.v[n])
            for n in left.m
        )
        assert (
            (left.step, left.betas, left.eps)
            == (right.step, right.betas, right.eps)
            == (a.step, (0.9, 0.999), 1e-8)
        )
        weights = [load_file(c.path / "adapter_model.safetensors") for c in (a, b)]
        assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[1])


def test_learning_rates_of_the_log_are_those_of_the_steps(both: tuple[Path, Path, Path]) -> None:
    _, ours, trainer = both
    rates = [1e-3 * (1 - k / 30) for k in range(30)]
    for folder in (ours, trainer):
        checkpoints = load_checkpoints(folder)
        assert [c.lr for c in checkpoints] == pytest.approx([rates[9], rates[19], rates[29]])
        assert [c.mean_lr for c in checkpoints] == pytest.approx(
            [sum(rates[k : k + 10]) / 10 for k in (0, 10, 20)]
        )


def test_every_tracked_parameter_has_moments(both: tuple[Path, Path, Path]) -> None:
    base, ours, trainer = both
    for folder in (ours, trainer):
        last = load_checkpoints(folder)[-1]
        tracked = tracked_modules(load_adapter(base_model(base), last.path))
        moments = read_moments(last)
        assert {f"{n}.weight" for n in tracked} <= moments.keys()
        assert all(moments[f"{n}.weight"][0].shape == m.weight.shape for n, m in tracked.items())


def test_names_come_from_a_given_base_model_when_the_adapter_names_none(
    theirs: Path, base: Path
) -> None:
    last = load_checkpoints(theirs)[-1]
    expected = read_moments(last)
    config = json.loads((last.path / "adapter_config.json").read_text())
    (last.path / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/gone"})
    )
    with pytest.raises(MismatchError, match="base=model"):
        read_moments(last)
    found = read_moments(last, base=base_model(base))
    assert all(torch.equal(found[n][0], expected[n][0]) for n in expected)
    with pytest.raises(MismatchError, match="does not fit the base model"):
        read_moments(last, base=llama(num_hidden_layers=3, attention_bias=True))


# ---- the callback in other trainers ----


def test_sft_trainer_of_trl(tmp_path: Path, base: Path) -> None:
    rows = Dataset.from_list(
        [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(40)]
    )
    settings = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=30,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        learning_rate=1e-3,
        max_length=32,
    )
    trainer = SFTTrainer(
        model=base_model(base),
        args=settings,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=LORA,
        callbacks=[TrajectoryCallback(tmp_path / "ours")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert optimizer is not None
    last = load_checkpoints(tmp_path / "ours")[-1]
    moments = read_moments(last)
    live = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert moments.keys() == live.keys()
    assert all(
        torch.equal(moments[n][1], optimizer.state[p]["exp_avg_sq"]) for n, p in live.items()
    )
    loaded = load_adapter(base_model(base), last.path)
    assert all(
        torch.equal(m.weight, live[f"{n}.weight"]) for n, m in tracked_modules(loaded).items()
    )


def test_another_adapter_name_becomes_default(tmp_path: Path, base: Path) -> None:
    model = get_peft_model(base_model(base), LORA, adapter_name="mine")
    train(model, tmp_path / "t", TrajectoryCallback(tmp_path / "ours"), save_strategy="no")
    last = load_checkpoints(tmp_path / "ours")[-1]
    tracked = tracked_modules(load_adapter(base_model(base), last.path))
    assert read_moments(last).keys() == {f"{n}.weight" for n in tracked}
    live = dict(model.named_parameters())
    assert all(
        torch.equal(m.weight, live[f"{n.replace('default', 'mine')}.weight"])
        for n, m in tracked.items()
    )


def test_an_early_stop_keeps_the_last_state(tmp_path: Path, base: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            control.should_training_stop = state.global_step == 25

    train(
        get_peft_model(base_model(base), LORA),
        tmp_path / "t",
        TrajectoryCallback(tmp_path / "ours"),
        Stop(),
        save_strategy="no",
    )
    checkpoints = load_checkpoints(tmp_path / "ours")
    assert [c.step for c in checkpoints] == [10, 20, 25]
    assert read_adam_state(checkpoints[-1]).step == 25


@pytest.mark.parametrize("kind", ["sgd", "adafactor", "subset"])
def test_an_optimizer_without_adam_moments_is_refused_at_the_first_step(
    tmp_path: Path, base: Path, kind: str
) -> None:
    model = get_peft_model(base_model(base), LORA)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers: Any = {
        "sgd": torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "adafactor": torch.optim.Adafactor(parameters),
        "subset": torch.optim.AdamW(parameters[1:]),
    }
    seen: list[int] = []

    class Count(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            seen.append(state.global_step)

    match = {
        "sgd": "no Adam moments",
        "adafactor": "no Adam moments",
        "subset": "does not hold 1 trainable",
    }[kind]
    callbacks = (TrajectoryCallback(tmp_path / "ours"), Count())
    with pytest.raises(MismatchError, match=match):
        train(
            model,
            tmp_path / "t",
            *callbacks,
            optimizers=(optimizers[kind], None),
            save_strategy="no",
        )
    assert seen == [0]


def test_what_the_callback_refuses_at_the_start(tmp_path: Path, base: Path) -> None:
    with pytest.raises(MismatchError, match="no LoRA adapter"):
        train(base_model(base), tmp_path / "t", TrajectoryCallback(tmp_path / "ours"))
    model = get_peft_model(base_model(base), LORA)
    with pytest.raises(MismatchError, match="own checkpoints into this folder"):
        train(model, tmp_path / "t", TrajectoryCallback(tmp_path / "t"))
    with pytest.raises(ConfigError, match=r"step 4.*force"):
        train(model, tmp_path / "t", TrajectoryCallback(tmp_path / "ours"), max_steps=12)
    (tmp_path / "ours" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "ours" / "checkpoint-5" / "checkpoint.json").write_text("{}")
    with pytest.raises(MismatchError, match="earlier run"):
        train(model, tmp_path / "t", TrajectoryCallback(tmp_path / "ours"))


# ---- folders that cannot be used, or only in part ----


def test_half_written_checkpoints_are_never_taken(
    both: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(both[1], tmp_path / "ours")
    (tmp_path / "ours" / "checkpoint-30" / "checkpoint.json").unlink()
    assert [c.step for c in load_checkpoints(tmp_path / "ours")] == [10, 20]
    for state in (tmp_path / "ours").glob("*/checkpoint.json"):
        state.unlink()
    with pytest.raises(UserError, match="half-written"):
        load_checkpoints(tmp_path / "ours")


@pytest.mark.parametrize("file", ["moments.safetensors", "adapter_model.safetensors"])
def test_a_flipped_bit_is_found(both: tuple[Path, Path, Path], tmp_path: Path, file: str) -> None:
    shutil.copytree(both[1], tmp_path / "ours")
    last = load_checkpoints(tmp_path / "ours")[-1]
    data = bytearray((last.path / file).read_bytes())
    data[-3] ^= 1
    (last.path / file).write_bytes(data)
    read = {
        "moments.safetensors": lambda: read_moments(last),
        "adapter_model.safetensors": lambda: load_adapter(llama(), last.path),
    }[file]
    with pytest.raises(IntegrityError, match=file):
        read()


def test_an_adapter_alone_serves_plain_gradients_only(theirs: Path, base: Path) -> None:
    alone = theirs / "checkpoint-20"
    for name in ("optimizer.pt", "trainer_state.json", "scheduler.pt"):
        (alone / name).unlink()
    (only,) = load_checkpoints(alone)
    assert (only.path, only.mean_lr) == (alone, 1.0)
    assert tracked_modules(load_adapter(base_model(base), only.path))
    with pytest.raises(MismatchError, match=r"without optimizer state.*-o transform=none"):
        read_moments(only)


def test_a_pickle_in_optimizer_pt_does_not_run(theirs: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    last = load_checkpoints(theirs)[-1]
    torch.save({"state": {0: Payload()}, "param_groups": []}, last.path / "optimizer.pt")
    with pytest.raises(MismatchError, match=r"optimizer\.pt.*not loaded"):
        read_moments(last)
    state = json.loads((last.path / "trainer_state.json").read_text())
    (last.path / "trainer_state.json").write_text(json.dumps({**state, "log_history": []}))
    torch.save(Payload(), last.path / "scheduler.pt")
    with pytest.raises(MismatchError, match=r"scheduler\.pt"):
        load_checkpoints(last.path)
    assert not (tmp_path / "ran").exists()


def test_8_bit_states_are_refused(theirs: Path) -> None:
    last = load_checkpoints(theirs)[-1]
    saved_state = torch.load(last.path / "optimizer.pt", weights_only=True)
    for state in saved_state["state"].values():
        shape = state.pop("exp_avg").shape
        state.pop("exp_avg_sq")
        packed = torch.zeros(shape, dtype=torch.uint8)
        state |= {"state1": packed, "state2": packed, "absmax1": torch.ones(1)}
    torch.save(saved_state, last.path / "optimizer.pt")
    with pytest.raises(MismatchError, match=r"8-bit \(bitsandbytes\).*adamw_torch"):
        read_moments(last)


@pytest.mark.parametrize(
    "name",
    [
        "global_step30/x.pt",
        "bf16_zero_pp_rank_0_optim_states.pt",
        "pytorch_model_fsdp_0/x",
    ],
)
def test_sharded_states_are_refused_by_name(theirs: Path, name: str) -> None:
    last = load_checkpoints(theirs)[-1]
    (last.path / "optimizer.pt").unlink()
    (last.path / name).parent.mkdir(exist_ok=True)
    (last.path / name).write_bytes(b"")
    with pytest.raises(MismatchError, match=rf"sharded \({name.split('/')[0]}\).*transform=none"):
        read_moments(last)
    (last.path / "adapter_model.safetensors").unlink()
    with pytest.raises(MismatchError, match=r"sharded \(DeepSpeed or FSDP\)"):
        load_checkpoints(theirs)


def test_a_whole_state_under_another_name_is_not_called_sharded(theirs: Path) -> None:
    last = load_checkpoints(theirs)[-1]
    (last.path / "optimizer.pt").rename(last.path / "optimizer.bin")
    with pytest.raises(MismatchError, match=r"in optimizer\.bin, as accelerate") as refused:
        read_moments(last)
    assert "sharded" not in str(refused.value)


def test_groups_that_fit_no_order_are_refused(theirs: Path) -> None:
    last = load_checkpoints(theirs)[-1]
    saved_state = torch.load(last.path / "optimizer.pt", weights_only=True)
    first = saved_state["param_groups"][0]
    moved = first["params"][:3]
    saved_state["param_groups"] = [
        {**first, "params": first["params"][3:]},
        {**first, "params": moved},
        *saved_state["param_groups"][1:],
    ]
    torch.save(saved_state, last.path / "optimizer.pt")
    with pytest.raises(MismatchError, match="cannot tell which moments"):
        read_moments(last)


def test_moments_of_another_shape_are_refused(theirs: Path) -> None:
    last = load_checkpoints(theirs)[-1]
    saved_state = torch.load(last.path / "optimizer.pt", weights_only=True)
    saved_state["state"][0]["exp_avg"] = saved_state["state"][0]["exp_avg"].T.contiguous()
    torch.save(saved_state, last.path / "optimizer.pt")
    with pytest.raises(MismatchError, match=r"lora_A.*shape \[32, 4\], the parameter \[4, 32\]"):
        read_moments(last)


def test_a_parameter_that_no_gradient_reached_has_zero_moments(theirs: Path) -> None:
    last = load_checkpoints(theirs)[-1]
    saved_state = torch.load(last.path / "optimizer.pt", weights_only=True)
    del saved_state["state"][0]
    torch.save(saved_state, last.path / "optimizer.pt")
    m, v = read_moments(last)[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    ]
    assert (m.shape, float(m.abs().sum()), float(v.sum())) == ((4, 32), 0.0, 0.0)


def test_folders_without_checkpoints(tmp_path: Path, theirs: Path, base: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_checkpoints(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_checkpoints(tmp_path)
    with pytest.raises(MismatchError, match="whole model"):
        load_checkpoints(base)
    (theirs / "checkpoint-30" / "trainer_state.json").unlink()
    with pytest.raises(IntegrityError, match="cut short"):
        load_checkpoints(theirs)


# ---- learning rates without a full log ----


def rewrite_logs(folder: Path, keep: Any) -> None:
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        state = json.loads(path.read_text())
        path.write_text(
            json.dumps(
                {**state, "log_history": [e for e in state["log_history"] if keep(e["step"])]}
            )
        )


def test_a_sparse_log_is_interpolated(theirs: Path) -> None:
    rewrite_logs(theirs, lambda step: step % 5 == 0 or step == 1)
    rates = [1e-3 * (1 - k / 30) for k in range(30)]
    assert [c.mean_lr for c in load_checkpoints(theirs)] == pytest.approx(
        [sum(rates[k : k + 10]) / 10 for k in (0, 10, 20)]
    )


def test_without_a_log_the_scheduler_tells(theirs: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite_logs(theirs, lambda step: False)
    with caplog.at_level(logging.WARNING, "gradsift"):
        checkpoints = load_checkpoints(theirs)
    # the scheduler's rates after 0, 10, 20 and 30 steps are 1, 2/3, 1/3 and 0 of the peak
    assert [c.mean_lr for c in checkpoints] == pytest.approx([1e-3 * 5 / 6, 1e-3 / 2, 1e-3 / 6])
    assert "between the scheduler's values" in caplog.text


def test_without_log_and_scheduler_all_weigh_the_same(
    theirs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite_logs(theirs, lambda step: False)
    for path in theirs.glob("*/scheduler.pt"):
        path.unlink()
    with caplog.at_level(logging.WARNING, "gradsift"):
        assert [c.mean_lr for c in load_checkpoints(theirs)] == [1.0, 1.0, 1.0]
    assert "weigh the same" in caplog.text


def test_a_base_in_use_is_not_touched_by_reading(both: tuple[Path, Path, Path]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = load_adapter(base_model(both[0]), load_checkpoints(both[2])[0].path)
    torch.set_rng_state(before)
    read_moments(load_checkpoints(both[2])[0], base=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert tracked_modules(model)
    assert remove_lora(model).model is not None
