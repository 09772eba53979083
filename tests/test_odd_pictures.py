"""A folder of odd files, through the source and through a whole job: each with the verdict that docs/input.md gives.

``python -m tests.test_odd_pictures`` writes the table there anew.
"""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.odd_files import FILES, MADE, fill, png, saved

import latentmill
from latentmill.plugin import RowError
from latentmill.sources.images import Images

DOCS = Path(__file__).parents[1] / "docs" / "input.md"
BEGIN, END = "<!-- odd pictures: begin -->\n", "<!-- odd pictures: end -->\n"


def verdicts(folder):
    """What the source makes of each file, by name: a colour, or a reason. Of a picture in several colours, those."""
    source = Images(str(folder))
    [fragment] = source.fragments()
    found = list(source.read(fragment.name, 0, fragment.rows))
    names = sorted(entry.name for entry in os.scandir(folder) if entry.name in VERDICTS)
    assert len(found) == len(names) == len(VERDICTS)
    result = {}
    for name, row in zip(names, found):
        if isinstance(row, RowError):
            result[name] = re.sub(r" \(\d+ bytes not processed\)", "", str(row))
        else:
            low, high = row["image"].min((0, 1)), row["image"].max((0, 1))
            assert np.abs(high.astype(int) - low).max() <= 1, name
            result[name] = tuple(low.tolist())
    return result


VERDICTS = {**{name: verdict for _, name, _, verdict in FILES}, **{name: verdict for _, name, verdict in MADE}}


def table():
    """The verdicts as docs/input.md has them."""
    lines, last = ["| what | verdict |", "|---|---|"], ""
    for what, name, verdict in [*((w, n, v) for w, n, _, v in FILES), *MADE]:
        last = what or last
        suffix = name.rpartition(".")[2]
        shown = "RGB " + ", ".join(map(str, verdict)) if isinstance(verdict, tuple) else verdict.rpartition(".txt: ")[2]
        lines.append(f"| {last} · {suffix} | {'read, as' if isinstance(verdict, tuple) else 'error row:'} {shown} |")
    return "\n".join(dict.fromkeys(lines)) + "\n"


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("pictures"))


def test_each_odd_file_has_the_verdict_that_the_table_gives(folder):
    assert len(VERDICTS) == len(FILES) + len(MADE) >= 60
    wrong = {}
    for name, found in verdicts(folder).items():
        expected = VERDICTS[name]
        if isinstance(expected, tuple):
            right = isinstance(found, tuple) and max(abs(a - b) for a, b in zip(found, expected)) <= 1
        else:
            shown = name.replace("\n", r"\n").replace("\x1b", r"\x1b")
            right = found == (expected if ".txt: " in expected else f"{shown}: {expected}")
        if not right:
            wrong[name] = found, expected
    assert not wrong


def test_the_table_in_the_docs_is_what_happens():
    _, _, rest = DOCS.read_text().partition(BEGIN)
    assert rest.partition(END)[0] == table(), "python -m tests.test_odd_pictures writes it anew"


def test_a_job_over_odd_files_ends_with_each_of_them_encoded_or_quarantined(folder, tmp_path):
    settings = [f"source.path={folder}", "source.id_column=path", "sampling.width=16", "sampling.height=16"]
    result = latentmill.run("encode", [*settings, "cluster=inline", f"output={tmp_path / 'out'}"])
    good = sum(isinstance(verdict, tuple) for verdict in VERDICTS.values())
    assert (result.planned, result.ok, result.failed) == (len(VERDICTS), good, len(VERDICTS) - good)
    encoded = pq.read_table(tmp_path / "out" / "data").column("id").to_pylist()
    assert len(encoded) == len(set(encoded)) == good and {"rgb.png", "é.png", r"\udcff\udcfe.png"} <= set(encoded)
    made = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert made and not any(b"the key to the house" in content for content in made)


def test_with_follow_links_a_link_may_lead_out(folder):
    source = Images(str(folder), follow_links=True)
    [fragment] = source.fragments()
    found = {
        str(row).partition(":")[0] for row in source.read(fragment.name, 0, fragment.rows) if isinstance(row, RowError)
    }
    assert not {"outside.png", "leak.txt"} & found and {"dangling.png", "loop.png", "device.png"} <= found


@pytest.mark.parametrize("most", [63, 64, 10**9])
def test_the_limit_of_pixels_is_the_source_s(tmp_path, most):
    (tmp_path / "a.png").write_bytes(saved())
    (tmp_path / "bomb.png").write_bytes(png(8, 2, b"", size=(20_000, 20_000)))
    before = Image.MAX_IMAGE_PIXELS
    source = Images(str(tmp_path), max_pixels=most)
    [fragment] = source.fragments()
    a, bomb = source.read(fragment.name, 0, 2)
    assert before == Image.MAX_IMAGE_PIXELS
    assert isinstance(a, RowError) == (most == 63)
    assert ("more than 64 pixels (max_pixels)" if most == 64 else "") in str(bomb)
    if most == 10**9:  # more than Pillow lets pass by itself, and then there are no lines in it
        assert "truncated" in str(bomb)


def test_a_file_that_may_not_be_read_is_an_error_row(tmp_path):
    (tmp_path / "a.png").write_bytes(saved())
    (tmp_path / "a.png").chmod(0)
    (tmp_path / "b.png").write_bytes(saved())
    (tmp_path / "b.txt").write_text("no")
    (tmp_path / "b.txt").chmod(0)
    if os.geteuid() == 0:  # root may read everything
        for parent in [tmp_path, *tmp_path.parents]:
            if parent.stat().st_uid == 0 and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o055)
        os.seteuid(65534)
    try:
        source = Images(str(tmp_path))
        [fragment] = source.fragments()
        found = [str(row) for row in source.read(fragment.name, 0, 2)]
    finally:
        os.seteuid(os.getuid())
    assert found == ["a.png: permission denied", "b.txt: permission denied"]


if __name__ == "__main__":
    text = DOCS.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    DOCS.write_text(before + BEGIN + table() + END + after)
    sys.stdout.write(table())
