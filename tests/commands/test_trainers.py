"""The written trainer files: the TRL script trains for real, and the other two name the fields that
the rows have.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gradsift.commands.select.outputs import write_outputs
from gradsift.config import EncodeSettings
from gradsift.data.encode import encode
from gradsift.data.pool import read_pool
from gradsift.types import Subset

TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|{{ m['role']"
    " }}|>{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif"
    " %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
    ),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a token that ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(
        models.BPE(vocab={symbol: place for place, symbol in enumerate(alphabet)}, merges=[])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True) for text in ("<|end|>", "<pad>")])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def model_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    torch.manual_seed(0)
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        **size,
    )
    config.pad_token_id = tokenizer.pad_token_id
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "drei?"},
    {"role": "assistant", "content": "3 é"},
    {"role": "user", "content": "thanks"},
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [
        {
            "instruction": "Add.",
            "input": "1 + 1",
            "output": "2",
            "system": "Be brief.",
            "history": [["hi", "ho"]],
        },
        {"instruction": "Say hi\u2028now.", "input": "", "output": "hi", "extra": 7},
    ],
    "messages": [
        {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "add"}}]},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
            ]
        },
        {"messages": [*TURNS[:2], {**TURNS[2], "weight": 0}, *TURNS[3:5]]},
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": "what is 1 + 1?"},
                {
                    "from": "function_call",
                    "value": '{"name": "add", "arguments": {"a": 1, "b": 1}}',
                },
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "two"},
            ],
            "system": "Be brief.",
            "tools": '[{"type": "function", "function": {"name": "add"}}]',
        },
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ],
    "prompt-completion": [
        {"prompt": "The sum is ", "completion": "2."},
        {"prompt": "", "completion": "alone<|end|>"},
    ],
    "text": [{"text": "All of this is learned."}, {"text": "And this, é."}],
    "tokenised": [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
    ],
}
ROWS["prompt-completion turns"] = [
    {"prompt": TURNS[:4], "completion": TURNS[4:5]},
    {"prompt": TURNS[1:2], "completion": TURNS[2:3]},
]
# what others call the fields, and what says which turns and tokens are learned
ROWS["other names"] = [
    {"query": "How are you?", "response": "Well.", "system": "Be kind.", "history": [["a", "b"]]},
    {"query": "And now?", "response": "Still.", "history": [{"user": "c", "assistant": "d"}]},
]
ROWS["dolly"] = [{"instruction": "Add.", "context": "1 and 1", "response": "2"}]
ROWS["a context of ours"] = [{"instruction": "Add.", "context": "1 and 1", "output": "2"}]
ROWS["pairs"] = [{"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "gpt": "d"}]}]
ROWS["mixed names"] = [
    {
        "system": "Be kind.",
        "conversations": [
            {"role": "Human", "value": "Hello."},
            {"from": "GPT", "content": ["Good ", {"type": "output_text", "text": "day."}]},
        ],
    },
]
ROWS["texts of turns"] = [{"messages": json.dumps(TURNS[:3]), "system": "Be kind."}]
ROWS["switches"] = [
    {
        "messages": [
            {"role": "user", "content": "Which way?"},
            {"role": "assistant", "content": "Left.", **switch},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Right."},
        ]
    }
    for switch in ({"loss": False}, {"lossWeight": "0.0"}, {"mask_loss": True}, {"train": "yes"})
]
# calls as they were written before `tool_calls`, and as some files shorten them
ROWS["old calls"] = [
    {
        "messages": [
            {"role": "user", "content": "add"},
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "add", "arguments": '{"a": 1}'},
            },
            {"role": "function", "name": "add", "content": "1"},
            {"role": "assistant", "content": "One."},
        ],
        "functions": [{"name": "add", "parameters": {}}],
    },
    {
        "messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]},
        ]
    },
]
ROWS["calls of others"] = [
    {
        "messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": "", **calls},
        ]
    }
    for calls in (
        {"tool_calls": [{"name": "add", "args": {"a": 1}, "id": "1", "type": "tool_call"}]},
        {"toolCalls": [{"name": "add", "input": {"a": 1}}]},
        {"tool_call": {"function": {"name": "add", "parameters": {"a": 1}}}},
        {"tool_calls": [{"function": {"arguments": '{"a": 1}', "name": "add"}}]},
        {"function_call": '{"function": {"name": "add"}, "args": "{}"}'},
    )
]
ROWS["texts of calls"] = [
    {
        "conversations": [
            {"from": "human", "value": "add"},
            {"from": "function_call", "value": text},
        ]
    }
    for text in (
        '{"name": "add", "args": {"a": 1}}',
        '{"name": "add", "parameters": {}}\n{"name": "sub", "input": {"b": "c"}}',
        '{"name": "add", "kwargs": {"a": 1}}',
        '{"function": {"name": "add", "kwargs": {"a": 1}}}',
        '{"name": "add", "arguments": null, "id": ""}',
        "add(1)",
    )
]
ROWS["padded tokens"] = [
    {"input_ids": [0, 0, 5, 6, 7], "labels": [0, 0, -100, 6, 7], "attention_mask": [0, 0, 1, 1, 1]},
    {"input_ids": [5, 6, 7, 0], "completion_mask": [0, 0, 1, 1], "attention_mask": [1, 1, 1, 0]},
]


def written(
    folder: Path, rows: list[dict[str, Any]], *, weights: list[float] | None = None, **settings: Any
) -> Path:
    """A selection of all rows, written as a user would have it; returns its folder."""
    path = folder / "pool.jsonl"
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    pool = read_pool(path, mapping=settings.pop("mapping", None))
    assert len(pool) == len(rows)
    given = None if weights is None else np.array(weights)
    write_outputs(
        folder / "out", pool, Subset(indices=np.arange(len(rows)), weights=given), **settings
    )
    return folder / "out"


def script(out: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "written_train_trl", out / "trainers" / "train_trl.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- TRL


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_script_supervises_the_tokens_that_were_scored(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ours, theirs = both(tmp_path, ROWS[name], tokenizer, 400)
    assert theirs == ours


@pytest.mark.parametrize("name", ["messages", "sharegpt", "old calls", "calls of others", "alpaca"])
@pytest.mark.parametrize("settings", [{"tool_calls": "text"}, {"system": "user"}])
def test_the_script_knows_how_calls_and_system_texts_were_given(
    name: str, settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ours, theirs = both(tmp_path, ROWS[name], tokenizer, 400, **settings)
    assert theirs == ours


def test_an_answer_that_the_template_leaves_out_stops_the_script(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    silent = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    module = script(written(tmp_path, ROWS["old calls"], template=silent))
    with pytest.raises(SystemExit, match="leaves out part of an answer"):
        module.make_dataset(tokenizer)


def both(
    folder: Path,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    max_length: int,
    **settings: Any,
) -> tuple[list[Any], list[Any]]:
    """(input_ids, labels that count) of each row, by gradsift.data.encode and by the written
    script; nothing predicts the first.
    """
    module = script(written(folder, rows, max_length=max_length, **settings))
    ours = encode(
        read_pool(folder / "pool.jsonl"),
        tokenizer,
        EncodeSettings(max_length=max_length, **settings),
    )
    assert not ours.codes.any()
    return tuple(
        [(row["input_ids"], row["labels"][1:]) for row in rows]
        for rows in (list(ours), list(module.make_dataset(tokenizer)))
    )  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["text", "prompt-completion"])
def test_a_first_token_is_added_where_the_tokenizer_adds_one(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.add_special_tokens([AddedToken("<s>", special=True)])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    with_start = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>"
    )
    ours, theirs = both(tmp_path, ROWS[name], with_start, 400)
    assert theirs == ours
    assert all(ids[0] == with_start.bos_token_id for ids, _ in ours)


def test_long_rows_are_cut_as_they_were_when_scored(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ours, theirs = both(tmp_path, ROWS["text"], tokenizer, 15)
    assert theirs == ours
    assert max(len(ids) for ids, _ in theirs) == 15


def test_a_template_that_rewrites_turns_stops_the_script(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    content = "{{ m['content'] if loop.last or m['role'] != 'assistant' else '...' }}"
    rewriting = "{% for m in messages %}<|{{ m['role'] }}|>" + content + "<|end|>{% endfor %}"
    module = script(written(tmp_path, [{"messages": TURNS[:5]}], template=rewriting))
    with pytest.raises(SystemExit, match="rewrites earlier turns"):
        module.make_dataset(tokenizer)


def test_the_script_reads_each_file_with_its_names(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = {"instruction": "Sub.", "input": "2 - 1", "context": "none", "output": "1"}
    files = {"plain": plain, "context": ROWS["a context of ours"][0], "dolly": ROWS["dolly"][0]}
    for name, row in files.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    pool = read_pool([tmp_path / f"{name}.jsonl" for name in files])
    write_outputs(tmp_path / "out", pool, Subset(indices=np.arange(len(pool))))
    theirs = [row["labels"] for row in script(tmp_path / "out").make_dataset(tokenizer)]
    assert theirs == [row["labels"] for row in encode(pool, tokenizer)]


def test_a_mapped_and_a_mixed_pool_are_read_by_their_fields(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"question": "Add.", "answer": "2"}, {"question": "Sub.", "answer": "0"}]
    mapping = {"instruction": "question", "output": "answer"}
    module = script(written(tmp_path, rows, mapping=mapping))
    ours = encode(read_pool(tmp_path / "pool.jsonl", mapping=mapping), tokenizer)
    assert [row["labels"] for row in module.make_dataset(tokenizer)] == [
        ours[0]["labels"],
        ours[1]["labels"],
    ]

    for name in ("alpaca", "messages"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in ROWS[name]), encoding="utf-8"
        )
    pool = read_pool([tmp_path / "alpaca.jsonl", tmp_path / "messages.jsonl"])
    written_files = write_outputs(tmp_path / "mixed", pool, Subset(indices=np.arange(len(pool))))
    assert [path.name for path in written_files if path.parent.name == "trainers"] == [
        "train_trl.py"
    ]
    ours = encode(pool, tokenizer)
    theirs = script(tmp_path / "mixed").make_dataset(tokenizer)
    assert [row["labels"] for row in theirs] == [ours[i]["labels"] for i in range(len(pool))]


def test_a_parquet_selection_is_read_too(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"messages": TURNS[1:5]}, {"messages": TURNS[:3]}]),
        tmp_path / "pool.parquet",
    )
    pool = read_pool(tmp_path / "pool.parquet")
    write_outputs(tmp_path / "out", pool, Subset(indices=np.array([1, 0])))
    ours = encode(pool, tokenizer)
    theirs = script(tmp_path / "out").make_dataset(tokenizer)
    assert [row["labels"] for row in theirs] == [ours[0]["labels"], ours[1]["labels"]]


def test_tables_of_calls_cells_and_several_mappings_are_read_too(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [
        {"messages": [*TURNS[:1], {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in (
            {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
            {"type": "function", "function": {"name": "g", "arguments": {"b": "x"}}},
        )
    ]
    notes = pa.array(['{"a": 1}', "null"])
    table = pa.Table.from_pylist(rows)
    table = table.append_column("note", pa.ExtensionArray.from_storage(pa.json_(), notes))
    pq.write_table(table, tmp_path / "calls.parquet")
    (tmp_path / "cells.csv").write_text('\ufeffinstruction,output\n"a, b","c\nd"\n', "utf-8")
    (tmp_path / "qa.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (tmp_path / "own.jsonl").write_text(json.dumps(ROWS["alpaca"][0]) + "\n")
    mapping = {"instruction": "question", "output": "answer"}
    for name, files in (
        ("calls", ["calls.parquet"]),
        ("cells", ["cells.csv"]),
        ("mappings", ["qa.jsonl", "own.jsonl"]),
    ):
        pool = read_pool(
            [tmp_path / file for file in files], mapping=mapping if name == "mappings" else None
        )
        written_files = write_outputs(tmp_path / name, pool, Subset(indices=np.arange(len(pool))))
        ours = encode(pool, tokenizer)
        theirs = script(tmp_path / name).make_dataset(tokenizer)
        assert [row["labels"] for row in theirs] == [row["labels"] for row in ours], name
        only = [path.name for path in written_files if path.parent.name == "trainers"]
        assert (only == ["train_trl.py"]) == (name == "mappings")


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_two_steps_of_the_real_sft_trainer(
    weights: list[float] | None,
    tokenizer: PreTrainedTokenizerFast,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    module = script(written(tmp_path, ROWS["alpaca"], weights=weights))
    model = LlamaForCausalLM.from_pretrained(model_folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = module.make_trainer(
        model,
        tokenizer,
        output_dir=str(tmp_path / "trained"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=0,
    )
    assert type(trainer).__name__ == ("SFTTrainer" if weights is None else "WeightedSFTTrainer")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 2
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert any(
        not torch.equal(before[name], parameter) for name, parameter in model.named_parameters()
    )


def test_the_weighted_loss_is_the_weighted_mean_of_row_losses(
    tokenizer: PreTrainedTokenizerFast, model_folder: Path, tmp_path: Path
) -> None:
    rows = ROWS["alpaca"] + ROWS["alpaca"][:1]
    module = script(written(tmp_path, rows, weights=[1.0, 3.0, 0.0]))
    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    trainer = module.make_trainer(
        model, tokenizer, output_dir=str(tmp_path / "trained"), report_to="none", use_cpu=True
    )
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    assert batch["weight"].tolist() == [0.75, 2.25, 0.0]
    expected = []
    for row, weight in zip(module.make_dataset(tokenizer), (0.75, 2.25, 0.0), strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = LlamaForCausalLM.from_pretrained(model_folder).eval()(input_ids=ids).logits
        expected.append(
            weight * torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).item()
        )
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch))
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_the_script_runs_from_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    out = written(tmp_path, ROWS["messages"][2:], weights=[2.0], model=str(model_folder))
    command = [
        sys.executable,
        str(out / "trainers" / "train_trl.py"),
        "--out",
        "trained",
        "--max-steps",
        "2",
        "--batch-size",
        "1",
    ]
    environment = {
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "trained" / "model.safetensors").exists()


def test_constants_are_data_not_code(tmp_path: Path) -> None:
    hostile = "x\"\n'''\nraise SystemExit('run')\n{{ 7 * 7 }} \\"
    module = script(written(tmp_path, ROWS["text"], model=hostile, template=hostile))
    assert module.MODEL == module.CHAT_TEMPLATE == hostile
    assert module.FORMAT == "text"


# --- LLaMA-Factory


def factory(out: Path) -> dict[str, Any]:
    info = json.loads((out / "trainers" / "dataset_info.json").read_text(encoding="utf-8"))[
        "gradsift"
    ]
    assert (out / "trainers" / info["file_name"]).resolve() == (out / "selected.jsonl").resolve()
    return info


@pytest.mark.parametrize(
    "name, formatting, columns",
    [
        (
            "alpaca",
            "alpaca",
            {
                "prompt": "instruction",
                "query": "input",
                "response": "output",
                "system": "system",
                "history": "history",
            },
        ),
        ("prompt-completion", "alpaca", {"prompt": "prompt", "response": "completion"}),
        ("text", "alpaca", {"prompt": "text"}),
        (
            "sharegpt",
            "sharegpt",
            {"messages": "conversations", "system": "system", "tools": "tools"},
        ),
        ("messages", "openai", {"messages": "messages", "tools": "tools"}),
    ],
)
def test_llama_factory_gets_the_fields_that_the_rows_have(
    name: str, formatting: str, columns: dict[str, str], tmp_path: Path
) -> None:
    info = factory(written(tmp_path, ROWS[name]))
    assert (info["formatting"], info["columns"]) == (formatting, columns)
    keys = {key for row in ROWS[name] for key in row}
    assert set(info["columns"].values()) <= keys
    if formatting != "alpaca":
        tags, turn = info["tags"], ROWS[name][0][columns["messages"]][0]
        assert {tags["role_tag"], tags["content_tag"]} <= set(turn)
        used = {turn[tags["role_tag"]] for row in ROWS[name] for turn in row[columns["messages"]]}
        assert used <= set(tags.values())


def test_llama_factory_is_not_told_of_columns_no_row_has(tmp_path: Path) -> None:
    assert factory(written(tmp_path, [{"instruction": "a", "output": "b"}]))["columns"] == {
        "prompt": "instruction",
        "response": "output",
    }


def test_llama_factory_gets_other_names(tmp_path: Path) -> None:
    info = factory(written(tmp_path, ROWS["other names"][:1]))
    assert info["columns"]["prompt"] == "query" and info["columns"]["response"] == "response"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    info = factory(written(tmp_path, [{"conversations": turns}]))
    assert info["tags"]["role_tag"] == "role" and info["tags"]["assistant_tag"] == "assistant"


def test_plain_chats_need_no_openai_converter(tmp_path: Path) -> None:
    assert factory(written(tmp_path, [{"messages": TURNS[:3]}]))["formatting"] == "sharegpt"


@pytest.mark.parametrize(
    "name",
    ["tokenised", "prompt-completion turns", "pairs", "mixed names", "texts of turns"],
)
def test_what_llama_factory_does_not_read_has_no_entry(name: str, tmp_path: Path) -> None:
    assert not (written(tmp_path, ROWS[name]) / "trainers" / "dataset_info.json").exists()


# --- Axolotl


def axolotl(out: Path) -> dict[str, Any]:
    config = yaml.safe_load((out / "trainers" / "axolotl.yml").read_text(encoding="utf-8"))
    (dataset,) = config["datasets"]
    assert (out / "trainers" / dataset["path"]).resolve() == (out / "selected.jsonl").resolve()
    assert (dataset["ds_type"], config["train_on_inputs"], config["sample_packing"]) == (
        "json",
        False,
        False,
    )
    return dataset


def test_axolotl_chats_name_roles_and_fields(tmp_path: Path) -> None:
    found = axolotl(written(tmp_path, ROWS["sharegpt"]))
    assert (found["type"], found["field_messages"]) == ("chat_template", "conversations")
    assert found["message_property_mappings"] == {"role": "from", "content": "value"}
    assert (found["field_system"], found["field_tools"]) == ("system", "tools")
    assert (found["roles_to_train"], found["train_on_eos"]) == (["assistant"], "turn")
    known = {tag for tags in found["roles"].values() for tag in tags}
    assert {turn["from"] for row in ROWS["sharegpt"] for turn in row["conversations"]} <= known


def test_axolotl_messages(tmp_path: Path) -> None:
    found = axolotl(written(tmp_path, ROWS["messages"]))
    assert (found["field_messages"], found["message_property_mappings"]) == (
        "messages",
        {"role": "role", "content": "content"},
    )
    assert "roles" not in found


def test_axolotl_pairs_and_texts(tmp_path: Path) -> None:
    for name, fields in (
        ("alpaca", ("instruction", "output")),
        ("prompt-completion", ("prompt", "completion")),
    ):
        (tmp_path / name).mkdir()
        found = axolotl(written(tmp_path / name, ROWS[name]))["type"]
        assert (found["field_instruction"], found["field_output"]) == fields
        assert found["no_input_format"] == "{instruction}"
    (tmp_path / "text").mkdir()
    (tmp_path / "tokens").mkdir()
    assert axolotl(written(tmp_path / "text", ROWS["text"]))["type"] == "completion"
    masked = [{**row, "attention_mask": [1] * len(row["labels"])} for row in ROWS["tokenised"]]
    assert axolotl(written(tmp_path / "tokens", masked))["type"] is None


@pytest.mark.parametrize("name", ["tokenised", "prompt-completion turns"])
def test_what_axolotl_does_not_read_has_no_file(name: str, tmp_path: Path) -> None:
    assert not (written(tmp_path, ROWS[name]) / "trainers" / "axolotl.yml").exists()


def test_field_names_cannot_break_out_of_the_yaml(tmp_path: Path) -> None:
    odd = 'a: "b"\n# c\u2028\x85 é 😀'
    found = axolotl(written(tmp_path, [{odd: "x"}], mapping={"text": odd}))
    assert found["field"] == odd
