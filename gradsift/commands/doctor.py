"""Which attention implementation and number format give a row the same gradient alone and in a
batch: measured on the user's own model.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from gradsift.commands.preflight import as_list, read_side
from gradsift.compute import machine, threads
from gradsift.compute.batches import plan_batches
from gradsift.compute.memory import out_of_memory
from gradsift.compute.progress import Progress, silent
from gradsift.config import Config, build
from gradsift.data.encode import encode
from gradsift.errors import ConfigError, DataError, GradsiftError
from gradsift.gradients.passes import Modules, extract
from gradsift.gradients.projection import Projection, projection_of
from gradsift.model.layers import coverage
from gradsift.model.load import from_settings, tokenizer_from_settings, vocabulary
from gradsift.model.lora import attach_lora
from gradsift.report.text import table
from gradsift.stages.checks import check_vocabulary
from gradsift.stages.context import in_force
from gradsift.types import counted

EQUAL = 0.9999  # least cosine at which two rows of one example count as the same
SAMPLE = 500  # pool rows that are encoded to choose from
# of the adapter's second factor, which a fresh adapter has at zero: then the first one's gradient
# is zero too
_ADAPTER_STD = 0.02
_ALLOCATOR = (
    "MALLOC_",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "LD_PRELOAD",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
)


@dataclass(frozen=True)
class Attempt:
    """One attention implementation at one number format. `worst`, `mean`: cosine of a row taken
    alone with the same row from a batch, over the rows measured; `row`: id of the worst.
    `reference`: least cosine with the first attempt's rows, taken alone. `tokens_per_second`: in
    batches. `problem`: why it could not be measured.
    """

    attention: str
    dtype: str
    worst: float | None = None
    mean: float | None = None
    row: str | None = None
    reference: float | None = None
    tokens_per_second: float | None = None
    problem: str | None = None

    @property
    def equal(self) -> bool:
        return self.problem is None and self.worst is not None and self.worst >= EQUAL


@dataclass(frozen=True)
class Diagnosis:
    """`recommended`: the attempt to work with, None where none keeps rows equal. `flags`: what to
    type for it. `notes`: what else to know.
    """

    model: str
    rows: int
    tokens: tuple[int, int]
    batches: int
    template: str
    attempts: list[Attempt]
    recommended: Attempt | None
    machine: dict[str, Any]
    coverage: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def flags(self) -> str | None:
        return (
            None
            if self.recommended is None
            else f"--dtype {self.recommended.dtype} --attention {self.recommended.attention}"
        )

    def as_dict(self) -> dict[str, Any]:
        attempts = [asdict(attempt) | {"equal": attempt.equal} for attempt in self.attempts]
        recommended = (
            None
            if self.recommended is None
            else {"attention": self.recommended.attention, "dtype": self.recommended.dtype}
        )
        return {
            **asdict(self),
            "attempts": attempts,
            "recommended": recommended,
            "flags": self.flags,
            "least_cosine": EQUAL,
        }

    def lines(self) -> list[str]:
        facts, seen = self.machine, self.coverage
        gb = 1e9
        allocator = ", ".join(f"{key}={value}" for key, value in facts["allocator"].items())
        found = [
            (
                f"machine    {facts['cpu']}, {counted(facts['threads'], 'thread')} of"
                f" {counted(facts['physical_cores'], 'core')}, torch {facts['torch']}, device"
                f" {facts['device']}"
            ),
            f"           {facts['memory_free'] / gb:.1f} GB of memory free,"
            f" {facts['disk_free'] / gb:.1f} GB of disk free"
            + "".join(f", {name}" for name in facts["gpus"]),
            f"allocator  {allocator or 'as the system has it; a run sets glibc up for itself'}",
            f"model      {self.model}: {counted(seen['parameters'], 'parameter')}",
            (
                f"coverage   {counted(seen['modules'], 'module')}, {seen['share']:.1%} of the"
                " trainable"
                " parameters"
            ),
            (
                f"experts    {counted(len(seen['experts']), 'mixture-of-experts layer')}"
                if seen["experts"]
                else "experts    none"
            ),
            f"template   {self.template}",
            (
                f"rows       {self.rows} of {self.tokens[0]} to {self.tokens[1]} tokens, alone and"
                f" in {counted(self.batches, 'batch', 'batches')}"
            ),
            "",
            *table(
                [
                    [
                        "attention",
                        "dtype",
                        "worst cosine",
                        "mean cosine",
                        "to the first",
                        "tokens/s",
                    ],
                    *map(_cells, self.attempts),
                ]
            ),
        ]
        found += ["", *(f"note       {note}" for note in self.notes)]
        if self.recommended is None:
            found.append(
                f"advice     none keeps rows equal (cosine >= {EQUAL}): take rows one by one,"
                " [gradients] token_budget = 1 in --config"
            )
        else:
            found.append(f"advice     rows are the same alone and in batches with: {self.flags}")
        return found


def doctor(
    model: str,
    pool: Sequence[str | Path] | str | Path,
    *,
    rows: int = 16,
    attentions: Sequence[str] = ("eager", "sdpa"),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    disk: str | Path = ".",
    progress: Progress | None = None,
) -> Diagnosis:
    """Takes the gradients of `rows` rows of the pool, spread over its lengths, one by one and in
    batches, for every attention implementation and number format given, with the adapter that a
    warm-up would train (its second factor drawn, not zero).

    Of those that keep every row's cosine at 0.9999 or above, the first of `dtypes` is recommended,
    and "sdpa" before others, for its speed. Writes nothing. `disk`: where free space is looked at.
    Raises UserError (a model that is nowhere, a wrong setting), DataError (no usable row); what
    fails for one attempt alone is its `problem`.
    """
    if rows < 2 or not attentions or not dtypes:
        raise ConfigError(
            f"rows {rows}, attentions {list(attentions)}, dtypes {list(dtypes)}",
            remedy="Two rows and one of each at least.",
        )
    progress = progress or silent()
    sections = {name: dict(values) for name, values in (settings or {}).items()}
    sections.setdefault("model", {})["name"] = model
    waiting = threads.waiting()
    config = in_force(build(sections, "settings"))
    configs = [
        in_force(_for(config, attention, dtype)) for dtype in dtypes for attention in attentions
    ]
    dtypes = list(dict.fromkeys(one.model.dtype for one in configs))
    count = machine.settle(config.machine.threads)
    tokenizer = tokenizer_from_settings(config.model)
    encoded, ids, notes = _rows(pool, tokenizer, config, rows)
    lengths = np.array([len(row["input_ids"]) for row in encoded])
    # Two rows in a batch at least, also where the run's own batches would hold one long row each.
    budget = max(config.gradients.token_budget, 2 * int(lengths.max()))
    attempts, seen, first = [], {}, None
    for one in configs:
        progress.note(f"{one.model.attention}, {one.model.dtype}")
        attempt, alone, covered = _measure(one, encoded, ids, budget, first)
        attempts.append(attempt)
        first, seen = (alone if first is None else first), seen or covered
        gc.collect()
    if not seen:
        raise ConfigError(
            f"no setting could be measured: {attempts[0].problem}",
            where=model,
            remedy="Correct that, then run it again.",
        )
    return Diagnosis(
        model=model,
        rows=len(encoded),
        tokens=(int(lengths.min()), int(lengths.max())),
        batches=len(plan_batches(lengths, budget)),
        template=_template(tokenizer, config),
        attempts=attempts,
        recommended=recommend(attempts, dtypes),
        machine={"device": config.model.device, **facts(count, Path(disk))},
        coverage=seen,
        notes=[*notes, *filter(None, [waiting.explain(count)]), *_advice(attempts, seen)],
    )


def _cells(attempt: Attempt) -> list[str]:
    """An attempt as a row of the table that `Diagnosis.lines` prints."""
    cells = [attempt.attention, attempt.dtype]
    if attempt.problem is not None:
        return [*cells, attempt.problem]
    cosines = (attempt.worst, attempt.mean, attempt.reference or 0.0)
    return [*cells, *(f"{cosine:.7f}" for cosine in cosines), f"{attempt.tokens_per_second:,.0f}"]


def recommend(attempts: Sequence[Attempt], dtypes: Sequence[str]) -> Attempt | None:
    """Of the attempts that keep rows equal: the first dtype in order, sdpa before others."""
    good = [attempt for attempt in attempts if attempt.equal]
    return min(
        good,
        key=lambda attempt: (dtypes.index(attempt.dtype), attempt.attention != "sdpa"),
        default=None,
    )


def _for(config: Config, attention: str, dtype: str) -> Config:
    return config.with_values("model", attention=attention, dtype=dtype)


def _rows(
    pool: Any, tokenizer: Any, config: Config, count: int
) -> tuple[list[dict[str, list[int]]], list[str], list[str]]:
    """Usable rows spread over the pool's lengths, their ids, and notes of the encoder."""
    candidates = read_side(as_list(pool), config, config.pool.group_field, silent())
    spread = np.unique(
        np.linspace(0, len(candidates) - 1, min(SAMPLE, len(candidates))).astype(int)
    )
    sample = candidates.take(spread)
    found = encode(sample, tokenizer, config.encode)
    check_vocabulary(sample, found, vocabulary(config.model))
    usable = np.flatnonzero((found.codes == 0) & (found.supervised > 0))
    if len(usable) < 2:
        raise DataError(
            f"{len(usable)} of {counted(len(spread), 'row is', 'rows are')} usable and two are"
            " needed",
            remedy="Look at them with `gradsift inspect`.",
        )
    by_length = usable[np.argsort(found.lengths[usable], kind="stable")]
    chosen = by_length[
        np.unique(np.linspace(0, len(by_length) - 1, min(count, len(by_length))).astype(int))
    ]
    return (
        [found[int(i)] for i in chosen],
        [candidates.ids[int(spread[i])] for i in chosen],
        list(found.notes),
    )


def _measure(
    config: Config,
    encoded: list[dict[str, list[int]]],
    ids: list[str],
    budget: int,
    first: Tensor | None,
) -> tuple[Attempt, Tensor | None, dict[str, Any]]:
    """The attempt, its rows taken alone [n, d], and what the tracked modules cover; without the
    last two where there is a problem.
    """
    attention, dtype = str(config.model.attention), config.model.dtype
    try:
        model = _model(config)
        modules: Modules = None if config.gradients.modules == "lora" else "linear"
        projection = projection_of(config.gradients)
        covered = coverage(model, modules).summary() | {
            "parameters": sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
        }
        alone, _ = timed_rows(model, encoded, projection, modules, 1)
        batched, seconds = timed_rows(model, encoded, projection, modules, budget)
    except (GradsiftError, ImportError, RuntimeError, MemoryError, TypeError, ValueError) as error:
        what = "does not fit in memory" if out_of_memory(error) else " ".join(str(error).split())
        return Attempt(attention, dtype, problem=what[:200]), None, {}
    cosines = torch.nn.functional.cosine_similarity(alone, batched, dim=1)
    if not bool(torch.isfinite(alone).all() and torch.isfinite(batched).all()):
        return (
            Attempt(
                attention,
                dtype,
                problem="gradients are not finite, or a row does not fit in memory",
            ),
            None,
            covered,
        )
    reference = torch.nn.functional.cosine_similarity(
        alone, alone if first is None else first, dim=1
    )
    worst = int(cosines.argmin())
    attempt = Attempt(
        attention,
        dtype,
        worst=float(cosines[worst]),
        mean=float(cosines.mean()),
        row=ids[worst],
        reference=float(reference.min()),
        tokens_per_second=sum(len(row["input_ids"]) for row in encoded) / max(seconds, 1e-9),
    )
    return attempt, alone, covered


def _model(config: Config) -> Any:
    """The model of a setting with the warm-up's adapter, whose second factor is drawn."""
    model = attach_lora(from_settings(config.model), config.warmup.lora)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * _ADAPTER_STD)
    return model.eval()


def timed_rows(
    model: Any,
    encoded: list[dict[str, list[int]]],
    projection: Projection,
    modules: Modules,
    budget: int,
) -> tuple[Tensor, float]:
    """Rows [n, d] in the order given, and the seconds they took."""
    started, parts = time.perf_counter(), []
    for batch in extract(
        model, encoded, projection=projection, modules=modules, token_budget=budget
    ):
        parts.append((batch.indices, batch.rows))
    order = np.argsort(np.concatenate([indices for indices, _ in parts]))
    return (
        torch.cat([rows for _, rows in parts])[torch.from_numpy(order)],
        time.perf_counter() - started,
    )


def _template(tokenizer: Any, config: Config) -> str:
    if config.encode.template is not None:
        return "the one given as encode.template"
    if not tokenizer.chat_template:
        return "none in the tokenizer: gradsift's default one is used"
    return "found in the tokenizer"


def _advice(attempts: Sequence[Attempt], seen: Mapping[str, Any]) -> Iterator[str]:
    if seen["experts"]:
        yield (
            f"{counted(len(seen['experts']), 'layer is a mixture', 'layers are mixtures')} of"
            " experts: attach LoRA to the attention"
            " layers; rows do not see the experts' weights"
        )
    if seen["uncovered"]:
        yield (
            f"{counted(len(seen['uncovered']), 'parameter is', 'parameters are')} seen by no row,"
            " among them"
            f" {seen['uncovered'][0]}"
        )
    if seen["rotary"]:
        kind, tokens = seen["rotary"]
        yield (
            f"its rotary factors ({kind}) are others in a batch with a row of over {tokens:,}"
            " tokens, for every row of that batch: rows are read as they are alone while"
            f" max_length is at most {tokens}, or one by one, [gradients] token_budget = 1"
        )
    for attempt in attempts:
        if attempt.problem is None and not attempt.equal:
            yield (
                f"{attempt.attention} in {attempt.dtype} changes rows with the batch they are in:"
                f" worst is row {attempt.row}"
            )
    halves = [
        attempt
        for attempt in attempts
        if attempt.equal and attempt.dtype in ("bfloat16", "float16")
    ]
    if halves:
        half = halves[0]
        full = max(
            (a.tokens_per_second or 0 for a in attempts if a.equal and a.dtype == "float32"),
            default=0,
        )
        speed = (
            f", at {(half.tokens_per_second or 0) / full:.1f} times the speed of float32"
            if full
            else ""
        )
        yield (
            f"{half.dtype} keeps rows equal too, in half the memory{speed}: --dtype {half.dtype}"
            f" --attention {half.attention}"
        )


def facts(threads: int, disk: Path) -> dict[str, Any]:
    """What a run's speed and memory depend on; bytes."""
    while not disk.exists():
        disk = disk.absolute().parent
    memory = psutil.virtual_memory()
    return {
        **machine.versions(),
        "cpu": machine.cpu_kind(),
        "threads": threads,
        "physical_cores": psutil.cpu_count(logical=False) or 1,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "allocator": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_ALLOCATOR)
        },
        "memory_total": memory.total,
        "memory_free": min(memory.available, _container_memory()),
        "disk_free": shutil.disk_usage(disk).free,
    }


def _container_memory() -> int:
    """Bytes left under the limit of a container, where there is one: the kernel's own count does
    not know it.
    """
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - int(
            (folder / "memory.current").read_text()
        )
    except (OSError, ValueError):
        return 2**63
