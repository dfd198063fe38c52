"""Per-example gradients by hooks in one batched backward pass, projected as they appear.

What makes it cheaper than the training step whose gradients it reads:
- Everything is frozen, so no weight gradient of a batch is formed. The graph starts at the lowest
  tracked module and the backward pass ends there.
- A tap on each tracked module sees its input and its output gradient; the per-example gradient is
  transformed, projected and dropped inside the backward pass, so a batch holds the gradients of one
  module at a time.
- The head runs only on positions whose next token is supervised, and the cross-entropy turns its
logits into their own gradient in place.
- Rows are cut after their last supervised token (under causal attention nothing later reaches the
  loss), sorted by length and padded on
  the right in batches of a token budget. Causal attention never looks right, so padding needs no
  mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.compute.batches import count_tokens, plan_batches
from gradsift.compute.cpu import matmul
from gradsift.compute.memory import Halving
from gradsift.errors import ConfigError, UnknownName
from gradsift.gradients.capture import Batch, Call, Capture, Input, LabelledIds
from gradsift.gradients.objectives import OBJECTIVES, Loss
from gradsift.gradients.projection import BoundProjection, Projection
from gradsift.gradients.weight_grads import doubled_gram, gram_is_cheaper, product, squares
from gradsift.types import Encoded, Transform

Modules = Literal["linear"] | Sequence[str] | None
Norms = Literal["exact", "sketched"]


@dataclass(frozen=True)
class GradientBatch:
    """Some rows, in any order: `indices` [b] are their positions in `encoded`.

    rows [b, d] fp32, not normalised: projection(transform(gradient)). norms [b]: L2 norm of the
    gradient before transform and projection, over all tracked modules. losses [b]: mean negative
    log-likelihood per supervised token, nats. tokens [b] int32: supervised tokens (the first token
    of a row is never predicted, so never counts). All on the CPU. A row without supervised tokens
    is all zeros, tokens 0 included. A row that does not fit in memory alone is NaN (rows, norms,
    losses) and listed in `failed`. `halvings`: how often this batch had to be split for memory;
    above 0 the numbers are right but not bit-reproducible.
    """

    indices: np.ndarray
    rows: Tensor
    norms: Tensor
    losses: Tensor
    tokens: Tensor
    halvings: int = 0
    failed: tuple[int, ...] = ()


class ProjectedRows:
    """A consumer that makes one projected row of each example's gradients, and its norm.

    The product of inputs and output gradients is formed only where something needs it (a transform,
    a sketch, a short norm). Otherwise a two-sided projection takes the factors, (g P_out)^T (x
    P_in), and the squared norm comes from t x t products (see `weight_grads`) or, with
    norms="sketched", from the sketch. Parameters that read the same x (queries, keys, values) share
    its sketch and its products.

    `width`: the numbers d of a row. Raises as the transform's `check`, and as `Projection.bind`.
    """

    def __init__(
        self,
        capture: Capture,
        projection: Projection,
        transform: Transform | None = None,
        norms: Norms = "exact",
    ) -> None:
        check = getattr(transform, "check", None)
        if check is not None:
            check(capture.shapes)
        self.device, self.transposed = capture.device, capture.transposed
        self.transform, self.norms = transform, norms
        self.bound: BoundProjection = projection.bind(capture.shapes, capture.device)
        self.width = self.bound.width
        self.sides: dict[str, tuple[Tensor, Tensor] | None] = {}
        self.state = self.squares = torch.empty(0)

    def begin(self, batch: Batch) -> None:
        self.state = self.bound.start(batch.b)  # what the projection accumulates
        self.squares = torch.zeros(batch.b, device=self.device)  # squared norms

    def result(self) -> tuple[Tensor, Tensor]:
        """(rows [b, d], norms [b]) of the batch that has just run, fp32 on the CPU."""
        return self.bound.finish(self.state).cpu(), self.squares.sqrt().cpu()

    def gradient(self, name: str, calls: list[Call]) -> None:
        """Norm, transform and projection of one parameter's gradient."""
        source, g = calls[0]
        if len(calls) > 1:
            # a gradient summed over calls is one over their positions laid end to end
            x = torch.cat([call[0].by_example for call in calls], 1)
            source, g = Input(x, x, [name]), torch.cat([call[1] for call in calls], 1)
        sides = self._sides(name, g.dtype)
        if sides is None:
            grad = product(source.by_example, g, name in self.transposed)
            self.squares += torch.linalg.vector_norm(grad, dim=(1, 2)).square_()
            if self.transform is not None:
                grad = self.transform.materialised(name, grad)
            self.bound.add(self.state, name, grad)
            return
        if name not in source.sketches:
            wanted = (
                [n for n in source.readers if self._sides(n, g.dtype) is not None]
                if name in source.readers
                else [name]
            )
            parts = [self.sides[n][1] for n in wanted]  # type: ignore[index]
            together = matmul.matmul(source.by_example, torch.cat(parts, 1))
            source.sketches.update(
                zip(wanted, together.split([p.shape[1] for p in parts], -1), strict=True)
            )
        inner, outer = source.sketches[name].float(), matmul.matmul(g, sides[0]).float()
        left, right = (inner, outer) if name in self.transposed else (outer, inner)
        a, b = self.bound.projection.dim  # type: ignore[misc]
        made = self.bound.add_product(self.state, name, left[..., :a], right[..., :b])
        if self.norms == "exact":
            if source.gram is None and gram_is_cheaper(source.by_example, g, len(source.readers)):
                source.gram = doubled_gram(source.by_example)
            self.squares += squares(source.by_example, g, source.gram)
        else:
            plain = (
                made
                if self.transform is None
                else self.bound.product(left[..., a:], right[..., b:])
            )
            self.squares += plain.square().sum(1)

    def _sides(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(output side, input side) signs where the projection can take factors, with the
        transform's own factors in them; where norms are sketched, then followed by those
        without.
        """
        if name not in self.sides:
            made, two_sided = None, self.bound.projection.two_sided
            # asked for only to be used
            factors = (
                self.transform.factors(name) if two_sided and self.transform is not None else None
            )
            if two_sided and (self.transform is None or factors is not None):
                left, right = self.bound.sides(name)
                if factors is not None:
                    plain = (
                        (left, right) if self.norms == "sketched" else (left[:, :0], right[:, :0])
                    )
                    left, right = (
                        torch.cat([f.to(s)[:, None] * s, p], 1)
                        for f, s, p in zip(factors, (left, right), plain, strict=True)
                    )
                made = (
                    (right.to(dtype), left.to(dtype))
                    if name in self.transposed
                    else (left.to(dtype), right.to(dtype))
                )
            self.sides[name] = made
        return self.sides[name]


def extract(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    projection: Projection,
    transform: Transform | None = None,
    modules: Modules = None,
    token_budget: int = 1024,
    loss: Loss = "cross-entropy",
    norms: Norms = "exact",
    halving: Halving | None = None,
) -> Iterator[GradientBatch]:
    """Yields the projected gradient of every row of `encoded`, each row once, shortest batches
    last.

    `encoded`: tokenised rows, {"input_ids": [...], "labels": [...]}, both of one length; a label is
    the token at its own place where it is to be learned, else -100. `gradsift.data.encode.encode`
    makes them from a pool; by hand:

        >>> prompt, answer = [1, 15, 9, 4], [22, 7, 2]  # token ids
        >>> row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        >>> for batch in gradsift.extract(model, [row], projection=gradsift.Projection(dim=64)):
        ...     print(batch.indices.tolist(), tuple(batch.rows.shape), batch.tokens.tolist())
        [0] (1, 64) [3]

    The loss of a row is the mean over its supervised tokens (labels other than -100, each predicted
    from the tokens before it). loss="margin" differentiates minus the mean log-odds of these tokens
    instead (see `gradsift.gradients.objectives`); `losses` stay what they are. `modules`: None for
    the trainable LoRA layers, "linear" for all linear layers of the blocks, or names and globs; the
    gradient is of their weights, not their biases. `token_budget`: padded tokens per forward pass;
    a longer row goes alone. When a pass runs out of memory the batch is halved, and what follows
    keeps to the size that fits; a single row that never fits becomes NaN (see GradientBatch) and a
    warning in the log. norms="sketched": where a two-sided projection leaves a gradient unformed,
    its squared norm is that of its projection without the transform: right on average over maps,
    zero and non-finite when the gradient is. Exact norms of full linear layers are about a seventh
    of the work on a CPU; they are free wherever gradients are formed, and exact there in either
    case. `halving` counts the halved batches and keeps the size that fits from one call to the
    next.

    The model runs in evaluation mode (no dropout) in its own dtype, with products of bf16 gradients
    accumulated in fp32. Whenever a batch is handed out, and after an exception or an early close,
    hooks, requires_grad flags and training mode are what they were; gradients (`.grad`) are never
    touched. Gradient checkpointing, where it is enabled, is honoured.

    Raises ConfigError or UnknownName when there is nothing to track, MismatchError when the
    transform does not know a parameter, DataError for a malformed row. All but the last before the
    first batch.
    """
    if token_budget < 1:
        raise ConfigError(
            f"token_budget is {token_budget}", remedy="Pass a positive number of tokens."
        )
    if loss not in OBJECTIVES:
        raise UnknownName("loss", loss, OBJECTIVES)
    if norms not in get_args(Norms):
        raise UnknownName("norms", norms, get_args(Norms))
    capture = Capture(model, modules, loss)
    projected = ProjectedRows(capture, projection, transform, norms)
    return _stream(capture, projected, encoded, token_budget, halving or Halving())


def output_dim(model: nn.Module, projection: Projection, modules: Modules = None) -> int:
    """The width d of the rows that `extract` makes."""
    return ProjectedRows(Capture(model, modules), projection).width


def _stream(
    capture: Capture,
    made: ProjectedRows,
    encoded: Sequence[Encoded],
    token_budget: int,
    halving: Halving,
) -> Iterator[GradientBatch]:
    lengths, supervised = count_tokens(encoded)
    silent = np.flatnonzero(supervised == 0)
    if len(silent):
        zeros = torch.zeros(len(silent))
        yield GradientBatch(
            silent, torch.zeros(len(silent), made.width), zeros, zeros.clone(), zeros.int()
        )

    def work(batch: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        losses = capture.run([_cut(encoded[int(i)], int(lengths[i])) for i in batch], made)
        return *made.result(), losses

    for batch, numbers, halvings in halving.run(plan_batches(lengths, token_budget), lengths, work):
        tokens, failed = torch.from_numpy(supervised[batch]), ()
        if numbers is None:
            nan = torch.full((1,), torch.nan)
            numbers, failed = (
                (torch.full((1, made.width), torch.nan), nan, nan.clone()),
                (int(batch[0]),),
            )
        yield GradientBatch(batch, *numbers, tokens, halvings, failed)


def _cut(row: Encoded, length: int) -> LabelledIds:
    """(input ids, the label that each position predicts), both [length]."""
    return np.asarray(row["input_ids"][:length]), np.asarray(row["labels"][1 : length + 1])
