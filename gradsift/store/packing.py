"""Rows as a store keeps them: unit rows in fp16 or int8, their lengths, quarantine codes; and ids
as one string.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

StoreDtype = Literal["float16", "int8"]
ZERO, NON_FINITE, NO_TOKEN, OUT_OF_MEMORY, ABSURD = 1, 2, 3, 4, 5
QUARANTINE: Mapping[int, str] = {
    ZERO: "zero gradient",
    NON_FINITE: "non-finite gradient or loss",
    NO_TOKEN: "no supervised token",
    OUT_OF_MEMORY: "out of memory",
    ABSURD: "gradient norm beyond fp32",
}
# rows normalised at a time: the fp32 copies stay in the cache instead of doubling the memory of a
# shard
_BLOCK = 64


class Ids(Sequence[str]):
    """n ids as one UTF-8 string and offsets: 8 bytes each besides their text, decoded when read."""

    def __init__(self, text: np.ndarray, offsets: np.ndarray) -> None:
        self._text, self._offsets = text, offsets

    @classmethod
    def of(cls, ids: Iterable[str]) -> Ids:
        parts = [id.encode("utf-8", "surrogatepass") for id in ids]
        offsets = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return cls(np.frombuffer(bytearray(b"".join(parts)), dtype=np.uint8), offsets)

    def tensors(self) -> dict[str, Tensor]:
        return {"text": torch.from_numpy(self._text), "offsets": torch.from_numpy(self._offsets)}

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        return (
            self._text[self._offsets[at] : self._offsets[at + 1]]
            .tobytes()
            .decode("utf-8", "surrogatepass")
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(
            mine == theirs for mine, theirs in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ids({len(self):,})"


def pack(
    rows: Tensor,
    *,
    norms: Tensor,
    losses: Tensor,
    tokens: Tensor,
    codes: Tensor | None = None,
    dtype: StoreDtype = "float16",
) -> dict[str, Tensor]:
    """The tensors of a shard. rows [r, d] un-normalised -> unit rows, scales, columns and
    quarantine codes, on the CPU.

    fp16 rounds each entry of a unit row by at most 2^-11 of itself (2^-25 for entries under 6e-5).
    int8 keeps round(entry / step) with step = largest entry / 127 of the row: an error of at most
    step / 2 per entry, a cosine of about 1 - d * step^2 / 24 with the row. Quarantined rows become
    zeros; a norm or loss that is not finite is stored as 0 beside its code.
    """
    count, dim = rows.shape
    scales, found = torch.empty(count), torch.zeros(count, dtype=torch.uint8)
    out = {
        "rows": torch.empty((count, dim), dtype=torch.float16 if dtype == "float16" else torch.int8)
    }
    if dtype == "int8":
        out["steps"] = torch.zeros(count)
    for a in range(0, count, _BLOCK):
        here = slice(a, a + _BLOCK)
        unit, scale, code = _unit(rows[here])
        scales[here], found[here] = scale.cpu(), code.cpu()
        if dtype == "int8":
            steps = unit.abs().amax(dim=1) / 127
            out["steps"][here] = steps.cpu()
            unit = (unit / torch.where(steps > 0, steps, 1.0)[:, None]).round_()
        out["rows"][here] = unit.to(device="cpu", dtype=out["rows"].dtype)
    norms, losses = norms.detach().float().cpu(), losses.detach().float().cpu()
    tokens = tokens.detach().to(device="cpu", dtype=torch.int32)
    # Later lines win: the reason nearest to the cause is the one told.
    found[(norms == 0) & (found == 0)] = ZERO
    found[norms == torch.inf] = ABSURD
    found[norms.isnan() | ~losses.isfinite()] = NON_FINITE
    found[tokens == 0] = NO_TOKEN
    if codes is not None:
        given = codes.to(device="cpu", dtype=torch.uint8)
        found = torch.where(given != 0, given, found)
    bad = found != 0
    for tensor in (scales, *out.values()):
        tensor[bad] = 0
    clean = {"norms": norms.nan_to_num(0, 0, 0), "losses": losses.nan_to_num(0, 0, 0)}
    return {**out, **clean, "scales": scales, "tokens": tokens, "codes": found}


def _unit(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows fp32 [r, d], scales fp32 [r], codes uint8 [r] (0, ZERO, NON_FINITE, ABSURD)."""
    rows = rows.detach().float()
    scales = torch.linalg.vector_norm(rows, dim=1)
    codes = torch.zeros(len(rows), dtype=torch.uint8, device=rows.device)
    # Outside this range the squares of fp32 entries under- or overflow; those few rows are measured
    # in fp64.
    odd = ~((scales > 1e-15) & (scales < 1e18))
    if not bool(odd.any()):
        return rows / scales[:, None], scales, codes
    wide = rows[odd].double()
    lengths = torch.linalg.vector_norm(wide, dim=1)
    finite = wide.isfinite().all(dim=1)
    limits = torch.finfo(torch.float32)
    code = torch.where(lengths < limits.tiny, ZERO, 0)
    code = torch.where(lengths > limits.max, ABSURD, code)
    code = torch.where(finite, code, NON_FINITE).to(torch.uint8)
    good = (code == 0)[:, None]
    units = rows / torch.where(odd, 1.0, scales)[:, None]
    units[odd] = torch.where(
        good, wide / torch.where(good[:, 0], lengths, 1.0)[:, None], 0.0
    ).float()
    scales[odd] = torch.where(good[:, 0], lengths, 0.0).float()
    codes[odd] = code
    return units, scales, codes
