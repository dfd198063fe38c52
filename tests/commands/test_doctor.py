"""The doctor: rows alone against rows in batches on real models, what it recommends, and what it
says when nothing will do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from gradsift.cli.app import app
from gradsift.commands import doctor as room
from gradsift.commands.doctor import EQUAL, Attempt, doctor, recommend
from gradsift.errors import ConfigError, DataError, UserError
from tests.conftest import rows, write_rows
from tests.model.small_models import mixtral, tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)
SETTINGS: dict[str, Any] = {
    "encode": {"max_length": 64},
    "gradients": {"dim": 64, "token_budget": 128},
    "machine": {"threads": 1},
}


@pytest.fixture(scope="module")
def found(model_folder: Path, pool_file: Path) -> room.Diagnosis:
    return doctor(str(model_folder), pool_file, rows=12, settings=SETTINGS)


def test_float32_rows_are_the_same_alone_and_in_batches(found: room.Diagnosis) -> None:
    assert [(t.dtype, t.attention) for t in found.attempts] == [
        (d, a) for d in ("float32", "bfloat16") for a in ("eager", "sdpa")
    ]
    for attempt in found.attempts[:2]:
        assert (
            attempt.equal
            and attempt.problem is None
            and attempt.worst is not None
            and attempt.worst > 0.99999
        )
        assert (
            attempt.mean is not None
            and attempt.mean >= attempt.worst
            and attempt.reference is not None
            and attempt.reference > 0.99999
        )
    for attempt in found.attempts[2:]:
        assert (
            attempt.worst is not None
            and attempt.worst > 0.9
            and attempt.reference is not None
            and 0.9 < attempt.reference < 0.999999
        )
    assert (
        found.recommended == found.attempts[1] and found.flags == "--dtype float32 --attention sdpa"
    )
    assert 1 < found.batches < found.rows == 12 and found.tokens[0] < found.tokens[1]


def test_it_reports_the_machine_the_template_and_the_coverage(found: room.Diagnosis) -> None:
    assert (
        found.machine["threads"] == 1
        and found.machine["memory_free"] > 0
        and found.machine["disk_free"] > 0
        and found.machine["torch"]
    )
    assert found.template == "found in the tokenizer"
    assert (
        found.coverage["share"] == 1
        and found.coverage["modules"] == 16
        and found.coverage["experts"] == ()
    )
    text = "\n".join(found.lines())
    assert (
        "--dtype float32 --attention sdpa" in text
        and "experts    none" in text
        and "MALLOC" not in text.split("allocator")[0]
    )
    told = json.loads(json.dumps(found.as_dict()))
    assert told["recommended"] == {"attention": "sdpa", "dtype": "float32"} and [
        t["equal"] for t in told["attempts"]
    ][:2] == [True, True]


def test_the_measured_cosine_is_that_of_rows_that_differ(
    model_folder: Path, pool_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose rows depend on their batch is found out, and nothing is recommended."""
    real = room.timed_rows

    def leaning(
        model: Any, encoded: Any, projection: Any, modules: Any, budget: int
    ) -> tuple[Tensor, float]:
        taken, seconds = real(model, encoded, projection, modules, budget)
        return (
            (taken, seconds)
            if budget == 1
            else (
                taken + 0.1 * taken.norm(dim=1, keepdim=True).mean() * taken.roll(1, 0).sign(),
                seconds,
            )
        )

    monkeypatch.setattr(room, "timed_rows", leaning)
    found = doctor(str(model_folder), pool_file, rows=4, dtypes=["float32"], settings=SETTINGS)
    assert (
        found.recommended is None
        and found.flags is None
        and not any(t.equal for t in found.attempts)
    )
    assert "token_budget = 1" in found.lines()[-1] and any(
        str(found.attempts[0].row) in note for note in found.notes
    )


def test_of_equal_attempts_the_first_format_and_the_faster_attention_win() -> None:
    equal: dict[str, Any] = {"worst": 1.0, "mean": 1.0}
    attempts = [
        Attempt("eager", "float32", worst=EQUAL - 1e-6),
        Attempt("eager", "bfloat16", **equal),
        Attempt("sdpa", "bfloat16", **equal),
    ]
    assert recommend(attempts, ["float32", "bfloat16"]) is attempts[2]
    assert recommend(
        [*attempts, Attempt("eager", "float32", **equal)], ["float32", "bfloat16"]
    ) == Attempt("eager", "float32", **equal)
    assert (
        recommend(
            [Attempt("sdpa", "float32", problem="does not fit in memory", **equal)], ["float32"]
        )
        is None
    )


def test_an_attention_that_is_not_there_is_that_attempts_problem(
    model_folder: Path, pool_file: Path
) -> None:
    found = doctor(
        str(model_folder),
        pool_file,
        rows=2,
        attentions=["nonesuch", "eager"],
        dtypes=["float32"],
        settings=SETTINGS,
    )
    assert (
        found.attempts[0].problem
        and not found.attempts[0].equal
        and found.recommended == found.attempts[1]
    )
    assert "nonesuch" in "\n".join(found.lines())
    with pytest.raises(ConfigError, match="no setting could be measured"):
        doctor(
            str(model_folder),
            pool_file,
            rows=2,
            attentions=["nonesuch"],
            dtypes=["float32"],
            settings=SETTINGS,
        )


def test_a_mixture_of_experts_is_reported(pool_file: Path, tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    made = tokenizer()
    made.save_pretrained(tmp_path)  # without a template
    found = doctor(
        str(tmp_path),
        pool_file,
        rows=4,
        attentions=["eager"],
        dtypes=["float32"],
        settings=SETTINGS,
    )
    assert len(found.coverage["experts"]) == 2 and any(
        "mixtures of experts" in note for note in found.notes
    )
    assert found.template.startswith("none in the tokenizer")


def test_what_it_cannot_work_with(model_folder: Path, pool_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Two rows"):
        doctor(str(model_folder), pool_file, rows=1)
    with pytest.raises(UserError, match="no such model folder"):
        doctor("./nowhere", pool_file)
    with pytest.raises(DataError, match="two are needed"):
        doctor(str(model_folder), write_rows(tmp_path / "one.jsonl", rows(1)), settings=SETTINGS)


def test_the_command_prints_flags_and_ends_with_3_where_none_is_equal(
    model_folder: Path, pool_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "doctor",
        "--model",
        str(model_folder),
        "--pool",
        str(pool_file),
        "--rows",
        "4",
        "--dtype",
        "float32",
        "--threads",
        "1",
        "-q",
    ]
    good = CliRunner().invoke(app, [*command, "--json"])
    assert (
        good.exit_code == 0
        and json.loads(good.stdout)["flags"] == "--dtype float32 --attention sdpa"
    )
    monkeypatch.setattr(room, "EQUAL", 1.1)
    bad = CliRunner().invoke(app, command)
    assert bad.exit_code == 3 and "none keeps rows equal" in bad.stdout
