"""The nouns every room shares. Plain data and protocols; nothing here reads a file or runs a model.

Shape letters: n pool rows, m target rows, k budget, d projected dimension, b batch, o / i module
out / in.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from fractions import Fraction
    from pathlib import Path

    import numpy as np
    from torch import Tensor

# "system", "user", "assistant", "tool"; or "text", "prompt", "completion" for raw strings that no
# template touches
Role = str

# how the Adam transform is written: with the bias correction of the paper, or as LESS's code has it
AdamForm = Literal["paper", "released"]

IGNORE = -100  # the label of a token that is not learned, as transformers and torch have it


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is the text; `extra` holds what a chat template may read besides
    (tool_calls, name).
    """

    role: Role
    content: str
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction item. `group` is the source in a pool, the task in a target set.

    `tools` is passed to the chat template. `tokens` is set only for rows that arrive tokenised:
    (input_ids, labels), -100 = not supervised.
    """

    id: str
    messages: tuple[Message, ...]
    group: str
    tools: tuple[Any, ...] = ()
    tokens: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved point of a warm-up. `mean_lr` is the mean learning rate of the steps since the
    previous checkpoint.
    """

    path: Path
    step: int
    lr: float
    mean_lr: float


def checkpoint_weights(rates: Sequence[float]) -> list[float]:
    """How much each checkpoint counts in a sum over checkpoints.

    Args:
        rates: the `mean_lr` of every checkpoint that is summed, in step order.

    Returns:
        Weights in proportion to the rates, of sum 1. A checkpoint alone has weight 1, whatever its
        rate.
    """
    if len(rates) == 1:
        return [1.0]
    total = float(sum(rates))
    return [rate / total for rate in rates]


@runtime_checkable
class Rows(Protocol):
    """n x d rows: a Tensor, a RowStore, or anything with `.shape` and `[a:b] -> Tensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Signal:
    """A declaration of something a method reads. What its value is:

    rows          Rows [n, d] of unit gradient rows (checkpoints="each": a list of them, in step
    order; "mean": their mean weighted by mean_lr)
    influence     Tensor [n, m] (or [n, groups] for a backend that merges target groups); positive =
    training on the row helps the target
    embeddings    Rows [n, d] of unit pooled hidden states
    loss          Tensor [n], mean negative log-likelihood per supervised token under the base
    model, nats
    tuned         Tensor [n, groups], the same loss after the model was fine-tuned on a group of
    target rows; groups in order of appearance
    ngrams        Tensor [n], log importance weights
    bm25          Tensor [n, m], how well the words of a row match those of each target row
    difficulty    Tensor [n], minus the score a net gave the row while a model was fine-tuned
    ifd           Tensor [n, 2], mean loss of the answer after its prompt, and of the answer alone,
    nats a token
    features      Rows [n, d] of the numbers that stand in the pool's own rows, in `fields` (which
    "difficulty" may be learned from too)

    adam_form     of rows and influence that carry the Adam transform: "paper" or "released"; None
                  = the run's setting
    modules       of rows and influence: "lora" = the modules that the run's gradients are of,
                  LoRA's unless its settings say otherwise; "linear"
                  = all linear layers, and a run of others is refused
    dim           of rows: wider ones come projected once more, to this many numbers
        (`rules.blocks.Narrow`); None = as they are stored

    Raises ValueError for `modules`, `dim` or `adam_form` of a signal that has none.
    """

    name: Literal[
        "rows",
        "influence",
        "embeddings",
        "loss",
        "tuned",
        "ngrams",
        "bm25",
        "difficulty",
        "ifd",
        "features",
    ]
    side: Literal["pool", "target"] = "pool"
    # "backend": of an influence, what its backend takes
    transform: Literal["none", "adam", "backend"] = "none"
    modules: Literal["lora", "linear"] = "lora"
    checkpoints: Literal["last", "each", "mean"] = "last"
    backend: str | None = None
    dim: int | None = None
    fields: tuple[str, ...] = ()
    adam_form: AdamForm | None = None

    def __post_init__(self) -> None:
        if self.adam_form is not None and self.transform not in ("adam", "backend"):
            raise ValueError(
                f"adam_form={self.adam_form!r} of {self.name} with transform={self.transform!r}:"
                " only rows that carry the Adam transform have a form of it"
            )
        if self.dim is not None and (self.name != "rows" or self.dim < 1):
            raise ValueError(
                f"dim={self.dim} of {self.name}: only rows have a width that can be chosen, of at"
                " least 1"
            )
        if self.modules != "lora" and self.name not in ("rows", "influence"):
            raise ValueError(
                f"modules={self.modules!r} of {self.name}: only rows and influence are of gradients"
            )


class UndeclaredSignal(KeyError):
    """A method read a signal that its `needs()` does not name: a fault of the method, not of the
    user.
    """


@dataclass(frozen=True)
class Signals:
    """What a method may read: the declared signals, and facts about the rows that cost nothing.

    `values` holds one value per declared Signal. `tokens` [n] are supervised tokens per row;
    `groups` the n pool groups (sources); `target_groups` the m target groups (tasks). `share`: of
    the n rows that the budget is, where it was written as a share; None for a count. `map` is what
    rules may do their blocks with: it gives the bytes of the built-in one, and calls its function
    in other processes where there are some.
    """

    values: Mapping[Signal, Any]
    n: int
    tokens: np.ndarray | None = None
    groups: Sequence[str] = ()
    target_groups: Sequence[str] = ()
    share: Fraction | None = None
    map: Callable[..., Any] = map

    def __getitem__(self, signal: Signal) -> Any:
        if signal not in self.values:
            raise UndeclaredSignal(f"{signal} is not among the signals that needs() declares")
        return self.values[signal]


@dataclass(frozen=True)
class Subset:
    """What a method chose: `indices` [k] unique, in pick order; `gains` [k] why each was picked
    (method's own unit, higher = better); `weights` [k] training weights; `notes`: columns for the
    report, each of length n (per pool row) or a scalar.
    """

    indices: np.ndarray
    gains: np.ndarray | None = None
    weights: np.ndarray | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Facts:
    """What a finished selection knows of one pool row: a method's `why(facts)` makes a sentence of
    it.

    Args:
        rank: from 1 in pick order; None where the row was not picked.
        gain, weight: those of the pick; None where there is none.
        score: the note "score" of the row; None where the method ranks no rows.
        tokens: supervised tokens of the row.
        loss: nats per supervised token, of the base model or at the last checkpoint.
        notes: the method's other notes: at this row where they are per row, else as they are.
        target_rows: rows of the target; 0 without one.
        tuned: target group -> (optimiser steps, rows) of the training on it.
        checkpoints: how many checkpoints of the warm-up were read.
    """

    rank: int | None = None
    gain: float | None = None
    weight: float | None = None
    score: float | None = None
    tokens: int = 0
    loss: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    target_rows: int = 0
    tuned: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    checkpoints: int = 0

    @property
    def value(self) -> float | None:
        """The gain of a pick, else the row's score."""
        return self.gain if self.gain is not None else self.score

    @property
    def group(self) -> str | None:
        """The target group that the method saw the row nearest to, where it says."""
        return self.notes.get("nearest_group")


@runtime_checkable
class Selector(Protocol):
    """A method: a frozen dataclass of hyper-parameters. It never sees a model, tokenizer, device or
    path.

    A method may also have `why(self, facts: Facts) -> str`: one clause without a full stop, in
    words and with units, on what it saw in a row; its numbers are those of the row's score or gain.
    And `notices(self, n: int, budget: int) -> list[str]`: what `gradsift plan` is to warn of when
    `budget` of n rows are chosen.
    """

    target: ClassVar[Literal["required", "optional", "none"]]

    def needs(self) -> frozenset[Signal]: ...

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset: ...


@runtime_checkable
class Transform(Protocol):
    """What happens to a gradient before it is projected."""

    def materialised(self, name: str, grad: Tensor) -> Tensor:
        """grad [b, o, i] of the parameter `name` -> the same shape."""
        ...

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(row [o], col [i]) when the transform is grad * row[:, None] * col[None, :]; None where
        it does not factor.
        """
        ...


class Encoded(Protocol):
    """A tokenised example: {"input_ids": list[int], "labels": list[int]}, label -100 = not
    supervised.
    """

    def __getitem__(self, key: Literal["input_ids", "labels"], /) -> list[int]: ...


def lazy_face(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names are imported on first use (PEP 562).

    It stands here, on the lowest floor: a wing that imported it from the root would import, through
    the root's own face, every other wing.

    Args:
        package: the package's `__name__`.
        homes: public name -> the module that holds it, relative to `package`.

    Returns:
        Two functions to assign to the package's `__getattr__` and `__dir__`.
    """

    def find(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(f".{homes[name]}", package), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find, lambda: sorted(homes)


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number and its noun: "1 row", "1,200 rows", with `plural` where an s is not enough."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
