"""``report.html``: one page that needs no other file. What it looks like is ``report.html`` beside this module."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any, TypeGuard

from PIL import Image

from latentmill.progress import Pace, duration_text, rate_text
from latentmill.report import usage_curves
from latentmill.report.contact_sheet import SIDE
from latentmill.report.files import MARK, put
from latentmill.report.material import Material, identity
from latentmill.usage import History

FIGURE = Template("<div><b>$value</b>$label</div>")
SECTION = Template("<h2>$title</h2>$content")
TILE = Template('<figure><img alt="" src="$uri"><figcaption>$caption</figcaption></figure>')


def make(dataset: Material, pace: Pace | None, history: History | None = None) -> None:
    """Write the page. ``pace`` brings the rates of the run that just ended, ``history`` what its workers used."""
    page = Template(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    figures = (FIGURE.substitute(value=value, label=label) for label, value in _figures(dataset, pace))
    sections = (
        SECTION.substitute(title=title, content=content) for title, content in _sections(dataset, pace, history)
    )
    content = page.substitute(
        mark=MARK,
        name=escape(dataset.name),
        plan=dataset.plan["hash"],
        figures="".join(figures),
        sections="\n".join(sections),
    )
    put(dataset.store, "report.html", content.encode())


def _figures(dataset: Material, pace: Pace | None) -> Iterator[tuple[str, str]]:
    yield "rows", f"{dataset.ok:,}"
    yield "failed", f"{dataset.failed:,}"
    if dataset.filtered:
        yield "filtered", f"{dataset.filtered:,}"
    if dataset.not_needed:
        yield "not needed", f"{dataset.not_needed:,}"
    yield "planned", f"{dataset.plan['rows']:,}"
    if _ran(pace):
        seconds, made = pace.last.seconds, pace.progress() - pace.last.others
        yield f"for {made:,} rows in the last run", duration_text(seconds)
        yield "rows/s", rate_text(made / seconds)


def _sections(dataset: Material, pace: Pace | None, history: History | None) -> Iterator[tuple[str, str]]:
    if dataset.tiles:
        pictures = (TILE.substitute(uri=_data_uri(t.image), caption=escape(t.caption)) for t in dataset.tiles)
        yield "Pictures from all over the dataset", f'<div class="pictures">{"".join(pictures)}</div>'
    if _ran(pace):
        seconds = pace.last.seconds
        stages = [
            [s.name, f"{s.done:,}", rate_text(s.done / seconds), f"{s.workers}", f"{pace.busy(s.name):.0%}"]
            for s in pace.last.stages
        ]
        head = ["stage", "rows", "rows/s", "workers", "busy"]
        yield "Stages in the last run", _table(head, stages, numbers=range(1, 5))
    if history is not None and (curves := list(usage_curves.figures(history))):
        yield "Processors, memory and GPUs in the last run", f'<div class="curves">{"".join(curves)}</div>'
    for title, rows, counts in (
        ("Failed rows", dataset.errors, dataset.failed_in),
        ("Filtered rows", dataset.left_out, dataset.filtered_in),
    ):
        if rows:
            yield title, _not_stored(rows, counts)
    if dataset.warnings:
        warnings = [[f"{rows:,}", text] for text, rows in dataset.warnings.items()]
        yield "Warnings", _table(["rows", "what is to be known of them"], warnings, numbers=[0])
    plugins = [[kind, *identity(plugin)] for kind, plugin in dataset.plan["plugins"].items()]
    yield "Made with", _table(["part", "plugin", "from", "weights"], plugins)
    yield "Config", f"<pre>{escape(json.dumps(dataset.plan['config'], indent=1))}</pre>"


def _not_stored(rows: Sequence[Mapping[str, Any]], counts: Counter[str]) -> str:
    by_stage = ", ".join(f"{stage} {count:,}" for stage, count in counts.most_common())
    first = f"the first {len(rows)} of {counts.total():,}" if counts.total() > len(rows) else ""
    head, cells = ["row", "stage", "reason"], [[row["row_id"], row["stage"], row["reason"]] for row in rows]
    if "scores" in rows[0]:
        head.append("scores")
        for line, row in zip(cells, rows):
            line.append(", ".join(f"{name} {score}" for name, score in row["scores"].items()))
    return f'<p class="faint">{escape("; ".join(filter(None, [by_stage, first])))}</p>{_table(head, cells)}'


def _ran(pace: Pace | None) -> TypeGuard[Pace]:
    return pace is not None and bool(pace.views) and pace.last.seconds > 0


def _data_uri(image: Image.Image) -> str:
    content = io.BytesIO()
    kind = "png"
    if max(image.size) > SIDE:
        image, kind = image.copy(), "webp"
        image.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    image.save(content, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="number"' if at in numbers else "" for at in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(c)}</{tag}>" for kind, c in zip(kinds, cells)) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"
