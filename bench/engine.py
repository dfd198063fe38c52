"""What a row of the gradient engine costs, as a ratio to a plain training step of the same parameters in the same run.

    python bench/engine.py [--rounds 5] [--rows 64] [--arms NAME...] [--json FILE]

Model: random Llama, vocabulary 4096, hidden 256, 4 layers, 4 heads, MLP 688, untied head. Rows: uniform 32..256 tokens, loss on the
second half. Floor: forward and backward with the batch's weight gradients of the same trainable parameters, fp32, length-sorted padded
batches of at most 2048 tokens; it yields nothing per example. Arms and floors take turns within a round, so a busy machine slows all of
them; a ratio is the arm's CPU time over the floor's in the same round, and what is printed is the median (min, max) over the rounds.
One thread. `goal` is the bound the project set itself; nothing fails when it is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

# glibc returns every large tensor to the kernel otherwise: page faults are then up to half of what is measured, in every arm
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
if any(os.environ.get(k) != v for k, v in _ENVIRONMENT.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_ENVIRONMENT})

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from gradsift.gradients import extract, plan_batches  # noqa: E402
from gradsift.model import tracked_modules  # noqa: E402
from gradsift.projection import Projection  # noqa: E402
from gradsift.transforms.adam import Adam, FactoredAdam  # noqa: E402

GOALS = {  # arm -> (floor, bound on the ratio)
    "lora-sketch-1024": ("floor-lora", 0.80),
    "lora-adam-sketch-8192": ("floor-lora", 0.85),
    "linear-16x16": ("floor-linear", 0.72),
    "linear-factored-adam-16x16": ("floor-linear", 0.75),
    "linear-16x16-bf16": ("floor-linear", 0.42),
}


def base_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=688)
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=512, tie_word_embeddings=False)).to(dtype).eval()


def lora_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = get_peft_model(base_model(), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return model.to(dtype).eval()


def make_rows(n: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(0)
    rows = []
    for length in rng.integers(32, 257, n):
        ids = rng.integers(0, 4096, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return rows


def floor(model: nn.Module, parameters: list[nn.Parameter], rows: list[dict[str, list[int]]]) -> Callable[[], None]:
    def run() -> None:
        for p in model.parameters():
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        for batch in plan_batches(np.array([len(r["input_ids"]) for r in rows]), 2048):
            t = max(len(rows[i]["input_ids"]) for i in batch)
            ids, labels = torch.zeros(len(batch), t, dtype=torch.long), torch.full((len(batch), t), -100)
            for k, i in enumerate(batch):
                length = len(rows[i]["input_ids"])
                ids[k, :length], labels[k, :length] = torch.tensor(rows[i]["input_ids"]), torch.tensor(rows[i]["labels"])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()).backward()
            for p in parameters:
                p.grad = None

    return run


def ours(model: nn.Module, rows: list[dict[str, list[int]]], **options: object) -> Callable[[], None]:
    def run() -> None:
        done = sum(len(batch.indices) for batch in extract(model, rows, **options))  # type: ignore[arg-type]
        assert done == len(rows)

    return run


def make_arms(rows: list[dict[str, list[int]]], budget: int) -> dict[str, Callable[[], None]]:
    lora, linear = lora_model(), base_model()
    lora16, linear16 = lora_model(torch.bfloat16), base_model(torch.bfloat16)
    weights = [p for n, p in lora.named_parameters() if "lora_" in n]
    torch.manual_seed(1)
    m = {n: torch.randn_like(p) * 1e-3 for n, p in lora.named_parameters() if "lora_" in n}
    v = {n: torch.rand_like(p) * 1e-6 for n, p in lora.named_parameters() if "lora_" in n}
    two_sided = Projection((16, 16), kind="rademacher", per_module=True)
    blocks = [module.weight for module in tracked_modules(linear, "linear").values()]
    squares = {n: torch.rand(module.weight.shape) * 1e-6 for n, module in tracked_modules(linear, "linear").items()}  # type: ignore[arg-type,union-attr]
    factored = FactoredAdam(squares, 100)
    return {
        "floor-lora": floor(lora, weights, rows),
        "lora-sketch-1024": ours(lora, rows, projection=Projection(1024), token_budget=budget),
        "lora-adam-sketch-8192": ours(lora, rows, projection=Projection(8192), transform=Adam(m, v, 100), token_budget=budget),
        "lora-sketch-1024-bf16": ours(lora16, rows, projection=Projection(1024), token_budget=budget),
        "floor-linear": floor(linear, blocks, rows),  # type: ignore[arg-type]
        "linear-16x16": ours(linear, rows, projection=two_sided, modules="linear", token_budget=budget),
        "linear-factored-adam-16x16": ours(linear, rows, projection=two_sided, transform=factored, modules="linear", token_budget=budget),
        "linear-16x16-bf16": ours(linear16, rows, projection=two_sided, modules="linear", token_budget=budget),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--budget", type=int, default=1024, help="padded tokens per batch of the engine")
    parser.add_argument("--arms", nargs="*", help="only these, and their floors")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = make_rows(args.rows)
    arms = make_arms(rows, args.budget)
    if args.arms:
        arms = {n: f for n, f in arms.items() if n in args.arms or (n.startswith("floor") and any(n[6:] in a for a in args.arms))}
    for run in arms.values():
        run()
    cpu: dict[str, list[float]] = {n: [] for n in arms}
    wall: dict[str, list[float]] = {n: [] for n in arms}
    for _ in range(args.rounds):
        for name, run in arms.items():
            gc.collect()
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - start)
    report = {
        "torch": torch.__version__, "rounds": args.rounds, "rows": args.rows, "token_budget": args.budget,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "arms": {name: figures(name, cpu, wall, args.rows) for name in arms},
    }  # fmt: skip
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


def figures(name: str, cpu: dict[str, list[float]], wall: dict[str, list[float]], rows: int) -> dict[str, object]:
    against = GOALS.get(name, ("floor-lora" if "lora" in name else "floor-linear", None))

    def spread(times: dict[str, list[float]]) -> list[float]:
        ratios = [a / f for a, f in zip(times[name], times[against[0]], strict=True)]
        return [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]

    return {
        "cpu_ms_per_row": round(1000 * statistics.median(cpu[name]) / rows, 2),
        "wall_ms_per_row": round(1000 * statistics.median(wall[name]) / rows, 2),
        "cpu_ratio": spread(cpu), "wall_ratio": spread(wall), "floor": against[0], "goal": against[1],
    }  # fmt: skip


if __name__ == "__main__":
    main()
