"""The warm-up: a short LoRA fine-tune on a random share of the pool, whose checkpoints the
gradients are taken at.

LESS (arXiv 2402.04333, section 3) and TAGCOS (arXiv 2407.15235, section 3) train on 5 % of the
pool; so does the default here. `warm_up` runs transformers' own Trainer on peft's LoRA;
`TrajectoryCallback` keeps the same checkpoints from any other Trainer run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SchedulerType

from gradsift.compute.batches import pad_batch
from gradsift.compute.cpu.matmul import quick_layers
from gradsift.compute.progress import Progress, quiet
from gradsift.config import WarmupSettings
from gradsift.errors import DataError, MismatchError, UnknownName
from gradsift.model.checkpoints import (
    STATE,
    check_length,
    optimizer_state,
    save_checkpoint,
    unwrapped,
)
from gradsift.model.lora import attach_lora, remove_lora
from gradsift.store.atomic import write_atomic
from gradsift.store.canonical import canonical_json
from gradsift.types import IGNORE, Checkpoint

if TYPE_CHECKING:
    from peft import PeftModel

RECORD = "warmup.json"
_MICRO_ROWS, _MICRO_TOKENS = 4, 2048


class TrajectoryCallback(TrainerCallback):
    """Keeps checkpoints of any LoRA run of transformers' Trainer or TRL for gradsift:
    `callbacks=[TrajectoryCallback(out)]`.

    Writes `out/checkpoint-<step>` at `checkpoints` equally spaced steps, the last at the last step
    (or where a run stops early). Each holds the adapter, Adam's moments by parameter name and the
    learning rates; see `checkpoints`. The training itself is not touched.

    Raises MismatchError at the start for a model without LoRA, for DeepSpeed or FSDP, for a folder
    that holds an earlier run's checkpoints or is the trainer's own output_dir; after the first step
    for an optimizer without plain Adam moments. Raises ConfigError when the first checkpoint would
    see fewer than 10 updates, unless `force`.
    """

    def __init__(self, out: str | Path, checkpoints: int = 3, *, force: bool = False) -> None:
        self.out, self.count, self.force = Path(out), checkpoints, force
        self.saved: list[Checkpoint] = []
        self.rates: list[float] = []  # of every step seen, in order
        self._since = 0
        self._at: list[int] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        unwrapped(objects["model"])
        for kind in ("deepspeed", "fsdp"):
            if getattr(args, kind, None):
                raise MismatchError(
                    f"{kind} shards the optimizer state",
                    remedy="Train the warm-up on one device, or with plain data parallelism.",
                )
        if (
            args.output_dir
            and Path(args.output_dir).resolve() == self.out.resolve()
            and str(args.save_strategy) != "SaveStrategy.NO"
        ):
            raise MismatchError(
                "the trainer saves its own checkpoints into this folder",
                where=self.out,
                remedy="Give the callback another one.",
            )
        if state.global_step == 0 and any(self.out.glob(f"checkpoint-*/{STATE}")):
            raise MismatchError(
                "holds the checkpoints of an earlier run",
                where=self.out,
                remedy="Give a new folder, or delete this one.",
            )
        self._at = check_length(state.max_steps, self.count, self.force)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        # Read here: by on_step_end the scheduler has moved on to the next step's rate.
        self.rates.append(float(objects["optimizer"].param_groups[0]["lr"]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        if state.global_step in self._at:
            self._save(state, objects)
        elif len(self.rates) == 1 and state.is_world_process_zero:
            # an optimizer that cannot be read is refused now, not hours later
            optimizer_state(objects["model"], objects["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        # With load_best_model_at_end the weights are another step's by now, and no longer belong to
        # the moments.
        if self._since < len(self.rates) and not args.load_best_model_at_end:
            self._save(state, objects)

    def _save(self, state: TrainerState, objects: Mapping[str, Any]) -> None:
        rates, self._since = self.rates[self._since :], len(self.rates)
        if not state.is_world_process_zero:
            return
        folder = self.out / f"checkpoint-{state.global_step}"
        note = {"forced": True} if self.force else None
        self.saved.append(
            save_checkpoint(
                folder,
                objects["model"],
                objects["optimizer"],
                step=state.global_step,
                rates=rates,
                note=note,
            )
        )


@dataclass(frozen=True)
class Plan:
    """What a warm-up trains on: `rows` (pool indices, ascending) and, per optimiser step,
    micro-batches of positions in `rows`.
    """

    rows: np.ndarray
    batch: int
    steps: list[list[list[int]]]


def plan_warmup(encoded: Sequence[Any], settings: WarmupSettings) -> Plan:
    """The random share and its order, a function of the pool's usable rows, their lengths and the
    settings alone.

    Rows: `share` of the usable ones, at least `min_rows`. Batch: `batch_size`, or 16 below 10,000
    pool rows and 128 from there. Steps: `WarmupSettings.steps_for`; epochs follow
    each other without a gap, each a fresh permutation. The rows of a step are sorted by length and
    cut where padding is least into micro-batches, four rows each on average and at most 2,048
    padded tokens (or one row): gradient accumulation keeps memory small and leaves the loss what it
    is. Raises DataError when no row is usable.
    """
    usable = _usable(encoded)
    if not len(usable):
        raise DataError(
            "no usable row to warm up on",
            remedy=(
                "Look at the dropped rows: every one was empty, too long, or without supervised"
                " tokens."
            ),
        )
    rng = np.random.default_rng(settings.seed)
    count = min(len(usable), max(settings.min_rows, math.floor(settings.share * len(usable) + 0.5)))
    rows = np.sort(rng.choice(usable, size=count, replace=False))
    lengths = np.array([len(encoded[int(i)]["input_ids"]) for i in rows])
    batch = min(settings.batch_size or (16 if len(encoded) < 10_000 else 128), count)
    steps = settings.steps_for(count, len(usable), batch)
    epochs = math.ceil(steps * batch / count)
    order = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    batches = [order[step * batch : (step + 1) * batch] for step in range(steps)]
    batches = [mates[np.argsort(lengths[mates], kind="stable")] for mates in batches]
    # Every step has the same number of micro-batches, because Trainer counts its steps in them.
    pieces = max(
        math.ceil(batch / _MICRO_ROWS), *(fewest_pieces(lengths[mates]) for mates in batches)
    )
    cuts = [cheapest_cuts(lengths[mates], pieces) for mates in batches]
    return Plan(
        rows,
        batch,
        [[piece.tolist() for piece in np.split(m, c)] for m, c in zip(batches, cuts, strict=True)],
    )


def fewest_pieces(lengths: np.ndarray) -> int:
    """The fewest contiguous pieces of ascending `lengths` that each hold one row or at most 2,048
    padded tokens.
    """
    count, size = 1, 0
    for length in lengths:
        size += 1
        if size > 1 and size * length > _MICRO_TOKENS:
            count, size = count + 1, 1
    return count


def cheapest_cuts(lengths: np.ndarray, pieces: int) -> list[int]:
    """Where to cut ascending `lengths` [b] into `pieces` non-empty parts with the fewest padded
    tokens, none over 2,048 but a single row.

    Dynamic programme over (parts so far, rows so far); `pieces` must allow a cut.
    """
    b = len(lengths)
    sizes = np.arange(1, b + 1)[None, :] - np.arange(b)[:, None]  # rows in [i, j)
    cost = np.where(sizes > 0, sizes * lengths[None, :], np.inf)
    cost[(sizes > 1) & (cost > _MICRO_TOKENS)] = np.inf
    best, choices = cost[0], []
    for _ in range(pieces - 1):
        total = best[:-1, None] + cost[1:]
        choices.append(total.argmin(axis=0) + 1)
        best = total.min(axis=0)
    cuts, end = [], b
    for choice in reversed(choices):
        end = int(choice[end - 1])
        cuts.append(end)
    return cuts[::-1]


def _usable(encoded: Sequence[Any]) -> np.ndarray:
    codes = getattr(encoded, "codes", None)
    if codes is not None:
        return np.flatnonzero(np.asarray(codes) == 0)
    return np.array(
        [
            i
            for i in range(len(encoded))
            if any(label != IGNORE for label in encoded[i]["labels"][1:])
        ],
        dtype=np.int64,
    )


def warm_up(
    model: PreTrainedModel,
    encoded: Sequence[Any],
    settings: WarmupSettings,
    out: Path,
    *,
    pad_id: int,
    progress: Progress | None = None,
    force: bool = False,
) -> list[Checkpoint]:
    """Trains LoRA on a share of `encoded` with transformers' Trainer and AdamW; returns the
    checkpoints written below `out`, in step order.

    The loss of a step is Trainer's: the mean over all supervised tokens of the batch, so a long
    answer weighs more than a short one. `model` is a plain base model on the device to train on, in
    any dtype; LoRA weights and moments are float32. It comes back as it was: layers, requires_grad,
    mode, config, and the process's random state. `out/warmup.json` records the rows, learning rates
    and losses.

    The same seed gives the same bytes on the same machine with the same number of threads, so an
    interrupted warm-up just starts again. Raises ConfigError when a checkpoint would come before
    step 10 (`force` accepts that), DataError when no row is usable or the training diverges,
    MismatchError when the model has an adapter already, UnknownName for an unknown scheduler.
    """
    plan = plan_warmup(encoded, settings)
    check_length(len(plan.steps), settings.checkpoints, force)
    kinds = [kind.value for kind in SchedulerType]
    if settings.scheduler not in kinds:
        raise UnknownName("scheduler", settings.scheduler, kinds)
    for old in out.glob(f"checkpoint-*/{STATE}"):  # what an interrupted warm-up left is made again
        old.unlink()
    trajectory = TrajectoryCallback(out, settings.checkpoints, force=force)
    with _as_it_was(model), quiet():
        peft = attach_lora(model, settings.lora)
        try:
            trainer = _Trainer(peft, _arguments(model, settings, plan, out), plan, encoded, pad_id)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(trajectory)
            if progress is not None:
                trainer.add_callback(_Report(progress))
            with quick_layers(peft.modules()):
                trainer.train()
        finally:
            remove_lora(peft)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    record = {
        "rows": plan.rows.tolist(),
        "batch": plan.batch,
        "rates": trajectory.rates,
        "losses": losses,
    }
    write_atomic(out / RECORD, canonical_json(record))
    return trajectory.saved


def _arguments(
    model: PreTrainedModel, settings: WarmupSettings, plan: Plan, out: Path
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=len(plan.steps),
        gradient_accumulation_steps=len(plan.steps[0]),
        learning_rate=settings.lr,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=math.ceil(settings.warmup_ratio * len(plan.steps)),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=model.device.type == "cpu",
    )
    # else Trainer splits every batch over all GPUs it sees
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Trainer(Trainer):
    """Trainer over a fixed plan of micro-batches."""

    def __init__(
        self,
        model: PeftModel,
        arguments: TrainingArguments,
        plan: Plan,
        encoded: Sequence[Any],
        pad_id: int,
    ) -> None:
        rows = [encoded[int(i)] for i in plan.rows]
        micro = [piece for step in plan.steps for piece in step]
        self._batches: Any = DataLoader(
            cast(Any, rows), batch_sampler=micro, collate_fn=lambda batch: _collate(batch, pad_id)
        )
        super().__init__(
            model=cast(nn.Module, model),
            args=arguments,
            train_dataset=cast(Any, rows),
            compute_loss_func=_token_mean,
        )

    def get_train_dataloader(self) -> DataLoader:
        return self._batches


def _collate(batch: Sequence[Any], pad_id: int) -> dict[str, Tensor]:
    ids, mask, labels = pad_batch(batch, pad_id)
    # nothing predicts the first token; Trainer's count of supervised tokens must not include it
    labels[:, 0] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _token_mean(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """Sum of a micro-batch's token losses / supervised tokens of the whole step: Trainer's own
    loss, here for every family of models.
    """
    kept = labels[:, 1:] != IGNORE
    # only supervised positions are copied to float32: a vocabulary is wide
    logits = outputs.logits[:, :-1][kept].float()
    return (
        nn.functional.cross_entropy(logits, labels[:, 1:][kept], reduction="sum")
        / num_items_in_batch
    )


class _Report(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        self._progress.start(state.max_steps, "steps", "warm-up")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        self._progress.advance(1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        self._progress.done()


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Puts back the random state of the process, and what training changes on the base model
    besides its layers.
    """
    python, cpu = random.getstate(), torch.get_rng_state()
    legacy = np.random.get_state()  # noqa: NPY002
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    use_cache = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        # Names that were not there before mean that the adapter could not be taken off: the error
        # that led here says why, and is not to be hidden by another one.
        for name, p in model.named_parameters():
            p.requires_grad_(wanted.get(name, False))
            p.grad = None
        for name, m in model.named_modules():
            m.training = modes.get(name, False)
        if use_cache is not None:
            model.config.use_cache = use_cache
