"""What a fit of the curvature leaves: factors, eigenbases and eigenvalues, on disk and as a damped
inverse.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gradsift.errors import ConfigError, MismatchError
from gradsift.signals.curvature.kfac import (
    HEURISTIC_SCALE,
    Damped,
    Eigen,
    Factored,
    Inverse,
    eigen_inverse,
    pi_inverse,
)
from gradsift.store.canonical import canonical_json
from gradsift.store.tensors import TensorFile, write_tensors

log = logging.getLogger("gradsift")

SCHEMA = 1


@dataclass(frozen=True)
class Curvature:
    """Fitted curvature of the tracked parameters.

    `spec`: the settings, counts and layers (plain JSON). `tensors`, fp32: "A/<group>" [i, i] and
    "G/<name>" [o, o], the factors; "UA/", "UG/" their eigenvectors as columns and "eA/", "eG/"
    their eigenvalues; "values/<name>" [r, c], the corrected eigenvalues in the parameter's own
    layout, where they were fitted. Layers that read the same inputs share one A, under the group's
    name.
    """

    spec: dict[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.spec["layers"])

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {
            name: (layer["shape"][0], layer["shape"][1])
            for name, layer in self.spec["layers"].items()
        }

    @property
    def corrected(self) -> bool:
        return bool(self.spec["correct"])

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(left [r, r], right [c, c]) of the parameter's layout: (G, A) for nn.Linear. K-FAC is
        their Kronecker product, gradients flattened by row.
        """
        return self._sides(name, "A", "G")

    def eigen(self, name: str, *, corrected: bool | None = None) -> Eigen:
        """The parameter's eigenbasis and eigenvalues. `corrected`: EK-FAC's (None: where they were
        fitted) or K-FAC's products.
        """
        if corrected and not self.corrected:
            raise ConfigError(
                "this curvature has no corrected eigenvalues",
                remedy="Fit with correct=True, or pass corrected=False.",
            )
        left, right = self._sides(name, "UA", "UG")
        if self.corrected and corrected is not False:
            return Eigen(left, right, self.tensors[f"values/{name}"])
        values = self._sides(name, "eA", "eG")
        return Eigen(left, right, torch.outer(*values))

    def _sides(self, name: str, inputs: str, outputs: str) -> tuple[Tensor, Tensor]:
        layer = self.spec["layers"][name]
        a, g = self.tensors[f"{inputs}/{layer['group']}"], self.tensors[f"{outputs}/{name}"]
        return (a, g) if layer["transposed"] else (g, a)

    def inverse(
        self,
        damping: float = HEURISTIC_SCALE,
        style: Literal["eigen", "pi"] = "eigen",
        *,
        absolute: bool = False,
        corrected: bool | None = None,
    ) -> Inverse:
        """The damped inverse. `damping`: in units of each parameter's mean eigenvalue, or the very
        number when `absolute`.

        style "eigen": (H + lambda I)^-1 in the Kronecker eigenbasis, with EK-FAC's corrected
        eigenvalues where they were fitted (`corrected` False: K-FAC's, the released G-DIG code's
        `--ekfac 1`). style "pi": factored damping of K-FAC (the released code's default, 0.5
        absolute). `Inverse.damped` lists damping / mean eigenvalue per parameter. Raises
        ConfigError, DataError (see `eigen_inverse`, `pi_inverse`).
        """
        if style not in ("eigen", "pi"):
            raise ConfigError(f"damping style is {style!r}", remedy="Known: eigen, pi.")
        if style == "pi" and corrected:
            raise ConfigError(
                "factored damping has no place for corrected eigenvalues",
                remedy="Use style='eigen'.",
            )
        parts: dict[str, Eigen | Factored] = {}
        damped: list[Damped] = []
        for name in self.names:
            if style == "eigen":
                parts[name], line = eigen_inverse(
                    name, self.eigen(name, corrected=corrected), damping, absolute=absolute
                )
            else:
                parts[name], line = pi_inverse(
                    name, *self.factors(name), damping, absolute=absolute
                )
            damped.append(line)
        inverse = Inverse(parts, damped)
        ratios = [line.ratio for line in damped]
        log.info(
            "damping / mean eigenvalue: %.3g to %.3g over %d parameters",
            min(ratios),
            max(ratios),
            len(ratios),
        )
        return inverse

    def save(self, path: Path) -> str:
        """Writes one safetensors file, atomically; returns its digest."""
        meta = {
            "kind": "curvature",
            "schema": str(SCHEMA),
            "spec": canonical_json(self.spec).decode(),
        }
        return write_tensors(Path(path), dict(self.tensors), meta)

    @classmethod
    def load(cls, path: Path) -> Curvature:
        """What `save` wrote, verified and read into memory. Raises IntegrityError, MismatchError
        for a newer schema.
        """
        with TensorFile(Path(path)) as file:
            file.verify()
            file.expect({"kind": "curvature"})
            if file.meta.get("schema") != str(SCHEMA):
                found = file.meta.get("schema")
                raise MismatchError(
                    f"has schema {found}, this version reads {SCHEMA}",
                    where=path,
                    remedy="Update gradsift.",
                )
            return cls(
                json.loads(file.meta["spec"]),
                {name: file.tensor(name).clone() for name in file.entries},
            )
