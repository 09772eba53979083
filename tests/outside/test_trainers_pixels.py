"""``size.pixels``: a picture opened as a trainer opens it, or as we do, and its size told by its header alone."""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned by a quarter


def noise(mode="RGB", size=(16, 8)):
    random = np.random.default_rng(len(mode))
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], len(mode)), np.uint8).squeeze(), mode)


def stored(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_palette():
    image = noise().quantize(16)
    return stored(image, "PNG", transparency=3)


def small_frame():
    first, second = Image.new("P", (16, 8), 1), noise().quantize(8)
    first.putpalette([0, 0, 0, 200, 30, 60])
    ImageDraw.Draw(first).rectangle((2, 2, 5, 5), fill=0)
    return stored(first, "GIF", save_all=True, append_images=[second])


FILES = {
    "turned.jpg": stored(noise(), "JPEG", exif=EXIF, quality=95),
    "turned.webp": stored(noise(), "WEBP", exif=EXIF, lossless=True),
    "turned.png": stored(noise(), "PNG", exif=EXIF),
    "turned.tif": stored(noise(), "TIFF", exif=EXIF),
    "rgba.png": stored(noise("RGBA"), "PNG"),
    "la.png": stored(noise("LA"), "PNG"),
    "palette.png": with_palette(),
    "gray.png": stored(noise("L"), "PNG"),
    "wide.png": stored(Image.fromarray((np.arange(128, dtype=np.uint16) * 511).reshape(8, 16)), "PNG"),
    "cmyk.jpg": stored(noise("CMYK"), "JPEG", quality=95),
    "frames.gif": small_frame(),
}
ALL = ("size.buckets=[[8,16],[16,8]]", "flow=[read,write]")  # either shape fits a bucket: nothing is scaled or cut


@pytest.fixture(params=["folder", "table"])
def source(request, tmp_path):
    """The pictures as files, or as bytes in a Parquet file."""
    if request.param == "folder":
        (tmp_path / "files").mkdir()
        for name, content in FILES.items():
            (tmp_path / "files" / name).write_bytes(content)
        return [f"source.path={tmp_path / 'files'}"], sorted(FILES)
    table = {"image": pa.array([*FILES.values()], pa.binary())}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    return ["source=prompts", f"source.path={tmp_path / 'rows.parquet'}"], [*FILES]


@pytest.mark.parametrize("way", ["ours", "kohya", "musubi"])
def test_a_picture_is_opened_as_the_trainer_does(latentmill, tmp_path, rows, source, way):
    of, names = source
    command = ["encode", "cluster=inline", *of, f"output={tmp_path / 'out'}", *ALL, f"size.pixels={way}"]
    assert latentmill("plan", *command) == 0, latentmill.said
    told = next(line for line in latentmill.out.splitlines() if line.startswith("buckets"))
    assert latentmill("run", *command) == 0, latentmill.said
    found = rows(tmp_path / "out")
    assert len(found) == len(FILES)
    for name, row in zip(names, found):
        got = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        with Image.open(io.BytesIO(FILES[name])) as image:
            plain = np.asarray(image.convert("RGB"))
        if way != "ours":
            assert np.array_equal(got, plain), name
            assert row["original_size"] == ([8, 16] if name == "turned.tif" else [16, 8])
        else:
            assert row["original_size"] == ([8, 16] if name.startswith("turned") else [16, 8])
            changed = not np.array_equal(got, plain)
            assert changed == (name not in ("turned.tif", "gray.png", "cmyk.jpg", "frames.gif")), name
    card = (tmp_path / "out/README.md").read_text()
    said = {"ours": "upright as EXIF says", "kohya": "as kohya's sd-scripts does", "musubi": "as musubi-tuner does"}
    assert (
        f"Pictures were opened {said[way]}" in card
        and "the bucket of its shape, of a list, and cut in the middle." in card
    )
    shapes = Counter("{}x{}".format(*row["bucket"]) for row in found)
    assert told.removeprefix("buckets").split() == " ".join(f"{k} {n}," for k, n in shapes.most_common())[:-1].split()


def test_a_source_that_can_t_open_pictures_so_is_refused(latentmill, install, tmp_path):
    code = """
import numpy as np
from latentmill.plugin import CONTRACT, Fragment, Source

class Squares(Source):
    contract = CONTRACT
    def fragments(self): return [Fragment("all", 3)]
    def read(self, fragment, start, stop):
        for k in range(start, stop): yield {"image": np.full((8, 8, 3), k, np.uint8)}
"""
    install("squares", "[latentmill.sources]\nsquares = squares:Squares\n", squares=code)
    command = ("cluster=inline", "source.name=squares", "~source.path", f"output={tmp_path / 'out'}", *ALL)
    assert latentmill("run", "encode", *command, "size.pixels=kohya") == 2
    assert "source squares opens pictures as ours, so size.pixels can't be kohya" in latentmill.err
    assert latentmill("plan", "encode", *command) == 0, latentmill.said
    assert "buckets       source squares doesn't say how large its pictures are\n" in latentmill.out
    assert latentmill("run", "encode", *command) == 0, latentmill.said


def test_of_a_large_source_an_even_share_is_looked_at(latentmill, install, tmp_path):
    code = """
from latentmill.plugin import CONTRACT, Fragment, RowError, Source

class Many(Source):
    contract = CONTRACT
    def fragments(self): return [Fragment("tall", 25_000), Fragment("wide", 5_000)]
    def read(self, fragment, start, stop): raise AssertionError("no picture may be read")
    def sizes(self, fragment, start, stop):
        for k in range(start, stop):
            yield RowError("bad") if k == 7 else {"image": (8, 16) if fragment == "tall" else (16, 8)}
"""
    install("many", "[latentmill.sources]\nmany = many:Many\n", many=code)
    command = ("cluster=inline", "source.name=many", "~source.path", f"output={tmp_path / 'out'}", *ALL)
    assert latentmill("plan", "encode", *command) == 0, latentmill.said
    assert "buckets       8x16 8,332, 16x8 1,666\n" in latentmill.out
    assert "              9,998 pictures of the 10,000 rows looked at\n" in latentmill.out
