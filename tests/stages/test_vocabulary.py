"""A tokenizer with more tokens than the model embeds is told by name before the model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

import gradsift
from gradsift.commands.doctor import doctor
from gradsift.commands.inspect import inspect
from gradsift.errors import DataError
from gradsift.model.load import vocabulary
from tests.conftest import SETTINGS, TEMPLATE
from tests.model.small_models import VOCAB, llama, tokenizer


@pytest.fixture
def wider(tmp_path: Path) -> str:
    """A model of VOCAB tokens whose tokenizer has one more, which every chat ends with."""
    llama().save_pretrained(tmp_path / "m")
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    made.chat_template = TEMPLATE.replace("<eos>", "<|end|>")
    made.save_pretrained(tmp_path / "m")
    return str(tmp_path / "m")


def test_a_row_is_named_whose_token_the_model_does_not_embed(
    wider: str, pool_file: Path, tmp_path: Path
) -> None:
    said = rf"pool.jsonl:1: has the token id {VOCAB}, and the model embeds {VOCAB} tokens.*resize_"
    with pytest.raises(DataError, match=said):
        gradsift.select(
            "tagcos",
            pool=str(pool_file),
            budget=5,
            run=tmp_path / "r",
            model=wider,
            settings=SETTINGS,
        )
    with pytest.raises(DataError, match=said):
        doctor(wider, str(pool_file), settings={"machine": {"threads": 1}})


def test_inspect_shows_the_rows_all_the_same(wider: str, pool_file: Path) -> None:
    lines = [str(line) for line in inspect(str(pool_file), model=wider, rows=2)]
    assert any("has the token id 258" in line for line in lines)
    assert any("<|end|>" in line for line in lines)


def test_inspect_of_no_rows_is_the_funnel(model_folder: Path, pool_file: Path) -> None:
    lines = [str(line) for line in inspect(str(pool_file), model=str(model_folder), rows=0)]
    assert any("72 read" in line for line in lines)
    assert not any("supervised" in line for line in lines)


def test_the_size_is_that_of_the_language_model(tmp_path: Path) -> None:
    from gradsift.config import ModelSettings

    for text, size in (
        ('{"vocab_size": 7}', 7),
        ('{"text_config": {"vocab_size": 9}}', 9),
        ('{"vocab_size": 7, "padded_vocab_size": 8}', 8),
        ("{}", None),
    ):
        (tmp_path / "config.json").write_text(text)
        assert vocabulary(ModelSettings(name=str(tmp_path))) == size
