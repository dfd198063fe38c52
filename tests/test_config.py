from __future__ import annotations

from pathlib import Path

import pytest

from gradsift.config import Config, build, read_toml
from gradsift.errors import ConfigError, UnknownName
from gradsift.store.canonical import canonical_json


def test_an_unknown_key_names_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"warmup\.epoch'.*'warmup\.epochs'"):
        build({"warmup": {"epoch": 3}}, "here")
    with pytest.raises(UnknownName, match=r"'gradients'"):
        build({"gradient": {}}, "here")
    with pytest.raises(UnknownName, match=r"'warmup\.lora\.alpha'"):
        build({"warmup": {"lora": {"alfa": 3}}}, "here")


def test_a_wrong_type_or_value_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"warmup\.share"):
        build({"warmup": {"share": 2.0}}, "here")
    with pytest.raises(ConfigError, match=r"gradients\.dim"):
        build({"gradients": {"dim": "many"}}, "here")


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[warmup\n")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        read_toml(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_toml(tmp_path / "none.toml")


def test_settings_are_frozen_and_have_one_canonical_form() -> None:
    config = Config()
    with pytest.raises(Exception, match="frozen"):
        config.model.name = "x"  # type: ignore[misc]
    reordered = build(dict(reversed(list(config.model_dump().items()))), "here")
    assert canonical_json(reordered.canonical()) == canonical_json(config.canonical())
