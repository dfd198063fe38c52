"""Models, adapters, tokenizers and checkpoints from elsewhere: nothing in them runs, whatever their
files are called.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from transformers import AutoConfig

from gradsift.errors import GradsiftError
from gradsift.model.checkpoints import load_checkpoints, read_moments
from gradsift.model.load import load_model, load_tokenizer
from gradsift.model.lora import load_adapter
from tests.faults.corpus import SENTINEL, Ran

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture
def model(tmp_path: Path, model_folder: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "model")


def set_json(path: Path, **fields: Any) -> None:
    found = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps({**found, **fields}))


def pickled(path: Path, folder: Path, zipped: bool = False) -> None:
    """A file that makes the sentinel when it is unpickled; `zipped`: in torch's own container."""
    if zipped:
        torch.save({"x": Ran(folder)}, path)
    else:
        path.write_bytes(pickle.dumps(Ran(folder)))


def code(folder: Path) -> str:
    return (
        f"import os\nos.makedirs({str(folder / SENTINEL)!r}, exist_ok=True)\nclass C: pass\nclass"
        " M: pass\nclass T: pass\n"
    )


def safetensors_pickle(model: Path, folder: Path) -> None:
    pickled(model / "model.safetensors", folder)


def safetensors_zip(model: Path, folder: Path) -> None:
    pickled(model / "model.safetensors", folder, zipped=True)


def bin_only(model: Path, folder: Path) -> None:
    (model / "model.safetensors").unlink()
    pickled(model / "pytorch_model.bin", folder, zipped=True)


def sharded_bin(model: Path, folder: Path) -> None:
    bin_only(model, folder)
    (model / "pytorch_model.bin").rename(model / "part.bin")
    set_json(
        model / "pytorch_model.bin.index.json",
        metadata={},
        weight_map={"lm_head.weight": "part.bin"},
    )


def index_leads_out(model: Path, folder: Path) -> None:
    (model / "model.safetensors").rename(folder / "model.safetensors")
    weights = {"lm_head.weight": "../model.safetensors", "model.embed_tokens.weight": "/etc/passwd"}
    set_json(model / "model.safetensors.index.json", metadata={}, weight_map=weights)


def remote_model(model: Path, folder: Path) -> None:
    set_json(
        model / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
    )
    (model / "mine.py").write_text(code(folder))


def config_is_no_json(model: Path, folder: Path) -> None:
    (model / "config.json").write_text("{")


def deep_config(model: Path, folder: Path) -> None:
    (model / "config.json").write_text("[" * 100_000)


HARMS: list[Callable[[Path, Path], None]] = [
    safetensors_pickle,
    safetensors_zip,
    bin_only,
    sharded_bin,
    index_leads_out,
    remote_model,
    config_is_no_json,
    deep_config,
]


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "zip"])
def test_the_sentinel_is_there_where_a_pickle_is_loaded(tmp_path: Path, zipped: bool) -> None:
    """What the tests below rest on: these very files do run something in a program that trusts
    them.
    """
    pickled(tmp_path / "x.bin", tmp_path, zipped)
    if zipped:
        torch.load(tmp_path / "x.bin", weights_only=False)
    else:
        pickle.loads((tmp_path / "x.bin").read_bytes())
    assert (tmp_path / SENTINEL).exists()


def test_the_sentinel_is_there_where_remote_code_is_trusted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    remote_model(model, tmp_path)
    with contextlib.suppress(Exception):  # its class is none; the file has run by then
        AutoConfig.from_pretrained(str(model), trust_remote_code=True)
    assert (tmp_path / SENTINEL).exists()


def test_the_sentinel_is_there_where_a_template_has_no_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jinja2.Environment().from_string(PAYLOADS[1]).render()
    assert (tmp_path / SENTINEL).exists()


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_model_is_refused_and_nothing_of_it_runs(
    model: Path, tmp_path: Path, harm: Callable[[Path, Path], None]
) -> None:
    harm(model, tmp_path)
    with pytest.raises(GradsiftError) as error:
        load_model(str(model))
    assert error.value.remedy
    assert not (tmp_path / SENTINEL).exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_code_of_a_tokenizer_does_not_run(model: Path, tmp_path: Path, name: str) -> None:
    """Either it is refused, or the ordinary tokenizer in the folder is read; the file beside it is
    not.
    """
    set_json(model / name, tokenizer_class="T", auto_map={"AutoTokenizer": ["mine.T", "mine.T"]})
    (model / "mine.py").write_text(code(tmp_path))
    try:
        load_tokenizer(str(model))
    except GradsiftError as error:
        told = error.remedy
    else:
        told = "read"
    assert told
    assert not (tmp_path / SENTINEL).exists()


def test_a_model_with_code_beside_it_is_read_without_it(model: Path, tmp_path: Path) -> None:
    for name in (
        "modeling_llama.py",
        "configuration_llama.py",
        "__init__.py",
        "conftest.py",
        "sitecustomize.py",
        "torch.py",
    ):
        (model / name).write_text(code(tmp_path))
    pickled(model / "pytorch_model.bin", tmp_path, zipped=True)
    pickled(model / "training_args.bin", tmp_path, zipped=True)
    load_model(str(model))
    load_tokenizer(str(model))
    assert not (tmp_path / SENTINEL).exists()


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "zip"])
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickled_adapter_does_not_run(
    model: Path, tmp_path: Path, name: str, zipped: bool
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    set_json(
        adapter / "adapter_config.json",
        peft_type="LORA",
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
    )
    pickled(adapter / name, tmp_path, zipped)
    with pytest.raises(GradsiftError) as error:
        load_adapter(load_model(str(model)), adapter)
    assert error.value.remedy or error.value.where
    assert not (tmp_path / SENTINEL).exists()


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "zip"])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "optimizer.bin"]
)
def test_pickles_of_a_checkpoint_do_not_run(
    model: Path, tmp_path: Path, name: str, zipped: bool
) -> None:
    folder = tmp_path / "out" / "checkpoint-5"
    folder.mkdir(parents=True)
    set_json(
        folder / "adapter_config.json",
        peft_type="LORA",
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        base_model_name_or_path=str(model),
    )
    set_json(
        folder / "trainer_state.json",
        global_step=5,
        log_history=[{"step": 5, "learning_rate": 1e-4}],
    )
    shutil.copy(model / "model.safetensors", folder / "adapter_model.safetensors")
    pickled(folder / name, tmp_path, zipped)
    try:
        for checkpoint in load_checkpoints(tmp_path / "out"):
            read_moments(checkpoint)
    except GradsiftError as error:
        told = str(error)
    else:
        told = "passed over"
    assert told
    assert not (tmp_path / SENTINEL).exists()


PAYLOADS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('something-ran') }}",
    "{% set x = namespace.__init__.__globals__ %}{{ x }}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", PAYLOADS)
def test_a_chat_template_cannot_reach_python(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    from gradsift.config import EncodeSettings
    from gradsift.data.encode import encode
    from gradsift.data.pool import read_pool

    monkeypatch.chdir(tmp_path)
    (model / "chat_template.jinja").write_text(template)
    set_json(model / "tokenizer_config.json", chat_template=template)
    (tmp_path / "p.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
    )
    pool = read_pool([tmp_path / "p.jsonl"])
    try:
        encoded = encode(pool, load_tokenizer(str(model)), EncodeSettings())
    except GradsiftError as error:
        told = error.remedy
    else:
        told = encoded.codes.tolist() != [0]
    assert told
    assert not (tmp_path / SENTINEL).exists()
