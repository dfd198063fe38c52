"""A model that lies over several devices, as accelerate's device map leaves it: the gradients of
the same model on one device.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from gradsift.gradients.adam import Adam
from gradsift.gradients.passes import extract
from gradsift.gradients.projection import Projection
from gradsift.model.load import load_model
from gradsift.model.lora import attach_lora
from gradsift.model.losses import row_losses
from gradsift.signals.embeddings import embed
from tests.model.small_models import llama

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (5, 9, 14, 20):
        ids = torch.randint(1, 40, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return made


def gradients(model: torch.nn.Module, modules: str | None) -> torch.Tensor:
    found = torch.zeros(4, 32)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adam = Adam(
        {n: torch.zeros(p.shape) for n, p in names.items()},
        {n: torch.ones(p.shape) for n, p in names.items()},
        10,
    )
    chosen = adam if modules is None else None
    for batch in extract(
        model,
        rows(),
        projection=Projection(dim=32),
        modules=modules,
        transform=chosen,
        token_budget=32,
    ):  # type: ignore[arg-type]
        found[torch.as_tensor(batch.indices)] = batch.rows
    return found


def test_a_device_map_without_gpus_changes_nothing(model_folder: Path) -> None:
    plain, mapped = (
        attach_lora(load_model(str(model_folder), spread=spread)) for spread in (False, True)
    )
    if torch.cuda.is_available():
        pytest.skip("a GPU would take the mapped model")
    assert torch.equal(gradients(plain, None), gradients(mapped, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_blocks_on_two_devices_give_the_rows_of_one() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    whole = attach_lora(llama())
    for parameter in whole.parameters():
        parameter.data = parameter.data.normal_(
            std=0.1, generator=torch.Generator().manual_seed(parameter.numel())
        )
    spread = copy.deepcopy(whole)
    other = torch.device("cuda:1" if torch.cuda.device_count() > 1 else "cuda:0")
    inner = spread.get_base_model().model
    for place, block in enumerate(
        [inner.embed_tokens, *inner.layers, inner.norm, spread.get_base_model().lm_head]
    ):
        device = torch.device("cpu") if place % 2 == 0 else other
        block.to(device)
        add_hook_to_module(block, AlignDevicesHook(execution_device=device, io_same_device=False))
    inner.rotary_emb.to("cpu")
    add_hook_to_module(
        spread.get_base_model(), AlignDevicesHook(execution_device="cpu", io_same_device=True)
    )
    for modules in (None, "linear"):
        torch.testing.assert_close(
            gradients(spread, modules), gradients(whole, modules), rtol=1e-3, atol=1e-5
        )
    torch.testing.assert_close(embed(spread, rows()), embed(whole, rows()), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        row_losses(spread, rows()).mean, row_losses(whole, rows()).mean, rtol=1e-3, atol=1e-5
    )
