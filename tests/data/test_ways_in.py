"""Ways in: cells, folders, patterns, splits, columns of JSON, and fields under other names."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradsift.data.formats import Fields, RowFault, convert, settle
from gradsift.data.pool import Pool, read_pool
from gradsift.data.sources import check_pool, default_name, expanded, holds
from gradsift.errors import DataError, TooManyBadRows, UnknownName, UserError
from tests.data.test_pool import ROWS, lines


def said(pool: Pool) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in example.messages] for example in pool]


def spoken(row: dict, format: str) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in convert(row, format, Fields()).messages]


# --- cells


def test_cells_are_rows_of_texts(tmp_path: Path) -> None:
    text = (
        "\ufeffid,instruction,output\r\n"
        "007,Say it,yes\r\n"
        '8,"Two\nlines, ""quoted""",no \u2028 end\r\n'
        "\r\n"
        '9,,"\u00e9"\r\n'
    )
    (tmp_path / "p.csv").write_text(text, newline="", encoding="utf-8")
    pool = read_pool([tmp_path / "p.csv"])
    assert pool.ids == ["007", "8", "9"] and pool.groups == ["p"] * 3
    assert pool[1].messages[0].content == 'Two\nlines, "quoted"'
    assert pool[1].messages[1].content == "no \u2028 end" and pool[2].messages[1].content == "é"
    assert [pool.place(row).rpartition(":")[2] for row in range(3)] == ["2", "3", "6"]
    assert pool.funnel == {"read": 3, "blank": 1, "duplicates": 0, "usable": 3}


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.tsv", "instruction\toutput\nq, r\ta\n"),
        ("p.csv", 'instruction;output\n"q, r";a\n'),
        ("p.csv", 'instruction,output\n"q, r",a'),
    ],
)
def test_the_separator_is_read_from_the_first_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert said(read_pool([tmp_path / name])) == [[("user", "q, r"), ("assistant", "a")]]


def test_damaged_cells_are_told_by_line(tmp_path: Path) -> None:
    rows = [f"q{i},a{i}" for i in range(60)]
    rows[3], rows[5] = "only one", "one,two,three"
    data = ("instruction,output\n" + "\n".join(rows)).encode() + b"\n\xff,a\n"
    (tmp_path / "p.csv").write_bytes(data + b'z,"never closed\nx,y\n')
    pool = read_pool([tmp_path / "p.csv"], max_bad_rows=5)
    assert [(row.line, row.code) for row in pool.dropped] == [
        (5, "bad-csv"),
        (7, "bad-csv"),
        (62, "not-utf8"),
        (63, "cut-file"),
    ]
    assert len(pool) == 58
    assert any("line 63 is never closed" in text for text in pool.warnings)
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="two columns named 'a'"):
        read_pool([tmp_path / "twice.csv"])


def test_a_quote_inside_a_cell_is_text(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(
        'instruction,output\nThe 5" pipe,"l1\nl2"\n"two\nlines","a ""b"\n6" or "7",a\n9",b\n'
        'The 3" pipe,"l1\nl2"\n'
    )
    pool = read_pool([tmp_path / "p.csv"])
    assert not pool.dropped and not pool.warnings
    assert [tuple(text for _, text in row) for row in said(pool)] == [
        ('The 5" pipe', "l1\nl2"),
        ("two\nlines", 'a "b'),
        ('6" or "7"', "a"),
        ('9"', "b"),
        ('The 3" pipe', "l1\nl2"),
    ]


@pytest.mark.parametrize("end", ['5" x,"cut', 'x,"cut\n', 'x,"cut\nq,a\n', '"x" y,"cut\n""\n'])
def test_a_file_that_ends_within_quotes_is_cut(tmp_path: Path, end: str) -> None:
    (tmp_path / "p.csv").write_text("instruction,output\nq1,a1\nq2,a2\n" + end)
    pool = read_pool([tmp_path / "p.csv"], max_bad_rows=1)
    assert [(row.line, row.code) for row in pool.dropped] == [(4, "cut-file")]
    assert len(pool) == 2 and any("line 4 is never closed" in text for text in pool.warnings)


def test_json_under_the_name_of_cells_is_json(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(lines(ROWS["text"]))
    assert len(read_pool([tmp_path / "p.csv"])) == 7


# --- several files


def filled(folder: Path, names: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in names.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        rows = [{"text": text}]
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_bytes(lines(rows))
    return folder


def test_the_files_of_a_folder_are_one_group(tmp_path: Path) -> None:
    names = {"b.parquet": "2", "a.parquet": "1", "sub/c.parquet": "3", ".hidden.parquet": "4"}
    names |= {"run/run.json": "7", "run/select/selected.jsonl": "8"}
    folder = filled(tmp_path / "shards", {**names, "README.md": "5", "info.json": "6"})
    pool = read_pool([folder])
    assert [messages[0][1] for messages in said(pool)] == ["1", "2", "3"]
    assert set(pool.groups) == {"shards"}
    assert set(read_pool([f"web={folder}"]).groups) == {"web"}
    assert [source.file for source in expanded([folder])] == pool.names


def test_a_pattern_is_one_group(tmp_path: Path) -> None:
    filled(tmp_path / "d", {"part-2.jsonl": "2", "part-1.jsonl": "1", "other.jsonl": "3"})
    pool = read_pool([f"{tmp_path}/d/part-*.jsonl"])
    assert [messages[0][1] for messages in said(pool)] == ["1", "2"]
    assert set(pool.groups) == {"part"}
    assert set(read_pool([f"{tmp_path}/d/*.jsonl"]).groups) == {"d"}
    assert read_pool(**pool.arguments).digest == pool.digest
    filled(tmp_path / "d", {"odd[1].jsonl": "4"})
    assert said(read_pool([f"{tmp_path}/d/odd[1].jsonl"])) == [[("text", "4")]]
    with pytest.raises(UserError, match="names no file"):
        read_pool([f"{tmp_path}/d/*.parquet"])


@pytest.mark.parametrize(
    "names, wrong",
    [
        ([], "no file in it holds rows"),
        (["a.json", "b.txt"], "no file in it holds rows"),
        (["a.jsonl", "b.parquet"], "files of several kinds"),
        (["train-0.parquet", "test-0.parquet"], r"files of several splits \(test, train\)"),
        (["train/0.jsonl", "validation/0.jsonl"], "files of several splits"),
    ],
)
def test_folders_that_say_several_things_are_refused(
    tmp_path: Path, names: list[str], wrong: str
) -> None:
    folder = filled(tmp_path / "d", dict.fromkeys(names, "t"))
    for read in (read_pool, check_pool):
        with pytest.raises(UserError, match=f"is a folder.*{wrong}"):
            read([folder])


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning:datasets.*", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_split_is_named_in_brackets(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}"} for i in range(7)]
    for name in ("train", "test"):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / f"{name}.jsonl").write_bytes(lines(rows[: 5 if name == "train" else 2]))
    datasets.disable_progress_bars()
    assert len(read_pool([f"hf:{tmp_path}/d"])) == 5
    assert len(read_pool([f"hf:{tmp_path}/d[test]"])) == 2
    assert len(read_pool([f"hf:{tmp_path}/d[train[1:3]]"])) == 2
    saved = datasets.DatasetDict({"a": datasets.Dataset.from_list(rows)})
    saved["b"] = datasets.Dataset.from_list(rows[:3])
    saved.save_to_disk(tmp_path / "saved")
    assert len(read_pool([f"hf:{tmp_path}/saved[b]"])) == 3
    with pytest.raises(UnknownName, match="unknown split 'c'"):
        read_pool([f"hf:{tmp_path}/saved[c]"])
    with pytest.raises(UserError) as error:
        read_pool([f"hf:{tmp_path}/d[tset]"])
    assert "network" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="Name its files") as error:
        read_pool([f"hf:{tmp_path}/empty"])
    assert "HF_TOKEN" not in str(error.value)
    names = ("hf:me/data[test]", "hf:me/data:main@v2[train[:5%]]")
    assert [default_name(name) for name in names] == ["data", "data:main"]


# --- columns of tables

CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "lamp"}}}
OTHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def calling(call: dict, properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties}
    return {
        "messages": [
            {"role": "user", "content": "Do it."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "ok"},
            {"role": "assistant", "content": "Done."},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}],
    }


CALLING = [
    calling(CALL, {"query": {"type": "string", "enum": ["a", "b"]}}),
    calling(OTHER, {"city": {"type": "string"}}),
    calling({"type": "function", "function": {"name": "stop", "arguments": {}}}, {}),
]


def test_nulls_that_a_table_adds_to_calls_and_tools_are_not_learned(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(lines(CALLING))
    pq.write_table(pa.Table.from_pylist(CALLING), tmp_path / "p.parquet")
    plain, table = (read_pool([tmp_path / name]) for name in ("p.jsonl", "p.parquet"))
    assert [e.messages for e in table] == [e.messages for e in plain]
    assert [e.tools for e in table] == [e.tools for e in plain]
    # a null that stands in a text was written by someone
    calls = [{"function": {"name": "f", "arguments": {"city": None}}}]
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": calls}]}
    (tmp_path / "q.jsonl").write_bytes(lines([row]))
    assert read_pool([tmp_path / "q.jsonl"])[0].messages[0].extra == {"tool_calls": calls}


def test_arguments_that_are_a_map_are_an_object(tmp_path: Path) -> None:
    function = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    turn = pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("tool_calls", pa.list_(pa.struct([("function", function)]))),
        ]
    )
    call = {"function": {"name": "f", "arguments": [("city", "Oslo")]}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    pq.write_table(
        pa.table({"messages": pa.array([turns], pa.list_(turn))}), tmp_path / "p.parquet"
    )
    message = read_pool([tmp_path / "p.parquet"])[0].messages[0]
    arguments = message.extra["tool_calls"][0]["function"]["arguments"]  # type: ignore[index]
    assert arguments == {"city": "Oslo"}


def json_array(values: list) -> pa.Array:
    texts = pa.array([None if value is None else json.dumps(value) for value in values])
    return pa.ExtensionArray.from_storage(pa.json_(), texts)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_of_json_are_decoded_at_any_depth(tmp_path: Path, suffix: str) -> None:
    turns = [turn for row in CALLING for turn in row["messages"]]
    offsets = pa.array([0, 4, 8, 12], pa.int32())
    functions = pa.StructArray.from_arrays(
        [
            pa.array(["f"] * 3),
            json_array([row["tools"][0]["function"]["parameters"] for row in CALLING]),
        ],
        names=["name", "parameters"],
    )
    tools = pa.StructArray.from_arrays(
        [pa.array(["function"] * 3), functions], names=["type", "function"]
    )
    table = pa.table(
        {
            "messages": pa.ListArray.from_arrays(offsets, json_array(turns)),
            "tools": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), tools),
            "meta": json_array([{"a": None}, 1, None]),
        }
    )
    path = tmp_path / f"p.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "p.jsonl").write_bytes(lines(CALLING))
    plain, decoded = read_pool([tmp_path / "p.jsonl"]), read_pool([path])
    assert [(e.messages, e.tools) for e in decoded] == [(e.messages, e.tools) for e in plain]
    assert [decoded.record(row)["meta"] for row in range(3)] == [{"a": None}, 1, None]


def test_a_column_of_json_that_is_none_costs_its_row(tmp_path: Path) -> None:
    texts = pa.array(['{"a": 1}'] * 30 + ["{not json"])
    table = pa.table(
        {"text": ["t"] * 31, "meta": pa.ExtensionArray.from_storage(pa.json_(), texts)}
    )
    pq.write_table(table, tmp_path / "p.parquet")
    pool = read_pool([tmp_path / "p.parquet"])
    assert len(pool) == 30 and (pool.dropped[0].line, pool.dropped[0].code) == (31, "bad-json")


# --- fields and turns under other names

QA = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    "row, format",
    [
        ({"query": "q", "response": "a"}, "alpaca"),
        ({"instruction": "q", "context": "", "response": "a"}, "alpaca"),
        ({"instruction": "q", "response": "a"}, "alpaca"),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, "sharegpt"),
        ({"conversation": [{"role": "user", "content": "q"}, {"role": "gpt", "content": "a"}]}, ""),
        (
            {"conversations": [{"from": "human", "content": "q"}, {"from": "gpt", "content": "a"}]},
            "",
        ),
        ({"conversations": [{"role": "Human", "value": "q"}, {"role": "GPT", "value": "a"}]}, ""),
        ({"messages": [{"role": "USER", "content": "q"}, {"role": "Model", "content": "a"}]}, ""),
        ({"messages": '[{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]'}, ""),
        (
            {
                "contents": [
                    {"role": "user", "parts": [{"text": "q"}]},
                    {"role": "model", "parts": [{"text": "a"}]},
                ]
            },
            "messages",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
                    {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
                ]
            },
            "",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": "q"}]},
                    {"role": "assistant", "content": ["a"]},
                ]
            },
            "",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": {"value": "q"}}]},
                    {"role": "assistant", "content": {"content_type": "text", "parts": ["a"]}},
                ]
            },
            "",
        ),
    ],
    ids=str,
)
def test_what_is_meant_is_read(tmp_path: Path, row: dict, format: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(lines([row]))
    pool = read_pool([tmp_path / "p.jsonl"])
    assert said(pool) == [QA]
    assert not format or list(pool.formats.values()) == [format]
    assert check_pool([tmp_path / "p.jsonl"])[0] is not None


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "q", "context": "c", "response": "a"}, "q\n\nc"),
        ({"instruction": "q", "context": "c", "output": "a"}, "q\n\nc"),
        ({"query": "q", "context": "c", "response": "a"}, "q\n\nc"),
        ({"query": "q", "context": "c", "output": "a"}, "q\n\nc"),
        ({"query": "q", "input": "c", "response": "a"}, "q\n\nc"),
        ({"instruction": "q", "query": "c", "response": "a"}, "q\n\nc"),
        ({"instruction": "q", "query": "c", "output": "a"}, "q\n\nc"),
        ({"instruction": "q", "input": "c", "context": "other", "output": "a"}, "q\n\nc"),
        ({"instruction": "q", "input": "", "output": "a", "response": "other"}, "q"),
        ({"instruction": "q", "context": None, "response": "a"}, "q"),
    ],
    ids=str,
)
def test_a_question_keeps_all_its_parts(tmp_path: Path, row: dict, asked: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(lines([row]))
    (tmp_path / "named.jsonl").write_bytes(lines([{**row, "system": "S"}]))
    assert said(read_pool([tmp_path / "p.jsonl"])) == [[("user", asked), ("assistant", "a")]]
    named = read_pool([tmp_path / "named.jsonl"])
    assert said(named) == [[("system", "S"), ("user", asked), ("assistant", "a")]]


def test_the_names_of_most_rows_count_and_a_mapping_before_them() -> None:
    theirs = {"query": "q", "context": "c", "response": "a"}
    ours = {"instruction": "q", "output": "a"}
    mapping = {"instruction": "query", "output": "response", "input": "context"}
    assert settle([theirs] * 3 + [ours])[1].mapping == mapping
    assert settle([theirs] + [ours] * 3)[1].mapping == {"input": "context"}
    assert settle([theirs] * 3 + [{**theirs, **ours}])[1].mapping == mapping
    assert settle([ours])[1].mapping == {}
    row = {"instruction": "q", "context": "c", "note": "n", "output": "a"}
    assert settle([row], mapping={"input": "note"})[1].mapping == {"input": "note"}
    assert settle([row], "alpaca")[1].mapping == {"input": "context"}
    asked = {"context": "q", "answer": "a"}
    named = {"instruction": "context", "output": "answer"}
    assert settle([asked], mapping=named)[1].mapping == named
    chat = {"messages": [], "context": "c", "query": "q", "response": "a"}
    assert settle([chat])[0] == "messages" and settle([chat])[1].mapping == {}


def test_system_and_history_are_kept_under_other_names(tmp_path: Path) -> None:
    system = {"system": "S", "history": [["h", "i"], {"user": "j", "assistant": "k"}]}
    (tmp_path / "p.jsonl").write_bytes(lines([{"query": "q", "response": "a", **system}]))
    turns = [("system", "S"), ("user", "h"), ("assistant", "i"), ("user", "j"), ("assistant", "k")]
    assert said(read_pool([tmp_path / "p.jsonl"])) == [[*turns, *QA]]
    row = {"system": "S", "messages": [{"role": "user", "content": "q"}]}
    row["messages"].append({"role": "assistant", "content": "a"})
    assert spoken(row, "messages") == [("system", "S"), *QA]
    assert spoken({**row, "system": 5}, "messages") == QA
    row["messages"].insert(0, {"role": "system", "content": "T"})
    assert spoken(row, "messages") == [("system", "T"), *QA]


def test_a_text_that_is_no_list_of_turns_is_named() -> None:
    for text, wrong in (
        ("hello", "a text that is not JSON"),
        ('{"a": 1}', "the turns are an object"),
    ):
        with pytest.raises(RowFault, match=wrong):
            convert({"messages": text}, "messages", Fields())


# --- mappings


def two(folder: Path) -> tuple[Path, Path]:
    asked = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
    (folder / "qa.jsonl").write_bytes(lines(asked))
    (folder / "alpaca.jsonl").write_bytes(lines(ROWS["alpaca"]))
    return folder / "qa.jsonl", folder / "alpaca.jsonl"


ASKED = {"instruction": "question", "output": "answer"}


def test_a_mapping_is_for_the_files_that_have_its_fields(tmp_path: Path) -> None:
    files = two(tmp_path)
    pool = read_pool(files, mapping=ASKED)
    assert len(pool) == 10 and pool[0].messages[0].content == "q0"
    assert pool.mappings == {str(files[0]): ASKED, str(files[1]): {}}
    assert pool[3].messages[0].content == "Say 0."
    assert read_pool(**pool.arguments).digest == pool.digest
    own = read_pool(files, files={"qa": {"mapping": ASKED}})
    assert own.digest == pool.digest
    text = read_pool([files[0]], mapping={"text": "answer"})
    assert text.digest != read_pool([files[0]], mapping=ASKED).digest


def test_the_first_rows_decide_and_others_may_lack_a_field() -> None:
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "note": "n"}]
    assert settle(rows, mapping=ASKED)[0] == "alpaca"
    assert settle(rows)[0] is None
    assert settle(rows, "alpaca", inherited=["format"])[0] is None
    assert settle(rows, "alpaca")[0] == "alpaca"
    assert settle([{"instruction": "i", "output": "o", "response": "r"}])[1].mapping == {}


def test_names_that_nothing_has_are_errors(tmp_path: Path) -> None:
    qa, alpaca = two(tmp_path)
    for read in (read_pool, check_pool):
        with pytest.raises(
            UserError, match="no row has the field 'questoin' for 'instruction'"
        ) as e:
            read([alpaca, qa], mapping={**ASKED, "instruction": "questoin"})
        assert "Did you mean 'question'?" in str(e.value)
        with pytest.raises(UserError, match="no row has the field 'outpt' to group by") as e:
            read([alpaca], group_field="outpt")
        assert "Did you mean 'output'?" in str(e.value)
        with pytest.raises(UnknownName, match="unknown source 'qaa'"):
            read([qa], files={"qaa": {"mapping": ASKED}})
        with pytest.raises(UnknownName, match="unknown format 'alpca'"):
            read([qa], files={"qa": {"format": "alpca"}})
    with pytest.raises(UserError, match=r"'colour' to group by\. The rows have: 'id'"):
        read_pool([alpaca], group_field="colour")
    rows = [{"text": "t"}] * 1200 + [{"text": "u", "kind": "late"}]
    (tmp_path / "late.jsonl").write_bytes(lines(rows))
    late = read_pool([tmp_path / "late.jsonl"], group_field="kind")
    assert set(late.groups) == {"?", "late"} and "1,200 rows" in late.warnings[0]


def test_an_error_names_the_flag_that_mends_it(tmp_path: Path) -> None:
    qa, _ = two(tmp_path)
    for read in (read_pool, check_pool):
        with pytest.raises(DataError, match="no known format fits") as error:
            read([qa])
        assert "--map instruction=question,output=answer" in str(error.value)
        assert "[pool]" in str(error.value) and "--target-map" in str(error.value)


# --- what a file is


@pytest.mark.parametrize(
    "text, what",
    [
        ('["a", "b, {c}"]', "a JSON list of strings"),
        ('[\n "a",\n "b"\n]\n', "a JSON list of strings"),
        ("[1, 2.5]", "a JSON list of numbers"),
        ('[["q", "a"], ["r", "b"]]', "a JSON list of lists"),
        ("[null]", "a JSON list of nulls"),
    ],
)
def test_a_list_of_other_things_is_named(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "p.json").write_text(text)
    for read in (read_pool, check_pool):
        with pytest.raises(DataError, match=f"is {what}, not of rows"):
            read([tmp_path / "p.json"])


def test_an_object_around_the_rows_is_named(tmp_path: Path) -> None:
    for text in (json.dumps({"data": ROWS["text"]}), json.dumps({"data": ROWS["text"]}, indent=1)):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(DataError, match="the list below its key 'data' alone"):
            read_pool([tmp_path / "p.json"])


@pytest.mark.parametrize(
    "value, remedy",
    [
        ({"instruction": ["q", "r"], "output": ["a", "b"]}, "orient='records'"),
        ({"text": {"0": "a", "1": "b"}, "id": {"0": "x", "1": "y"}}, "orient='records'"),
        ({"a": {"text": "t"}, "b": {"text": "u"}}, "Write its values alone"),
        ({"version": 1, "rows": [{"text": "t"}]}, "the list below its key 'rows' alone"),
    ],
)
def test_rows_inside_one_object_are_named(tmp_path: Path, value: dict, remedy: str) -> None:
    (tmp_path / "p.json").write_text(json.dumps(value))
    for read in (read_pool, check_pool):
        with pytest.raises(DataError, match="is one object around its rows") as error:
            read([tmp_path / "p.json"])
        assert remedy in str(error.value)


def test_errors_of_json_read_as_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(lines(ROWS["text"]) + b'{"text": "open\n')
    with pytest.raises(TooManyBadRows, match="Unterminated string starting at character 10"):
        read_pool([tmp_path / "p.jsonl"])


# --- what is said of many files


def test_many_files_of_one_folder_are_one_line(tmp_path: Path) -> None:
    folder = filled(tmp_path / "d", {f"{i}.jsonl": f"{i}" for i in range(5)})
    assert read_pool([folder]).read_as() == [f"{folder} (5 files): text"]
    few = filled(tmp_path / "e", {"a.jsonl": "a", "b.jsonl": "b"})
    assert read_pool([few]).read_as() == [f"{few}/a.jsonl: text", f"{few}/b.jsonl: text"]


def test_what_a_folder_or_a_pattern_would_read(tmp_path: Path) -> None:
    folder = filled(tmp_path / "d", {"a.jsonl": "a"})
    assert holds(str(folder), folder / "picks.jsonl") and holds(str(folder), folder / "x/y.jsonl")
    assert holds(f"{folder}/*.jsonl", folder / "picks.jsonl")
    assert not holds(f"{folder}/*.jsonl", folder / "picks.json")
    assert not holds(str(folder), tmp_path / "picks.jsonl")
    assert not holds(str(folder / "a.jsonl"), folder / "picks.jsonl")


def test_names_of_other_targets_are_no_mistake(tmp_path: Path) -> None:
    qa, alpaca = two(tmp_path)
    own = {"qa": {"mapping": ASKED}}
    assert len(read_pool([alpaca], files=own, inherited=["files"])) == 7
    assert len(read_pool([qa], files=own, inherited=["files"])) == 3
    pool = read_pool([alpaca], format="messages", inherited=["format"])
    assert pool.formats == {str(alpaca): "alpaca"}
    assert len(read_pool([alpaca], mapping={"output": "reply"}, inherited=["mapping"])) == 7


def test_rows_in_other_groups_keep_how_they_are_read(tmp_path: Path) -> None:
    qa, alpaca = two(tmp_path)
    pool = read_pool([alpaca, qa], mapping=ASKED)
    moved = pool.regrouped([8, 9], ["x", "y"])
    assert [(row.group, row.messages[0].content) for row in moved] == [("x", "q1"), ("y", "q2")]
