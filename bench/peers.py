"""The same work done by other libraries and by plain loops: arms of bench/engine.py, each left out,
aloud, where it cannot run.

Every arm sees the rows and models of the bench and the batches of its floor (length-sorted, padded,
at most 2048 tokens), and differentiates the mean loss over a row's supervised tokens. What each
does, and what it is spared:

    vmap     torch.func.vmap(grad) over each batch (eager attention), then a dense projection kept
    in memory, or P_out G P_in per module
    opacus   GradSampleModule (hooks), then the same projections
    dattri   its hooks and LoGra compressors on each batch; without its attributor's store and
    metadata, which want batches of one size
    bergson  collect_gradients into an index on disk: 8 x 8 or 16 x 16 per module, or one row of
        1024 for all (`global`)
    logix    per-example gradients of the LoRA weights whole (it has no projection for them), or its
             own rank-16 bypass on each linear;
             written to disk at the end of a pass
    less     the loop of LESS (arXiv 2402.04333): one row at a time, Adam's direction, a dense map
             of signs. At 1024 the map is kept in
             memory; at 8192 it is drawn again, 128 columns at a time, for every 16 rows, as a map
             that does not fit in memory must be

A library's own progress bars and log lines are silenced; nothing else of it is changed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Arm = Callable[[], None]
Rows = Sequence[dict[str, list[int]]]
PACKAGES = {
    "vmap": "torch",
    "less": "torch",
    "opacus": "opacus",
    "dattri": "dattri",
    "bergson": "bergson",
    "logix": "logix-ai",
}


@dataclass(frozen=True)
class Work:
    """What an arm is made from. `lora` and `linear` return a new model at each call, because some
    libraries change theirs. `batches` holds positions in `rows`; `folder` is empty and its own.
    """

    rows: Rows
    batches: Sequence[np.ndarray]
    lora: Callable[[], nn.Module]
    linear: Callable[[], nn.Module]
    device: torch.device
    folder: Path

    def padded(self) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        for batch in self.batches:
            yield batch, *pad([self.rows[i] for i in batch], self.device)


def pad(rows: Rows, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(ids, labels) int64 [b, t], padded on the right with 0 and -100."""
    t = max(len(row["input_ids"]) for row in rows)
    ids, labels = torch.zeros(len(rows), t, dtype=torch.long), torch.full((len(rows), t), -100)
    for k, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[k, :length], labels[k, :length] = (
            torch.tensor(row["input_ids"]),
            torch.tensor(row["labels"]),
        )
    return ids.to(device), labels.to(device)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood over the supervised tokens of each row [b]."""
    targets = labels[:, 1:]
    each = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)
    return each.sum(1) / (targets != -100).sum(1)


def make_arms(
    work: Work, only: Sequence[str] | None = None
) -> tuple[dict[str, Arm], dict[str, str]]:
    """(arms by name, why others are left out). An arm has run once before it is returned, so what
    it holds is known to work.
    """
    arms: dict[str, Arm] = {}
    left_out: dict[str, str] = {}
    logging.disable(logging.WARNING)
    for name, make in MAKERS.items():
        if only and name not in only:
            continue
        peer = name.split("-")[1]
        try:
            importlib.metadata.version(PACKAGES[peer])
            folder = work.folder / name
            folder.mkdir(parents=True)
            with contextlib.redirect_stdout(io.StringIO()):
                run = make(
                    Work(work.rows, work.batches, work.lora, work.linear, work.device, folder)
                )
                run()
        except importlib.metadata.PackageNotFoundError:
            left_out[name] = f"{PACKAGES[peer]} is not installed"
        except Exception as error:  # a library that does not run here must not stop the others
            left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            arms[name] = _quiet(run)
        if name in left_out:
            print(f"left out: {name} ({left_out[name]})", file=sys.stderr)
    return arms, left_out


def versions() -> dict[str, str]:
    found = {}
    for package in sorted(set(PACKAGES.values())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _quiet(run: Arm) -> Arm:
    def quietly() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            run()

    return quietly


# ---- projections of materialised gradients


def _signs(p: int, d: int, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (
        torch.empty(p, d, device=device)
        .bernoulli_(0.5, generator=generator)
        .mul_(2)
        .sub_(1)
        .div_(d**0.5)
    )


class _Dense:
    """One row for all parameters, by a map kept in memory."""

    def __init__(self, parameters: dict[str, nn.Parameter], d: int, device: torch.device) -> None:
        self.map = _signs(sum(p.numel() for p in parameters.values()), d, device)

    def __call__(self, grads: dict[str, Tensor]) -> Tensor:
        return torch.cat([g.flatten(1) for g in grads.values()], 1) @ self.map


class _TwoSided:
    """P_out G P_in, k x k numbers for each parameter."""

    def __init__(self, parameters: dict[str, nn.Parameter], k: int, device: torch.device) -> None:
        self.maps = {
            n: (_signs(p.shape[0], k, device, 1), _signs(p.shape[1], k, device, 2))
            for n, p in parameters.items()
        }

    def __call__(self, grads: dict[str, Tensor]) -> Tensor:
        return torch.cat(
            [(self.maps[n][0].T @ g @ self.maps[n][1]).flatten(1) for n, g in grads.items()], 1
        )


def _tracked(work: Work, kind: str) -> tuple[nn.Module, dict[str, nn.Parameter], Any]:
    """(model, its tracked parameters alone trainable, their projection)."""
    model = work.lora() if kind == "lora" else work.linear()
    wanted = {
        n: p
        for n, p in model.named_parameters()
        if ("lora_" in n if kind == "lora" else n.endswith("_proj.weight"))
    }
    for p in model.parameters():
        p.requires_grad_(False)
    for p in wanted.values():
        p.requires_grad_(True)
    return (
        model,
        wanted,
        _Dense(wanted, 1024, work.device) if kind == "lora" else _TwoSided(wanted, 16, work.device),
    )


# ---- the arms


def vmap_grad(work: Work, kind: str) -> Arm:
    model, wanted, project = _tracked(work, kind)
    config: Any = model.config
    config._attn_implementation = "eager"
    chosen = {n: p.detach() for n, p in wanted.items()}
    rest = {n: p.detach() for n, p in model.named_parameters() if n not in wanted} | dict(
        model.named_buffers()
    )

    def loss(parameters: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        out: Any = torch.func.functional_call(
            model, parameters | rest, (), {"input_ids": ids[None], "use_cache": False}
        )
        return losses(out.logits, labels[None])[0]

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run() -> None:
        for _, ids, labels in work.padded():
            with torch.no_grad():
                project(gradients(chosen, ids, labels))

    return run


def opacus(work: Work, kind: str) -> Arm:
    from opacus import GradSampleModule  # type: ignore[import-not-found]

    model, wanted, project = _tracked(work, kind)
    model.train()  # it hooks nothing otherwise; these models have no dropout
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)

    def run() -> None:
        for _, ids, labels in work.padded():
            losses(wrapped(input_ids=ids, use_cache=False).logits, labels).sum().backward()
            with torch.no_grad():
                project({n: p.grad_sample for n, p in wanted.items()})
            for p in wanted.values():
                p.grad = p.grad_sample = None  # type: ignore[attr-defined]

    return run


def dattri(work: Work, kind: str) -> Arm:
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors  # type: ignore[import-not-found]
    from dattri.algorithm.block_projected_if.core.hook import HookManager  # type: ignore[import-not-found]

    model = work.lora() if kind == "lora" else work.linear()
    names = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and ("lora_" in n if kind == "lora" else n.endswith("_proj"))
    ]
    shared = {"device": str(work.device), "proj_max_batch_size": 64}
    compressors = setup_model_compressors(
        model,
        names,
        sparsifier_kwargs={
            **shared,
            "proj_dim": 8 if kind == "lora" else 16,
            "proj_type": "normal",
        },
        projector_kwargs={**shared, "proj_dim": -1, "proj_type": "identity"},
        sample_inputs={"input_ids": next(work.padded())[1]},
        device=str(work.device),
    )
    hooks = HookManager(model, names, device=str(work.device))
    hooks.set_compressors(compressors)

    def run() -> None:
        for _, ids, labels in work.padded():
            model.zero_grad()
            losses(model(input_ids=ids, use_cache=False).logits, labels).sum().backward()
            with torch.no_grad():
                torch.cat([g.flatten(1) for g in hooks.get_compressed_grads()], 1)

    return run


def bergson(work: Work, kind: str, dim: int, target: str = "per_module") -> Arm:
    model: Any = work.lora() if kind == "lora" else work.linear()
    names = (
        {
            n
            for n, m in model.base_model.named_modules()
            if isinstance(m, nn.Linear) and "lora_" in n
        }
        if kind == "lora"
        else None
    )
    return bergson_index(model, work.rows, work.batches, work.folder / "index", dim, target, names)


def bergson_index(
    model: Any,
    rows: Rows,
    batches: Sequence[np.ndarray],
    folder: Path,
    dim: int,
    target: str = "per_module",
    names: set[str] | None = None,
) -> Arm:
    """Writes its index of the rows' gradients, projected to dim x dim per module, under `folder`
    plus ".part".
    """
    from bergson import GradientProcessor, IndexConfig, collect_gradients  # type: ignore[import-not-found]
    from datasets import Dataset  # type: ignore[import-not-found]

    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    data = Dataset.from_list(
        [{"input_ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in rows]
    )
    places = [[int(i) for i in batch] for batch in batches]
    config = IndexConfig(
        run_path=str(folder),
        projection_dim=dim,
        projection_target=target,
        loss_reduction="mean",
        token_batch_size=2048,
    )

    def run() -> None:
        shutil.rmtree(config.partial_run_path, ignore_errors=True)
        config.partial_run_path.mkdir(parents=True)
        processor = GradientProcessor(projection_dim=dim, projection_target=target)
        collect_gradients(model, data, processor, config, batches=places, target_modules=names)

    return run


def bergson_scores(
    model: Any, rows: Rows, targets: Rows, batches: Callable[[Rows], Sequence[np.ndarray]]
) -> dict[str, Tensor]:
    """Products and cosines [n, m] of its rows, 16 x 16 for each linear layer of the blocks, all
    side by side.
    """
    from bergson.data import load_gradients  # type: ignore[import-not-found]

    found, names = (
        [],
        {
            name
            for name, module in model.base_model.named_modules()
            if isinstance(module, nn.Linear)
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, side in (("pool", rows), ("target", targets)):
            bergson_index(model, side, batches(side), Path(folder) / name, 16, names=names)()
            found.append(
                torch.from_numpy(
                    np.array(load_gradients(f"{folder}/{name}.part"), dtype=np.float32)
                )
            )
    unit = [nn.functional.normalize(side, dim=1) for side in found]
    return {"dot": found[0] @ found[1].T, "cosine": unit[0] @ unit[1].T}


def logix(work: Work, kind: str) -> Arm:
    import yaml  # type: ignore[import-untyped]
    from logix import LogIX  # type: ignore[import-not-found]
    from logix.config import LoRAConfig  # type: ignore[import-not-found]

    model = work.lora() if kind == "lora" else work.linear()
    settings = work.folder / "config.yaml"
    settings.write_text(yaml.safe_dump({"root_dir": str(work.folder)}))
    log = LogIX("bench", config=str(settings))
    log.watch(
        model,
        type_filter=[nn.Linear],
        name_filter=["lora_"] if kind == "lora" else ["self_attn", "mlp"],
    )
    if kind != "lora":
        log.add_lora(lora_config=LoRAConfig(rank=16))
    log.setup({"grad": ["log"]})
    log.save(True)

    def run() -> None:
        for old in Path(log.log_dir).glob("log_rank*"):
            old.unlink()
        for batch, ids, labels in work.padded():
            with log(data_id=[str(i) for i in batch]):
                model.zero_grad()
                losses(model(input_ids=ids, use_cache=False).logits, labels).sum().backward()
        log.finalize()

    return run


def less(work: Work, d: int) -> Arm:
    model, wanted, _ = _tracked(work, "lora")
    parameters = list(wanted.values())
    size = sum(p.numel() for p in parameters)
    generator = torch.Generator(work.device).manual_seed(0)
    m = torch.randn(size, device=work.device, generator=generator) * 1e-3
    v = torch.rand(size, device=work.device, generator=generator) * 1e-6
    kept = _signs(size, d, work.device) if d <= 1024 else None
    block = 128

    def project(rows: Tensor) -> Tensor:
        if kept is not None:
            return rows @ kept
        return torch.cat(
            [rows @ _signs(size, block, work.device, column) for column in range(0, d, block)], 1
        )

    def run() -> None:
        held: list[Tensor] = []
        for k, row in enumerate(work.rows):
            ids, labels = pad([row], work.device)
            losses(model(input_ids=ids, use_cache=False).logits, labels).sum().backward()
            g = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
            model.zero_grad()
            held.append((0.9 * m + 0.1 * g) / torch.sqrt(0.999 * v + 0.001 * g * g + 1e-8))
            if len(held) == 16 or k + 1 == len(work.rows):
                project(torch.stack(held))
                held = []

    return run


MAKERS: dict[str, Callable[[Work], Arm]] = {
    "lora-vmap-1024": lambda work: vmap_grad(work, "lora"),
    "lora-opacus-1024": lambda work: opacus(work, "lora"),
    "lora-dattri-8x8": lambda work: dattri(work, "lora"),
    "lora-bergson-8x8": lambda work: bergson(work, "lora", 8),
    "lora-bergson-1024": lambda work: bergson(work, "lora", 1024, "global"),
    "lora-logix-whole": lambda work: logix(work, "lora"),
    "lora-less-1024": lambda work: less(work, 1024),
    "lora-less-8192": lambda work: less(work, 8192),
    "linear-vmap-16x16": lambda work: vmap_grad(work, "linear"),
    "linear-opacus-16x16": lambda work: opacus(work, "linear"),
    "linear-dattri-16x16": lambda work: dattri(work, "linear"),
    "linear-bergson-16x16": lambda work: bergson(work, "linear", 16),
    "linear-logix-16x16": lambda work: logix(work, "linear"),
}
