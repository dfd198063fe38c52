"""What a comparison is asked for: arms, controls, measures, ways of equal training. Checked before
anything heavy is loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradsift import methods
from gradsift.commands import budget as budgets
from gradsift.commands.preflight import (
    Files,
    Inputs,
    check_lines,
    check_reading,
    check_run,
    check_target,
)
from gradsift.errors import ConfigError, UnknownName, UserError

if TYPE_CHECKING:
    from gradsift.types import Selector

CONTROLS = {
    "random": "rows drawn at random, anew for every seed",
    "length": "the longest answers",
    "length-matched": (
        "random rows whose answers are as long as those of the first method's choice, drawn anew"
        " for every seed"
    ),
    "perplexity": "the method of that name",
    "rds": "pooled hidden states, where there is a target",
    "full": (
        "rows of the whole pool in random order, for as many steps as the others: more different"
        " rows, seen less often"
    ),
}
CONTROL = "random"
MEASURES: Mapping[str, str] = {
    "loss": "nats per supervised token, lower is better",
    "exact": "share of rows whose answer equals the row's `answer`",
    "bleu": "mean over rows of sentence BLEU (sacrebleu), 0 to 100",
    "chrf": "mean over rows of chrF (sacrebleu), 0 to 100",
}


@dataclass(frozen=True)
class Request:
    """A comparison as asked for. `methods`: arm as written -> (method, selector); `controls`,
    `measures`: names; `ways`: what is equal.
    """

    budget: budgets.Budget
    methods: dict[str, tuple[str, Selector]]
    controls: list[str]
    measures: tuple[str, ...]
    ways: tuple[str, ...]


def check_comparison(
    arms: Sequence[str],
    inputs: Inputs,
    *,
    budget: str | int | float,
    test: Files,
    seeds: int = 5,
    level: float = 0.95,
    controls: Sequence[str] | None = None,
    equal: Sequence[str] | str = ("steps", "tokens"),
    measure: Sequence[str] = (),
) -> Request:
    """Checks the arguments of `gradsift.compare`, with the errors that it would end with.

    Raises:
        UserError: a wrong name, option, budget, setting or combination, a file that is not there.
        DataError: a file whose first bytes cannot be read as rows.
        IntegrityError: the run's settings file is damaged.
    """
    wanted, targeted = budgets.parse(budget), bool(inputs.target_files)
    specs = parse(arms, targeted)
    request = Request(
        wanted,
        specs,
        controls_of(controls, targeted, specs),
        check_measures(measure),
        ways_of(equal),
    )
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: nothing to train", remedy="Give at least 1, better 5.")
    if not 0 < level < 1:
        raise ConfigError(
            f"level {level}: no share of the draws",
            remedy="Give a number between 0 and 1, such as 0.95.",
        )
    config, texts = check_run(inputs)
    check_lines(wanted, texts, inputs, config)
    check_reading(test, config, "target")
    return request


def parse(specs: Sequence[str], targeted: bool) -> dict[str, tuple[str, Selector]]:
    """spec -> (method, selector), each spec once, without random, which is always among the
    controls. Raises ConfigError, UserError, UnknownName.
    """
    found = {spec: _parse(spec) for spec in dict.fromkeys(specs) if spec != CONTROL}
    for spec, (_, selector) in found.items():
        check_target(spec, selector, ("given",) if targeted and selector.target != "none" else ())
    if not found:
        raise UserError(
            "no method was named to beat random, which is always there",
            remedy="Name at least one, such as less.",
        )
    return found


def _parse(spec: str) -> tuple[str, Selector]:
    name, _, text = spec.partition(":")
    pairs = filter(None, text.split(","))
    options = methods.options_from(
        pairs, before=f"{name}:", remedy="Write it as less:aggregate=max,preset=paper."
    )
    return name, methods.make(name, options)


def controls_of(names: Sequence[str] | None, targeted: bool, specs: Mapping[str, Any]) -> list[str]:
    """The controls beside `specs`: those named and random, or all that fit. Raises UnknownName,
    UserError.
    """
    for name in names or ():
        if name not in CONTROLS:
            raise UnknownName("control", name, CONTROLS)
    if names is not None and "rds" in names and not targeted:
        raise UserError(
            "the control rds selects toward a target and none was given",
            remedy="Add --target FILE, or drop it.",
        )
    wanted = (
        [name for name in CONTROLS if targeted or name != "rds"]
        if names is None
        else [CONTROL, *names]
    )
    return [name for name in dict.fromkeys(wanted) if name not in specs]


def check_measures(names: Sequence[str]) -> tuple[str, ...]:
    """The names in the order of MEASURES. Raises UnknownName, and UserError where sacrebleu is
    needed and missing.
    """
    for name in names:
        if name not in MEASURES:
            raise UnknownName("measure", name, MEASURES)
    if {"bleu", "chrf"} & set(names) and importlib.util.find_spec("sacrebleu") is None:
        raise UserError(
            "BLEU and chrF need sacrebleu, which is not installed",
            remedy='Run: pip install "gradsift[measure]"',
        )
    return tuple(name for name in MEASURES if name in names)


def ways_of(equal: Sequence[str] | str) -> tuple[str, ...]:
    """The ways of equal training, each once. Raises UnknownName."""
    found = tuple(dict.fromkeys([equal] if isinstance(equal, str) else equal))
    for name in found or ("",):
        if name not in ("steps", "tokens"):
            raise UnknownName("way of equal training", name, ["steps", "tokens"])
    return found
