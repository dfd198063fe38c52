"""The built-in model `tiny`: a Llama of under a million parameters over bytes, trained from scratch
where it is used.

It learns the families of the playground from a stream of their own questions, the target family
being rare there: it speaks the invented language a little and does not yet translate. Nothing is
downloaded, and nothing is shipped but the recipe: under a minute on two cores.

The training is a few hundred steps, too few for AdamW to leave the unigrams of the answers, so the
matrices are trained with Muon: momentum whose singular values are all set to about one (Jordan et
al. 2024, https://kellerjordan.github.io/posts/muon/), in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gradsift.compute import machine
from gradsift.compute.machine import cache_folder
from gradsift.compute.progress import quiet
from gradsift.config import Settings
from gradsift.errors import ResourceError
from gradsift.model.tiny_tasks import FAMILIES, TARGET_FAMILY, stream
from gradsift.store.atomic import making
from gradsift.store.canonical import canonical_json, recipe_digest

SPECIALS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_THREADS = 2  # fixed, so that the weights do not depend on how many cores the machine has


class TinySettings(Settings):
    """The recipe of `tiny`. `tokens` are padded tokens a step; `target_weight` scales the target
    family's share of the stream; `prompt_weight` is the weight of a prompt token in the loss, where
    an answer token has 1; rates are per step.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 384
    steps: int = 500
    tokens: int = 1024
    lr: float = 5e-3
    weight_decay: float = 0.1
    target_weight: float = 0.1
    prompt_weight: float = 0.2
    seed: int = 0


def tiny_model(
    cache: Path | None = None,
    *,
    settings: TinySettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The folder of the built-in model, which is trained first if it is not there; transformers
    loads it as any local model.

    `cache` defaults to $GRADSIFT_CACHE, else $XDG_CACHE_HOME/gradsift, else ~/.cache/gradsift. The
    folder's name holds a digest of the settings and of the beginning of the training stream, so
    another recipe gets another folder. `progress(step, steps)` is called after every step. The same
    weights for the same torch build and kind of CPU; the process's random state and threads are
    left as they were. Two processes may build at once: the first to finish gives the folder its
    name. Raises ResourceError when the cache cannot be written.
    """
    settings = settings or TinySettings()
    root = cache or cache_folder()
    weights = {
        family.name: (
            family.share * (settings.target_weight if family.name == TARGET_FAMILY else 1.0)
        )
        for family in FAMILIES
    }
    recipe = {
        "settings": settings.canonical(),
        "template": TEMPLATE,
        "stream": list(islice(stream(settings.seed, weights), 400)),
    }
    folder = Path(root) / f"tiny-{recipe_digest(recipe)[:12]}"
    if (folder / "config.json").is_file():
        return folder
    try:
        with making(folder) as temp:
            # before the training: a cache that is not writable is told at once
            tokenizer = _tokenizer()
            model = _train(tokenizer, settings, weights, progress)
            with quiet():
                model.save_pretrained(temp)
                tokenizer.save_pretrained(temp)
            (temp / "recipe.json").write_bytes(canonical_json({**recipe, "stream": None}))
    except OSError as error:
        raise ResourceError(
            f"cannot be written: {error.strerror}",
            where=root,
            remedy="Set GRADSIFT_CACHE to a folder that can.",
        ) from error
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, and the five specials. The specials come first, so a padded id
    is 0.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={text: i for i, text in enumerate([*SPECIALS, *alphabet])}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIALS[0],
        eos_token=SPECIALS[-1],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS[1:-1])})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _filled(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows of about one length in batches, longest first, each with as many as fit: the recipe
    counts steps, so steps are to be full.
    """
    order, batches, at = sorted(range(len(lengths)), key=lambda i: -lengths[i]), [], 0
    while at < len(order):
        rows = max(1, tokens // lengths[order[at]])
        batches.append(order[at : at + rows])
        at += rows
    return batches


def training_batches(
    tokenizer: Any, settings: TinySettings, weights: Mapping[str, float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: ids [b, t], right-padded, and the loss weight [b, t] of each. Rows of about one
    length share a batch.
    """
    source, rng, pad = stream(settings.seed, weights), Random(settings.seed), tokenizer.pad_token_id
    while True:
        chats = list(islice(source, settings.tokens))
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        ids = [torch.tensor(row) for row in tokenizer(texts)["input_ids"]]
        # <|user|>, a token per byte, <|end|>, <|assistant|>
        prompts = [3 + len(chat[0]["content"].encode()) for chat in chats]
        batches = _filled([len(row) for row in ids], settings.tokens)
        rng.shuffle(batches)
        for batch in batches:
            padded = nn.utils.rnn.pad_sequence(
                [ids[i] for i in batch], batch_first=True, padding_value=pad
            )
            weight = padded.ne(pad).float()
            for row, i in enumerate(batch):
                weight[row, : prompts[i]] *= settings.prompt_weight
            yield padded, weight


def _train(
    tokenizer: Any,
    settings: TinySettings,
    weights: Mapping[str, float],
    progress: Callable[[int, int], None] | None,
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        intermediate_size=settings.intermediate,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(config)
        matrices = [
            p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name
        ]
        others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
        muon, adam = (
            _Muon(matrices, settings.weight_decay),
            torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98)),
        )
        try:
            machine.settle(_THREADS)
            for step, (ids, weight) in zip(
                range(1, settings.steps + 1),
                training_batches(tokenizer, settings, weights),
                strict=False,
            ):
                logits = model(input_ids=ids, attention_mask=(weight > 0).long()).logits[:, :-1]
                losses = nn.functional.cross_entropy(
                    logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
                )
                (losses @ weight[:, 1:].flatten() / weight[:, 1:].sum()).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                lr = settings.lr * _schedule(step / settings.steps)
                muon.step(lr)
                adam.param_groups[0]["lr"] = lr
                adam.step()
                model.zero_grad()
                if progress is not None:
                    progress(step, settings.steps)
        finally:
            torch.set_num_threads(threads)
    return model.eval()


def _schedule(done: float) -> float:
    """Share of the top rate: up over 6 %, level to 30 %, straight down to a fiftieth."""
    return max(0.02, min(1.0, done / 0.06, (1 - done) / 0.7))


class _Muon:
    """Muon over matrices (see the module's docstring), those of one shape in one batched product.

    A step's update has singular values of about 1 and is scaled by 0.2 sqrt(longer side), which
    gives its entries the size of an AdamW step of the same rate (Liu et al. 2025, arXiv 2502.16982,
    section 2.2).
    """

    def __init__(
        self, matrices: list[nn.Parameter], weight_decay: float, momentum: float = 0.95
    ) -> None:
        self.weight_decay, self.momentum = weight_decay, momentum
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        self.groups = [(group, [torch.zeros_like(p) for p in group]) for group in shapes.values()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, means in self.groups:
            updates = []
            for p, mean in zip(group, means, strict=True):
                if p.grad is None:
                    raise ValueError("a matrix without gradient")
                mean.lerp_(p.grad, 1 - self.momentum)
                updates.append(_wide(p.grad.lerp(mean, self.momentum)))
            for p, update in zip(group, orthogonal(torch.stack(updates)), strict=True):
                p.mul_(1 - lr * self.weight_decay)
                p.add_(
                    update if update.shape == p.shape else update.mT,
                    alpha=-lr * 0.2 * max(p.shape) ** 0.5,
                )


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def orthogonal(matrices: Tensor) -> Tensor:
    """[k, o, i] with o <= i -> the same singular vectors, singular values near 1 (0.7 to 1.2): five
    Newton-Schulz steps of degree 5.
    """
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x
