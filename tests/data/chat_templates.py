"""Small real tokenizers and chat templates in the manner of well-known families, for the tests of
encoding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "What is the capital of France? The capital of France is Paris.",
    "user assistant system answer question the a is in of and to it that",
    "Answer: 42\n\nThe answer is 42, because 6 * 7 = 42.\n",
    '{"name": "add", "arguments": {"a": 1, "b": 2}}',
] * 4
Turns = list[tuple[str, str]]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%"
    " endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] +"
    " '<|end_header_id|>\\n\\n' + (m['content'] | trim) + '<|eot_id|>' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%"
    " endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 %"
    " 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif"
    " %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}{{ '<start_of_turn>' +"
    " role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content']"
    " + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else"
    " %}{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{% if m['role'] == 'user' %}\n{{ '<|user|>\\n' + m['content'] +"
    " eos_token }}\n{% elif m['role'] == 'system' %}\n{{ '<|system|>\\n' + m['content'] + eos_token"
    " }}\n{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\\n' + m['content'] + eos_token"
    " }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{%"
    " endif %}\n{% endfor %}"
)
# Thinking of all turns before the last is dropped, and the last turn opens with a thinking block
# even where it has none.
THINKING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% if loop.last %}{% set text = '<think>\\n\\n</think>\\n\\n' + text %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The prompt opens the thinking block that a finished turn does not show.
OPENED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{%"
    " else %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{%"
    " endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
# Rewrites earlier turns too, but marks what the model wrote.
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' }}{% generation"
    " %}{{ (m.content if loop.last else m.content.split('</think>')[-1]) + eos_token }}{%"
    " endgeneration %}{{ '\\n' }}{% else %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token +"
    " '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n<think>'"
    " }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}{%"
    " for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for call in"
    " m.tool_calls or [] %}{% set f = call.function %}{{ '<tool_call>' + f.name + ' ' +"
    " (f.arguments | tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]


@functools.cache
def trained(prefix_space: bool = False) -> str:
    """A byte-level BPE, trained on TEXTS, as JSON."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS, trainer)
    return raw.to_str()


def tokenizer(
    template: str | None, *, bos: bool = True, adds_bos: bool = False, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """A tokenizer with BOS <s>, and the chat markers of SPECIAL as single tokens. adds_bos: plain
    text gets a BOS.
    """
    raw = Tokenizer.from_str(trained())
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>" if bos else None,
        eos_token=eos,
        pad_token="<pad>",
        extra_special_tokens=SPECIAL[3:],
    )
    made.chat_template = template
    return made


def pieces_of(template: str, last_eos: str) -> Callable[[Turns], list[tuple[str, bool]]]:
    """The naive twin: a conversation as (text, learned) pieces, written turn by turn without a
    template engine.
    """
    makers: dict[str, Callable[[str, str], list[tuple[str, bool]]]] = {
        CHATML: lambda role, text: [
            (f"<|im_start|>{role}\n", False),
            (f"{text}<|im_end|>", role == "assistant"),
            ("\n", False),
        ],
        LLAMA3: lambda role, text: [
            (f"<|start_header_id|>{role}<|end_header_id|>\n\n", False),
            (f"{text.strip()}<|eot_id|>", role == "assistant"),
        ],
        GEMMA: lambda role, text: [
            (f"<start_of_turn>{'model' if role == 'assistant' else role}\n", False),
            (f"{text.strip()}<end_of_turn>", role == "assistant"),
            ("\n", False),
        ],
        MISTRAL: lambda role, text: (
            [(f" {text}{last_eos}", True)]
            if role == "assistant"
            else [(f"[INST] {text} [/INST]", False)]
        ),
        ZEPHYR: lambda role, text: [
            (f"<|{role}|>\n", False),
            (f"{text}{last_eos}", role == "assistant"),
            ("\n", False),
        ],
    }
    begins = template.startswith("{{ bos_token }}")

    def pieces(turns: Turns) -> list[tuple[str, bool]]:
        return ([("<s>", False)] if begins else []) + [
            piece for role, text in turns for piece in makers[template](role, text)
        ]

    return pieces
