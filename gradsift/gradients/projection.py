"""Seeded random projections of per-example gradients: rows of d numbers whose inner products are
those of the gradients, without bias.

Every map is a function of (seed, module name, shape, width) alone: bits come from Philox, a
counter-based generator, keyed by a hash of those, and are drawn on the CPU, so a CPU and a GPU
apply the same map. Maps are kept while they fit in `CACHE_BYTES` and drawn again when they do not.

sketch      count-sketch (Charikar et al. 2002; for gradients: sparse Johnson-Lindenstrauss): each
            coordinate is added, with a random
            sign, to one of d buckets. Consecutive blocks of d coordinates each get their own random
            permutation of the buckets, so two
            coordinates share a bucket with probability at most 1/d: E<Sx, Sy> = <x, y> and Var <=
            (|x|^2 |y|^2 + <x, y>^2) / d, as for
            a dense random matrix.
rademacher  dense signs / sqrt(d); with per_module=True and dim=(a, b) two-sided, P_left G P_right^T
            for each module, which a product of
            activations and output gradients passes through without forming G. Same mean; per module
            Var <= about |x|^2 |y|^2 (2/a + 2/b
            + 4/ab).
identity    the flat gradient itself, for tests and tiny models.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gradsift.config import GradientSettings
from gradsift.errors import ConfigError, MismatchError

CACHE_BYTES = 2 << 30  # of maps, per bound projection and device
DENSE_BLOCK = 1 << 24  # entries of a dense map that are drawn at once

Shape = tuple[int, int]


@dataclass(frozen=True)
class Projection:
    """What random map takes a gradient of all tracked modules to a row.

    dim: width of the row (sketch, rademacher), of each module's part of it with per_module=True,
    (a, b) for the two-sided product of a*b numbers per module, or None for identity. Raises
    ConfigError for any other combination.
    """

    dim: int | tuple[int, int] | None = 8192
    seed: int = 0
    kind: Literal["sketch", "rademacher", "identity"] = "sketch"
    per_module: bool = False

    def __post_init__(self) -> None:
        # The maps are keyed by how these are written: numbers of other libraries become Python's,
        # and what only looks like a number is refused.
        object.__setattr__(self, "seed", _whole(self.seed, "seed"))
        if isinstance(self.dim, (list, tuple)):  # TOML and JSON make a list of a pair
            object.__setattr__(self, "dim", tuple(_whole(part, "dim") for part in self.dim))
        elif self.dim is not None:
            object.__setattr__(self, "dim", _whole(self.dim, "dim"))
        if self.kind not in ("sketch", "rademacher", "identity"):
            raise ConfigError(
                f"projection kind is {self.kind!r}", remedy="Known: sketch, rademacher, identity."
            )
        if self.kind == "identity":
            if self.dim is not None:
                raise ConfigError(
                    f"the identity projection has no width, dim is {self.dim}",
                    remedy="Pass dim=None.",
                )
        elif isinstance(self.dim, tuple):
            if not (
                self.kind == "rademacher"
                and self.per_module
                and len(self.dim) == 2
                and all(_positive(k) for k in self.dim)
            ):
                raise ConfigError(
                    f"dim={self.dim} needs kind='rademacher', per_module=True, two widths",
                    remedy="Try dim=(16, 16).",
                )
        elif not _positive(self.dim):
            raise ConfigError(
                f"dim={self.dim!r} is not a width",
                remedy="Pass a positive integer, for example dim=8192.",
            )

    @property
    def two_sided(self) -> bool:
        return isinstance(self.dim, tuple)

    def bind(
        self, shapes: Mapping[str, Shape], device: torch.device | str = "cpu"
    ) -> BoundProjection:
        """The map for parameters of these (name -> shape), in this order, on this device."""
        return BoundProjection(self, dict(shapes), torch.device(device))


def projection_of(settings: GradientSettings) -> Projection:
    """The map that a run's settings name: two-sided for each layer where `dim` is a pair."""
    return Projection(
        dim=settings.dim,
        seed=settings.seed,
        kind=settings.projection,
        per_module=isinstance(settings.dim, tuple),
    )


class BoundProjection:
    """A projection for given parameters: `state = start(b)`, then `add` or `add_product` once for
    each, `rows = finish(state)`.
    """

    def __init__(
        self, projection: Projection, shapes: dict[str, Shape], device: torch.device
    ) -> None:
        self.projection, self.shapes, self.device = projection, shapes, device
        self._keys = canonical_names(shapes)
        self._cache: dict[str, tuple[Tensor, ...]] = {}
        self._cached_bytes = 0
        self._parts: dict[str, slice] = {}
        at = 0
        for name, shape in shapes.items():
            width = self._part_width(shape)
            start = at if self._concatenated else 0
            self._parts[name] = slice(start, start + width)
            at = start + width
        self.width = at

    @property
    def _concatenated(self) -> bool:
        return self.projection.per_module or self.projection.kind == "identity"

    def _part_width(self, shape: Shape) -> int:
        dim = self.projection.dim
        if dim is None:
            return shape[0] * shape[1]
        return dim[0] * dim[1] if isinstance(dim, tuple) else dim

    def start(self, b: int) -> Tensor:
        """An accumulator for b examples."""
        return torch.zeros(b, self.width, device=self.device)

    def finish(self, state: Tensor) -> Tensor:
        """The rows [b, width], fp32."""
        return state

    def add(self, state: Tensor, name: str, grad: Tensor) -> None:
        """Adds the projection of `grad` [b, *shape of name], fp32."""
        self._check(name, grad)
        out, kind = state[:, self._parts[name]], self.projection.kind
        if kind == "identity":
            out.copy_(grad.flatten(1))
        elif self.projection.two_sided:
            left, right = self.sides(name)
            out.add_((left.t() @ (grad @ right)).flatten(1), alpha=self._scale)
        elif kind == "sketch":
            self._sketch(out, name, grad.flatten(1))
        else:
            self._dense(out, name, grad.flatten(1))

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """[b, width]: the two-sided projection of sum_t left_t right_t^T, whose factors [b, t, .]
        were multiplied by `sides(name)` already.
        """
        return torch.bmm(left.transpose(1, 2), right).flatten(1).mul_(self._scale)

    def add_product(self, state: Tensor, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Adds their `product`, and returns it."""
        made = self.product(left, right)
        state[:, self._parts[name]] += made
        return made

    def sides(self, name: str) -> tuple[Tensor, Tensor]:
        """(left [rows, a], right [columns, b]) of a two-sided projection: signs, exact in any
        dtype; their product gets 1/sqrt(ab).
        """
        assert isinstance(self.projection.dim, tuple)
        kept = self._cache.get(name)
        if kept is None:
            a, b = self.projection.dim
            o, i = self.shapes[name]
            kept = self._keep(
                name, (self._signs(name, "left", o, a), self._signs(name, "right", i, b))
            )
        return kept[0], kept[1]

    @property
    def _scale(self) -> float:
        dim = self.projection.dim
        return 1 / sqrt(dim[0] * dim[1]) if isinstance(dim, tuple) else 1.0

    def _check(self, name: str, grad: Tensor) -> None:
        if tuple(grad.shape[1:]) != self.shapes[name]:
            raise MismatchError(
                f"gradient of {name} has shape {tuple(grad.shape[1:])}, the projection was bound"
                f" for {self.shapes[name]}"
            )

    def _sketch(self, out: Tensor, name: str, flat: Tensor) -> None:
        # scatter_add_ is the fastest on a CPU, where its order is fixed; a GPU adds in any order,
        # so there each bucket collects instead
        add = add_scattered if out.device.type == "cpu" else add_collected
        add(out, flat, *self.sketch_map(name))

    def sketch_map(self, name: str) -> tuple[Tensor, Tensor]:
        """(buckets int64 [blocks, d], signs [blocks, d]): flat coordinate k*d + j goes to bucket
        buckets[k, j] with signs[k, j].
        """
        kept = self._cache.get(name)
        if kept is None:
            d = self._parts[name].stop - self._parts[name].start
            o, i = self.shapes[name]
            blocks = -(-o * i // d)
            raw = self._philox(name, "sketch").random_raw(blocks * d).reshape(blocks, d)
            buckets = np.argsort(raw >> np.uint64(1), axis=1, kind="stable")
            signs = (raw & np.uint64(1)).astype(np.float32) * 2 - 1
            kept = self._keep(name, (torch.from_numpy(buckets), torch.from_numpy(signs)))
        return kept[0], kept[1]

    def _dense(self, out: Tensor, name: str, flat: Tensor) -> None:
        d = out.shape[1]
        step = max(1, DENSE_BLOCK // d)
        for k, start in enumerate(range(0, flat.shape[1], step)):
            rows = min(step, flat.shape[1] - start)
            kept = self._cache.get(f"{name}#{k}")
            if kept is None:
                kept = self._keep(f"{name}#{k}", (self._signs(name, f"dense{k}", rows, d),))
            out.addmm_(flat[:, start : start + rows], kept[0], alpha=1 / sqrt(d))

    def _signs(self, name: str, part: str, rows: int, columns: int) -> Tensor:
        n = rows * columns
        raw = self._philox(name, part).random_raw(-(-n // 64)).astype("<u8")
        bits = np.unpackbits(raw.view(np.uint8), count=n, bitorder="little").reshape(rows, columns)
        return torch.from_numpy(bits.astype(np.float32) * 2 - 1)

    def _philox(self, name: str, part: str) -> np.random.Philox:
        p = self.projection
        recipe = repr((p.seed, p.kind, p.dim, self._keys[name], self.shapes[name], part))
        return np.random.Philox(
            key=int.from_bytes(hashlib.sha256(recipe.encode()).digest()[:16], "little")
        )

    def _keep(self, key: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tensors = tuple(t.to(self.device) for t in tensors)
        size = sum(t.numel() * t.element_size() for t in tensors)
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cache[key] = tensors
            self._cached_bytes += size
        return tensors


def add_scattered(out: Tensor, flat: Tensor, buckets: Tensor, signs: Tensor) -> None:
    """out [b, d] += the count-sketch of flat [b, p], coordinate by coordinate."""
    p = flat.shape[1]
    out.scatter_add_(1, buckets.view(-1)[:p].expand(len(flat), p), flat * signs.view(-1)[:p])


def add_collected(out: Tensor, flat: Tensor, buckets: Tensor, signs: Tensor) -> None:
    """The same sum, bucket by bucket: every block of d coordinates is permuted, then the blocks are
    added.
    """
    blocks, d = buckets.shape
    flat = torch.nn.functional.pad(flat, (0, blocks * d - flat.shape[1])) * signs.view(-1)
    out += (
        flat.view(-1, blocks, d).gather(2, buckets.argsort(1).expand(len(flat), blocks, d)).sum(1)
    )


_INNER = r"(?<=\.)(?:base_layer|_orig_mod|_checkpoint_wrapped_module)(?:\.|$)"
_WRAPPERS = re.compile(rf"^(?:module\.|_orig_mod\.)*(?:base_model\.model\.)?|{_INNER}")
_ADAPTER = re.compile(r"(lora_[AB])\.[^.]+$")


def canonical_names(names: Mapping[str, object]) -> dict[str, str]:
    """Module names without what wrappers (peft, torch.compile, DistributedDataParallel) put in; as
    they are where two would become one.
    """
    short = {
        n: _ADAPTER.sub(r"\1", _WRAPPERS.sub("", n.removesuffix(".weight"))).rstrip(".")
        for n in names
    }
    return (
        short
        if len(set(short.values())) == len(short)
        else {n: n.removesuffix(".weight") for n in names}
    )


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(
            f"{name}={value!r} is not a whole number",
            remedy="Pass an int, for example dim=8192, seed=0.",
        )
    return operator.index(value)


def _positive(value: object) -> bool:
    return isinstance(value, int) and value > 0
