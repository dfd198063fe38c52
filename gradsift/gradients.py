"""Per-example gradients by hooks in one batched backward pass, projected as they appear.

What makes it cheaper than the training step whose gradients it reads:
- Everything is frozen, so no weight gradient of a batch is formed. The graph starts at the lowest tracked module and the backward pass ends there.
- A tap on each tracked module sees its input and its output gradient; the per-example gradient is transformed, projected and dropped inside the
  backward pass, so a batch holds the gradients of one module at a time.
- The head runs only on positions whose next token is supervised, and the cross-entropy turns its logits into their own gradient in place.
- Rows are cut after their last supervised token (under causal attention nothing later reaches the loss), sorted by length and padded on the right
  in batches of a token budget. Causal attention never looks right, so padding needs no mask.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import ConfigError, DataError
from .model import tracked_modules
from .projection import BoundProjection, Projection
from .types import Encoded, Transform

log = logging.getLogger("gradsift")

Modules = Literal["linear"] | Sequence[str] | None
_IGNORED = -100
_LOGIT_CHUNK = 1 << 17  # logits whose softmax is formed at once: stays in a CPU cache; a GPU takes what a batch holds


@dataclass(frozen=True)
class GradientBatch:
    """Some rows, in any order: `indices` [b] are their positions in `encoded`.

    rows [b, d] fp32, not normalised: projection(transform(gradient)). norms [b]: L2 norm of the gradient before transform and projection, over all
    tracked modules. losses [b]: mean negative log-likelihood per supervised token, nats. tokens [b] int32: supervised tokens (the first token of a
    row is never predicted, so never counts). All on the CPU.
    A row without supervised tokens is all zeros, tokens 0 included. A row that does not fit in memory alone is NaN (rows, norms, losses) and listed
    in `failed`. `halvings`: how often this batch had to be split for memory; above 0 the numbers are right but not bit-reproducible.
    """

    indices: np.ndarray
    rows: Tensor
    norms: Tensor
    losses: Tensor
    tokens: Tensor
    halvings: int = 0
    failed: tuple[int, ...] = ()


def extract(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    projection: Projection,
    transform: Transform | None = None,
    modules: Modules = None,
    token_budget: int = 1024,
) -> Iterator[GradientBatch]:
    """Yields the projected gradient of every row of `encoded`, each row once, shortest batches last.

    The loss of a row is the mean over its supervised tokens (labels other than -100, each predicted from the tokens before it). `modules`: None for
    the trainable LoRA layers, "linear" for all linear layers of the blocks, or names and globs; the gradient is of their weights, not their biases.
    `token_budget`: padded tokens per forward pass; a longer row goes alone. When a pass runs out of memory the batch is halved, and what follows
    keeps to the size that fits; a single row that never fits becomes NaN (see GradientBatch) and a warning in the log.

    The model runs in evaluation mode (no dropout) in its own dtype, with products of bf16 gradients accumulated in fp32. Whenever a batch is handed
    out, and after an exception or an early close, hooks, requires_grad flags and training mode are what they were; gradients (`.grad`) are never
    touched. Gradient checkpointing, where it is enabled, is honoured.

    Raises ConfigError or UnknownName when there is nothing to track, MismatchError when the transform does not know a parameter, DataError for a
    malformed row. All but the last before the first batch.
    """
    if token_budget < 1:
        raise ConfigError(f"token_budget is {token_budget}", remedy="Pass a positive number of tokens.")
    engine = _Engine(model, projection, transform, modules)
    return _stream(engine, encoded, token_budget)


def output_dim(model: nn.Module, projection: Projection, modules: Modules = None) -> int:
    """The width d of the rows that `extract` makes."""
    return _Engine(model, projection, None, modules).bound.width


def _stream(engine: _Engine, encoded: Sequence[Encoded], token_budget: int) -> Iterator[GradientBatch]:
    lengths, supervised = _measure(encoded)
    silent = np.flatnonzero(supervised == 0)
    if len(silent):
        zeros = torch.zeros(len(silent))
        yield GradientBatch(silent, torch.zeros(len(silent), engine.bound.width), zeros, zeros.clone(), zeros.int())
    todo = deque((batch, 0) for batch in plan_batches(lengths, token_budget))
    limit = None
    while todo:
        batch, halvings = todo.popleft()
        size = len(batch) * int(lengths[batch].max())
        fits = limit is None or size <= limit or len(batch) == 1
        try:
            if fits:
                rows, norms, losses = engine.run([_cut(encoded[int(i)], int(lengths[i])) for i in batch])
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            limit, fits = max(1, size // 2), False
        if fits:
            yield GradientBatch(batch, rows, norms, losses, torch.from_numpy(supervised[batch]), halvings)
        elif len(batch) > 1:
            half = len(batch) // 2
            todo.extendleft([(batch[half:], halvings + 1), (batch[:half], halvings + 1)])
            log.warning("out of memory at %d rows of %d tokens: the batch is halved", len(batch), size // len(batch))
        else:
            yield _failed(engine, int(batch[0]), supervised[batch], size, halvings)


def _failed(engine: _Engine, index: int, tokens: np.ndarray, size: int, halvings: int) -> GradientBatch:
    log.warning("row %d (%d tokens) does not fit in memory on its own: its gradient is NaN", index, size)
    nan = torch.full((1,), torch.nan)
    rows = torch.full((1, engine.bound.width), torch.nan)
    return GradientBatch(np.array([index]), rows, nan, nan.clone(), torch.from_numpy(tokens), halvings, (index,))


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(s in str(error) for s in ("out of memory", "DefaultCPUAllocator"))


def _measure(encoded: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens that can reach the loss, supervised tokens) of each row: a row counts up to the position before its last supervised token."""
    lengths, supervised = np.zeros(len(encoded), np.int64), np.zeros(len(encoded), np.int32)
    for n in range(len(encoded)):
        row = encoded[n]
        labels = np.asarray(row["labels"])
        if len(labels) != len(row["input_ids"]):
            raise DataError(f"row {n} has {len(row['input_ids'])} tokens and {len(labels)} labels", remedy="Encode the pool again.")
        places = np.flatnonzero(labels[1:] != _IGNORED)
        if len(places):
            lengths[n], supervised[n] = places[-1] + 1, len(places)
    return lengths, supervised


def _cut(row: Encoded, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(input ids, the label that each position predicts), both [length]."""
    return np.asarray(row["input_ids"][:length]), np.asarray(row["labels"][1 : length + 1])


def plan_batches(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Rows sorted by length, longest first, in batches of at most `token_budget` padded tokens; rows of length 0 are left out."""
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    batches, start = [], 0
    while start < len(order):
        rows = max(1, token_budget // int(lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


class _Tap(torch.autograd.Function):
    """The identity on a module's output. Its backward hands (module input, output gradient) to the engine.

    `anchor` requires a gradient, so the output does too: that is where the graph of a frozen model starts.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, anchor: Tensor, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.sink(x, grads[0])
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None, None


@dataclass
class _Call:
    """What one batch accumulates. `state` is the projection's, `squares` [b] the squared norms; `calls` counts forward calls by parameter,
    `held` the (input, output gradient) pairs of a module that is called more than once until all have arrived."""

    b: int
    t: int
    flat: Tensor  # of the b * t positions, those that predict a supervised token
    state: Tensor
    squares: Tensor
    calls: dict[str, int] = field(default_factory=dict)
    held: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    backward: bool = False
    gathered: bool = False
    head_out: int = 0  # where the head wrote: logits that are still there were not capped or scaled, nothing keeps them, they may be overwritten


class _Engine:
    """A model with tracked modules, a transform and a projection; `run` makes the rows of one batch."""

    def __init__(self, model: nn.Module, projection: Projection, transform: Transform | None, modules: Modules) -> None:
        self.model, self.transform = model, transform
        self.modules = tracked_modules(model, modules)
        weights = {name: _weight(name, module) for name, module in self.modules.items()}
        # modules that share one parameter are one: its gradient is the sum over all of them, under the first name
        first: dict[int, str] = {}
        self.owner = {name: first.setdefault(id(w), name) for name, w in weights.items()}
        shapes = {name: (w.shape[0], w.shape[1]) for name, w in weights.items() if self.owner[name] == name}
        # Linear keeps [out, in], transformers' Conv1D [in, out]; gradients are formed in the parameter's own layout
        self.transposed = {name for name, module in self.modules.items() if type(module).__name__ == "Conv1D"}
        check = getattr(transform, "check", None)
        if check is not None:
            check(shapes)
        self.device = next(iter(weights.values())).device
        self.bound: BoundProjection = projection.bind(shapes, self.device)
        self.head = _head(model)
        self.call: _Call | None = None

    def run(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
        """(rows [b, d], norms [b], losses [b]) of rows of (input ids, predicted labels), on the CPU."""
        try:
            with _quiet(self.model), self._hooked(), torch.enable_grad():
                return self._run(rows)
        finally:
            self.call = None

    def _run(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
        ids, labels = _pad(rows)
        b, t = ids.shape
        places = np.flatnonzero(labels != _IGNORED)
        owner = torch.from_numpy(places // t).to(self.device)
        counts = torch.from_numpy((labels != _IGNORED).sum(1)).to(self.device, torch.float32)
        flat = torch.from_numpy(places).to(self.device)
        call = self.call = _Call(b, t, flat, self.bound.start(b), torch.zeros(b, device=self.device))
        logits = self.model(input_ids=torch.from_numpy(ids).to(self.device), use_cache=False).logits
        if not call.gathered:
            logits = logits.flatten(0, 1).index_select(0, flat)
        logits = logits.view(-1, logits.shape[-1])
        targets = torch.from_numpy(labels.reshape(-1)[places].astype(np.int64)).to(self.device)
        nll, grad = _cross_entropy(logits, targets, 1 / counts[owner], in_place=logits.data_ptr() == call.head_out)
        call.backward = True
        torch.autograd.backward(logits, grad)
        for name in list(call.held):
            self._finish(name)
        losses = torch.zeros(b, device=self.device).index_add_(0, owner, nll) / counts
        return self.bound.finish(call.state).cpu(), call.squares.sqrt().cpu(), losses.cpu()

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        handles = [m.register_forward_hook(self._tap(name, anchor)) for name, m in self.modules.items()]
        if self.head is not None:
            handles += [self.head.register_forward_pre_hook(self._gather), self.head.register_forward_hook(self._note_head)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _gather(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = self.call
        assert call is not None
        hidden = args[0]
        if hidden.shape[:2] != (call.b, call.t):
            return None
        call.gathered = True
        return (hidden.flatten(0, 1).index_select(0, call.flat)[None], *args[1:])

    def _note_head(self, head: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if self.call is not None and self.call.gathered:
            self.call.head_out = out.data_ptr()

    def _tap(self, name: str, anchor: Tensor) -> Callable[..., Tensor]:
        owner = self.owner[name]

        def sink(x: Tensor, grad: Tensor) -> None:
            self._arrived(name, x, grad)

        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            call = self.call
            if call is None:
                return out
            if not call.backward:  # a checkpointed block runs again during the backward pass
                call.calls[owner] = call.calls.get(owner, 0) + 1
            return _Tap.apply(out, args[0], anchor, sink)  # type: ignore[return-value]

        return hook

    def _arrived(self, name: str, x: Tensor, grad: Tensor) -> None:
        call, owner = self.call, self.owner[name]
        assert call is not None
        x, grad = self._per_example(name, x), self._per_example(name, grad)
        call.held.setdefault(owner, []).append((x, grad) if name in self.transposed else (grad, x))
        if len(call.held[owner]) == call.calls[owner]:
            self._finish(owner)

    def _per_example(self, name: str, a: Tensor) -> Tensor:
        """Activations as [b, t, features]; those of the gathered head are spread over their examples again."""
        call = self.call
        assert call is not None
        if a.dim() == 3 and a.shape[0] == call.b and not (call.gathered and self.modules[name] is self.head):
            return a
        if a.dim() == 2 and a.shape[0] == call.b * call.t:
            return a.view(call.b, call.t, -1)
        if a.dim() == 3 and a.shape[:2] == (1, len(call.flat)):
            return a.new_zeros(call.b * call.t, a.shape[2]).index_copy_(0, call.flat, a[0]).view(call.b, call.t, -1)
        raise ConfigError(
            f"module {name} sees activations of shape {tuple(a.shape)}, which do not say whose example they are",
            remedy="Leave this module out (experts of a mixture cannot be read).",
        )

    def _finish(self, name: str) -> None:
        """The gradient of one parameter is complete: norm, transform, projection."""
        call = self.call
        assert call is not None
        pairs = call.held.pop(name)
        left = pairs[0][0] if len(pairs) == 1 else torch.cat([p[0] for p in pairs], 1)
        right = pairs[0][1] if len(pairs) == 1 else torch.cat([p[1] for p in pairs], 1)
        grad = torch.bmm(left.float().transpose(1, 2), right.float())
        call.squares += grad.flatten(1).square().sum(1)
        if self.transform is not None:
            grad = self.transform.materialised(name, grad)
        self.bound.add(call.state, name, grad)


def _weight(name: str, module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ConfigError(f"module {name} has no weight matrix", remedy="Name linear layers.")
    return weight


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Module) else None


def _pad(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) [b, t], padded on the right: ids with the row's own first token, which every vocabulary has, labels with -100."""
    t = max(len(ids) for ids, _ in rows)
    ids = np.empty((len(rows), t), np.int64)
    labels = np.full((len(rows), t), _IGNORED, np.int64)
    for k, (row_ids, row_labels) in enumerate(rows):
        ids[k], labels[k, : len(row_labels)] = row_ids[0], row_labels
        ids[k, : len(row_ids)] = row_ids
    return ids, labels


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, nothing requires a gradient, and checkpointing where it is enabled (transformers checkpoints in training mode only)."""
    training = [m for m in model.modules() if m.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    blocks = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and hasattr(m, "_can_checkpoint_with_cache")]
    own = {m: m.__dict__.get("forward") for m in blocks}
    try:
        for m in training:
            m.training = False
        for p in trainable:
            p.requires_grad_(False)
        for m in blocks:
            m.forward = _checkpointed(m.forward)
        yield
    finally:
        for m, forward in own.items():
            if forward is None:
                m.__dict__.pop("forward", None)
            else:
                m.forward = forward
        for p in trainable:
            p.requires_grad_(True)
        for m in training:
            m.training = True


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood [l], gradient [l, v] of its weighted sum) for logits [l, v], which `in_place` overwrites.

    Written by hand because autograd keeps three copies of the logits; here there is one, in chunks that stay in cache.
    """
    source = logits.detach()
    grad = source if in_place else torch.empty_like(source)
    nll = torch.empty(len(targets), device=logits.device)
    step = max(1, _LOGIT_CHUNK // logits.shape[1]) if logits.device.type == "cpu" else len(targets)
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        chunk, target = source[part].float(), targets[part, None]
        nll[part] = chunk.logsumexp(1) - chunk.gather(1, target)[:, 0]
        soft = chunk.softmax(1)
        soft.scatter_add_(1, target, torch.full_like(target, -1, dtype=soft.dtype))
        grad[part] = soft.mul_(weights[part, None])
    return nll, grad
