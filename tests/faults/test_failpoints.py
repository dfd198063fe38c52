"""A crash just before and just after every rename and every sync of the package: nothing is lost,
and the same commands end as if left alone.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradsift.store.atomic import TEMP
from gradsift.store.run import Run
from tests.faults import failpoints
from tests.faults.forks import Server
from tests.faults.killed import digests, finished, prepare, strays

pytestmark = pytest.mark.slow

# Together they come by every place that writes into a run; further methods write at the same ones.
COMMANDS = {
    "less": ["select", "less"],
    "bm25": ["select", "bm25"],
    "gdig": ["select", "gdig"],
    "contrast": ["select", "contrast"],
    "perplexity": ["select", "perplexity"],
    "features": ["select", "selffilter", "-o", "features=length"],
    "score": ["score", "--backend", "less"],
    "compare": ["compare", "length"],
}
TARGETED = ("less", "bm25", "gdig", "contrast", "score")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server("tests.faults.failpoints")
    yield found
    found.close()


def until_it_ends(server: Server, record: Path, watch: Path, ends: int = 0, **order: Any) -> int:
    """The order again and again until it ends by itself, with the exit code `ends`; how often it
    died. Asserts that what was finished in the run `watch` stays the same file.
    """
    deaths, before = 0, dict[str, tuple[int, int]]()
    while True:
        server.order(record=str(record), **order)
        status, points = server.answer(), len(record.read_text().splitlines())
        after = finished(watch)
        assert before.items() <= after.items(), (order, points)
        before = after
        if status["status"] != -signal.SIGKILL:
            assert status["status"] == 0 and (status["answer"] or 0) == ends, (
                order,
                Path(order.get("log", record)).read_text()[-3000:],
            )
            return deaths
        deaths += 1


def test_all_that_renames_or_syncs_is_in_one_module() -> None:
    assert failpoints.elsewhere() == []


def test_a_crash_before_or_after_any_rename_or_sync_loses_nothing(
    server: Server, tmp_path: Path
) -> None:
    files = prepare(tmp_path)[2:]
    options = dict(zip(files[::2], files[1::2], strict=True))
    pool, target = Path(options["--pool"]), options.pop("--target")
    with_lengths = [
        {**json.loads(line), "length": len(line)} for line in pool.read_text().splitlines()
    ]
    pool.write_text("".join(json.dumps(row) + "\n" for row in with_lengths))

    def arguments(name: str, root: Path) -> list[str]:
        made = [
            *COMMANDS[name],
            "--run",
            str(root),
            *(text for option in options.items() for text in option),
        ]
        if name in TARGETED:
            made += ["--target", target]
        if name == "score":
            at = made.index("--budget")
            del made[at : at + 2]
        if name == "compare":
            return [
                *made,
                "--test",
                target,
                "--seeds",
                "1",
                "--equal",
                "steps",
                "--control",
                "length-matched",
            ]
        return [
            *made,
            "--out",
            str(root.parent / f"{root.name}-{name}{'.parquet' if name == 'score' else '.jsonl'}"),
        ]

    def order(name: str, root: Path) -> dict[str, Any]:
        return {"arguments": arguments(name, root), "log": str(tmp_path / f"{root.name}.log")}

    run, alone, record, nothing_new = (
        tmp_path / "run",
        tmp_path / "alone",
        tmp_path / "record",
        tmp_path / "every-point",
    )
    deaths = sum(until_it_ends(server, record, run, **order(name, run)) for name in COMMANDS)

    # Damage, found and set aside: here too each crash is followed by the command that was struck.
    damaged = next(run.glob("loss-*/loss.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    verify = {"arguments": ["verify", str(run)], "log": str(tmp_path / "verify.log")}
    deaths += until_it_ends(server, record, tmp_path / "none", ends=5, **verify)
    deaths += until_it_ends(server, record, tmp_path / "none", **order("perplexity", run))
    assert [path.name for path in (run / "damaged").rglob("*.safetensors")] == ["loss.safetensors"]
    for call, folder in (
        ("make_playground", "playground-2"),
        ("make_tiny", "cache"),
        ("fetch_and_send", "storage"),
    ):
        (tmp_path / folder).mkdir()
        deaths += until_it_ends(
            server, record, tmp_path / "none", call=call, folder=str(tmp_path / folder)
        )
        assert [path for path in (tmp_path / folder).rglob("*") if path.name.startswith(TEMP)] == []
    deaths += until_it_ends(
        server, record, tmp_path / "none", call="mend_run_file", folder=str(run)
    )

    struck = record.read_text().splitlines()
    assert deaths == len(struck)
    renames = {tuple(line.split(" ", 2)[1:]) for line in struck if not line.startswith("fsync")}
    assert renames == {(when, site) for when in ("before", "after") for site in failpoints.sites()}
    assert {line for line in struck if line.startswith("fsync")} == {
        f"fsync {when} {place}"
        for when in ("before", "after")
        for place in ("replacing", "making", "sync_folder")
    }

    shutil.copy(record, nothing_new)
    for name in COMMANDS:
        until_it_ends(server, nothing_new, alone, **order(name, alone))
    assert nothing_new.read_text() == record.read_text()
    assert digests(run) == digests(alone)
    assert Run(run).verify() == []
    assert strays(run) == [] and [path.name for path in tmp_path.glob(".*")] == []
    for path in tmp_path.glob("alone-*"):
        assert path.read_bytes() == (tmp_path / path.name.replace("alone", "run")).read_bytes(), (
            path.name
        )
