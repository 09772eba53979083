"""The contact sheet of a sweep: the same rows of several datasets, a dataset a column."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from latentmill.dataset import Dataset
from latentmill.plugin import RowError
from latentmill.report.contact_sheet import FAINT, GAP, INK, MARGIN, PAPER, SIDE, fit, wrap
from latentmill.report.files import MARK, put
from latentmill.report.material import Material, Tile, evenly, tiles
from latentmill.storage import Storage

MOST_ROWS = 8
"""Rows of datasets, at most, that are on a sheet,"""
MOST_COLUMNS = 24
"""and datasets."""
LINE = 18


def make_side_by_side(store: Storage, name: str, datasets: Mapping[str, Dataset]) -> bool:
    """Write ``contact_sheet.png`` of finished datasets, by their labels; whether there was a picture."""
    shown = dict([*datasets.items()][:MOST_COLUMNS])
    rows = _rows(next(iter(shown.values())))
    columns = {label: _pictures(there, rows) for label, there in shown.items()}
    found = [tile for column in columns.values() for tile in column.values()]
    if not found:
        return False
    text, title = ImageFont.load_default(14), ImageFont.load_default(24)
    cells = [fit(tile.image).size for tile in found]
    width, height = max(160, *(w for w, _ in cells)), max(h for _, h in cells)
    heads = [wrap(label.replace(",", ", "), text, width, 4) for label in columns]
    head = 64 + LINE * max(map(len, heads))
    size = (
        2 * MARGIN + SIDE + len(columns) * (width + GAP),
        2 * MARGIN + head + len(rows) * (height + GAP),
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), name, INK, title)
    some = f"{len(columns)} of {len(datasets)} datasets, " if len(columns) < len(datasets) else ""
    draw.text((MARGIN, MARGIN + 25), f"{some}the same {len(rows)} rows of each", FAINT, text)
    for at, (lines, column) in enumerate(zip(heads, columns.values())):
        x = MARGIN + SIDE + GAP + at * (width + GAP)
        for number, words in enumerate(lines):
            draw.text((x, MARGIN + head - 8 - LINE * (len(lines) - number)), words, INK, text)
        for down, row in enumerate(rows):
            if row in column:
                sheet.paste(fit(column[row].image), (x, MARGIN + head + down * (height + GAP)))
    for down, row in enumerate(rows):
        captions = [column[row].caption for column in columns.values() if row in column]
        for number, words in enumerate(wrap(captions[0] if captions else row[1], text, SIDE, height // LINE)):
            draw.text((MARGIN, MARGIN + head + down * (height + GAP) + LINE * number), words, INK, text)
    content, about = io.BytesIO(), PngImagePlugin.PngInfo()
    about.add_text("Comment", MARK)
    sheet.save(content, "PNG", pnginfo=about, compress_level=1)
    put(store, "contact_sheet.png", content.getvalue())
    return True


def _rows(there: Dataset) -> list[tuple[int, str]]:
    """Rows from all over a dataset: shard and row id."""
    dataset = Material(there)
    shards = [shard for shard, count in dataset.rows.items() if count] if dataset.has_pictures else []
    shards = [shards[at] for at in evenly(len(shards), MOST_ROWS)]
    found = []
    for number, shard in enumerate(shards):
        ids = _ids(there, shard)
        most = MOST_ROWS * (number + 1) // len(shards) - MOST_ROWS * number // len(shards)
        found += [(shard, ids[at]) for at in evenly(len(ids), most)]
    return found


def _ids(there: Dataset, shard: int) -> list[str]:
    file = there.shard(shard)
    _, _, count = file.about()
    pieces = file.read(["row_id"], range(count))
    return [row for piece in pieces if not isinstance(piece, RowError) for row in piece.column("row_id").to_pylist()]


def _pictures(there: Dataset, rows: Sequence[tuple[int, str]]) -> dict[tuple[int, str], Tile]:
    """Those of the rows that a dataset has. Its shards must be as many rows as the others'."""
    found: dict[tuple[int, str], Tile] = {}
    for shard in sorted({shard for shard, _ in rows} & there.look().rows().keys()):
        ids = _ids(there, shard)
        wanted = [at for at, row in enumerate(ids) if (shard, row) in rows]
        for piece in there.shard(shard).read(["image", "prompt", "row_id", "psnr"], wanted):
            if not isinstance(piece, RowError) and "image" in piece.column_names:
                found |= zip([(shard, row) for row in piece.column("row_id").to_pylist()], tiles(piece))
    return found
