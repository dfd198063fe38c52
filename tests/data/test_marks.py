"""Fields that say how a row teaches: switches of the loss, rejected answers, pictures, masks of
tokens.
"""

import json
from pathlib import Path

import pytest

from gradsift.data.chat import reasoning
from gradsift.data.formats import Fields, RowFault, convert, supervised
from gradsift.data.marks.loss import learned, remarks
from gradsift.data.marks.media import media
from gradsift.data.marks.preference import preference
from gradsift.data.pool import Pool, read_pool
from gradsift.errors import DataError, TooManyBadRows

ASKED = {"role": "user", "content": "Which way?"}


def chat(**switch: object) -> dict:
    """A conversation whose first answer carries a switch."""
    return {
        "messages": [
            ASKED,
            {"role": "assistant", "content": "Left.", **switch},
            ASKED,
            {"role": "assistant", "content": "Right."},
        ]
    }


def taught(row: dict, format: str = "messages") -> list[str]:
    return [m.content for m in convert(row, format, Fields()).messages if supervised(m)]


OFF = [
    *({name: 0} for name in ("weight", "loss_weight", "loss_mask", "loss_scale")),
    *({name: False} for name in ("train", "loss", "trainable", "training")),
    *({"weight": value} for value in ("0", "0.0", " 0 ", 0.0, "false", "No", False)),
    {"train": "False"},
    {"trainable": "off"},
    {"lossWeight": 0},
    {"Loss-Mask": "0"},
    {"mask_loss": True},
    {"train": True, "weight": 0},
]
ON = [
    {"weight": 1},
    {"weight": "1.0"},
    {"loss": True},
    {"trainable": "true"},
    {"weight": None},
    {"weight": ""},
    {"weight": float("nan")},
    {"mask_loss": 0},
    {"name": "Ann"},
]


@pytest.mark.parametrize("switch", OFF, ids=str)
def test_a_turn_that_is_switched_off_is_shown_and_not_learned(switch: dict) -> None:
    assert taught(chat(**switch)) == ["Right."]
    row = chat(**switch)
    row["conversations"] = [
        {"from": "gpt", "value": "Left.", **switch},
        {"from": "gpt", "value": "Right."},
    ]
    assert taught(row, "sharegpt") == ["Right."]


def test_a_call_can_be_switched_off() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "loss": False}
    row = {"conversations": [call, {"from": "gpt", "value": "a"}]}
    assert taught(row, "sharegpt") == ["a"]
    row["conversations"][0] = {**call, "loss": True}
    assert taught(row, "sharegpt") == ["", "a"]
    row["conversations"][0] = {**call, "loss": "perhaps"}
    with pytest.raises(RowFault, match="'loss' is 'perhaps'"):
        convert(row, "sharegpt", Fields())


@pytest.mark.parametrize("switch", ON, ids=str)
def test_a_turn_that_is_not_switched_off_is_learned(switch: dict) -> None:
    assert taught(chat(**switch)) == ["Left.", "Right."]


@pytest.mark.parametrize("value", ["maybe", [1, 0], {"a": 1}, -1, "-0.5"], ids=str)
def test_a_switch_that_cannot_be_read_is_a_fault(value: object) -> None:
    with pytest.raises(RowFault, match="turn 2: its 'weight' is") as fault:
        convert(chat(weight=value), "messages", Fields())
    assert fault.value.code == "wrong-type"
    user = {"messages": [{**ASKED, "weight": value}, {"role": "assistant", "content": "a"}]}
    assert taught(user) == ["a"]


def test_keys_that_look_like_switches_are_named() -> None:
    for key in (
        "no_loss",
        "ignore",
        "masked",
        "mask",
        "weights",
        "tokenWeights",
        "learnIt",
        "supervised",
        "train_detail",
    ):
        assert learned({key: False})
        assert [repr(key) in said for said in remarks({key: False})] == [True], key
    for key in ("constraint", "tool_calls", "reasoning_content", "name", "strained", "labels_url"):
        assert remarks({key: False}) == [], key
    assert "read as 1" in remarks({"weight": 0.5})[0] and remarks({"weight": 1}) == []
    assert "true = the turn is not learned" in remarks({"mask_loss": False})[0]


def pool_of(folder: Path, rows: list[dict], **options: object) -> Pool:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pool([path], **options)  # type: ignore[arg-type]


def test_a_pool_warns_of_switches_it_does_not_read(tmp_path: Path) -> None:
    rows = [chat(), chat(no_loss=True), chat(weight=0), chat(no_loss=False)]
    warnings = pool_of(tmp_path, rows).warnings
    assert len(warnings) == 1
    assert warnings[0].startswith("2 rows have 'no_loss' in an assistant turn, which is not read")
    assert "loss_weight" in warnings[0]
    assert not pool_of(tmp_path, [chat(weight=0)]).warnings


# --- rejected answers

DPO = {"chosen": "Oslo", "rejected": "Go away."}
TURN = {"role": "assistant", "content": "a"}
JUDGED: dict[str, dict] = {
    "pair": {"prompt": "q", **DPO},
    "pair without prompt": DPO,
    "pair of chats": {"prompt": [ASKED], "chosen": [TURN], "rejected": [TURN]},
    "pair beside a chat": {**chat(), **DPO},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "context"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "alpaca pair": {"instruction": "q", "input": "", **DPO},
    "ranking": {"instruction": "q", "output": ["good", "bad"]},
    "swift": {**chat(), "rejected_response": "no"},
    "openai": {
        "input": {"messages": [ASKED]},
        "preferred_output": [TURN],
        "non_preferred_output": [TURN],
    },
    "kto": {"prompt": "q", "completion": "a", "label": False},
    "kto chat": {**chat(), "label": False},
    "kto tag": {"instruction": "q", "output": "a", "kto_tag": False},
    "kto text": {"prompt": "q", "completion": "a", "label": "False"},
    "kto number": {"instruction": "q", "output": "a", "kto_tag": 0},
    "kto number text": {**chat(), "desirable": "0"},
    "kto answer": {"question": "q", "answer": "a", "label": "undesirable"},
    "not chosen": {**chat(), "chosen": False},
    "refused": {**chat(), "rejected": True},
    "refused text": {"instruction": "q", "output": "a", "is_rejected": "yes"},
    "short pair": {"prompt": "q", "chosen": "Yes", "rejected": "No"},
    "short pair beside a chat": {**chat(), "chosen": "Oslo", "rejected": "5"},
    "rewards": {"prompt": "q", "completions": ["a", "b"], "rewards": [0.5, 1.0]},
    "ranks": {"prompt": "q", "answers": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]},
    "steps": {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
    "two": {"question": "q", "response_j": "a", "response_k": "b"},
    "arena": {"winner": "model_a", "conversation_a": [ASKED, TURN], "conversation_b": [ASKED]},
}


@pytest.mark.parametrize("name", JUDGED)
def test_rows_with_rejected_answers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    row = JUDGED[name]
    assert preference(row)
    with pytest.raises((DataError, TooManyBadRows), match="preference") as error:
        pool_of(tmp_path, [row] * 30)
    assert "not supported yet" in str(error.value)


def test_one_preference_row_among_others_is_set_aside(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, [chat()] * 40 + [JUDGED["kto chat"]])
    assert pool.funnel["quarantined:preference"] == 1
    assert pool.dropped[0].line == 41 and "'label'" in pool.dropped[0].reason


@pytest.mark.parametrize(
    "row",
    [
        {**chat(), "rejected": None, "chosen": None},
        {**chat(), "rejected": [], "score_rejected": 0.25},
        {"text": "a film", "label": True},
        {**chat(), "label": 3},
        {**chat(), "label": True},
        {"instruction": "q", "output": "a", "chosen": "true", "rejected": "False"},
        {"instruction": "q", "output": "a", "rejected": "0", "is_rejected": "no"},
        {**chat(), "rejected": "none", "chosen": "a"},
        {**chat(), "rejected_by": "none", "reject_reason": "n/a"},
        {**chat(), "rejectedBy": "Ann", "reject_reason": "too long", "rejected_at": "2024-01-01"},
        {**chat(), "rejected_count": "12", "rejected_id": "x7"},
        {**chat(), "label": "bad"},
        {**chat(), "label": "no", "chosen": 0},
        {**chat(), "label": "sports"},
        {"instruction": "q", "output": "a", "score": 0.5, "rating": [1, 2]},
        {"prompt": "q", "completion": "a", "answer_1": "x"},
    ],
    ids=str,
)
def test_rows_with_one_answer_are_no_preference_rows(row: dict) -> None:
    assert preference(row) is None


@pytest.mark.parametrize("field, good, bad", [("label", True, False), ("kto_tag", "1", "0")])
def test_good_rows_alone_are_learned(field: str, good: object, bad: object, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": f"{i}", field: good} for i in range(30)]
    pool = pool_of(tmp_path, rows)
    assert len(pool) == 30 and not pool.warnings
    for among in ([*rows, {**rows[0], field: bad}], [{**rows[0], field: bad}, *rows]):
        with pytest.raises(DataError, match="preference rows"):
            pool_of(tmp_path, among)


def test_a_mapping_says_which_answer_is_learned(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, [JUDGED["pair"]], mapping={"completion": "chosen"})
    assert [message.content for message in pool[0].messages] == ["q", "Oslo"]
    both = {"chosen": [ASKED, TURN], "rejected": [ASKED, TURN]}
    pool = pool_of(tmp_path, [both], mapping={"messages": "chosen"})
    assert [message.role for message in pool[0].messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    "field, values", [("label", (0, 1)), ("label", ("0", "1")), ("label", ("bad", "good"))]
)
@pytest.mark.parametrize("answered", ["chat", "alpaca", "completion", "answer"])
def test_a_mark_that_may_judge_is_told(
    field: str, values: tuple, answered: str, tmp_path: Path
) -> None:
    def row(text: str) -> dict:
        return {
            "chat": {"messages": [ASKED, {"role": "assistant", "content": text}]},
            "alpaca": {"instruction": "q", "output": text},
            "completion": {"prompt": "q", "completion": text},
            "answer": {"question": "q", "answer": text},
        }[answered]

    mapping = {"instruction": "question", "output": "answer"} if answered == "answer" else None
    rows = [{**row(f"a{i}"), field: value} for i, value in enumerate(values)]
    pool = pool_of(tmp_path, rows, mapping=mapping)
    assert len(pool) == 2
    assert any(f"{field!r} of 0 or 1" in said for said in pool.warnings), pool.warnings
    assert not pool_of(tmp_path, [row("a")], mapping=mapping).warnings


# --- pictures


@pytest.mark.parametrize(
    "field, value",
    [
        ("images", ["x.jpg"]),
        ("image", "x.jpg"),
        ("image", {"bytes": None, "path": "x.jpg"}),
        ("image", {"bytes": b"\x89PNG", "path": None}),
        ("videos", ["v.mp4"]),
        ("audio", {"array": [0.0], "sampling_rate": 16000}),
        ("audios", [{"path": "a.wav"}]),
        ("pixel_values", [[0.0, 1.0]]),
    ],
)
def test_rows_with_pictures_are_set_aside_by_name(field: str, value: object) -> None:
    for row, format in (
        ({**chat(), field: value}, "messages"),
        ({"instruction": "q", "output": "a", field: value}, "alpaca"),
        ({"text": "t", field: value}, "text"),
        ({"input_ids": [1, 2], "labels": [1, 2], field: value}, "tokenised"),
        ({"messages": [{**ASKED, field: value}, TURN]}, "messages"),
    ):
        with pytest.raises(RowFault, match=f"'{field}'") as fault:
            convert(row, format, Fields())
        assert fault.value.code == "not-text"


@pytest.mark.parametrize(
    "value",
    [
        *(None, [], "", [None], [""], {"bytes": None, "path": None}, 0),
        *("none", "None", "N/A", "nan", "null", "[]", "false", "True", "no", "3", "0.5"),
        *(["none"], {"path": "n/a"}),
    ],
    ids=str,
)
def test_empty_fields_of_pictures_are_no_pictures(value: object) -> None:
    assert media({"images": value}) is None
    assert taught({**chat(), "images": value, "image_url": "https://x/y"}) == ["Left.", "Right."]


@pytest.mark.parametrize(
    "part, named",
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "image", "text": None}, "'image'"),
        ({"type": "input_audio", "input_audio": {"data": "x"}}, "'input_audio'"),
        ({"type": "text", "text": "t", "image": "x.jpg"}, "'text'"),
        ({"url": "x"}, "the fields 'url'"),
        (3, "a number"),
    ],
    ids=str,
)
def test_a_part_that_is_no_text_is_named(part: object, named: str) -> None:
    row = {"messages": [{"role": "user", "content": [part]}, TURN]}
    with pytest.raises(RowFault, match=named) as fault:
        convert(row, "messages", Fields())
    assert fault.value.code == "not-text"


# --- tokens


def tokens(**row: object) -> tuple[list[int], list[int]]:
    found = convert({"input_ids": [1, 2, 3, 4], **row}, "tokenised", Fields()).tokens
    assert found is not None
    return list(found[0]), list(found[1])


PLAIN = ([1, 2, 3, 4], [-100, -100, 3, 4])


@pytest.mark.parametrize(
    "row",
    [
        {"labels": PLAIN[1]},
        {"labels": PLAIN[1], "attention_mask": [1, 1, 1, 1]},
        {"labels": PLAIN[1], "attention_mask": [True] * 4, "position_ids": [0, 1, 2, 3]},
        {"labels": PLAIN[1], "attention_mask": [7, 7, 7, 7], "seq_lens": [4]},
        {"completion_mask": [0, 0, 1, 1]},
        {"assistant_masks": [0, 0, 1, 1]},
        {"response_mask": [0, 0, 1, 1]},
        {"labels": [1, 2, 3, 4], "completion_mask": [0, 0, 1, 1]},
        {"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 0, 1, 1]},
    ],
    ids=str,
)
def test_masks_say_what_is_learned(row: dict) -> None:
    assert tokens(**row) == PLAIN


@pytest.mark.parametrize("left, right", [(3, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize("label", [-100, 9])
def test_padding_is_cut_with_its_labels(left: int, right: int, label: int) -> None:
    def padded(values: list[int], fill: int) -> list[int]:
        return [fill] * left + values + [fill] * right

    assert (
        tokens(
            input_ids=padded(PLAIN[0], 9),
            labels=padded(PLAIN[1], label),
            attention_mask=padded([1] * 4, 0),
            position_ids=padded([0, 1, 2, 3], 1),
        )
        == PLAIN
    )


@pytest.mark.parametrize(
    "row, code, said",
    [
        ({"labels": PLAIN[1], "attention_mask": [1, 0, 1, 1]}, "wrong-type", "leaves out token 2"),
        ({"labels": PLAIN[1], "attention_mask": [1, 1]}, "wrong-type", "4 input_ids but 2"),
        ({"labels": PLAIN[1], "attention_mask": [0] * 4}, "no-answer", "every token"),
        ({"labels": PLAIN[1], "attention_mask": [[1] * 4]}, "wrong-type", "whole numbers"),
        ({"labels": PLAIN[1], "attention_mask": [1, 1, 2, 2]}, "packed", "2 documents"),
        ({"labels": PLAIN[1], "position_ids": [0, 1, 0, 1]}, "packed", "again at token 3"),
        ({"labels": PLAIN[1], "position_ids": [0, 2, 4, 6]}, "wrong-type", "one by one"),
        ({"labels": PLAIN[1], "seq_lens": [2, 2]}, "packed", "2 documents"),
        ({"labels": PLAIN[1], "cu_seqlens": [0, 2, 4]}, "packed", "2 documents"),
        ({"labels": PLAIN[1], "document_ids": [0, 0, 1, 1]}, "packed", "2 documents"),
        ({"labels": [-1, -1, 3, 4]}, "wrong-type", "has the label -100"),
        ({"labels": [2, 3, 4, -100]}, "wrong-type", "shifted by one token"),
        ({"completion_mask": [0, 0, 2, 1]}, "wrong-type", "0 and 1"),
        ({"completion_mask": [0, 1]}, "wrong-type", "4 input_ids but 2"),
        ({"completion_mask": [0] * 4}, "no-answer", "supervised"),
        ({}, "missing-field", "no field 'labels'"),
    ],
    ids=str,
)
def test_tokens_that_cannot_be_used_are_named(row: dict, code: str, said: str) -> None:
    with pytest.raises(RowFault, match=said) as fault:
        tokens(**row)
    assert fault.value.code == code


def test_tokens_without_labels_are_told_what_they_lack(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Add `labels`"):
        pool_of(tmp_path, [{"input_ids": [1, 2], "attention_mask": [1, 1]}])
    masked = pool_of(tmp_path, [{"input_ids": [1, 2], "completion_mask": [0, 1]}])
    assert masked.formats == {masked.names[0]: "tokenised"}


def test_masks_of_tokens_that_are_not_read_are_named(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]}
    quiet = {"response_mask": [0, 1, 1], "loss": 0.5, "weight": 1, "masked_by": "x"}
    assert not pool_of(tmp_path, [{**row, **quiet}]).warnings
    for name in ("prompt_mask", "labels_mask", "special_tokens_mask", "loss_weights", "lossMask_"):
        warnings = pool_of(tmp_path, [{**row, name: [0, 1, 0]}]).warnings
        assert len(warnings) == 1, name
        assert f"{name!r} beside input_ids, which is not read" in warnings[0]


@pytest.mark.parametrize(
    "key", ["thought", "thoughts", "cot", "rationale", "reasoningContent", "chain_of_thought"]
)
def test_reasoning_under_a_name_that_is_not_read_is_named(key: str, tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", key: "because"},
        ]
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    (warning,) = read_pool([tmp_path / "p.jsonl"]).warnings
    assert repr(key) in warning and "'reasoning_content'" in warning


def test_reasoning_that_is_read_and_empty_fields_are_no_remark() -> None:
    for key in ("reasoning_content", "thinking", "reasoning", "name", "reasoning_effort"):
        assert reasoning.remarks({key: "because"}) == []
    assert reasoning.remarks({"reasoning": "because", "thoughts": "because"}) == []
    for empty in (None, "", " ", [], True, 3):
        assert reasoning.remarks({"thought": empty}) == []
