"""One batch through a frozen model: taps on the tracked modules, and the loss on supervised
positions.

A tap is the identity on a module's output that also keeps its input. When the backward pass reaches
it, the input x [b, t, i] and the output gradient g [b, t, o] of that module are at hand, and its
per-example weight gradient is sum_t g_t x_t^T. A `Consumer` takes both, one parameter after the
other, and says what becomes of them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradsift.compute.cpu import matmul
from gradsift.compute.cpu.attention import is_helped, short_rows
from gradsift.compute.cpu.rmsnorm import in_few_passes, rms_norms
from gradsift.compute.cpu.swap import swapped
from gradsift.errors import ConfigError
from gradsift.gradients.last_layer import find_tail, same_without
from gradsift.gradients.lora_layer import LowRank, low_rank_layers
from gradsift.gradients.objectives import OBJECTIVES, Loss
from gradsift.model.layers import tracked_modules
from gradsift.types import IGNORE, counted

# last feed-forward layers already checked
_SAME_WITHOUT: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

# (input ids, the label that each position predicts), of equal length
LabelledIds = tuple[np.ndarray, np.ndarray]


class _Tap(torch.autograd.Function):
    """The identity on a module's output. Its backward hands (module input, output gradient) to
    `sink`.

    `anchor` requires a gradient, so the output does too: that is where the graph of a frozen model
    starts.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, anchor: Tensor, sink: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        # the very tensor, not a view of it: what comes next may change it in place
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.sink(x, grads[0])
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None, None


@dataclass
class Input:
    """What a module read.

    `seen`: the tensor itself. `by_example` [b, positions, i]: its positions, those of an example
    side by side. `readers`: the parameters that read this very tensor in the forward pass. `gram`
    and `sketches`: what a consumer made of it for one of them, for the others to use.
    """

    seen: Tensor
    by_example: Tensor
    readers: list[str]
    gram: list[Tensor] | None = None
    sketches: dict[str, Tensor] = field(default_factory=dict)

    def is_of(self, x: Tensor) -> bool:
        return (
            x.data_ptr() == self.seen.data_ptr()
            and x.shape == self.seen.shape
            and x.stride() == self.seen.stride()
        )


# one use of a parameter: its input, its output gradients [b, positions, o]
Call = tuple[Input, Tensor]


class Consumer(Protocol):
    """What uses the gradients of a pass.

    The two methods are called inside `Capture.run`, without autograd: `begin` once, then `gradient`
    once for every tracked parameter that the loss depends on, in the order in which the backward
    pass completes them. An exception ends the pass; the next one begins anew.
    """

    def begin(self, batch: Batch) -> None:
        """A pass over `batch` begins: the model has not run yet."""
        ...

    def gradient(self, name: str, calls: list[Call]) -> None:
        """The gradient of parameter `name` is complete.

        Args:
            name: of the parameter; modules that share one are called by the name of the first.
            calls: every use of it in the forward pass, one or more. The gradient is the sum over
                calls and positions of output gradient times input, for each example. Both are on
                the device of `Capture`, in the dtype of the model, and not to be changed.
        """
        ...


@dataclass
class Batch:
    """The state of one forward and backward pass of b rows padded to t positions."""

    b: int
    t: int
    flat: Tensor  # [l] of the b * t positions, those that predict a supervised token
    slots: Tensor  # [l] where each of them goes when examples lie side by side, b * width in all
    width: int  # most supervised tokens of an example
    consumer: Consumer
    calls: dict[str, int] = field(default_factory=dict)  # forward calls by parameter
    # parameters by what they read, for sharing
    readers: dict[str, list[str]] = field(default_factory=dict)
    # until all calls of a parameter have come back
    held: dict[str, list[Call]] = field(default_factory=dict)
    last_read: tuple[Tensor, list[str]] | None = None
    shared: Input | None = None
    backward: bool = False
    gathered: bool = False  # the head saw supervised positions only
    # where the head wrote: logits still there were not capped or scaled, nothing keeps them, they
    # may be overwritten
    head_out: int = 0

    def called(self, owner: str, x: Tensor | None) -> None:
        """Counts a forward call of a parameter that reads x, or None for what nothing else
        reads.
        """
        if self.backward:  # a checkpointed block runs again during the backward pass
            return
        self.calls[owner] = self.calls.get(owner, 0) + 1
        if x is None:
            self.readers[owner] = [owner]
            return
        if self.last_read is None or self.last_read[0] is not x:
            self.last_read = (x, [])
        self.last_read[1].append(owner)
        self.readers[owner] = self.last_read[1]


class Capture:
    """A model with tracked modules, and what is differentiated; `run` hands the gradients of a
    batch to a consumer.

    `modules`: by name, those that are tapped. `owner`: module -> the name of its parameter.
    `shapes`: parameter -> its shape, in its own layout; `transposed`: the parameters in the layout
    [in, out]. `fused`: LoRA layers run in one step, which hands B its input times the scaling and
    an output gradient without it: the same product of other factors. `every_position`: all modules
    see all positions; otherwise the last feed-forward layer sees supervised ones alone.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Any,
        loss: Loss = "cross-entropy",
        *,
        fused: bool = True,
        every_position: bool = False,
    ) -> None:
        self.model, self.differentiate = model, OBJECTIVES[loss]
        self.modules = tracked_modules(model, modules)
        weights = {name: _weight(name, module) for name, module in self.modules.items()}
        # modules that share one parameter are one: its gradient is the sum over all of them, under
        # the first name
        first: dict[int, str] = {}
        self.owner = {name: first.setdefault(id(w), name) for name, w in weights.items()}
        self.shapes = {
            name: (w.shape[0], w.shape[1])
            for name, w in weights.items()
            if self.owner[name] == name
        }
        # Linear keeps [out, in], transformers' Conv1D [in, out]; gradients are formed in the
        # parameter's own layout
        self.transposed = {
            name for name, module in self.modules.items() if type(module).__name__ == "Conv1D"
        }
        self.tapped = set(self.modules.values())
        self.low_rank = low_rank_layers(model, self.modules) if fused else []
        self.device = next(iter(weights.values())).device
        self.head = _head(model)
        self.everything, self.parameters = list(model.modules()), list(model.parameters())
        self.bf16_attention, self.rms_norms = is_helped(self.everything), rms_norms(self.everything)
        self.blocks = [
            m
            for m in self.everything
            if hasattr(m, "gradient_checkpointing") and hasattr(m, "_can_checkpoint_with_cache")
        ]
        self.tail: nn.Module | None = (
            None if self.head is None or every_position else find_tail(model)
        )
        self.tail_checked = False
        self.batch: Batch | None = None

    def run(
        self,
        rows: Sequence[LabelledIds],
        consumer: Consumer,
        relabel: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """One forward and backward pass: hands every gradient to `consumer`, and returns the losses
        [b] of the rows on the CPU.

        Args:
            rows: b rows, each with at least one supervised position.
            consumer: takes the gradients of the sum of the rows' losses, each a mean over
                supervised positions.
            relabel: gives other labels [l] for the supervised positions of all rows, in order, from
                their logits [l, v] in a pass of its
                own without gradients.
        """
        try:
            with self.frozen(), torch.enable_grad():
                if not self.tail_checked:
                    self._check_tail(rows[0][0])
                with self._hooked():
                    ids, labels = pad_rows(rows)
                    if relabel is not None:
                        labels[labels != IGNORE] = (
                            relabel(self._outputs(ids, labels, consumer)).cpu().numpy()
                        )
                    return self._differentiated(ids, labels, consumer)
        finally:
            self.batch = None

    def _outputs(self, ids: np.ndarray, labels: np.ndarray, consumer: Consumer) -> Tensor:
        """Logits [l, v] at the supervised positions. No tap hands anything on: there is no graph to
        hang one on.
        """
        b, t = ids.shape
        flat = torch.from_numpy(np.flatnonzero(labels != IGNORE)).to(self.device)
        self.batch = Batch(b, t, flat, flat, t, consumer)
        with torch.no_grad():
            return self._logits(ids, self.batch)

    def _logits(self, ids: np.ndarray, batch: Batch) -> Tensor:
        logits = self.model(input_ids=torch.from_numpy(ids).to(self.device), use_cache=False).logits
        if not batch.gathered:
            logits = _at(logits.flatten(0, 1), batch.flat)
        return logits.view(-1, logits.shape[-1])

    def _differentiated(self, ids: np.ndarray, labels: np.ndarray, consumer: Consumer) -> Tensor:
        b, t = ids.shape
        supervised = labels != IGNORE
        places = np.flatnonzero(supervised)
        counts = torch.from_numpy(supervised.sum(1)).to(self.device, torch.float32)
        width, rank = int(supervised.sum(1).max()), (np.cumsum(supervised, 1) - 1).ravel()[places]
        flat, owner, slots = (
            torch.from_numpy(a).to(self.device)
            for a in (places, places // t, places // t * width + rank)
        )
        batch = self.batch = Batch(b, t, flat, slots, width, consumer)
        consumer.begin(batch)
        logits = self._logits(ids, batch)
        targets, weights = (
            torch.from_numpy(labels.ravel()[places]).to(logits.device),
            (1 / counts[owner]).to(logits.device),
        )
        nll, grad = self.differentiate(
            logits, targets, weights, in_place=logits.data_ptr() == batch.head_out
        )
        batch.backward, batch.last_read = True, None
        torch.autograd.backward(logits, grad)
        with torch.no_grad():
            for name in list(batch.held):
                consumer.gradient(name, batch.held.pop(name))
        return (
            torch.zeros(b, device=self.device).index_add_(0, owner, nll.to(self.device)) / counts
        ).cpu()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode, nothing requires a gradient, and checkpointing where enabled
        (transformers: in training mode only).
        """
        training = [m for m in self.everything if m.training]
        trainable = [p for p in self.parameters if p.requires_grad]
        blocks = [m for m in self.blocks if m.gradient_checkpointing]
        try:
            for m in training:
                m.training = False
            for p in trainable:
                p.requires_grad_(False)
            with swapped([(m, _checkpointed(m.forward)) for m in blocks]):
                yield
        finally:
            for p in trainable:
                p.requires_grad_(True)
            for m in training:
                m.training = True

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        handles = [
            m.register_forward_hook(self._tap(name, anchor)) for name, m in self.modules.items()
        ]
        if self.head is not None:
            handles += [
                self.head.register_forward_pre_hook(self._before_head),
                self.head.register_forward_hook(self._after_head),
            ]
        if self.tail is not None:
            handles += [
                self.tail.register_forward_pre_hook(self._before_tail),
                self.tail.register_forward_hook(self._after_tail),
            ]
        quick: list[tuple[nn.Module, Callable[..., Any]]] = [
            (m, in_few_passes(m, m.forward)) for m in self.rms_norms
        ]
        quick += [(parts.layer, self._low_rank(parts, anchor)) for parts in self.low_rank]
        within = {m for parts in self.low_rank for m in (parts.base, parts.a, parts.b)}
        quick += matmul.layer_forwards(m for m in self.everything if m not in within)
        try:
            with swapped(quick), short_rows(self.bf16_attention):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_tail(self, ids: np.ndarray) -> None:
        self.tail_checked = True
        if self.tail is None or self.head is None:
            return
        if self.tail not in _SAME_WITHOUT and len(ids) >= 4:
            sample = torch.from_numpy(ids[:32])[None].to(self.device)
            _SAME_WITHOUT[self.tail] = same_without(self.model, self.tail, self.head, sample)
        if not _SAME_WITHOUT.get(self.tail, False):
            self.tail = None

    def _before_head(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        batch = self.batch
        if batch is None or args[0].shape[:2] != (batch.b, batch.t):
            return None
        batch.gathered = True
        return (_at(args[0].flatten(0, 1), batch.flat)[None], *args[1:])

    def _after_head(self, head: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if self.batch is not None and self.batch.gathered and head not in self.tapped:
            self.batch.head_out = out.data_ptr()

    def _before_tail(self, tail: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.batch is not None
        return (_at(args[0].flatten(0, 1), self.batch.flat)[None], *args[1:])

    def _after_tail(self, tail: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        assert self.batch is not None
        b, t, width = self.batch.b, self.batch.t, out.shape[-1]
        return (
            out.new_zeros(b * t, width)
            .index_copy(0, self.batch.flat.to(out.device), out[0])
            .view(b, t, width)
        )

    def _tap(self, name: str, anchor: Tensor) -> Callable[..., Tensor | None]:
        owner = self.owner[name]

        def sink(x: Tensor, grad: Tensor) -> None:
            self._arrived(name, x, grad)

        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            batch = self.batch
            if batch is None:
                return None
            if not isinstance(out, Tensor):
                what = f"{type(module).__name__} gives {type(out).__name__}, not a tensor"
                raise ConfigError(
                    what,
                    where=name,
                    remedy=(
                        "Name the other layers: modules=[...] (routers of a mixture cannot be"
                        " read)."
                    ),
                )
            batch.called(owner, args[0])
            return _Tap.apply(out, args[0], anchor, sink)  # type: ignore[return-value]

        return hook

    def _low_rank(self, parts: LowRank, anchor: Tensor) -> Callable[..., Tensor]:
        """What stands for the forward of a LoRA layer, and taps both its matrices."""
        own = parts.layer.forward

        def sink(x: Tensor, before: Tensor, inner: Tensor, grad: Tensor) -> None:
            self._arrived(parts.b_name, inner, grad)
            self._arrived(parts.a_name, x, before)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            batch = self.batch
            if batch is None or args or kwargs or not parts.takes(x):
                return own(x, *args, **kwargs)
            batch.called(self.owner[parts.b_name], None)
            batch.called(self.owner[parts.a_name], x)
            return parts.run(x, anchor, sink)

        return forward

    def _arrived(self, name: str, x: Tensor, grad: Tensor) -> None:
        batch, owner = self.batch, self.owner[name]
        assert batch is not None
        shared = batch.shared
        if shared is None or not shared.is_of(x):
            readers = batch.readers[owner] if batch.calls[owner] == 1 else [owner]
            shared = batch.shared = Input(x, self._by_example(name, x), readers)
        batch.held.setdefault(owner, []).append((shared, self._by_example(name, grad)))
        if len(batch.held[owner]) == batch.calls[owner]:
            batch.consumer.gradient(owner, batch.held.pop(owner))

    def _by_example(self, name: str, a: Tensor) -> Tensor:
        """Activations as [b, positions, features], on one device where the model spans several:
        supervised positions that were gathered from all examples go back to their own.
        """
        batch = self.batch
        assert batch is not None
        a = a.to(self.device)
        if a.dim() == 2:
            a = a.view(batch.b, batch.t, -1) if a.shape[0] == batch.b * batch.t else a[None]
        if a.dim() > 3 and a.shape[0] == batch.b and math.prod(a.shape[1:-1]) == batch.t:
            a = a.flatten(1, -2)  # [b, 1, t, r]: latent attention has one head for all
        if a.dim() == 3 and a.shape[:2] == (batch.b, batch.t):
            return a
        if a.dim() == 3 and a.shape[:2] == (1, len(batch.flat)):
            out = a.new_zeros(batch.b * batch.width, a.shape[2])
            return out.index_copy_(0, batch.slots, a[0]).view(batch.b, batch.width, -1)
        kind = name.partition(".lora_")[0].rpartition(".")[2]
        expert = " (experts of a mixture cannot be read)" if "expert" in name else ""
        raise ConfigError(
            f"sees activations of shape {tuple(a.shape)} where {counted(batch.b, 'row')} of"
            f" {counted(batch.t, 'token')} came in: whose row they are is not known",
            where=name,
            remedy=(
                f"Leave {kind} out{expert}: name the other layers, as [warmup.lora] targets ="
                ' ["q_proj", "v_proj"] in --config does, or as modules=[...] of gradsift.extract.'
            ),
        )


def _weight(name: str, module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ConfigError(f"module {name} has no weight matrix", remedy="Name linear layers.")
    return weight


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Module) else None


def pad_rows(rows: Sequence[LabelledIds]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) int64 [b, t], padded on the right: ids with the row's own first token, which
    every vocabulary has, labels with -100.
    """
    t = max(len(ids) for ids, _ in rows)
    ids, labels = np.empty((len(rows), t), np.int64), np.full((len(rows), t), IGNORE, np.int64)
    for k, (row_ids, row_labels) in enumerate(rows):
        ids[k], labels[k, : len(row_labels)] = row_ids[0], row_labels
        ids[k, : len(row_ids)] = row_ids
    return ids, labels


def _at(flat: Tensor, places: Tensor) -> Tensor:
    """Rows of `flat`, wherever it lies: a model may span devices."""
    return flat.index_select(0, places.to(flat.device))


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
