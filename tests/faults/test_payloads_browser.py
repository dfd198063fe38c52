"""Payloads in rows, ids, groups and file names, through a whole selection: nothing runs in a real
browser, nothing is a formula anywhere.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import gradsift
from gradsift.commands.select.select import Selection
from tests.conftest import SETTINGS, rows, write_rows
from tests.report.test_report_browser import Page, page  # noqa: F401  (a fixture)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
    ),
]

RUN = "window.__pwned = 1; document.title = 'pwned'; fetch('http://127.0.0.1:9/x')"
PAYLOADS = [
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f'<img src=x onerror="{RUN}">',
    f'<svg/onload="{RUN}">',
    f'"><iframe srcdoc="<script>parent.{RUN}</script>">',
    f'<a href="javascript:{RUN}" autofocus onfocus="{RUN}">x</a>',
    (
        "<style>@import 'http://127.0.0.1:9/x.css';</style><link rel=stylesheet"
        " href=http://127.0.0.1:9/x.css>"
    ),
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'><base href=http://127.0.0.1:9/>",
    "<form action=http://127.0.0.1:9/><button autofocus>",
    "-->]]><!--<![CDATA[</textarea></title></style></noscript></template>",
    "{{ ''.__class__ }}{% raw %}${7*7}#{7*7}<%= 7*7 %>",
    "\u2028</script>\u2029<script>" + RUN + "//",
    "=cmd|' /C calc'!A1",
    "@SUM(1+1)*cmd|' /C calc'!A0",
    '+HYPERLINK("http://127.0.0.1:9/")',
    "\u202e\u2066cod.exe\x1b]8;;http://127.0.0.1:9/\x07",
]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Selection:
    folder = tmp_path_factory.mktemp("payloads")
    items: list[dict[str, Any]] = rows(72)
    for i, item in enumerate(items):
        payload = PAYLOADS[i % len(PAYLOADS)]
        item |= {"id": f"{payload} {i}", "kind": payload, "note": payload}
        item["messages"] = [
            {"role": "user", "content": payload[:40]},
            {"role": "assistant", "content": payload},
        ]
    name = folder / "<img src=x onerror=window.__pwned=1>=1+1.jsonl"
    write_rows(name, items)
    with name.open("a") as file:
        file.write('{"id": "<script>window.__pwned=1</script>", "messages": "=1+1"}\n')
    settings = {**SETTINGS, "encode": {"max_length": 256}}
    return gradsift.select(
        "tagcos",
        pool=name,
        model=str(model_folder),
        run=folder / "run",
        budget="50%",
        settings=settings,
        options={"clusters": 4},
        pool_group="kind",
        add_scores=True,
        out=folder / "out.jsonl",
    )


def test_nothing_runs_in_a_browser(page: Page, chosen: Selection) -> None:  # noqa: F811
    page.open(chosen.report)
    page.js("document.querySelectorAll('details').forEach(part => part.open = true)")
    page.js("new Promise(done => setTimeout(done, 300))")
    assert page.js("typeof window.__pwned") == "undefined"
    assert page.js("document.title") != "pwned"
    assert page.complaints() == []
    assert [url for url in page.requests() if url not in (chosen.report.as_uri(), "data:,")] == []
    own = 'link[rel=icon][href="data:,"], form.vega-bindings'
    tags = (
        "iframe",
        "img",
        "object",
        "embed",
        "form",
        "base",
        "link",
        "meta[http-equiv=refresh]",
        "[onerror]",
        "[onload]",
        "[onfocus]",
    )
    foreign = ", ".join(f"{tag}:not({own})" for tag in tags)
    assert (
        page.js(
            f"[...document.querySelectorAll({json.dumps(foreign)})].map(found =>"
            " found.outerHTML.slice(0, 200))"
        )
        == []
    )
    assert page.js("document.querySelectorAll('a[href^=\"javascript:\"]').length") == 0
    shown = page.js("document.documentElement.innerText")
    assert "<script>window.__pwned" in shown


def test_tables_hold_texts_and_no_file_is_a_spreadsheet(chosen: Selection) -> None:
    """Parquet and JSON have no formulas: the ids stand there as they are, as texts."""
    table = pq.read_table(chosen.folder / "scores.parquet")
    assert str(table.schema.field("id").type) == "string"
    assert table["id"].to_pylist() == [f"{PAYLOADS[i % len(PAYLOADS)]} {i}" for i in range(72)]
    assert not [
        path
        for path in chosen.folder.rglob("*")
        if path.suffix in (".csv", ".tsv", ".xls", ".xlsx", ".pkl", ".pt")
    ]
    for line in (chosen.folder / "selected.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        assert json.loads(line)["note"] in PAYLOADS
    told = json.loads((chosen.folder / "dropped.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert told["id"] == "<script>window.__pwned=1</script>"


def test_files_for_trainers_hold_no_code_of_rows(chosen: Selection, tmp_path: Path) -> None:
    for path in chosen.folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        compile(text, path.name, "exec")
        assert not any(payload in text for payload in PAYLOADS)
    copied = shutil.copytree(chosen.folder, tmp_path / "moved")
    assert sorted(path.name for path in copied.iterdir()) == sorted(
        path.name for path in chosen.folder.iterdir()
    )
