"""The report as one HTML page that loads nothing and runs nothing but its own two scripts."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from gradsift.report import text
from gradsift.report.charts import MAX_BARS, by_size, charts
from gradsift.report.data import Point, ReportData

HERE = Path(__file__).parent
LISTED = 200  # points of the map that its table has


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script without imports, offering `vegaEmbed` (about 0.9
    MB).
    """
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("\r\n", "\n")
    return inline_script(script)


def inline_script(script: str) -> str:
    """A script that may stand between script tags: what would end or re-open them there is refused,
    not patched.
    """
    lowered = script.lower()
    for token in ("</script", "<!--", "\r", "\0"):
        if token in lowered:
            raise ValueError(f"the chart script contains {token!r} and cannot be inlined")
    return script


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        pieces=text.pieces,
        visible=text.visible,
        excerpt=text.excerpt,
        count=text.count,
        number=text.number,
        share=text.share,
        seconds=text.seconds,
        size=text.size,
        option=_option,
    )
    return environment


def _option(value: Any) -> str:
    return "none" if value is None else str(value)


def _rows(data: ReportData) -> list[dict[str, Any]]:
    """What the map shows of each of its points, in their order. Scripts set it as text."""
    return [
        {
            "x": point.x,
            "y": point.y,
            "kind": point.kind,
            "about": _about(point),
            "text": "".join(
                f"[{piece}]" if control else piece for piece, control in text.pieces(point.text)
            ),
            "cut": point.cut,
        }
        for point in (data.map.points if data.map is not None else ())
    ]


def _about(point: Point) -> str:
    kind = {"picked": f"pick {text.count(point.rank)}", "target": "target row", "pool": "pool row"}
    named = (point.id, point.group and f"group {point.group}", point.place)
    return " · ".join([kind[point.kind].strip(), *(text.visible(part) for part in named if part)])


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: ASCII, and no character that the HTML parser
    reads.
    """
    body = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return body.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(source: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() + "'"


def render(data: ReportData) -> str:
    """The page. Its policy admits exactly its own style sheet and scripts, by hash, and no
    connection, image, frame, form or base.

    Vega's expressions run in its interpreter (`ast: true`), so the policy needs no `unsafe-eval`.
    """
    specs = charts(data)
    style = (HERE / "style.css").read_text(encoding="utf-8")
    script = inline_script((HERE / "charts.js.j2").read_text(encoding="utf-8"))
    bundle = _bundle() if specs else ""
    scripts = f"{_digest(bundle)} {_digest(script)}" if specs else "'none'"
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {_digest(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'; object-src 'none'; connect-src 'none'"
    )
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            data=data,
            charts=set(specs),
            policy=Markup(policy),
            style=Markup(style),
            specs=Markup(script_json({"specs": specs, "rows": _rows(data)})),
            listed=LISTED,
            stars=data.map is not None and any(p.kind == "target" for p in data.map.points),
            bundle=Markup(bundle),
            script=Markup(script),
            groups=by_size(data.groups),
            shown=MAX_BARS,
            noted=any(step.note for step in data.funnel),
            largest=max((step.count for step in data.funnel), default=0),
            longest=max((stage.seconds or 0.0 for stage in data.timings), default=0.0),
            pool_rows=sum(group.pool_rows for group in data.groups),
            picked_rows=sum(group.picked_rows for group in data.groups),
            tokens=any(group.pool_tokens is not None for group in data.groups),
        )
    )
