"""bench/scaling.py on paper: its bytes and seconds are those of `gradsift plan`, and docs/scale.md
has the shape of the results.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from gradsift import methods
from gradsift.commands.plan.costs import MATCHING, select_cost, stage_cost
from gradsift.commands.plan.probe import Rates
from gradsift.commands.preflight import Inputs
from gradsift.commands.session import opened
from gradsift.compute.machine import peak_bytes
from gradsift.config import LoraSettings
from gradsift.model.load import load_model
from gradsift.model.lora import attach_lora
from tests.conftest import SETTINGS
from tests.docs.pages import check_measured

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "scale.json"
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return load(ROOT / "bench" / "scaling.py")


@pytest.mark.parametrize("method", ["less", "tagcos"])
def test_bytes_and_seconds_are_those_of_the_plan(
    scaling: ModuleType,
    method: str,
    tmp_path: Path,
    pool_file: Path,
    target_file: Path,
    model_folder: Path,
) -> None:
    """One GPU that makes as many tokens a second as the plan's machine, a disk and a network that
    cost nothing.
    """
    n, per_row, flops = 72, 30, 4e12
    target = {"target": target_file} if method == "less" else {}
    with opened(
        Inputs(
            tmp_path / "r", pool=pool_file, model=str(model_folder), settings=SETTINGS, **target
        ),
        keep=False,
    ) as pipeline:
        rates = Rates(
            1000.0, 800.0, 3000.0, 500.0, 2e9, peak_bytes(), peak_bytes(), 64, 5000, 32, 0, 0
        )
        tokens = {side: per_row * len(rows) for side, rows in pipeline.sides.items()}
        selector = methods.make(method, {"clusters": 4} if method == "tagcos" else {})
        planned = [
            stage_cost(pipeline, recipe, tokens, rates)
            for recipe in pipeline.recipes(selector.needs())
        ]
        chosen = select_cost(pipeline, selector, 18, rates)
        ids = sum(len(i.encode()) for i in pipeline.sides["pool"].ids) / n
        m = len(pipeline.sides["target"]) if target else 0
    a = scaling.Assumed(
        parameters=flops / 4 / rates.train,
        gpu_flops=flops,
        utilisation=1.0,
        gpus=1,
        tokens_per_row=per_row,
        id_bytes=ids,
        dim=64,
        target_rows=m,
        clusters=4,
        budget=18 / 72,
        driver_threads=1,
        thread_efficiency=1.0,
        disk_bytes=1e30,
        network_bytes=1e30,
        warmup_share=24 / 72,
        warmup_epochs=30 * 4 / 24,
    )
    measured = scaling.Measured(
        rates.train / rates.gradients,
        0.0,
        1 / (rates.encode_rows * per_row),
        0.0,
        rates.multiply,
        rates.multiply,
        2 / rates.multiply,
        MATCHING / rates.multiply,
        1 / rates.multiply,
        0.0,
        0.0,
    )
    found = {stage["stage"]: stage for stage in scaling.stages(method, n, a, measured)}
    ours = {
        "encode": "encode",
        "warm-up": "warmup",
        "gradients x 3": "gradients",
        "influence": "influence",
        "mean": "mean",
    }
    for name, stage in ours.items():
        theirs = [s for s in planned if s.stage == stage and not s.label.startswith("target")]
        if stage in ("encode", "gradients", "influence", "mean") and theirs:
            assert found[name]["disk"] == pytest.approx(sum(s.bytes for s in theirs), rel=1e-3), (
                stage
            )
        if theirs:
            assert found[name]["hours"] * 3600 == pytest.approx(
                sum(s.seconds for s in theirs), rel=1e-6
            ), stage
    if method == "tagcos":
        both = found["k-means"]["hours"] + found["matching"]["hours"]
        assert both * 3600 == pytest.approx(chosen.seconds - 1.0 - n * 2e-5)


def test_an_adapter_has_as_many_numbers(scaling: ModuleType, model_folder: Path) -> None:
    model = attach_lora(load_model(str(model_folder)), LoraSettings(r=2))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert scaling.Assumed(layers=2, hidden=32, keys=16, lora_rank=2).lora == count


def test_what_breaks_is_what_takes_more_than_there_is(scaling: ModuleType) -> None:
    measured = scaling.Measured(
        0.8, 1e-5, 1e-6, 300.0, 7e10, 4e10, 3e-11, 1e-10, 2e-11, 1e-10, 1e-10
    )
    roomy = replace(scaling.Assumed(), wall_hours=1e9, driver_memory=1e30, driver_disk=1e30)
    assert scaling.project("less", 10**8, roomy, measured)["breaks"] == []
    small = scaling.project("less", 10**8, replace(roomy, driver_disk=2e12), measured)
    first = small["breaks"][0]
    assert (first["stage"], first["of"]) == ("influence", "disk")
    assert first["times"] == pytest.approx(sum(s["disk"] for s in small["stages"][:-1]) / 2e12)
    for method in scaling.METHODS:
        # a tenth of the rows through the costly stages, all of them through the forward pass
        cut = scaling.project(method, 10**7, replace(roomy, first_cut=0.1), measured)
        part = {s["stage"]: s for s in scaling.project(method, 10**6, roomy, measured)["stages"]}
        for stage in cut["stages"]:
            if stage["stage"] in part and stage["stage"] not in ("pool", "encode"):
                assert stage["hours"] == pytest.approx(part[stage["stage"]]["hours"]), stage


@pytest.mark.skipif(
    not RESULTS.exists(), reason="bench/scale.py has not been run on quiet cores yet"
)
def test_the_page_has_the_shape_of_the_results() -> None:
    results = json.loads(RESULTS.read_text())
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    check_measured(
        page,
        load(ROOT / "docs" / "generate_scale.py").page(results),
        "python docs/generate_scale.py",
    )
    for method in results["projected"].values():
        assert list(method) == ["1000000", "10000000", "100000000"]
