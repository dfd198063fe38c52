"""One selection's report: a page to read, the same as Markdown, and the data behind both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsift.types import lazy_face

if TYPE_CHECKING:
    from gradsift.report.data import (
        Cluster,
        Compared,
        Comparison,
        Curve,
        Group,
        Histogram,
        Map,
        Method,
        Near,
        Point,
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
    from gradsift.report.write import write_report

__all__ = [
    "Cluster",
    "Compared",
    "Comparison",
    "Curve",
    "Group",
    "Histogram",
    "Map",
    "Method",
    "Near",
    "Point",
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
__getattr__, __dir__ = lazy_face(
    __name__, {**dict.fromkeys(__all__, "data"), "write_report": "write"}
)
