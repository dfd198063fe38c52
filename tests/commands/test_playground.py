"""The playground: is every label true, is every split apart, and does the built-in model come out
the same.
"""

from __future__ import annotations

import multiprocessing
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradsift.commands.demo import playground
from gradsift.commands.demo.playground import generate, target_rows, write_playground
from gradsift.compute import machine
from gradsift.data.encode import encode
from gradsift.data.pool import read_pool
from gradsift.errors import ResourceError, UserError
from gradsift.model import tiny, tiny_tasks
from gradsift.model.load import load_model
from gradsift.model.tiny import TinySettings, tiny_model
from gradsift.store.atomic import making
from gradsift.types import Example, Message

SMALL = TinySettings(hidden=32, layers=2, heads=2, intermediate=64, steps=4, tokens=256)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
VELU = tiny_tasks.NOUNS | tiny_tasks.ADJECTIVES | tiny_tasks.VERBS | tiny_tasks.ARTICLES


def texts(row: dict[str, Any]) -> tuple[str, str]:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def solve_units(text: str) -> str:
    count, big = re.findall(r"(\d+) (\w+)", text)[0]
    seconds = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}
    length = {
        "inches": 1,
        "feet": 12,
        "centimeters": 1,
        "meters": 100,
        "pieces": 1,
        "dozens": 12,
        "months": 1,
        "years": 12,
    }
    small = next(
        unit for unit in seconds | length if unit != big and re.search(rf"\b{unit}\b", text)
    )
    factor = seconds[big] / seconds[small] if big in seconds else length[big] / length[small]
    return f"{int(int(count) * factor)} {small}"


def solve_weekday(text: str) -> str:
    step, way, day = re.findall(r"(\d+) days (before|after) (\w+)", text)[0]
    return DAYS[(DAYS.index(day) + int(step) * (1 if way == "after" else -1)) % 7]


def solve_boolean(text: str) -> str:
    tokens = re.findall(r"\b(true|false|not|and|or)\b", text)
    value, operator, negate = None, None, False
    for token in tokens:
        if token == "not":
            negate = not negate
        elif token in ("and", "or"):
            operator = token
        else:
            literal, negate = (token == "true") != negate, False
            value = (
                literal
                if value is None
                else (value and literal if operator == "and" else value or literal)
            )
    return "true" if value else "false"


def solve_translate(text: str) -> str:
    """By rewriting: word for word, then adjective and noun change places."""
    words = [VELU[word] for word in english(text).split()]
    adjectives = set(tiny_tasks.ADJECTIVES.values())
    for i in range(len(words) - 1):
        if words[i] in adjectives and words[i - 1] in tiny_tasks.ARTICLES.values():
            words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def english(text: str) -> str:
    return re.sub(
        r"^(Say in Velu:|Translate into Velu:|How do you say)| in Velu\?$", "", text
    ).strip()


SOLVE: dict[str, Callable[[str], str]] = {
    "lookup": lambda text: dict(re.findall(r"(\w+)=(\w+)", text))[
        re.findall(r"(?:give|is|Read) the (\w+)", text)[0]
    ],
    "arithmetic": lambda text: str(eval(re.findall(r"\d+ [-+] \d+", text)[0])),
    "sort": lambda text: " ".join(sorted(re.findall(r"\d+", text), key=int)),
    "letters": lambda text: re.findall(r"(?:Spell|the word|Reverse:) ([a-z]+)", text)[0][::-1],
    "units": solve_units,
    "weekday": solve_weekday,
    "translate": solve_translate,
    "boolean": solve_boolean,
}


@pytest.fixture(scope="module")
def pool() -> list[dict[str, Any]]:
    return generate(0, 2000)


def test_clean_rows_are_right_and_noisy_rows_are_wrong(pool: list[dict[str, Any]]) -> None:
    for row in pool:
        prompt, answer = texts(row)
        right = SOLVE[row["family"]](prompt)
        assert (answer == right) == (row["noise"] == "none"), row
        assert answer.strip()
        if row["noise"] == "truncated":
            assert right.startswith(answer)


def test_shares_of_families_noise_and_copies(pool: list[dict[str, Any]]) -> None:
    count = Counter(row["family"] for row in pool)
    assert len(pool) == 2000
    assert len({row["id"] for row in pool}) == 2000
    for family in tiny_tasks.FAMILIES:
        assert abs(count[family.name] / 2000 - family.share) < 0.012
        noisy = sum(row["noise"] != "none" for row in pool if row["family"] == family.name)
        assert 0.15 < noisy / count[family.name] < 0.25
    assert 0.09 < count["translate"] / 2000 < 0.11
    assert 0.19 < sum(row["noise"] != "none" for row in pool) / 2000 < 0.21
    assert {row["noise"] for row in pool if row["family"] == "translate"} == {
        "none",
        *playground.NOISE_KINDS,
    }
    assert Counter(row["copy"] for row in pool) == {
        "none": 1800,
        "duplicate": 100,
        "paraphrase": 100,
    }
    noise = {
        name: [row["noise"] != "none" for row in pool if row["source"] == name]
        for name in playground.SOURCES
    }
    shares = {name: sum(bad) / len(bad) for name, bad in noise.items()}
    assert shares["handbook"] < shares["forum"] < shares["crawl"]


def test_copies_are_what_they_are_called(pool: list[dict[str, Any]]) -> None:
    originals = [row for row in pool if row["copy"] == "none"]
    same = {(texts(row), row["noise"]) for row in originals}
    assert len({texts(row)[0] for row in originals}) == 1800  # no question twice

    def core(row: dict[str, Any]) -> tuple[Any, ...]:
        """What is asked, whatever the wording."""
        prompt = texts(row)[0]
        return (
            row["family"],
            SOLVE[row["family"]](prompt),
            tuple(re.findall(r"\d+|\w+=\w+", prompt)),
        )

    asked = {core(row) for row in originals}
    for row in pool:
        if row["copy"] == "duplicate":
            assert (texts(row), row["noise"]) in same
        if row["copy"] == "paraphrase":
            assert row["noise"] == "none"
            assert texts(row)[0] not in {text for (text, _), _ in same}
            assert core(row) in asked


def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    one, two, other = (
        write_playground(tmp_path / name, seed, 200)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for a, b in (
        (one.pool, two.pool),
        (one.target, two.target),
        (one.test, two.test),
        (one.readme, two.readme),
    ):
        assert a.read_bytes() == b.read_bytes()
    assert one.pool.read_bytes() != other.pool.read_bytes()


def test_no_question_is_in_two_splits(pool: list[dict[str, Any]]) -> None:
    weights = {family.name: family.share for family in tiny_tasks.FAMILIES}
    learned = {
        text["content"] for chat in islice(tiny_tasks.stream(0, weights), 4000) for text in chat[:1]
    }
    assert not learned & {texts(row)[0] for row in pool}
    sentences = {
        "pretrain": {english(text) for text in learned if "Velu" in text},
        "pool": {
            english(texts(row)[0])
            for seed in (0, 1)
            for row in generate(seed, 1000)
            if row["family"] == "translate"
        },
        "dev": {english(texts(row)[0]) for seed in (0, 1) for row in target_rows("dev", 64, seed)},
        "test": {
            english(texts(row)[0]) for seed in (0, 1) for row in target_rows("test", 200, seed)
        },
    }
    assert all(len(found) > 100 for found in sentences.values())
    names = sorted(sentences)
    assert not any(sentences[a] & sentences[b] for a in names for b in names if a < b)
    assert all(
        row["noise"] == "none" and texts(row)[1] == solve_translate(texts(row)[0])
        for row in target_rows("test", 200)
    )


def test_files_are_read_as_messages(tmp_path: Path) -> None:
    paths = write_playground(tmp_path, seed=1, rows=300)
    read = {
        name: read_pool([str(path)])
        for name, path in (("pool", paths.pool), ("target", paths.target), ("test", paths.test))
    }
    assert {name: len(rows) for name, rows in read.items()} == {
        "pool": 300,
        "target": 32,
        "test": 200,
    }
    rows = generate(1, 300)
    assert [(example.id, example.messages[1].content) for example in read["pool"]] == [
        (row["id"], texts(row)[1]) for row in rows
    ]
    readme = paths.readme.read_text()
    assert f"| translate | {sum(row['family'] == 'translate' for row in rows)} |" in readme


def test_too_few_and_too_many_rows_are_refused() -> None:
    with pytest.raises(UserError, match="at least 100"):
        generate(0, 99)
    with pytest.raises(UserError, match="Ask for fewer rows"):
        generate(0, 30_000)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("cache"), settings=SMALL)


def test_tiny_is_built_once_and_the_same_everywhere(small: Path, tmp_path: Path) -> None:
    state, threads, steps = torch.get_rng_state(), torch.get_num_threads(), []
    again = tiny_model(
        tmp_path, settings=SMALL, progress=lambda step, total: steps.append((step, total))
    )
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert again.name == small.name
    assert (again / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [again.name]
    before = (small / "model.safetensors").stat().st_mtime_ns
    assert tiny_model(small.parent, settings=SMALL) == small
    assert (small / "model.safetensors").stat().st_mtime_ns == before
    other = tiny_model(tmp_path, settings=SMALL.model_copy(update={"seed": 1}))
    assert other.name != again.name


def test_transformers_loads_tiny_and_its_tokens_are_bytes(small: Path) -> None:
    tokenizer, model = (
        AutoTokenizer.from_pretrained(small),
        AutoModelForCausalLM.from_pretrained(small),
    )
    assert sum(p.numel() for p in model.parameters()) < 3_000_000
    assert len(tokenizer) == model.config.vocab_size == 256 + len(tiny.SPECIALS)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    for text in ("  two  spaces . x\n", "naïve 東京 🙂", bytes(range(32, 127)).decode()):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        == "<|system|>s<|end|><|user|>u<|end|><|assistant|>"
    )


def test_training_weights_agree_with_the_encoder(small: Path) -> None:
    """An answer token weighs 1 where the encoder supervises, a prompt token 0.2, a padded one 0."""
    tokenizer = AutoTokenizer.from_pretrained(small)
    weights = {family.name: family.share for family in tiny_tasks.FAMILIES}
    for ids, weight in islice(tiny.training_batches(tokenizer, SMALL, weights), 6):
        assert ids.numel() <= SMALL.tokens
        for row, factor in zip(ids, weight, strict=True):
            length = int((row != tokenizer.pad_token_id).sum())
            text = tokenizer.decode(row[:length])
            [(user, answer)] = re.findall(
                r"^<\|user\|>(.*)<\|end\|><\|assistant\|>(.*)<\|end\|>$", text
            )
            example = Example("x", (Message("user", user), Message("assistant", answer)), "g")
            encoded = encode([example], tokenizer)[0]
            assert encoded["input_ids"] == row[:length].tolist()
            assert factor[:length].tolist() == pytest.approx(
                [0.2 if label == -100 else 1.0 for label in encoded["labels"]]
            )
            assert not factor[length:].any()


def test_the_muon_update_keeps_the_singular_vectors() -> None:
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    core = u.mT @ tiny.orthogonal(matrices) @ vt.mT
    values = core.diagonal(dim1=1, dim2=2)
    assert torch.allclose(core, torch.diag_embed(values), atol=1e-4)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    """20 steps against 1: nats per answer token on the test rows."""
    from gradsift.model.finetune import heldout_loss

    losses = []
    for steps in (1, 20):
        folder = tiny_model(
            tmp_path, settings=SMALL.model_copy(update={"steps": steps, "target_weight": 5.0})
        )
        rows = [
            Example(row["id"], tuple(Message(**m) for m in row["messages"]), "t")
            for row in target_rows("test", 20)
        ]
        losses.append(
            heldout_loss(
                load_model(str(folder)), encode(rows, AutoTokenizer.from_pretrained(folder))
            ).loss
        )
    assert losses[1] < losses[0] - 1


def _build(cache: str) -> None:
    tiny_model(Path(cache), settings=SMALL)


@pytest.mark.slow
def test_two_processes_may_build_at_once(small: Path, tmp_path: Path) -> None:
    workers = [
        multiprocessing.get_context("spawn").Process(target=_build, args=(str(tmp_path),))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [small.name]
    assert (tmp_path / small.name / "model.safetensors").read_bytes() == (
        small / "model.safetensors"
    ).read_bytes()


def test_the_second_to_finish_leaves_the_first_ones_folder(small: Path) -> None:
    before = (small / "config.json").read_bytes()
    with making(small) as late:
        (late / "config.json").write_text("late")
    assert not late.exists()
    assert (small / "config.json").read_bytes() == before


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="GRADSIFT_CACHE"):
        tiny_model(tmp_path / "file", settings=SMALL)
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "set"))
    assert machine.cache_folder() == tmp_path / "set"
    monkeypatch.delenv("GRADSIFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert machine.cache_folder() == tmp_path / "xdg" / "gradsift"


@pytest.mark.slow
def test_the_page_says_what_runs(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gradsift.model.tiny.tiny_model", lambda: small)
    page = (Path(__file__).resolve().parents[2] / "docs" / "playground.md").read_text(
        encoding="utf-8"
    )
    snippets = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    assert len(snippets) == 2
    capsys.readouterr()
    exec("\n".join(snippets), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["perplexity", "length", "random", "untrained"]
    assert [line.split()[-2:] for line in printed[3:]] == [["0%", "noise"]]
    assert all(0 < int(line.split()[-2].rstrip("%")) < 100 for line in printed[:3])
