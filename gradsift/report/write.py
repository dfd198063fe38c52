"""Writes a report: the page, the Markdown, the data, and their digests beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gradsift.report.markdown import render as render_markdown
from gradsift.report.page import render as render_page
from gradsift.store.artifact import SUMS
from gradsift.store.atomic import make_folder, write_atomic
from gradsift.store.canonical import canonical_json, sealed
from gradsift.store.tensors import file_hash

if TYPE_CHECKING:
    from gradsift.report.data import ReportData


def write_report(data: ReportData, folder: Path) -> Path:
    """Write report.json, report.md and report.html into `folder` (made if missing), and their
    digests beside them; returns the path of the page.

    The same data gives the same bytes. Each file is replaced whole or not at all; raises DiskFull
    or ResourceError.
    """
    folder = Path(folder)
    make_folder(folder)
    pages = {
        "report.json": (data.model_dump_json(indent=1) + "\n").encode(),
        "report.md": render_markdown(data).encode(),
        "report.html": render_page(data).encode(),
    }
    for name, content in pages.items():
        write_atomic(folder / name, content)
    write_atomic(
        folder / SUMS,
        canonical_json(sealed({"files": {name: file_hash(folder / name) for name in pages}}))
        + b"\n",
    )
    return folder / "report.html"
