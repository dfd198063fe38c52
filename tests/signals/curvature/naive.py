"""Small models, rows, and automatic differentiation one row at a time: what the fast paths are held
against.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradsift.signals.curvature.passes import uniforms

VOCAB = 64


def base(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
    )
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes})
    ).eval()


def lora() -> nn.Module:
    model = get_peft_model(
        base(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj"])
    )  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, n_inner=24)
    ).eval()


MODELS = {"linear": (base, "linear"), "lora": (lora, None), "gpt2": (gpt2, "linear")}


def make_rows(n: int = 10, seed: int = 0, longest: int = 20) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(5, longest, n):
        ids = rng.integers(0, VOCAB, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return rows


def sampled(
    model: nn.Module, rows: list[dict[str, list[int]]], seed: int
) -> list[dict[str, list[int]]]:
    """The same rows with labels drawn from the model, one row at a time."""
    out = []
    for n, r in enumerate(rows):
        labels, places = (
            list(r["labels"]),
            [t for t in range(1, len(r["labels"])) if r["labels"][t] != -100],
        )
        with torch.no_grad():
            chances = (
                model(input_ids=torch.tensor([r["input_ids"]]))
                .logits[0]
                .softmax(-1)
                .double()
                .cumsum(-1)
            )
        for place, u in zip(places, uniforms(seed, n, len(places)), strict=True):
            labels[place] = int((chances[place - 1] <= u * chances[place - 1, -1]).sum())
        out.append({"input_ids": r["input_ids"], "labels": labels})
    return out


class Naive:
    """Inputs, output gradients and gradients of every tracked weight, row by row, without padding,
    by autograd.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        rows: list[dict[str, list[int]]],
        *,
        whole: bool = False,
    ) -> None:
        modules = dict(model.named_modules())
        self.a: dict[str, list[Tensor]] = {n: [] for n in names}
        self.d: dict[str, list[Tensor]] = {n: [] for n in names}
        self.grads: dict[str, list[Tensor]] = {n: [] for n in names}
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        for r in rows:
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            keep = seen.__setitem__
            hooks = {
                n: lambda m, args, out, n=n, keep=keep: keep(n, (args[0].detach(), out))
                for n in names
            }
            handles = [modules[n].register_forward_hook(hook) for n, hook in hooks.items()]
            labels = torch.tensor(r["labels"])
            logits = model(input_ids=torch.tensor([r["input_ids"]])).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, labels[1:])
            for handle in handles:
                handle.remove()
            wanted = [seen[n][1] for n in names] + [modules[n].weight for n in names]
            found = torch.autograd.grad(loss, wanted)  # type: ignore[arg-type]
            last = len(labels) if whole else int((labels[1:] != -100).nonzero()[-1]) + 1
            for k, n in enumerate(names):
                self.a[n].append(seen[n][0][0, :last].double())
                self.d[n].append(found[k][0, :last].double())
                self.grads[n].append(found[k + len(names)].double())

    def factors(self, name: str, form: str) -> tuple[Tensor, Tensor]:
        def factor(parts: list[Tensor]) -> Tensor:
            if form == "reduce":
                sums = torch.stack([p.sum(0) for p in parts])
                return sums.t() @ sums / len(parts)
            flat = torch.cat(parts)
            return flat.t() @ flat / (len(flat) if form == "expand" else len(parts))

        return factor(self.a[name]), factor(self.d[name])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return (
        float((a.double() - b.double()).abs().max())
        <= tolerance * float(b.double().abs().max()) + 1e-30
    )


def gather(stream: Iterator[tuple[np.ndarray, Tensor]], n: int) -> Tensor:
    parts = list(stream)
    order = np.concatenate([indices for indices, _ in parts])
    assert sorted(order.tolist()) == list(range(n))
    return torch.cat([s for _, s in parts])[torch.from_numpy(order).argsort()]


def naive_scores(inverse: Any, pool: Naive, target: Naive) -> Tensor:
    """[n, m] in fp64."""
    total = torch.zeros(
        len(next(iter(pool.grads.values()))),
        len(next(iter(target.grads.values()))),
        dtype=torch.float64,
    )
    for name in pool.grads:
        p, q = torch.stack(pool.grads[name]), torch.stack(target.grads[name])
        total += (
            p.flatten(1) @ (q if inverse is None else inverse.apply_inverse(name, q)).flatten(1).t()
        )
    return total
