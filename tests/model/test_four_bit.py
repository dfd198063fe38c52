"""A base model in 4 bits under LoRA: the gradients of the same model with its weights written out,
on every device that bitsandbytes runs on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsift
from gradsift.config import LoraSettings
from gradsift.errors import ConfigError
from gradsift.gradients.passes import extract
from gradsift.gradients.projection import Projection
from gradsift.model.layers import REPACKS, block_linears, coverage, tracked_modules
from gradsift.model.load import load_model
from gradsift.model.lora import attach_lora
from gradsift.model.losses import row_losses
from gradsift.store.rows import RowStore
from tests.conftest import SETTINGS
from tests.model.small_models import llama, token_rows
from tests.tolerances import (
    BF16_COSINE,
    BF16_NORM_RTOL,
    GPU_ATOL,
    GPU_RTOL,
    GRADIENT_ATOL,
    GRADIENT_RTOL,
)

installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
# what it says on import about kernels that it does not find, and of its own calls of torch
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def with_lora(base: Any) -> Any:
    """The same adapter whatever the base, with B other than zero, so that A has a gradient too."""
    model = attach_lora(base, LoraSettings(r=4, targets="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for name, p in sorted(model.named_parameters()):
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator).mul_(0.1).to(p.device)
    return model


def written_out(folder: Path, packed: nn.Module, device: str, dtype: torch.dtype) -> Any:
    """The model of the folder whose quantised weights are those that `packed` stands for."""
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found]

    model = load_model(str(folder), dtype="bfloat16", device=device)
    found = dict(packed.named_modules())
    for name, module in model.named_modules():
        weight = getattr(found.get(name), "weight", None)
        if isinstance(module, nn.Linear) and hasattr(weight, "quant_state"):
            module.weight.data = dequantize_4bit(weight.data, weight.quant_state).to(module.weight)  # type: ignore[union-attr]
    return model.to(dtype)


def gradients(model: nn.Module, rows: Sequence[dict[str, list[int]]]) -> Tensor:
    found = torch.zeros(0)
    for batch in extract(
        model, rows, projection=Projection(None, kind="identity"), token_budget=64
    ):
        found = found if len(found) else torch.zeros(len(rows), batch.rows.shape[1])
        found[torch.as_tensor(batch.indices)] = batch.rows
    return found


@installed
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_over_a_four_bit_base_are_those_of_its_weights_written_out(
    folder: Path, device: str
) -> None:
    """In bfloat16, as such models are loaded: every product is rounded to 8 bits, and peft adds up
    in another order over either base.
    """
    packed = load_model(str(folder), dtype="nf4", device=device)
    plain, exact = (
        with_lora(written_out(folder, packed, device, dtype))
        for dtype in (torch.bfloat16, torch.float32)
    )
    four_bit, rows = with_lora(packed), token_rows(6)
    assert coverage(four_bit).quantised == 14  # all of two blocks, not the head
    assert all(".lora_" in name for name in tracked_modules(four_bit))
    with pytest.raises(ConfigError, match="quantised and have no gradient"):
        tracked_modules(four_bit, "linear")
    got = gradients(four_bit, rows)
    for expected in (gradients(plain, rows), gradients(exact, rows)):
        assert torch.cosine_similarity(got, expected).min() > BF16_COSINE
        torch.testing.assert_close(
            got.norm(dim=1), expected.norm(dim=1), rtol=BF16_NORM_RTOL, atol=0
        )
    whole = gradients(with_lora(load_model(str(folder), device=device)), rows)
    assert torch.cosine_similarity(got, whole).max() < 0.9999  # else nothing was quantised


@installed
@pytest.mark.parametrize("device", DEVICES)
def test_in_float32_they_are_equal(device: str) -> None:
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found]
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found]

    packed, plain = (llama(hidden_size=64, intermediate_size=128).to(device) for _ in range(2))
    for name, linear in block_linears(plain).items():
        layer = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )  # type: ignore[arg-type]
        layer.weight = Params4bit(
            linear.weight.data.clone().cpu(), requires_grad=False, quant_type="nf4", module=layer
        )  # type: ignore[union-attr,operator]
        setattr(layer, REPACKS, False)
        parent, _, leaf = name.rpartition(".")
        setattr(packed.get_submodule(parent), leaf, layer.to(device))
        linear.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # type: ignore[union-attr]
    rows = token_rows(6)
    rtol, atol = (GRADIENT_RTOL, GRADIENT_ATOL) if device == "cpu" else (GPU_RTOL, GPU_ATOL)
    torch.testing.assert_close(
        gradients(with_lora(packed), rows), gradients(with_lora(plain), rows), rtol=rtol, atol=atol
    )


@installed
def test_a_four_bit_base_is_left_as_it_was(folder: Path) -> None:
    packed = load_model(str(folder), dtype="nf4")
    before = {name: p.detach().clone() for name, p in packed.named_parameters()}
    model, rows = with_lora(packed), token_rows(3)
    assert torch.equal(gradients(model, rows), gradients(model, rows))
    after = {
        name.replace(".base_layer", ""): p
        for name, p in model.get_base_model().named_parameters()
        if "lora_" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@installed
def test_layers_that_would_cut_the_gradient_are_refused(folder: Path) -> None:
    model = with_lora(load_model(str(folder), dtype="nf4"))
    layers = [module for module in model.modules() if hasattr(module, REPACKS)]
    assert len(layers) == 14
    layers[3].support_avx512bf16_for_cpu = True
    with pytest.raises(ConfigError, match="no gradient passes through"):
        gradients(model, token_rows(2))


@installed
def test_rows_are_the_same_after_the_model_ran_without_gradients(folder: Path) -> None:
    model, rows = with_lora(load_model(str(folder), dtype="nf4")), token_rows(4)
    before = gradients(model, rows)
    row_losses(model, rows)
    assert torch.equal(gradients(model, rows), before)


@installed
def test_the_main_job_over_a_four_bit_base(
    tmp_path: Path, pool_file: Path, target_file: Path, model_folder: Path
) -> None:
    settings = {**SETTINGS, "model": {"dtype": "nf4"}}
    chosen = gradsift.select(
        "less",
        pool=pool_file,
        target=target_file,
        model=str(model_folder),
        run=tmp_path / "run",
        budget="25%",
        settings=settings,
    )
    assert len(chosen) == 18
    stores = [
        RowStore.open(path.parent, verify=True)
        for path in (tmp_path / "run").glob("gradients-*/store.json")
    ]
    assert stores
    assert all(bool(store.usable.all()) for store in stores)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"
)
def test_without_bitsandbytes_nf4_says_what_to_install(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"bitsandbytes.*gradsift\[four-bit\]"):
        load_model(str(folder), dtype="nf4")
