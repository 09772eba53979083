"""Files that tests make: of rows, of pictures; and what a source reads in them."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from latentmill.plugin import RowError


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def all_rows(source):
    """Every row of a source; a bad one as its reason."""
    found = []
    for fragment in source.fragments():
        part = list(source.read(fragment.name, 0, fragment.rows))
        assert len(part) == fragment.rows
        found += [str(row) if isinstance(row, RowError) else dict(row) for row in part]
    return found


def picture(mode="RGB", size=(4, 3), color=None, format="PNG", **options):
    """A picture's file."""
    file = io.BytesIO()
    image = Image.new(mode, size, color) if color is not None else Image.new(mode, size)
    image.save(file, format, **options)
    return file.getvalue()


def parquet(rename=None, **columns):
    """A Parquet file."""
    file = io.BytesIO()
    table = pa.table(columns)
    pq.write_table(
        table.rename_columns(rename) if rename else table,
        file,
        row_group_size=10,
        compression="none",
        use_dictionary=False,
    )
    return file.getvalue()


KINDS_OF_FILES = "csv", "tsv", "json", "jsonl", "parquet"


def table(path, rows):
    """A file of rows, all with the same columns, as its suffix says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        separator = "," if path.suffix == ".csv" else "\t"
        path.write_text("\n".join(separator.join(row) for row in [rows[0], *(row.values() for row in rows)]))
    return str(path)
