"""Batched passes that show every tracked layer's inputs and output gradients: the gradient engine with another use for what its taps
bring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.errors import ConfigError
from gradsift.gradients.capture import Batch, Capture, pad_rows
from gradsift.gradients.passes import Modules
from gradsift.gradients.projection import Projection
from gradsift.types import IGNORE, Encoded

T = TypeVar("T")

_LOGIT_CHUNK = 1 << 17


@dataclass(frozen=True)
class Row:
    """`ids` [t] and `targets` [t], the label that each position predicts (-100: none); `index` is its place in the encoded set."""

    index: int
    ids: np.ndarray
    targets: np.ndarray


def row(encoded: Sequence[Encoded], index: int, length: int) -> Row:
    """The first `length` tokens of a row, all of them where that is the whole row (the last one then predicts nothing)."""
    ids, labels = np.asarray(encoded[index]["input_ids"]), np.asarray(encoded[index]["labels"])
    return Row(index, ids[:length], np.append(labels[1:], IGNORE)[:length])


@dataclass(frozen=True)
class Layer:
    """A tracked parameter. `shape` (r, c) in its own layout; `transposed`: r counts inputs (Conv1D). Layers of one `group` read the same
    tensor."""

    name: str
    shape: tuple[int, int]
    transposed: bool
    group: str

    @property
    def outputs(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def inputs(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1]

    def sides(self, x: T, d: T) -> tuple[T, T]:
        """(left, right) of the parameter's layout from what belongs to inputs and to outputs."""
        return (x, d) if self.transposed else (d, x)


# layer, inputs [b, t, i], output gradients [b, t, o], places of each row that hold something [b]
Visit = Callable[[Layer, Tensor, Tensor, list[int]], None]


class Walk(Capture):
    """A model and its tracked layers: `layers` by parameter name, modules that share a parameter under the first one's.

    Layers that read the same tensor (query, key and value; gate and up) are found by one forward pass over two tokens, so that what depends
    on the input alone is computed and kept once (`sharing` counts them). `whole`: inputs at every token of every row; otherwise only what
    gradients need: the last feed-forward layer shows supervised positions alone. Inputs of padding are arbitrary, see `clean`.
    Raises as `tracked_modules`.
    """

    def __init__(self, model: nn.Module, modules: Modules = None, *, whole: bool = False) -> None:
        super().__init__(model, Projection(1), None, modules)
        self.whole = whole
        self.low_rank = []  # their step scales what B reads in place of its output gradient: the same product, other factors
        if whole:
            self.tail = None
        groups = self._groups()
        self.layers = {name: Layer(name, shape, name in self.transposed, groups[name]) for name, shape in self.bound.shapes.items()}
        self.sharing = Counter(layer.group for layer in self.layers.values())
        self._made: dict[str, tuple[int, Any]] = {}  # by group: layers still to come, and what `once` made for them
        self._places: dict[str, int] = {}  # by group: where in memory its input lies
        self._rows: Sequence[Row] = ()
        self._visit: Visit | None = None
        self._draw: Callable[[Row], np.ndarray] | None = None

    def _groups(self) -> dict[str, str]:
        seen: dict[str, list[Tensor]] = {name: [] for name in self.modules}

        def note(name: str) -> Callable[..., None]:
            return lambda module, args: seen[name].append(args[0])

        handles = [m.register_forward_pre_hook(note(n)) for n, m in self.modules.items()]
        try:
            with self._frozen(), torch.no_grad():
                self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        first: dict[int, str] = {}
        uses = Counter(self.owner.values())
        alone = {name for name in self.modules if len(seen[name]) != 1 or uses[self.owner[name]] > 1}
        return {name: name if name in alone else first.setdefault(id(seen[name][0]), name) for name in self.modules}

    def show(self, rows: Sequence[Row], visit: Visit, draw: Callable[[Row], np.ndarray] | None = None) -> Tensor:
        """One pass over `rows`, each with at least one supervised token; returns their losses [b], means over supervised tokens, nats.

        `visit` is called once per layer. Output gradients are of the sum of the rows' losses, so each row's is its own, and zero at
        padding; all is fp32 or wider. `draw`: uniform numbers, one per supervised token of a row, that pick labels from the model's own
        distribution in place of the given ones.
        """
        self._rows, self._visit, self._draw = rows, visit, draw
        try:
            return self.run([(r.ids, r.targets) for r in rows])[2]
        finally:
            self._rows, self._visit, self._draw, self._made, self._places = (), None, None, {}, {}

    def _run(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
        if self._draw is None:
            return super()._run(rows)
        ids, labels = pad_rows(rows)
        b, t = ids.shape
        places = np.flatnonzero(labels != IGNORE)
        flat = torch.from_numpy(places).to(self.device)
        self.batch = Batch(b, t, flat, flat, t, torch.empty(0), torch.empty(0))  # no tap runs: there is no graph to hang one on
        with torch.no_grad():
            logits = self.model(input_ids=torch.from_numpy(ids).to(self.device), use_cache=False).logits
            if not self.batch.gathered:
                logits = logits.flatten(0, 1).index_select(0, flat.to(logits.device))
            uniform = np.concatenate([self._draw(r) for r in self._rows])
        labels.ravel()[places] = sample(logits.view(-1, logits.shape[-1]), torch.from_numpy(uniform).to(logits.device)).cpu().numpy()
        return super()._run([(ids[k, : len(r[0])], labels[k, : len(r[0])]) for k, r in enumerate(rows)])

    def _finish(self, name: str) -> None:
        batch, layer = self.batch, self.layers[name]
        assert batch is not None and self._visit is not None
        held = batch.held.pop(name)
        place = held[0][0].seen.data_ptr()
        if self.sharing[layer.group] > 1 and self._places.setdefault(layer.group, place) != place:
            raise ConfigError(f"module {name} does not always read what {layer.group} reads", remedy="Name the modules without it.")
        if len(held) == 1:
            x, d = held[0][0].spread, held[0][1]
        else:
            x, d = torch.cat([self.clean(source.spread) for source, _ in held], 1), torch.cat([d for _, d in held], 1)
        if d.shape[1] == batch.t:
            lengths = [len(r.ids) for r in self._rows]
        elif d.shape[1] == batch.width:
            lengths = [int((r.targets != IGNORE).sum()) for r in self._rows]
        else:
            lengths = [d.shape[1]] * batch.b
        self._visit(layer, _wide(x), _wide(d), lengths)

    def clean(self, x: Tensor) -> Tensor:
        """Inputs with zeros at padding. Those of a layer that is called more than once come like that."""
        batch = self.batch
        assert batch is not None
        if x.shape[1] != batch.t or all(len(r.ids) == batch.t for r in self._rows):
            return x
        lengths = torch.tensor([len(r.ids) for r in self._rows], device=x.device)
        return x * (torch.arange(batch.t, device=x.device) < lengths[:, None])[:, :, None]

    def once(self, layer: Layer, make: Callable[[], Any]) -> Any:
        """make(), called once a batch for all layers of a group; the value is dropped after the last of them."""
        members = self.sharing[layer.group]
        left, value = self._made.pop(layer.group, (members, None))
        if left == members:
            value = make()
        if left > 1:
            self._made[layer.group] = (left - 1, value)
        return value


def _wide(a: Tensor) -> Tensor:
    return a if a.dtype in (torch.float32, torch.float64) else a.float()


def uniforms(seed: int, key: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that depend on (seed, key) alone: Philox, a counter-based generator."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, key % 2**64], np.uint64))).random(count)


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """One label per row of logits [l, v], by inverting the cumulated probabilities at `uniform` [l] (fp64)."""
    picked = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    step = max(1, _LOGIT_CHUNK // logits.shape[1]) if logits.device.type == "cpu" else 1024
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        total = logits[part].float().softmax(1).double().cumsum(1)
        picked[part] = torch.searchsorted(total, uniform[part, None] * total[:, -1:], right=True)[:, 0]
    return picked.clamp_(max=logits.shape[1] - 1)
