"""Runs `gradsift` commands to be killed: serves orders {"arguments", "log"} (see forks.py). Answers
the exit code.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import peft  # noqa: F401  (imported once, here, for all children)
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import gradsift.commands.select.select  # noqa: F401
from gradsift.cli import app
from tests.faults.forks import serve


def work(order: dict[str, Any]) -> int:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.argv = ["gradsift", *order["arguments"]]
    try:
        app.main()
    except SystemExit as end:
        sys.stderr.flush()
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(work)
