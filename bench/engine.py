"""What a row of the gradient engine costs, as a ratio to a plain training step of the same
parameters in the same run.

    python bench/engine.py [--rounds 5] [--rows 64] [--arms NAME...] [--peers] [--json FILE] python
    bench/engine.py --device cuda --parameters 300M --dtype bfloat16 --rows 512 --budget 16384
    --peak-tflops 989

Model: random Llama, vocabulary 4096, hidden 256, 4 layers, 4 heads, MLP 688, untied head (or a
larger one of the same proportions, with `--parameters`). Rows: uniform 32..256 tokens, loss on the
second half. Floor: forward and backward with the batch's weight gradients of the same trainable
parameters, length-sorted padded batches of at most 2048 tokens (`--floor-budget`); it yields
nothing per example. Arms and floors take turns within a round, so a busy machine slows all of them;
a ratio is the arm's CPU time (on a GPU: wall time) over the floor's in the same round, and what is
printed is the median (min, max) over the rounds. One thread on a CPU. `goal` is the bound the
project set itself; nothing fails when it is missed.

On a processor where fp32 products go to oneDNN (`gradsift.compute.cpu.matmul`: AMD's
with AVX-512), while the floor's are torch's usual ones, the arms named
"usual" tell what the engine costs with those.

Full linear layers take norms="sketched" (no other library here yields norms); the arm "exact-norms"
tells what exact ones cost.

`--peers` adds what other libraries do (bench/peers.py, docs/benchmarks.md); those that are not
installed are named in `left_out`. `memory`: peak memory that one more pass adds to what the process
held before it, in MB, and its ratio to the floor's; models, moments and maps that an arm keeps from
pass to pass are there before. `store`: rows of these widths written by the product's own writer, a
full shard of 2,048: bytes per row on disk, those of them that are not the row's numbers, and the
writing's share of extracting and writing. With `--peak-tflops`: products and attention counted per
row, and the share of that peak at which they ran.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

# glibc returns every large tensor to the kernel otherwise: page faults are then up to half of what
# is measured, in every arm
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",  # as the product sets them
    "LRU_CACHE_CAPACITY": "64",
    "TQDM_DISABLE": "1",  # of other libraries
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
if any(os.environ.get(k) != v for k, v in _ENVIRONMENT.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_ENVIRONMENT})

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import peers  # noqa: E402
import torch  # noqa: E402
from peers import Arm, Rows  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from gradsift.compute import machine  # noqa: E402
from gradsift.compute.batches import plan_batches  # noqa: E402
from gradsift.compute.cpu import matmul  # noqa: E402
from gradsift.gradients.adam import Adam, FactoredAdam  # noqa: E402
from gradsift.gradients.passes import extract  # noqa: E402
from gradsift.gradients.projection import Projection  # noqa: E402
from gradsift.model.layers import tracked_modules  # noqa: E402
from gradsift.store.rows import RowStore  # noqa: E402

GOALS = {  # arm -> (floor, bound on the ratio)
    "lora-sketch-1024": ("floor-lora", 0.80),
    "lora-adam-sketch-8192": ("floor-lora", 0.85),
    "linear-16x16": ("floor-linear", 0.72),
    "linear-factored-adam-16x16": ("floor-linear", 0.80),
    "linear-adam-16x16": ("floor-linear", 1.10),
    "linear-16x16-bf16": ("floor-linear", 0.42),
}
TWO_SIDED = Projection((16, 16), kind="rademacher", per_module=True)


@dataclass(frozen=True)
class Shape:
    """A random Llama: sizes, and where and in what type it lies."""

    hidden: int = 256
    layers: int = 4
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, parameters: int, device: str, dtype: torch.dtype) -> Shape:
        """The smallest of at least so many parameters: heads of 64, MLP 2.7 times as wide, a layer
        more for every 43 of width.
        """
        return next(
            s
            for h in range(256, 1 << 16, 64)
            if (s := cls(h, max(4, round(h / 43)), device, dtype)).parameters >= parameters
        )

    @property
    def parameters(self) -> int:
        return (
            self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.mlp) + 2 * 4096 * self.hidden
        )

    @property
    def mlp(self) -> int:
        return round(self.hidden * 2.6875 / 8) * 8


def base_model(dtype: torch.dtype | None = None, shape: Shape = Shape()) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=4096,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        intermediate_size=shape.mlp,
    )
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, max_position_embeddings=512, tie_word_embeddings=False)
    )  # type: ignore[arg-type]
    return model.to(shape.device, dtype or shape.dtype).eval()


def lora_model(dtype: torch.dtype | None = None, shape: Shape = Shape()) -> nn.Module:
    model = get_peft_model(
        base_model(torch.float32, shape),
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return model.to(dtype or shape.dtype).eval()


def make_rows(n: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(0)
    rows = []
    for length in rng.integers(32, 257, n):
        ids = rng.integers(0, 4096, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return rows


def floor_batches(rows: Rows, budget: int = 2048) -> list[np.ndarray]:
    return list(plan_batches(np.array([len(r["input_ids"]) for r in rows]), budget))


def floor(model: nn.Module, parameters: list[nn.Parameter], rows: Rows, budget: int = 2048) -> Arm:
    device = next(model.parameters()).device

    def run() -> None:
        for p in model.parameters():
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        for batch in floor_batches(rows, budget):
            ids, labels = peers.pad([rows[i] for i in batch], device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            nn.functional.cross_entropy(logits, labels[:, 1:].flatten()).backward()
            for p in parameters:
                p.grad = None

    return run


def ours(model: nn.Module, rows: Rows, **options: object) -> Arm:
    def run() -> None:
        done = sum(len(batch.indices) for batch in extract(model, rows, **options))  # type: ignore[arg-type]
        assert done == len(rows)

    return run


def make_arms(
    rows: Rows, budget: int, shape: Shape = Shape(), floor_budget: int = 2048
) -> dict[str, Arm]:
    lora, linear = lora_model(shape=shape), base_model(shape=shape)
    lora16, linear16 = lora_model(torch.bfloat16, shape), base_model(torch.bfloat16, shape)
    weights = [p for n, p in lora.named_parameters() if "lora_" in n]
    torch.manual_seed(1)
    m = {
        n: torch.randn_like(p, dtype=torch.float32) * 1e-3
        for n, p in lora.named_parameters()
        if "lora_" in n
    }
    v = {
        n: torch.rand_like(p, dtype=torch.float32) * 1e-6
        for n, p in lora.named_parameters()
        if "lora_" in n
    }
    blocks = [module.weight for module in tracked_modules(linear, "linear").values()]
    squares = {
        n: torch.rand(module.weight.shape) * 1e-6
        for n, module in tracked_modules(linear, "linear").items()
    }  # type: ignore[arg-type,union-attr]
    momenta = {n: torch.randn(square.shape) * 1e-3 for n, square in squares.items()}
    whole: dict[str, Any] = dict(token_budget=budget)
    factored: dict[str, Any] = dict(
        projection=TWO_SIDED, modules="linear", token_budget=budget, norms="sketched"
    )
    arms = {
        "floor-lora": floor(lora, weights, rows, floor_budget),
        "lora-sketch-1024": ours(lora, rows, projection=Projection(1024), **whole),
        "lora-adam-sketch-8192": ours(
            lora, rows, projection=Projection(8192), transform=Adam(m, v, 100), **whole
        ),
        "lora-sketch-1024-bf16": ours(lora16, rows, projection=Projection(1024), **whole),
        "floor-linear": floor(linear, blocks, rows, floor_budget),  # type: ignore[arg-type]
        "linear-16x16": ours(linear, rows, **factored),
        "linear-16x16-exact-norms": ours(linear, rows, **{**factored, "norms": "exact"}),
        "linear-factored-adam-16x16": ours(
            linear, rows, transform=FactoredAdam(squares, 100), **factored
        ),
        "linear-adam-16x16": ours(linear, rows, transform=Adam(momenta, squares, 100), **factored),
        "linear-16x16-bf16": ours(linear16, rows, **factored),
    }
    if machine.prefers_onednn() and shape.device == "cpu":
        arms |= {
            f"{name}-usual": with_usual_products(arms[name])
            for name in ("lora-sketch-1024", "linear-16x16")
        }
    return arms


def with_usual_products(run: Arm) -> Arm:
    """The arm with the matrix products that torch itself would take, as the floor does."""

    def usual() -> None:
        with patch.object(matmul, "prefers_onednn", lambda: False):
            run()

    return usual


# ---- measuring


class Flops(TorchDispatchMode):
    """Counts multiply-adds twice: matrix products and, where torch knows its count, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if func._schema.name == "mkldnn::_linear_pointwise":
            self.total += 2 * args[0].numel() * len(args[1])
        elif count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def added_memory(run: Arm, device: str) -> float:
    """MB that a pass needs at its peak beyond what was held before it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    # what earlier arms freed stays with the process otherwise, and this one's peak would hide in it
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1e3


def _status(field: str) -> int:
    """kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(
    arms: dict[str, Arm], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """({arm: CPU seconds of each round}, {arm: wall seconds})."""
    cpu: dict[str, list[float]] = {n: [] for n in arms}
    wall: dict[str, list[float]] = {n: [] for n in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            gc.collect()
            synchronise(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            synchronise(device)
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - start)
    return cpu, wall


def stored(
    folder: Path, wall_per_row: dict[str, float], rounds: int
) -> dict[str, dict[str, float]]:
    """What a full shard of unit rows costs to write, per row, against extracting that row (seconds,
    of the arm that makes such rows).
    """
    found = {}
    generator = torch.Generator().manual_seed(0)
    n = 2048
    for arm, dim in (("lora-adam-sketch-8192", 8192), ("linear-16x16", 7168)):
        if arm not in wall_per_row:
            continue
        rows = torch.randn(n, dim, generator=generator)
        column = torch.ones(n)
        for dtype in ("float16", "int8"):
            times, path = [], folder / f"{arm}-{dtype}"
            for k in range(rounds):
                path = folder / f"{arm}-{dtype}-{k}"
                store = RowStore.create(
                    path,
                    recipe_digest=f"{k:032x}",
                    ids=[f"row-{i:08d}" for i in range(n)],
                    dim=dim,
                    spec={},
                    shard_rows=n,
                    dtype=dtype,
                )
                start = time.perf_counter()
                store.write(0, rows, norms=column, losses=column, tokens=column.int())
                times.append((time.perf_counter() - start) / n)
            size = sum(f.stat().st_size for f in path.iterdir())
            each = statistics.median(times)
            found[f"{arm}-{dtype}"] = {
                "bytes_per_row": round(size / n, 1),
                "metadata_bytes_per_row": round(
                    size / n - dim * (2 if dtype == "float16" else 1), 1
                ),
                "write_ms_per_row": round(1000 * each, 4),
                "write_share": round(each / (each + wall_per_row[arm]), 4),
            }
    return found


def counted(run: Arm) -> int:
    with Flops() as flops:
        run()
    return flops.total


def figures(
    name: str,
    cpu: dict[str, list[float]],
    wall: dict[str, list[float]],
    rows: Rows,
    memory: dict[str, float],
    flops: dict[str, int],
    peak: float,
) -> dict[str, object]:
    against = floor_of(name)

    def spread(times: dict[str, list[float]]) -> list[float]:
        ratios = [a / f for a, f in zip(times[name], times[against], strict=True)]
        return [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]

    seconds = statistics.median(wall[name])
    made: dict[str, object] = {
        "cpu_ms_per_row": round(1000 * statistics.median(cpu[name]) / len(rows), 2),
        "wall_ms_per_row": round(1000 * seconds / len(rows), 2),
        "tokens_per_s": round(sum(len(row["input_ids"]) for row in rows) / seconds),
        "cpu_ratio": spread(cpu),
        "wall_ratio": spread(wall),
        "floor": against,
        "goal": GOALS.get(name, ("", None))[1],
        "added_mb": round(memory[name]),
        "memory_ratio": round(memory[name] / memory[against], 2),
    }
    if flops:
        made |= {
            "gflop_per_row": round(flops[name] / len(rows) / 1e9, 3),
            "share_of_peak": round(flops[name] / seconds / peak / 1e12, 4),
        }
    return made


def floor_of(arm: str) -> str:
    return GOALS[arm][0] if arm in GOALS else "floor-lora" if "lora" in arm else "floor-linear"


def count(text: str) -> int:
    """300M as a number."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1].upper(), 1)
    return int(float(text.rstrip("kKmMbB")) * scale)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument(
        "--budget", type=int, default=1024, help="padded tokens per batch of the engine"
    )
    parser.add_argument(
        "--floor-budget", type=int, default=2048, help="and of the floor and the peers"
    )
    parser.add_argument("--arms", nargs="*", help="only these, and their floors")
    parser.add_argument("--peers", action="store_true", help="measure other libraries too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of floors, peers and the arms not named bf16",
    )
    parser.add_argument(
        "--parameters", type=count, default=0, help="at least so many, such as 300M"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=0,
        help="the machine's peak in that dtype: count operations, report the share",
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    rows = make_rows(args.rows)
    shape = Shape.of(args.parameters, args.device, getattr(torch, args.dtype))
    arms = make_arms(rows, args.budget, shape, args.floor_budget)
    with tempfile.TemporaryDirectory() as folder:
        left_out: dict[str, str] = {}
        if args.peers:
            work = peers.Work(
                rows,
                floor_batches(rows, args.floor_budget),
                lambda: lora_model(shape=shape),
                lambda: base_model(shape=shape),
                torch.device(args.device),
                Path(folder),
            )
            more, left_out = peers.make_arms(work, args.arms)
            arms |= more
        if args.arms:
            wanted = set(args.arms) | {floor_of(name) for name in args.arms}
            arms = {n: f for n, f in arms.items() if n in wanted}
        elif machine.emulates_bfloat16(args.device):
            left_out |= {
                n: "this CPU has no bfloat16 products (name the arm to run it all the same)"
                for n in arms
                if n.endswith("bf16")
            }
            arms = {n: f for n, f in arms.items() if n not in left_out}
        for run in arms.values():
            run()
        memory = {name: added_memory(run, args.device) for name, run in arms.items()}
        flops = {name: counted(run) for name, run in arms.items()} if args.peak_tflops else {}
        cpu, wall = measure(arms, args.rounds, args.device)
        store = stored(
            Path(folder) / "stores",
            {n: statistics.median(wall[n]) / len(rows) for n in arms},
            args.rounds,
        )
    report = {
        "torch": torch.__version__,
        "cpu": machine.cpu_kind(),
        "device": args.device,
        "dtype": args.dtype,
        "parameters": shape.parameters,
        "rounds": args.rounds,
        "rows": args.rows,
        "token_budget": args.budget,
        "floor_budget": args.floor_budget,
        "load": os.getloadavg(),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peers": peers.versions() if args.peers else {},
        "left_out": left_out,
        "store": store,
        "arms": {
            name: figures(name, cpu, wall, rows, memory, flops, args.peak_tflops) for name in arms
        },
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
