"""Device and number format "auto": decided once, as the machine and the checkpoint are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsift
from gradsift.compute import machine
from gradsift.config import ModelSettings, build
from gradsift.errors import ConfigError, MismatchError
from gradsift.model.load import from_settings, in_force, load_model
from gradsift.store.run import SETTINGS
from tests.conftest import SETTINGS as SMALL
from tests.model.small_models import llama


def folder(path: Path, dtype: torch.dtype, keys: dict[str, Any]) -> str:
    """A checkpoint of a type, whose config.json says `keys` of it."""
    model: Any = llama()
    model.to(dtype).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (path / "config.json").write_text(json.dumps(config | keys))
    return str(path)


@pytest.mark.parametrize(
    ("stored", "keys", "expected"),
    [
        (torch.bfloat16, {"dtype": "bfloat16"}, "bfloat16"),
        (torch.float16, {"torch_dtype": "float16"}, "float16"),
        (torch.float16, {"torch_dtype": "torch.float16"}, "float16"),
        (torch.bfloat16, {"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        (torch.bfloat16, {}, "bfloat16"),
        (torch.float16, {}, "float16"),
        (torch.float32, {}, "float32"),
        (torch.float32, {"dtype": "float32"}, "float32"),
    ],
)
def test_a_gpu_takes_the_checkpoints_sixteen_bits_and_a_cpu_float32(
    stored: torch.dtype, keys: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    name = folder(tmp_path, stored, keys)
    # a kind of device that torch knows everywhere, and this package has no opinion on
    there = in_force(ModelSettings(name=name, device="privateuseone"))
    assert (there.device, there.dtype) == ("privateuseone", expected)
    here = in_force(ModelSettings(name=name, device="cpu"))
    assert (here.device, here.dtype) == ("cpu", "float32")


def test_a_gpu_without_bfloat16_takes_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = folder(tmp_path, torch.bfloat16, {"dtype": "bfloat16"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    found = in_force(ModelSettings(name=name))
    assert (found.device, found.dtype) == ("cuda", "float32")


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ((), "cpu"),
        (("xpu",), "xpu"),
        (("mps", "xpu"), "mps"),
        (("cuda", "mps", "xpu"), "cuda"),
    ],
)
def test_cuda_before_mps_before_xpu_before_the_cpu(
    present: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, module in (("cuda", torch.cuda), ("mps", torch.backends.mps), ("xpu", torch.xpu)):
        monkeypatch.setattr(module, "is_available", lambda kind=kind: kind in present)
    assert machine.best_device() == expected


def test_settings_without_auto_stay_as_they_are() -> None:
    explicit = ModelSettings(name="nowhere", device="cpu", dtype="bfloat16")
    assert in_force(explicit) is explicit


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"'cuda:1' is not on this machine.*--device cpu"):
        in_force(ModelSettings(name="nowhere", device="cuda:1"))
    with pytest.raises(ConfigError, match="no such device: 'gpu7'"):
        in_force(ModelSettings(name="nowhere", device="gpu7"))
    # workers elsewhere may have one
    elsewhere = in_force(ModelSettings(name="n", device="cuda", dtype="nf4"), elsewhere=True)
    assert elsewhere.device == "cuda"


def test_a_gpu_beyond_those_that_there_are_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = ModelSettings(name="n", device="cuda:1", dtype="float16")
    assert in_force(settings) is settings
    with pytest.raises(ConfigError, match="'cuda:2' is not on this machine"):
        in_force(settings.model_copy(update={"device": "cuda:2"}))


def test_the_loaders_know_auto(model_folder: Path) -> None:
    expected = torch.float32 if machine.best_device() == "cpu" else None
    for model in (
        from_settings(ModelSettings(name=str(model_folder))),
        load_model(str(model_folder), device="auto", dtype="auto"),
    ):
        assert model.device.type == machine.best_device()
        assert expected is None or model.dtype == expected


def test_a_run_keeps_what_was_decided_and_auto_that_decides_the_same_is_the_same_run(
    model_folder: Path, pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build({}, "t").model.device == build({}, "t").model.dtype == "auto"

    def choose(**model: str) -> gradsift.Selection:
        return gradsift.select(
            "length",
            pool=str(pool_file),
            budget=5,
            run=tmp_path / "run",
            model=str(model_folder),
            settings={**SMALL, "model": model},
        )

    monkeypatch.setattr(machine, "best_device", lambda: "cpu")
    first = choose()
    kept = json.loads((tmp_path / "run" / SETTINGS).read_text())["model"]
    assert (kept["device"], kept["dtype"]) == ("cpu", "float32")
    for model in ({"device": "auto", "dtype": "auto"}, {"device": "cpu"}, {"dtype": "float32"}):
        assert choose(**model).subset_path == first.subset_path
    monkeypatch.setattr(machine, "best_device", lambda: "meta")
    assert choose().subset_path == first.subset_path  # nothing asked: as the run was made
    with pytest.raises(MismatchError, match=r"model\.device = 'cpu', and 'meta' is asked now"):
        choose(device="auto")
