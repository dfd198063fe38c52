"""What `bm25` costs: scores of a pool of texts for a hundred target rows, and the turns. No model.

    python bench/words.py [--rows 55000 1000000] [--queries 100] [--shared ../shared] [--json FILE]

Texts are those of the shared general pool, its rows again and again (cut to 400 characters) where
more are asked for; queries are rows spread over it. One process, one after the other, smallest
first, so that `peak_gb` is of the largest yet.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradsift.compute import machine
from gradsift.methods.reading import nearest_by_turns
from gradsift.signals import bm25


def measured(texts: list[str], rows: int, queries: list[str]) -> dict[str, Any]:
    """Seconds of scores and of turns toward 5 % of the rows, and the peak so far."""
    again = rows > len(texts)
    pool = itertools.islice((t[:400] if again else t for t in itertools.cycle(texts)), rows)
    started = time.perf_counter()
    scores = bm25.scores(pool, queries)
    scored = time.perf_counter()
    chosen = nearest_by_turns(scores, ["target"] * len(queries), rows // 20, "rows", "next")
    return {
        "rows": rows,
        "queries": len(queries),
        "score_s": round(scored - started, 1),
        "turns_s": round(time.perf_counter() - scored, 1),
        "chosen": len(chosen),
        "peak_gb": round(machine.peak_bytes() / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[55_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--shared", default="../shared")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with gzip.open(Path(options.shared) / "data" / "pool_general.jsonl.gz", "rt") as lines:
        rows = [json.loads(line)["messages"] for line in lines]
    texts = ["\n".join(message["content"] for message in row) for row in rows]
    queries = texts[:: max(1, len(texts) // options.queries)][: options.queries]
    machine.settle(1)
    found = [measured(texts, count, queries) for count in sorted(options.rows)]
    text = json.dumps({"cpu": machine.cpu_kind(), "runs": found}, indent=1) + "\n"
    print(text, end="")
    if options.json:
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
