"""Settings of every stage: small frozen records, one per stage, read from TOML sections of the same
name or from flags.

An unknown key is an error with the nearest name. `canonical()` is what enters a recipe digest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)

from gradsift.errors import ConfigError, UnknownName
from gradsift.types import AdamForm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Settings(BaseModel):
    """Base of the stage records: frozen, no unknown key, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def canonical(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class FileSettings(Settings):
    """How the rows of one source are read, where that is not how the others are."""

    format: str | None = None
    mapping: dict[str, str] | None = None


class PoolSettings(Settings):
    """How rows are read. `mapping`: our field -> theirs; `files`: the name of a source -> its own
    format and mapping.
    """

    format: str = "auto"
    group_field: str | None = None
    id_field: str = "id"
    mapping: dict[str, str] | None = None
    files: dict[str, FileSettings] = {}
    max_bad_rows: float | int = Field(default=0.05, ge=0)
    dedup: Literal["none", "exact"] = "none"


class TargetSettings(Settings):
    """How the rows of targets and tests are read. What has no value here is as in [pool]; a format
    or mapping of the pool then holds where it fits.
    """

    format: str | None = None
    group_field: str | None = None
    id_field: str | None = None
    mapping: dict[str, str] | None = None
    files: dict[str, FileSettings] = {}
    max_bad_rows: float | int | None = Field(default=None, ge=0)


class EncodeSettings(Settings):
    """Chat template, length and what is supervised.

    tool_calls: who writes an assistant's calls, the template or, as JSON texts in the content,
    gradsift. system: where the system text goes, to the template as a turn or in front of the first
    user turn's text.
    """

    max_length: int = Field(default=1024, ge=8)
    policy: Literal["truncate", "drop"] = "truncate"
    template: str | None = None
    tool_calls: Literal["template", "text"] = "template"
    system: Literal["template", "user"] = "template"


AUTO = "auto"


class ModelSettings(Settings):
    """Which model, and how it is held in memory.

    device "auto": CUDA where torch can use it, else MPS or XPU, else the CPU. dtype "auto": on a
    GPU the 16-bit type of the checkpoint where that GPU computes in it, else float32. A run decides
    both once (`gradsift.model.load.in_force`); its recipes and settings file hold the decision.
    """

    name: str = "tiny"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "nf4"] = "auto"
    device: str = AUTO
    attention: str | None = None
    trust_remote_code: bool = False


class LoraSettings(Settings):
    """The adapter. `targets`: "attention" (q, k, v, o), "all-linear", or module name endings."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["attention", "all-linear"] | Annotated[tuple[str, ...], Strict(False)] = (
        "attention"
    )
    seed: int = 0


class WarmupSettings(Settings):
    """The short fine-tune whose checkpoints the gradients are taken at.

    epochs: passes over the share; None = four, but no more rows than one pass over the pool has.
    weights: how much each checkpoint counts, in step order, in place of the mean learning rate of
    the steps before it (sums to 1 or not).
    """

    share: float = Field(default=0.05, gt=0, le=1)
    min_rows: int = Field(default=512, ge=1)
    min_steps: int = Field(default=30, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, ge=1)
    lr: float = Field(default=2e-4, gt=0)
    scheduler: str = "linear"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    checkpoints: int = Field(default=3, ge=1)
    weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Strict(False)] | None = None
    seed: int = 0
    lora: LoraSettings = LoraSettings()

    def steps_for(self, share: int, usable: int, batch: int) -> int:
        """Optimiser steps of `batch` rows on `share` of the `usable` rows of a pool."""
        if self.epochs is not None:
            return max(self.min_steps, math.ceil(self.epochs * share / batch))
        return max(self.min_steps, math.ceil(min(4 * share, usable) / batch))

    @model_validator(mode="after")
    def _one_weight_each(self) -> WarmupSettings:
        if self.weights is not None and len(self.weights) != self.checkpoints:
            raise ValueError(
                f"{len(self.weights)} weights for {self.checkpoints} checkpoints: give one for each"
            )
        return self

    def canonical(self) -> dict[str, Any]:
        made = super().canonical()
        if self.weights is None:  # warm-ups made before there was a choice say nothing
            del made["weights"]
        return made


class GradientSettings(Settings):
    """The stored rows. One setting for all methods of a run, so that a second method reuses the
    first one's rows.

    modules: "lora" = the warm-up's LoRA layers, "linear" = all linear layers of the blocks, or
    linear layers by name: names, endings of names and globs ("down_proj", "*.3.mlp.*"). dim: width
    of a row; a pair (a, b) with projection "rademacher" keeps a x b numbers of each
    layer and never forms a gradient: the way to read all linear layers (`modules` "linear"). norms:
    "sketched" takes them from such a projection, a seventh faster. adam_momentum: False takes beta1
    = 0 in Adam rows, g / sqrt(v') alone, without the first moment that all rows of a checkpoint
    share. adam_form: of methods whose preset does not say (`preset=released` takes "released").
    """

    modules: Literal["lora", "linear"] | Annotated[tuple[str, ...], Strict(False)] = "lora"
    projection: Literal["sketch", "rademacher"] = "sketch"
    dim: (
        Annotated[int, Field(ge=1)]
        | Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Strict(False)]
    ) = 8192
    norms: Literal["exact", "sketched"] = "exact"
    seed: int = 0
    adam_form: AdamForm = "paper"
    adam_momentum: bool = True
    token_budget: int = Field(default=1024, ge=1)
    shard_rows: int = Field(default=2048, ge=1)
    store_dtype: Literal["float16", "int8"] = "float16"

    @field_validator("modules", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) and given not in ("lora", "linear") else given

    @model_validator(mode="after")
    def _two_sided(self) -> GradientSettings:
        if isinstance(self.dim, tuple) and self.projection != "rademacher":
            raise ValueError('a pair of widths needs projection = "rademacher"')
        return self

    def canonical(self) -> dict[str, Any]:
        made = super().canonical()
        for name, usual in (("norms", "exact"), ("adam_momentum", True)):
            # rows made before there was a choice say nothing
            if made[name] == usual:
                del made[name]
        return made


class CurvatureSettings(Settings):
    """Influence through the inverse curvature (backends ekfac, kfac): what it is fitted on and how
    it is damped and kept.

    fit_rows: pool rows, drawn with `seed`. form, labels: see `gradsift.signals.curvature.Fitting`.
    damping: in units of each parameter's mean eigenvalue, or the very number when `absolute`. rank:
    of the target's preconditioned gradients; None = whole while they fit in memory.
    """

    fit_rows: int = Field(default=4096, ge=1)
    form: Literal["expand", "expand-sum", "reduce"] = "expand"
    labels: Literal["empirical", "sampled"] = "sampled"
    seed: int = 0
    damping: float = Field(default=0.1, gt=0)
    absolute: bool = False
    style: Literal["eigen", "pi"] = "eigen"
    rank: int | None = Field(default=None, ge=1)
    target_batch: int = Field(default=1, ge=1)


class MachineSettings(Settings):
    """Where work runs. `threads` 0 = OMP_NUM_THREADS, or without it the physical cores that the
    process may use; the number in force enters the digests of training and gradients, nothing else
    does.

    executor "ray": workers over Ray, `workers` of them (0 = as many as there is room for) on the
    cluster at `address` (None = this machine), each with `threads` threads or, for a model on GPUs,
    `gpus_per_worker` GPUs; one that takes `shard_timeout` seconds for a shard hangs.
    """

    threads: int = Field(default=0, ge=0)
    executor: Literal["serial", "ray"] = "serial"
    address: str | None = None
    workers: int = Field(default=0, ge=0)
    gpus_per_worker: int = Field(default=1, ge=1)
    shard_timeout: float = Field(default=3600, gt=0)
    force: bool = False

    def spans(self, device: str) -> bool:
        """Whether a model on `device` lies over several GPUs."""
        return device != "cpu" and self.gpus_per_worker > 1


class FinetuneSettings(Settings):
    """The recipe of a training that judges a subset: AdamW, learning rate up over `warmup_ratio` of
    the steps and straight down to 0.

    `steps` optimiser steps of `batch_size` rows, or as many as `epochs` passes need. `token_budget`
    bounds the padded tokens of one forward pass; gradients are accumulated up to the batch, so it
    changes memory and the last digits only. `mode` "full" trains every parameter, "lora" a fresh
    adapter made by `lora`. lr: None = 5e-4 with LoRA, 2e-5 in full. `bf16`: mixed precision, as a
    trainer's `bf16=True`: products in bfloat16; weights, losses and the optimiser stay as they are.
    `seed` decides the order of the rows, dropout, and the adapter's first weights.
    """

    mode: Literal["full", "lora"] = "lora"
    steps: int | None = Field(default=None, ge=1)
    epochs: float = Field(default=3, gt=0)
    batch_size: int = Field(default=16, ge=1)
    lr: float | None = Field(default=None, gt=0)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    token_budget: int = Field(default=2048, ge=1)
    bf16: bool = False
    lora: LoraSettings = LoraSettings()
    seed: int = 0

    def canonical(self) -> dict[str, Any]:
        made = super().canonical()
        if not self.bf16:  # trainings done before there was a choice say nothing
            del made["bf16"]
        return made

    def steps_for(self, rows: int) -> int:
        """Optimiser steps on `rows` rows."""
        return self.steps or max(1, math.ceil(self.epochs * rows / self.batch_size))

    @property
    def rate(self) -> float:
        """The learning rate in force."""
        return self.lr or {"lora": 5e-4, "full": 2e-5}[self.mode]


class TuningSettings(FinetuneSettings):
    """As [finetune], for the model that is tuned on the target, further: what a row gains tells the
    target's kind from all others only once the model has left what every training does to it. lr:
    None = 1e-3 with LoRA, 2e-5 in full.
    """

    epochs: float = Field(default=10, gt=0)

    @property
    def rate(self) -> float:
        """The learning rate in force."""
        return self.lr or {"lora": 1e-3, "full": 2e-5}[self.mode]


class Config(Settings):
    """All stages. TOML sections carry the field names: [pool], [target] (how the rows of targets
    and tests are read), [encode], [model], [warmup], [gradients], [curvature], [tuning] (on target
    rows, for the signal "tuned"), [finetune] (on subsets, to judge them), [machine].
    """

    pool: PoolSettings = PoolSettings()
    target: TargetSettings = TargetSettings()
    encode: EncodeSettings = EncodeSettings()
    model: ModelSettings = ModelSettings()
    warmup: WarmupSettings = WarmupSettings()
    gradients: GradientSettings = GradientSettings()
    curvature: CurvatureSettings = CurvatureSettings()
    tuning: TuningSettings = TuningSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    machine: MachineSettings = MachineSettings()

    def reading(self, side: Literal["pool", "target"]) -> PoolSettings:
        """How the rows of a side are read: those of the target as its own settings say, and as the
        pool's say where it has none.
        """
        if side == "pool":
            return self.pool
        own = {name: value for name, value in self.target if value is not None}
        return self.pool.model_copy(update={"group_field": None, **own})

    def with_values(self, section: str, where: str = "flags", **values: Any) -> Config:
        """A copy with `values` (those that are not None) set in one section; raises ConfigError or
        UnknownName.
        """
        values = {k: v for k, v in values.items() if v is not None}
        if not values:
            return self
        return build(
            {**self.model_dump(), section: {**self.model_dump()[section], **values}}, where
        )


def build(data: Mapping[str, Any], where: str | Path) -> Config:
    """Config from plain data. Raises UnknownName (with the nearest name) or ConfigError (naming the
    key).
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise _explain(error, where) from None


def _explain(error: ValidationError, where: str | Path) -> ConfigError | UnknownName:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return UnknownName("setting", ".".join(path), _known(path[:-1]), where=where)
    return ConfigError(
        f"{'.'.join(path)}: {first['msg']}, not {first.get('input')!r}",
        where=where,
        remedy="Correct that value.",
    )


def _known(path: list[str]) -> list[str]:
    model: Any = Config
    for part in path:
        if not hasattr(model, "model_fields"):  # records by the name of a source
            model = get_args(model)[-1]
            continue
        model = model.model_fields[part].annotation
    return [".".join([*path, name]) for name in model.model_fields]


def read_toml(path: Path) -> dict[str, Any]:
    """The plain data of a TOML file. Raises ConfigError naming the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read it ({error.strerror})",
            where=path,
            remedy="Check the path given to --config.",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"not valid TOML: {error}", where=path, remedy="Correct the file."
        ) from None
