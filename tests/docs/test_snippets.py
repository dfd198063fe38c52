"""The Python of the guides runs as it stands, on real files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsift
import gradsift.methods
from gradsift.data.formats import FORMATS
from gradsift.gradients.passes import extract
from gradsift.report import ReportData
from tests.conftest import SETTINGS, rows, write_rows

DOCS = Path(__file__).resolve().parents[2] / "docs"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
    ),
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<eos>{% endgeneration %}{% else %}{{ m['content'] }}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# snippets that are not run, and why
NOT_RUN = {
    ("compare.md", 0): "needs lm-eval and its task files",
    ("warmup.md", 0): "leaves out the arguments of a trainer of the reader's own",
}


def snippets(name: str) -> list[str]:
    page = DOCS.parent / name if name == "README.md" else DOCS / name
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_every_snippet_has_a_test_or_a_reason() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    elsewhere = {"README.md", "quickstart.md", "playground.md"}  # the first ones: test_readme.py
    for page in sorted(DOCS.glob("*.md")):
        for place in range(len(snippets(page.name))):
            assert (
                page.name in elsewhere
                or (page.name, place) in NOT_RUN
                or f'snippets("{page.name}")' in here
            ), f"snippet {place} of {page.name}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with the files that the guides name: pool, target, model, and a run of `less`."""
    folder = tmp_path_factory.mktemp("guide")
    write_rows(folder / "pool.jsonl", rows(60))
    write_rows(folder / "dev.jsonl", [row for row in rows(20, seed=5) if row["kind"] == "back"])
    shutil.copytree(model_folder, folder / "my-model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the settings of the run name the model as the guides do
        gradsift.select(
            "less",
            pool="pool.jsonl",
            target="dev.jsonl",
            model="./my-model",
            budget=6,
            run="runs/a",
            settings=SETTINGS,
        )
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Executes code in a folder (the guide's) and returns its names."""

    def execute(code: str, folder: Path = place, **names: Any) -> dict[str, Any]:
        monkeypatch.chdir(folder)
        known = dict(names)
        exec(compile(code, "<guide>", "exec"), known)
        return known

    return execute


def test_extract_is_explained_by_two_examples(run: Callable[..., dict[str, Any]]) -> None:
    first, second = snippets("quickstart.md")[1:3]
    assert first == snippets("README.md")[1]
    names = run(first)
    assert len(names["encoded"]) == 60 and names["batch"].rows.shape[1] == 8192
    names = run(second, gradsift=gradsift, model=names["model"])
    (batch,) = (names["batch"],)
    assert batch.rows.shape == (1, 64) and batch.tokens.tolist() == [3]
    assert torch.isfinite(batch.rows).all() and batch.norms[0] > 0


def test_the_docstring_of_extract_shows_what_its_code_prints(
    run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    model = run(snippets("quickstart.md")[1])["model"]
    capsys.readouterr()
    lines = [line.strip() for line in (extract.__doc__ or "").splitlines()]
    code = "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... ")))
    run(code, gradsift=gradsift, model=model)
    assert capsys.readouterr().out.strip() == lines[lines.index("... " + code.splitlines()[-1]) + 1]


TURNS = [
    ("one and one?", "two"),
    ("two and two?", "four"),
]
CHATS: dict[str, Callable[[int], dict[str, Any]]] = {
    "messages": lambda i: {
        "messages": [
            {"role": role, "content": f"{text} {i}"}
            for asked, told in TURNS
            for role, text in (("user", asked), ("assistant", told))
        ]
    },
    "sharegpt": lambda i: {
        "conversations": [
            {"from": role, "value": f"{text} {i}"}
            for asked, told in TURNS
            for role, text in (("human", asked), ("gpt", told))
        ]
    },
    "alpaca": lambda i: {
        "instruction": f"add {i}",
        **({"input": f"and {i}"} if i % 2 else {}),
        "output": f"two {i}",
    },
    "prompt-completion": lambda i: {"prompt": f"add {i}", "completion": f"two {i}"},
}


@pytest.mark.parametrize("name", sorted(CHATS))
def test_the_lines_for_trl_train_on_every_format_that_the_page_names(
    name: str, run: Callable[..., dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    """From a selection of that format, one step of the real trainer, whose labels are the
    answers.
    """
    assert name in FORMATS
    model = shutil.copytree(place / "my-model", tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    pool = write_rows(tmp_path / "pool.jsonl", [CHATS[name](i) for i in range(12)])
    chosen = gradsift.select(
        "random",
        pool=pool,
        model=str(model),
        run=tmp_path / "run",
        budget=4,
        settings={"encode": {"max_length": 128}, "machine": {"threads": 1}},
    )
    code = snippets("outputs.md")[1].replace('"MODEL"', repr(str(model)))
    quick = "SFTConfig(max_steps=1, use_cpu=True, report_to='none', save_strategy='no', "
    names = run(code.replace("SFTConfig(", quick), chosen.folder)
    trainer = names["trainer"]
    assert trainer.state.global_step == 1
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    learned = [
        trainer.processing_class.decode([label for label in labels.tolist() if label != -100])
        for labels in batch["labels"]
    ]
    answers = {" ".join(told for _, told in TURNS) if name in ("messages", "sharegpt") else "two"}
    for text in learned:
        words = re.sub(r"<[^>]*>|\d+", " ", text).split()
        assert " ".join(words) in answers, text


def test_the_other_lines_of_the_outputs_page(
    run: Callable[..., dict[str, Any]], place: Path
) -> None:
    (folder,) = (place / "runs" / "a").glob("select-less-*")
    first, _, last = snippets("outputs.md")
    best = run(first, folder)["best"]
    assert best.num_rows == 10 and best["influence"].null_count == 0
    names = run(last, folder)
    assert names["data"] == ReportData.model_validate_json((folder / "report.json").read_bytes())
    assert (folder / "somewhere" / "report.html").exists()
    shutil.rmtree(folder / "somewhere")


def test_the_lines_on_stores_recovery_scores_and_warm_ups(
    run: Callable[..., dict[str, Any]], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = place / "runs" / "a"
    store = next(
        path
        for path in sorted(root.glob("gradients-*"))
        if (path / "rows-00001.safetensors").exists()
    )
    hashed, read, opened = snippets("store-format.md")
    assert run(hashed, store)["stated"]
    assert run(read, store)["rows"].shape[0] <= 10
    small = opened.replace("gradients-1780d1ee5b92", store.name).replace("2000:2100", "20:30")
    assert len(run(small.replace("ids[2000]", "ids[20]"))["store"]) == 60
    run(snippets("recovery.md")[0])
    assert "safetensors" not in capsys.readouterr().out  # nothing is damaged
    found = run(snippets("scores.md")[0], gradsift=gradsift)["found"]
    assert found.usable == 60 and found.path.exists()
    (warmup,) = root.glob("warmup-*")
    moments = run(snippets("warmup.md")[1].replace("my-warmup", f"runs/a/{warmup.name}"))["moments"]
    assert moments and all(m.shape == v.shape for m, v in moments.values())


def test_the_lines_on_the_doctor(
    run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(snippets("doctor.md")[0])["found"]
    assert found.attempts and len(capsys.readouterr().out.splitlines()) == 1 + len(found.attempts)


def test_the_method_of_the_guide_selects_and_says_why(
    run: Callable[..., dict[str, Any]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a package of one's own would register it: the class of the guide with its `why`."""
    first, second = snippets("adding-a-method.md")
    code = first.replace("import Signal,", "import Facts, Signal,") + "\n" + second
    module = place / "closest.py"
    module.write_text(code)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.chdir(place)
    monkeypatch.setitem(gradsift.methods.METHODS, "closest", "closest:Closest")
    chosen = gradsift.select(
        "closest",
        pool="pool.jsonl",
        target="dev.jsonl",
        run="runs/a",
        budget=4,
    )
    data = ReportData.model_validate_json((chosen.folder / "report.json").read_bytes())
    assert len(chosen) == 4
    for row in data.best:
        assert row.why == f"its gradient has a cosine of {row.gain:.3g} with that of a target row"
    assert (
        json.loads((chosen.folder / "manifest.json").read_bytes())["config"]["method"] == "closest"
    )
