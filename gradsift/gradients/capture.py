"""One batch through a frozen model: taps on the tracked modules, the loss on supervised positions, and what happens to each gradient.

A tap is the identity on a module's output that also keeps its input. When the backward pass reaches it, the input x [b, t, i] and the
output gradient g [b, t, o] of that module are at hand, and its per-example weight gradient is sum_t g_t x_t^T. That product is formed
only where something needs it (a transform, a sketch, a short norm). Otherwise a two-sided projection takes the factors, (g P_out)^T (x
P_in), and the squared norm comes from t x t products (see `products`) or, where that is asked for, from the sketch. Modules that read the
same x (queries, keys, values) share its sketch and its products.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

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
from gradsift.gradients.projection import BoundProjection, Projection
from gradsift.gradients.weight_grads import doubled_gram, gram_is_cheaper, product, squares
from gradsift.model.layers import tracked_modules
from gradsift.types import IGNORE, Transform

_SAME_WITHOUT: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # last feed-forward layers already checked

Norms = Literal["exact", "sketched"]
Row = tuple[np.ndarray, np.ndarray]  # (input ids, the label that each position predicts), of equal length


class _Tap(torch.autograd.Function):
    """The identity on a module's output. Its backward hands (module input, output gradient) to `sink`.

    `anchor` requires a gradient, so the output does too: that is where the graph of a frozen model starts.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, anchor: Tensor, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        ctx.mark_dirty(out)  # the very tensor, not a view of it: what comes next may change it in place
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.sink(x, grads[0])
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None, None


@dataclass
class _Input:
    """A module input as it was seen, spread per example, and what its readers share: the parameters that read it in the forward pass."""

    seen: Tensor
    spread: Tensor
    readers: list[str]
    gram: list[Tensor] | None = None
    sketches: dict[str, Tensor] = field(default_factory=dict)

    def is_of(self, x: Tensor) -> bool:
        return x.data_ptr() == self.seen.data_ptr() and x.shape == self.seen.shape and x.stride() == self.seen.stride()


@dataclass
class Batch:
    """The state of one forward and backward pass of b rows padded to t positions."""

    b: int
    t: int
    flat: Tensor  # [l] of the b * t positions, those that predict a supervised token
    slots: Tensor  # [l] where each of them goes when examples lie side by side, b * width in all
    width: int  # most supervised tokens of an example
    state: Tensor  # what the projection accumulates
    squares: Tensor  # [b] squared gradient norms
    calls: dict[str, int] = field(default_factory=dict)  # forward calls by parameter
    readers: dict[str, list[str]] = field(default_factory=dict)  # parameters by what they read, for sharing
    held: dict[str, list[tuple[_Input, Tensor]]] = field(default_factory=dict)  # until all calls of a parameter have come back
    last_read: tuple[Tensor, list[str]] | None = None
    shared: _Input | None = None
    backward: bool = False
    gathered: bool = False  # the head saw supervised positions only
    head_out: int = 0  # where the head wrote: logits still there were not capped or scaled, nothing keeps them, they may be overwritten

    def called(self, owner: str, x: Tensor | None) -> None:
        """Counts a forward call of a parameter that reads x, or None for what nothing else reads."""
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
    """A model with tracked modules, a transform, a projection and what is differentiated; `run` makes the rows of one batch."""

    def __init__(
        self,
        model: nn.Module,
        projection: Projection,
        transform: Transform | None,
        modules: Any,
        loss: Loss = "cross-entropy",
        norms: Norms = "exact",
    ) -> None:
        self.model, self.transform, self.differentiate, self.norms = model, transform, OBJECTIVES[loss], norms
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
        self.tapped = set(self.modules.values())
        self.low_rank = low_rank_layers(model, self.modules)
        self.device = next(iter(weights.values())).device
        self.bound: BoundProjection = projection.bind(shapes, self.device)
        self.head = _head(model)
        self.everything, self.parameters = list(model.modules()), list(model.parameters())
        self.bf16_attention, self.rms_norms = is_helped(self.everything), rms_norms(self.everything)
        self.blocks = [m for m in self.everything if hasattr(m, "gradient_checkpointing") and hasattr(m, "_can_checkpoint_with_cache")]
        self.tail: nn.Module | None = None if self.head is None else find_tail(model)
        self.tail_checked = False
        self.sides: dict[str, tuple[Tensor, Tensor] | None] = {}
        self.batch: Batch | None = None

    def run(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """(rows [b, d], norms [b], losses [b]) on the CPU."""
        try:
            with self._frozen(), torch.enable_grad():
                if not self.tail_checked:
                    self._check_tail(rows[0][0])
                with self._hooked():
                    return self._run(rows)
        finally:
            self.batch = None

    def _run(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        ids, labels = pad_rows(rows)
        b, t = ids.shape
        supervised = labels != IGNORE
        places = np.flatnonzero(supervised)
        counts = torch.from_numpy(supervised.sum(1)).to(self.device, torch.float32)
        width, rank = int(supervised.sum(1).max()), (np.cumsum(supervised, 1) - 1).ravel()[places]
        flat, owner, slots = (torch.from_numpy(a).to(self.device) for a in (places, places // t, places // t * width + rank))
        batch = self.batch = Batch(b, t, flat, slots, width, self.bound.start(b), torch.zeros(b, device=self.device))
        logits = self.model(input_ids=torch.from_numpy(ids).to(self.device), use_cache=False).logits
        if not batch.gathered:
            logits = _at(logits.flatten(0, 1), flat)
        logits = logits.view(-1, logits.shape[-1])
        targets, weights = torch.from_numpy(labels.ravel()[places]).to(logits.device), (1 / counts[owner]).to(logits.device)
        nll, grad = self.differentiate(logits, targets, weights, in_place=logits.data_ptr() == batch.head_out)
        batch.backward, batch.last_read = True, None
        torch.autograd.backward(logits, grad)
        with torch.no_grad():
            for name in list(batch.held):
                self._finish(name)
        losses = torch.zeros(b, device=self.device).index_add_(0, owner, nll.to(self.device)) / counts
        return self.bound.finish(batch.state).cpu(), batch.squares.sqrt().cpu(), losses.cpu()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Evaluation mode, nothing requires a gradient, and checkpointing where enabled (transformers: in training mode only)."""
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
        handles = [m.register_forward_hook(self._tap(name, anchor)) for name, m in self.modules.items()]
        if self.head is not None:
            handles += [self.head.register_forward_pre_hook(self._before_head), self.head.register_forward_hook(self._after_head)]
        if self.tail is not None:
            handles += [self.tail.register_forward_pre_hook(self._before_tail), self.tail.register_forward_hook(self._after_tail)]
        quick: list[tuple[nn.Module, Callable[..., Any]]] = [(m, in_few_passes(m, m.forward)) for m in self.rms_norms]
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
        return out.new_zeros(b * t, width).index_copy(0, self.batch.flat.to(out.device), out[0]).view(b, t, width)

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
                raise ConfigError(what, where=name, remedy="Name the other layers: modules=[...] (routers of a mixture cannot be read).")
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
            shared = batch.shared = _Input(x, self._spread(name, x), readers)
        batch.held.setdefault(owner, []).append((shared, self._spread(name, grad)))
        if len(batch.held[owner]) == batch.calls[owner]:
            self._finish(owner)

    def _spread(self, name: str, a: Tensor) -> Tensor:
        """Activations as [b, positions, features], on one device where the model spans several: supervised positions that were gathered from
        all examples go back to their own."""
        batch = self.batch
        assert batch is not None
        a = a.to(self.device)
        if a.dim() == 2:
            a = a.view(batch.b, batch.t, -1) if a.shape[0] == batch.b * batch.t else a[None]
        if a.shape[:2] == (batch.b, batch.t):
            return a
        if a.dim() == 3 and a.shape[:2] == (1, len(batch.flat)):
            out = a.new_zeros(batch.b * batch.width, a.shape[2])
            return out.index_copy_(0, batch.slots, a[0]).view(batch.b, batch.width, -1)
        raise ConfigError(
            f"module {name} sees activations of shape {tuple(a.shape)}, which do not say whose example they are",
            remedy="Leave this module out (experts of a mixture cannot be read).",
        )

    def _finish(self, name: str) -> None:
        """The gradient of one parameter is complete: norm, transform, projection."""
        batch = self.batch
        assert batch is not None
        pairs = batch.held.pop(name)
        source, g = pairs[0]
        if len(pairs) > 1:  # a gradient summed over calls is one over their positions laid end to end
            x = torch.cat([p[0].spread for p in pairs], 1)
            source, g = _Input(x, x, [name]), torch.cat([p[1] for p in pairs], 1)
        sides = self._sides(name, g.dtype)
        if sides is None:
            grad = product(source.spread, g, name in self.transposed)
            batch.squares += torch.linalg.vector_norm(grad, dim=(1, 2)).square_()
            if self.transform is not None:
                grad = self.transform.materialised(name, grad)
            self.bound.add(batch.state, name, grad)
            return
        if name not in source.sketches:
            wanted = [n for n in source.readers if self._sides(n, g.dtype) is not None] if name in source.readers else [name]
            parts = [self.sides[n][1] for n in wanted]  # type: ignore[index]
            together = matmul.matmul(source.spread, torch.cat(parts, 1))
            source.sketches.update(zip(wanted, together.split([p.shape[1] for p in parts], -1), strict=True))
        inner, outer = source.sketches[name].float(), matmul.matmul(g, sides[0]).float()
        left, right = (inner, outer) if name in self.transposed else (outer, inner)
        a, b = self.bound.projection.dim  # type: ignore[misc]
        made = self.bound.add_product(batch.state, name, left[..., :a], right[..., :b])
        if self.norms == "exact":
            if source.gram is None and gram_is_cheaper(source.spread, g, len(source.readers)):
                source.gram = doubled_gram(source.spread)
            batch.squares += squares(source.spread, g, source.gram)
        else:
            plain = made if self.transform is None else self.bound.product(left[..., a:], right[..., b:])
            batch.squares += plain.square().sum(1)

    def _sides(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(output side, input side) signs where the projection can take factors, with the transform's own factors in them; where norms are
        sketched, then followed by those without."""
        if name not in self.sides:
            made, two_sided = None, self.bound.projection.two_sided
            factors = self.transform.factors(name) if two_sided and self.transform is not None else None  # asked for only to be used
            if two_sided and (self.transform is None or factors is not None):
                left, right = self.bound.sides(name)
                if factors is not None:
                    plain = (left, right) if self.norms == "sketched" else (left[:, :0], right[:, :0])
                    left, right = (torch.cat([f.to(s)[:, None] * s, p], 1) for f, s, p in zip(factors, (left, right), plain, strict=True))
                made = (right.to(dtype), left.to(dtype)) if name in self.transposed else (left.to(dtype), right.to(dtype))
            self.sides[name] = made
        return self.sides[name]


def _weight(name: str, module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ConfigError(f"module {name} has no weight matrix", remedy="Name linear layers.")
    return weight


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Module) else None


def pad_rows(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) int64 [b, t], padded on the right: ids with the row's own first token, which every vocabulary has, labels with -100."""
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
