"""One selection's report: a page to read, the same as Markdown, and the data behind both."""

from __future__ import annotations

from pathlib import Path

from gradsift.artifact import make_folder, write_atomic
from gradsift.report.data import (
    Cluster,
    Compared,
    Comparison,
    Group,
    Histogram,
    Method,
    ReportData,
    Reproduce,
    Row,
    Step,
    Table,
    Timing,
    Turn,
    Verdict,
    histogram,
    row_card,
)
from gradsift.report.markdown import render as render_markdown
from gradsift.report.page import render as render_page

__all__ = [
    "Cluster",
    "Compared",
    "Comparison",
    "Group",
    "Histogram",
    "Method",
    "ReportData",
    "Reproduce",
    "Row",
    "Step",
    "Table",
    "Timing",
    "Turn",
    "Verdict",
    "histogram",
    "row_card",
    "write_report",
]


def write_report(data: ReportData, folder: Path) -> Path:
    """Write report.json, report.md and report.html into `folder` (made if missing); returns the path of the page.

    The same data gives the same bytes. Each file is replaced whole or not at all; raises DiskFull or ResourceError.
    """
    folder = Path(folder)
    make_folder(folder)
    write_atomic(folder / "report.json", (data.model_dump_json(indent=1) + "\n").encode())
    write_atomic(folder / "report.md", render_markdown(data).encode())
    page = folder / "report.html"
    write_atomic(page, render_page(data).encode())
    return page
