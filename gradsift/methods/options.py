"""What each option of a method means and takes, as a person reads it: the words of `gradsift
methods`.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

# Option, or METHOD.option where a method means something of its own, -> its meaning. A method of
# another package may say it itself: field(metadata={"meaning": ...}).
MEANINGS: Mapping[str, str] = {
    "preset": "which published form sets the options that are not given",
    "transform": "gradients of the pool as Adam steps, or plain",
    "checkpoints": "of the warm-up: the last one, or the mean over all",
    "backend": "which influence is read: a name of docs/scores.md",
    "aggregate": "who takes turns: target rows, target groups, or nobody (each row's best counts)",
    "cosine": "cluster rows at length 1",
    "iterations": "most steps of k-means",
    "restarts": "how often k-means starts; the best clustering counts",
    "clusters": "gradient clusters",
    "ridge": "added to the diagonal of each solve of the matching",
    "taken": "a target row whose best row is taken loses the turn, or takes its next one",
    "tol": "share of the mean gradient that may stay unexplained when matching ends",
    "bids.standardise": "bring each target row's influence to mean 0 and deviation 1",
    "contrast.per": "what counts: nats of the whole answer, per square root of tokens, per token",
    "dsir.draw": "draw rows by weight, or take the heaviest",
    "dsir.temperature": "divides the log weights before the draw; above 1 nearer to uniform",
    "g2is.core": "walk toward each group's mean gradient, or along principal directions",
    "g2is.keep": "share of the target's variance that the directions hold (with core=principal)",
    "g2is.neighbours": "edges of each row in the graph; 0 = no graph",
    "g2is.consistency": "share of its alignment with the direction that a walk must keep",
    "g2is.centred": "take the target's mean out before its directions are found",
    "g2is.orient": "point directions the way of the target's mean",
    "g2is.redistribute": "give seats that a walk cannot fill to the others",
    "g2is.remove_mean": "take the pool's mean row out of the pool",
    "g2is.exact": "find neighbours by all pairs; false = faster, nearly the same",
    "gdig.dim": "project rows to so many numbers before clustering; 0 = as stored",
    "gdig.fill": "too few rows help all: lower the share that must be helped, or give fewer rows",
    "gist.rank": "directions of the target's subspace, at most",
    "gist.variance": "instead of rank: the fewest directions that hold this share",
    "gist.energy": "weigh each cosine by the row's share inside the subspace",
    "gradmatch.refill": "how to complete a budget that matching left open",
    "gradmatch.normalise": "bring gradients to length 1 first",
    "ifd.ratio": "of the losses a token, or of the perplexities",
    "ifd.most": "rows at this ratio or more come last",
    "ifd.fill": "too few rows below `most`: go on with the others, or give fewer rows",
    "kcenter.signal": "what distance is measured between",
    "length.order": "which end comes first",
    "perplexity.band": "rows of lowest, middle or highest loss",
    "selffilter.neighbours": "nearest rows that a pick makes less wanted",
    "selffilter.gamma": "how much less",
    "selffilter.clamp": "set negative difficulty to 0",
    "selffilter.features": "fields of the rows to learn from, with commas; none = embeddings",
    "tagcos.on_repeat": "a row that is matched twice: skip it, or end the match",
    "tagcos.refill": "how a cluster goes on when its match ends early",
    "tagcos.fill": "meet the budget with the rows nearest to the centroid, or give fewer rows",
    "tagcos.weights": "write the matching's coefficients as training weights",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option as a line of a table: what to write after -o, its default, the values it takes,
    its meaning.
    """

    name: str
    default: str
    values: str
    meaning: str


def options(name: str, cls: type[Any]) -> list[Option]:
    """The options of a method, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    preset = "preset" in hints
    found = []
    for field in dataclasses.fields(cls):
        own = MEANINGS.get(f"{name}.{field.name}", MEANINGS.get(field.name, ""))
        meaning = field.metadata.get("meaning", own)
        default = _said(field.default)
        if field.default is None and preset and field.name != "variance":
            default = "by preset"
        found.append(Option(field.name, default, values(hints[field.name]), meaning))
    return found


def _said(value: Any) -> str:
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def values(hint: Any) -> str:
    """What may be given for a type: names, or a kind of number with its bounds."""
    if get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        bounds = [_bound(limit) for limit in limits]
        return " ".join([values(kind), *filter(None, bounds)])
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(values(part) for part in get_args(hint) if part is not type(None))
    return {bool: "true | false", int: "whole number", float: "number", str: "text"}.get(hint, "")


def _bound(limit: Any) -> str:
    parts = [limit, *getattr(limit, "metadata", ())]
    signs = {"gt": "over", "ge": "from", "le": "to", "lt": "under"}
    found = (
        f"{word} {getattr(part, sign):g}"
        for sign, word in signs.items()
        for part in parts
        if getattr(part, sign, None) is not None
    )
    return " ".join(dict.fromkeys(found))
