"""IFD: rows whose instruction helps the model little in writing the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import PositiveFloat

from gradsift import rules
from gradsift.methods.words import answer, figure
from gradsift.types import Facts, Signal, Signals, Subset, counted

IFD = Signal("ifd")
HIGHEST = 1e6  # difficulty of an answer without any loss alone


@dataclass(frozen=True)
class Ifd:
    """The rows of highest instruction-following difficulty below 1: the loss of the answer after
    its instruction, over its loss alone.

    Source: arXiv 2308.12032 (equations 3 to 5) and Superfiltering (arXiv 2402.00530): rows at 1 or
    more are discarded (the instruction does not help), of the rest the highest are kept. Cost: two
    forward passes over the pool's answers under the base model, one of them with the prompt. Where
    fewer rows than the budget lie below 1, the others follow from the lowest on (`fill=none`: fewer
    rows come back, and an error where there is none).

    ratio: "loss" = of the mean losses a token (2308.12032 and its code, Cherry); "perplexity" = of
    their exponentials (Superfiltering), which orders rows by the difference of the losses.

    The answer alone follows the token that the tokenizer puts before a text (BOS). Where it puts
    none, the answer's first token is read and not scored, as the released scripts have it with such
    a tokenizer: the two means are then of sets that differ by that token.

    Differences from the paper, from both: there a model fine-tuned on a few of the rows scores
    (Superfiltering: GPT-2) a prompt of its own wording; here the base model does, after the model's
    own template, whose end of turn is part of the answer.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "none"
    ratio: Literal["loss", "perplexity"] = "loss"
    most: PositiveFloat = 1.0
    fill: Literal["rest", "none"] = "rest"

    def needs(self) -> frozenset[Signal]:
        return frozenset({IFD})

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        from gradsift.methods.reading import finite

        given, alone = finite(signals, IFD).double().numpy().T
        if self.ratio == "loss":  # an answer that the model knows by heart is helped by nothing
            value = np.divide(given, alone, out=np.full_like(given, HIGHEST), where=alone > 0)
        else:
            value = np.exp(given - alone)
        value = np.minimum(value, HIGHEST)
        fine = value < self.most
        if self.fill == "none" and not fine.any():
            raise ValueError(
                f"no row has a difficulty below {self.most:g} (the lowest is {value.min():.3g});"
                " fill=rest takes the lowest"
            )
        # Rows to be discarded rank after all others, the least bad first.
        rank = np.where(fine, value - value.min(), -1 - (value - value.min()))
        seats = budget if self.fill == "rest" else min(budget, int(fine.sum()))
        indices = rules.topk.top(rank, seats).numpy()
        notes: dict[str, Any] = {"score": value, "below_most": int(fine.sum())}
        if fine.sum() < seats:
            notes["note"] = (
                f"{counted(int(fine.sum()), 'row has', 'rows have')} a difficulty below"
                f" {self.most:g}; the budget was"
                " filled with rows above"
            )
        return Subset(indices, gains=np.where(fine, value, -value)[indices], notes=notes)

    def why(self, facts: Facts) -> str:
        ratio = figure(facts.score or 0.0)
        return (
            f"with its instruction the {self.ratio} of its {answer(facts.tokens)} is {ratio} times"
            " that of the answer alone"
        )
