"""Contrast: rows that become easier for a model once it was trained on the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gradsift import rules
from gradsift.methods.words import answer, count, figure
from gradsift.types import Facts, Signal, Signals, Subset

LOSS, TUNED = Signal("loss"), Signal("tuned")


@dataclass(frozen=True)
class Contrast:
    """The rows whose loss falls most, in nats, when the base model is fine-tuned on a group of
    target rows.

    Source: arXiv 1809.00068 (WMT 2018), where the model tuned on trusted data minus the one before
    scores noisy data; before it the difference of cross-entropies under two models of Moore and
    Lewis (ACL 2010). It is influence with the sides exchanged: to first order, what a row gains
    from steps on the target is what the target would gain from the same steps on the row (TracIn,
    arXiv 2002.08484), but here all parameters move, further than first order holds, and nothing is
    projected. Positive = training on the target helps the row. Cost: one short training on each
    target group, and one forward pass over the pool for it and for the base model: no gradients of
    rows.

    per: "row" = nats of the whole answer (a long answer that gains a little everywhere counts);
    "sqrt" = over the square root of its tokens; "token" = nats per supervised token. aggregate:
    "groups" = the target groups take turns; "max" = a row's best group counts. How the model is
    trained on the target is the section [tuning] of the settings.

    Differences from the paper: there nats per token, here `per=row` by default, since a training
    step weighs all tokens alike; the paper schedules training by the score, here the best rows are
    taken. Details of the paper are from memory.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "required"
    per: Literal["row", "sqrt", "token"] = "row"
    aggregate: Literal["groups", "max"] = "groups"

    def needs(self) -> frozenset[Signal]:
        return frozenset({LOSS, TUNED})

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        import torch

        from gradsift.methods.reading import by_turns, finite

        groups = list(dict.fromkeys(signals.target_groups))
        tuned, loss = finite(signals, TUNED).double(), finite(signals, LOSS).double()
        if tuned.shape != (signals.n, len(groups)) or signals.tokens is None:
            raise ValueError(
                f"tuned losses [n, groups] of shape {tuple(tuned.shape)} do not fit {signals.n}"
                f" rows and {len(groups)} groups"
            )
        power = {"row": 1.0, "sqrt": 0.5, "token": 0.0}[self.per]
        fall = (loss[:, None] - tuned) * torch.as_tensor(signals.tokens.astype(np.float64))[
            :, None
        ] ** power
        best, which = fall.max(dim=1)
        score, why = best.numpy(), np.array([groups[g] for g in which.tolist()], dtype=object)
        if self.aggregate == "max":
            indices = rules.topk.top(best, budget).numpy()
            return Subset(
                indices=indices, gains=score[indices], notes={"score": score, "nearest_group": why}
            )
        indices, gains, turn = by_turns(fall, budget)
        why[indices] = [groups[g] for g in turn]
        return Subset(indices=indices, gains=gains, notes={"score": score, "nearest_group": why})

    def why(self, facts: Facts) -> str:
        fall, group = facts.value or 0.0, facts.group
        steps, rows = facts.tuned.get(str(group), (0, 0))
        nats = f"{figure(abs(fall))} nats {'likelier' if fall >= 0 else 'less likely'}"
        each = {"row": "", "sqrt": " per square root of its tokens", "token": " per token"}
        after = (
            f"after {count(steps, 'step')} on your {count(rows, 'row')}"
            if steps
            else "after training on your rows"
        )
        of = f" of {group}" if group is not None else ""
        return f"its {answer(facts.tokens)} became {nats}{each[self.per]} {after}{of}"
