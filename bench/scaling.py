"""What a selection costs at a size nobody here can run: `gradsift plan`'s arithmetic, with GPUs,
disks and networks that are assumed.

Pure arithmetic on `Assumed` (stated) and `Measured` (by bench/scale.py). Bytes and seconds of a
stage are those of gradsift/commands/plan/costs.py, which a test compares; what comes on top is how
many work on it at once, what crosses the network, what the driver holds in memory, and how long the
disk takes to read stored rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

HOUR = 3600.0
METHODS = ("less", "tagcos", "g2is")
SIZES = (1_000_000, 10_000_000, 100_000_000)


@dataclass(frozen=True)
class Assumed:
    """Not measured: a stated model, pool and cluster. Rates per second; bytes; `parameters` are
    those of the base model's products.
    """

    model: str = "8B, the shape of Llama 3: 32 layers, hidden 4,096, keys and values 1,024"
    parameters: float = 7.5e9
    layers: int = 32
    hidden: int = 4096
    keys: int = 1024
    lora_rank: int = 16
    tokens_per_row: int = 400
    text_bytes_per_row: int = 1800
    id_bytes: int = 16
    target_rows: int = 512
    checkpoints: int = 3
    dim: int = 8192
    store_bytes_per_number: int = 2
    budget: float = 0.05
    warmup_share: float = 0.05
    warmup_epochs: float = 4.0
    clusters: int = 100
    kmeans_steps: int = 25
    neighbours: int = 50
    first_cut: float = 1.0
    gpus: int = 8
    gpu_flops: float = 989e12
    utilisation: float = 0.35
    driver_threads: int = 32
    thread_efficiency: float = 0.5
    driver_memory: float = 512e9
    driver_disk: float = 8e12
    disk_bytes: float = 2e9
    network_bytes: float = 1.25e9
    wall_hours: float = 24.0

    @property
    def lora(self) -> int:
        """Numbers of an adapter on q, k, v and o."""
        return self.layers * self.lora_rank * (2 * 2 * self.hidden + 2 * (self.hidden + self.keys))


NOTES = {
    "parameters": "those in matrix products; the embedding is looked up",
    "lora_rank": "the default (attention: q, k, v, o)",
    "checkpoints": "the default",
    "dim": "the default, projected dimensions of a row",
    "store_bytes_per_number": "fp16, the default; 1 = int8",
    "warmup_share": "the default: 5 % of the rows, 4 passes",
    "clusters": "the default of tagcos",
    "first_cut": (
        "share of the rows that a cheap method (rds: one forward pass) lets through before"
        " gradients are taken"
    ),
    "gpu_flops": "dense bf16 peak that the vendor states for one H100",
    "utilisation": "share of the peak that training and gradients reach",
    "thread_efficiency": "what a thread is worth when all of them work, against one alone",
    "driver_threads": "the machine where the command runs: rules and products over stored rows",
    "disk_bytes": "a second, sequential reading, the driver's disk",
    "network_bytes": "a second, 10 Gbit/s at the driver",
    "wall_hours": "what a user waits for one stage before calling it broken",
}


@dataclass(frozen=True)
class Measured:
    """By bench/scale.py, one thread. Seconds per unit, unless said otherwise."""

    # cost of a token's gradient row over that of a plain training step
    gradient_over_training: float
    read_row: float  # pool: one row of a JSONL file
    encode_token: float
    pool_memory_row: float  # bytes
    multiply: float  # fp32 multiply-adds per second in a product of matrices
    influence_multiply: float  # per second, over a store on disk
    kmeans: float  # per row, cluster, step and dimension
    omp: float  # per pick, row and dimension
    knn: float  # per pair of rows and dimension
    safe_byte: float  # hash and fsync, per stored byte
    write_byte: float


def tokens_per_second(a: Assumed, ratio: float = 1.0) -> float:
    """Of one GPU: forward and the gradients of activations are 4 operations per parameter and
    token; a frozen base has no others.
    """
    return a.gpu_flops * a.utilisation / (4 * a.parameters * ratio)


def store_bytes(rows: float, dim: int, each: int, id_bytes: float) -> float:
    return rows * (dim * each + 17 + id_bytes + 4)


def stages(method: str, n: float, a: Assumed, m: Measured) -> list[dict[str, Any]]:
    """The stages of a method over n rows. hours: by the clock; gpu_hours; disk and network: bytes;
    memory: bytes that the driver holds.
    """
    threads, pool = a.driver_threads * a.thread_efficiency, n * m.pool_memory_row

    def line(
        stage: str,
        seconds: float,
        *,
        gpu: float = 0.0,
        disk: float = 0.0,
        network: float = 0.0,
        memory: float = 0.0,
    ) -> dict[str, Any]:
        where = "one GPU" if stage == "warm-up" else f"{a.gpus} GPUs" if gpu else "driver"
        hours = {"hours": seconds / HOUR, "gpu_hours": gpu / HOUR}
        return {
            "stage": stage,
            "where": where,
            **hours,
            "disk": disk,
            "network": network,
            "memory": memory + pool,
        }

    tokens = n * a.tokens_per_row
    found = [
        line("pool", n * m.read_row),
        line(
            "encode", tokens * m.encode_token, disk=8 * tokens + 9 * n, memory=16 * tokens + 9 * n
        ),
    ]
    if a.first_cut < 1:
        forward, rows = tokens / (2 * tokens_per_second(a)), store_bytes(n, a.hidden, 2, a.id_bytes)
        found.append(
            line("first cut", forward / a.gpus, gpu=forward, disk=rows, network=rows + 8 * tokens)
        )
        n, tokens = n * a.first_cut, tokens * a.first_cut
    store = store_bytes(n, a.dim, a.store_bytes_per_number, a.id_bytes)
    each = n * a.dim * a.store_bytes_per_number
    passes = 1 if method == "g2is" else a.checkpoints
    trained = tokens * a.warmup_share * a.warmup_epochs / tokens_per_second(a)
    taken = tokens / tokens_per_second(a, m.gradient_over_training)
    sent = store + 8 * tokens + 9 * n
    slowest = max(
        taken / a.gpus,
        store * (m.safe_byte + m.write_byte),
        sent / a.network_bytes,
        store / a.disk_bytes,
    )
    found += [
        line("warm-up", trained, gpu=trained, disk=a.checkpoints * a.lora * 12),
        line(
            f"gradients x {passes}",
            passes * slowest,
            gpu=passes * taken,
            disk=passes * store,
            network=passes * sent,
        ),
    ]
    if method == "less":
        products = n * a.target_rows * a.dim * passes
        seconds = max(products / (m.influence_multiply * threads), passes * each / a.disk_bytes)
        found.append(
            line("influence", seconds, disk=4 * n * a.target_rows, memory=8 * n * a.target_rows)
        )
    if method == "tagcos":
        found.append(
            line(
                "mean",
                max(n * a.dim * 20e-9 / threads, (passes + 1) * each / a.disk_bytes),
                disk=store,
            )
        )
        steps = a.kmeans_steps + 8
        found.append(
            line(
                "k-means",
                max(
                    n * a.clusters * steps * a.dim * m.kmeans / threads, steps * each / a.disk_bytes
                ),
                memory=12 * n,
            )
        )
        seconds, memory = _matching(n, a, m, threads)
        found.append(line("matching", seconds, memory=memory))
    if method == "g2is":
        found.append(
            line("neighbours", n * n / 2 * a.dim * m.knn / threads, memory=12 * n * a.neighbours)
        )
    chosen = n * a.budget * a.text_bytes_per_row
    found.append(
        line("select", n * 2e-5 + chosen / a.disk_bytes, disk=chosen + 24 * n, memory=100 * n)
    )
    return found


def _matching(n: float, a: Assumed, m: Measured, threads: float) -> tuple[float, float]:
    """(seconds, bytes): one pass over a cluster per pick, read again from disk where it is over 1
    GiB in fp32; chosen atoms, their Gram matrix and its factor in fp64, of a cluster four times the
    mean.
    """
    size, picks = n / a.clusters, n * a.budget / a.clusters
    compute = a.clusters * picks * size * a.dim * m.omp / threads
    reads = (
        a.clusters * picks * size * a.dim * a.store_bytes_per_number / a.disk_bytes
        if size * a.dim * 4 > 1 << 30
        else 0.0
    )
    most = 4 * picks
    return max(compute, reads), 8 * most * a.dim + 16 * most * most + min(
        4 * size * a.dim * 4, 1 << 30
    )


def pressure(stage: dict[str, Any], disk_before: float, a: Assumed) -> dict[str, float]:
    """How much of what is assumed to be there a stage takes; over 1 = it breaks. Disk: with what
    earlier stages left.
    """
    return {
        "time": stage["hours"] / a.wall_hours,
        "memory": stage["memory"] / a.driver_memory,
        "disk": (disk_before + stage["disk"]) / a.driver_disk,
    }


def project(method: str, n: float, a: Assumed, m: Measured) -> dict[str, Any]:
    """Stages, totals, and what breaks, worst first."""
    lines, disk, breaks = stages(method, n, a, m), 0.0, []
    for stage in lines:
        for kind, value in pressure(stage, disk, a).items():
            if value > 1 and (kind != "disk" or stage["disk"] > 0.01 * a.driver_disk):
                breaks.append({"stage": stage["stage"], "of": kind, "times": value})
        disk += stage["disk"]
    total = {
        "hours": sum(s["hours"] for s in lines),
        "gpu_hours": sum(s["gpu_hours"] for s in lines),
        "disk": disk,
        "network": sum(s["network"] for s in lines),
        "memory": max(s["memory"] for s in lines),
    }
    return {"stages": lines, "total": total, "breaks": sorted(breaks, key=lambda b: -b["times"])}


def remedies(a: Assumed) -> dict[str, Assumed]:
    """What a user can change, one at a time and together."""
    changes: dict[str, dict[str, Any]] = {
        "--dim 1024": {"dim": 1024},
        "one checkpoint": {"checkpoints": 1},
        "a proxy model of 1B": {
            "model": "1B",
            "parameters": 1.0e9,
            "layers": 16,
            "hidden": 2048,
            "keys": 512,
        },
        "warm-up on 1 % of the rows": {"warmup_share": 0.01},
        "ten times the clusters": {"clusters": 10 * a.clusters},
        "a first cut to a tenth by `rds`": {"first_cut": 0.1},
    }
    together = {name: value for change in changes.values() for name, value in change.items()}
    return {
        "as assumed": a,
        **{name: replace(a, **change) for name, change in changes.items()},
        "all of these": replace(a, **together),
    }


def report(a: Assumed, m: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in METHODS:
        found[method] = {}
        for n in SIZES:
            changed = {name: project(method, n, other, m) for name, other in remedies(a).items()}
            short = {
                name: {**entry["total"], "breaks": entry["breaks"][:1]}
                for name, entry in changed.items()
            }
            found[method][str(n)] = {**changed["as assumed"], "remedies": short}
    return {
        "assumed": {**asdict(a), "lora": a.lora},
        "notes": NOTES,
        "measured": asdict(m),
        "projected": found,
    }
