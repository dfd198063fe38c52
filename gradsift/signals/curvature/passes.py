"""Batched passes that show every tracked layer's inputs and output gradients: another consumer of
what the gradient engine's taps bring.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.errors import ConfigError
from gradsift.gradients.capture import Batch, Call, Capture
from gradsift.gradients.passes import Modules
from gradsift.types import IGNORE, Encoded

T = TypeVar("T")

_LOGIT_CHUNK = 1 << 17


@dataclass(frozen=True)
class PassRow:
    """`ids` [t] and `targets` [t], the label that each position predicts (-100: none); `index` is
    its place in the encoded set.
    """

    index: int
    ids: np.ndarray
    targets: np.ndarray


def pass_row(encoded: Sequence[Encoded], index: int, length: int) -> PassRow:
    """The first `length` tokens of a row, all of them where that is the whole row (the last one
    then predicts nothing).
    """
    ids, labels = np.asarray(encoded[index]["input_ids"]), np.asarray(encoded[index]["labels"])
    return PassRow(index, ids[:length], np.append(labels[1:], IGNORE)[:length])


@dataclass(frozen=True)
class Layer:
    """A tracked parameter. `shape` (r, c) in its own layout; `transposed`: r counts inputs
    (Conv1D). Layers of one `group` read the same tensor.
    """

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


class CurvaturePass:
    """A model and its tracked layers: `layers` by parameter name, modules that share a parameter
    under the first one's.

    Layers that read the same tensor (query, key and value; gate and up) are found by one forward
    pass over two tokens, so that what depends on the input alone is computed and kept once
    (`sharing` counts them). `whole`: inputs at every token of every row; otherwise only what
    gradients need: the last feed-forward layer shows supervised positions alone. Inputs of padding
    are arbitrary, see `clean`. A consumer of `Capture`, which calls `begin` and `gradient`. Raises
    as `tracked_modules`.
    """

    def __init__(self, model: nn.Module, modules: Modules = None, *, whole: bool = False) -> None:
        # Not fused: the step of a LoRA layer scales what B reads in place of its output gradient,
        # and factors need either as it is.
        self.capture = capture = Capture(model, modules, fused=False, every_position=whole)
        self.device = capture.device
        groups = self._groups()
        self.layers = {
            name: Layer(name, shape, name in capture.transposed, groups[name])
            for name, shape in capture.shapes.items()
        }
        self.sharing = Counter(layer.group for layer in self.layers.values())
        # by group: layers still to come, and what `once` made for them
        self._made: dict[str, tuple[int, Any]] = {}
        self._places: dict[str, int] = {}  # by group: where in memory its input lies
        self._rows: Sequence[PassRow] = ()
        self._visit: Visit | None = None
        self._batch: Batch | None = None

    def _groups(self) -> dict[str, str]:
        capture = self.capture
        seen: dict[str, list[Tensor]] = {name: [] for name in capture.modules}

        def note(name: str) -> Callable[..., None]:
            return lambda module, args: seen[name].append(args[0])

        handles = [m.register_forward_pre_hook(note(n)) for n, m in capture.modules.items()]
        try:
            with capture.frozen(), torch.no_grad():
                capture.model(
                    input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device),
                    use_cache=False,
                )
        finally:
            for handle in handles:
                handle.remove()
        first: dict[int, str] = {}
        uses = Counter(capture.owner.values())
        alone = {
            name
            for name in capture.modules
            if len(seen[name]) != 1 or uses[capture.owner[name]] > 1
        }
        return {
            name: name if name in alone else first.setdefault(id(seen[name][0]), name)
            for name in capture.modules
        }

    def show(
        self,
        rows: Sequence[PassRow],
        visit: Visit,
        draw: Callable[[PassRow], np.ndarray] | None = None,
    ) -> Tensor:
        """One pass over `rows`, each with at least one supervised token; returns their losses [b],
        means over supervised tokens, nats.

        `visit` is called once per layer. Output gradients are of the sum of the rows' losses, so
        each row's is its own, and zero at padding; all is fp32 or wider. `draw`: uniform numbers,
        one per supervised token of a row, that pick labels from the model's own distribution in
        place of the given ones.
        """

        def drawn(logits: Tensor) -> Tensor:
            assert draw is not None
            return sample(
                logits, torch.from_numpy(np.concatenate([draw(r) for r in rows])).to(logits.device)
            )

        self._rows, self._visit = rows, visit
        try:
            return self.capture.run(
                [(r.ids, r.targets) for r in rows], self, drawn if draw is not None else None
            )
        finally:
            self._rows, self._visit, self._batch, self._made, self._places = (), None, None, {}, {}

    def begin(self, batch: Batch) -> None:
        self._batch = batch

    def gradient(self, name: str, calls: list[Call]) -> None:
        """Shows one layer to `visit`."""
        batch, layer = self._batch, self.layers[name]
        assert batch is not None and self._visit is not None
        place = calls[0][0].seen.data_ptr()
        if self.sharing[layer.group] > 1 and self._places.setdefault(layer.group, place) != place:
            raise ConfigError(
                f"module {name} does not always read what {layer.group} reads",
                remedy="Name the modules without it.",
            )
        if len(calls) == 1:
            x, d = calls[0][0].by_example, calls[0][1]
        else:
            x, d = (
                torch.cat([self.clean(source.by_example) for source, _ in calls], 1),
                torch.cat([d for _, d in calls], 1),
            )
        if d.shape[1] == batch.t:
            lengths = [len(r.ids) for r in self._rows]
        elif d.shape[1] == batch.width:
            lengths = [int((r.targets != IGNORE).sum()) for r in self._rows]
        else:
            lengths = [d.shape[1]] * batch.b
        self._visit(layer, _wide(x), _wide(d), lengths)

    def clean(self, x: Tensor) -> Tensor:
        """Inputs with zeros at padding. Those of a layer that is called more than once come like
        that.
        """
        batch = self._batch
        assert batch is not None
        if x.shape[1] != batch.t or all(len(r.ids) == batch.t for r in self._rows):
            return x
        lengths = torch.tensor([len(r.ids) for r in self._rows], device=x.device)
        return x * (torch.arange(batch.t, device=x.device) < lengths[:, None])[:, :, None]

    def once(self, layer: Layer, make: Callable[[], Any]) -> Any:
        """make(), called once a batch for all layers of a group; the value is dropped after the
        last of them.
        """
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
    """`count` numbers in [0, 1) that depend on (seed, key) alone: Philox, a counter-based
    generator.
    """
    return np.random.Generator(
        np.random.Philox(key=np.array([seed % 2**64, key % 2**64], np.uint64))
    ).random(count)


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """One label per row of logits [l, v], by inverting the cumulated probabilities at `uniform` [l]
    (fp64).
    """
    picked = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    step = max(1, _LOGIT_CHUNK // logits.shape[1]) if logits.device.type == "cpu" else 1024
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        total = logits[part].float().softmax(1).double().cumsum(1)
        picked[part] = torch.searchsorted(total, uniform[part, None] * total[:, -1:], right=True)[
            :, 0
        ]
    return picked.clamp_(max=logits.shape[1] - 1)
