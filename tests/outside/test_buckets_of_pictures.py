"""``size``: pictures of odd shapes brought to buckets, from the command line to the columns of the dataset."""

import io
import json
from importlib.metadata import entry_points

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentmill.plugin import tensors

KOHYA = ("size.buckets=kohya", "size.area=4096", "size.step=8", "size.min_side=32", "size.max_side=128")
# 4096 pixels within 32..128, by hand: 4096 / 32 = 128, / 40 = 102 -> 96, / 48 = 85 -> 80, / 56 = 73 -> 72, / 64 = 64, / 72 = 56,
# / 80 = 51 -> 48, / 88 = 46 -> 40, / 96 = 42 -> 40, / 104 = 39 -> 32, and so on to 128; and each of them turned.
TABLE = [
    *((32, 104), (32, 112), (32, 120), (32, 128), (40, 88), (40, 96), (48, 80), (56, 72), (64, 64), (72, 56), (80, 48)),
    *((88, 40), (96, 40), (104, 32), (112, 32), (120, 32), (128, 32)),
]
SHAPES = [
    *((20 + 13 * k % 180, 150 - 11 * k % 140) for k in range(34)),
    *((64, 64), (128, 32), (300, 100), (1, 50), (33, 32), (640, 480)),
]


def bucket_of(width, height):
    ratio = width / height
    return (
        (width, height) if (width, height) in TABLE else min(TABLE, key=lambda sides: abs(sides[0] / sides[1] - ratio))
    )


def scaled(picture, bucket):
    """As a trainer scales it: OpenCV's INTER_AREA down, Pillow's Lanczos up."""
    height, width = picture.shape[:2]
    scale = max(bucket[0] / width, bucket[1] / height)
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    if size == (width, height):
        return picture
    if scale > 1:
        return np.asarray(Image.fromarray(picture).resize(size, Image.LANCZOS))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def cut(picture, bucket):
    left, top = (picture.shape[1] - bucket[0]) // 2, (picture.shape[0] - bucket[1]) // 2
    return picture[top : top + bucket[1], left : left + bucket[0]]


def drawn(folder, shapes):
    """A folder of pictures of these shapes, and their pixels."""
    random, found = np.random.default_rng(3), []
    folder.mkdir()
    for number, (width, height) in enumerate(shapes):
        found.append(random.integers(0, 256, (height, width, 3), np.uint8))
        Image.fromarray(found[-1]).save(folder / f"{number:02d}.png", compress_level=1)
    return folder, found


@pytest.fixture
def odd(tmp_path):
    assert len(SHAPES) == 40
    return drawn(tmp_path / "odd", SHAPES)


FEW = [*SHAPES[25:39], (50, 40)]


@pytest.fixture
def few(tmp_path):
    return drawn(tmp_path / "few", FEW)


@pytest.fixture
def made(tmp_path, latentmill, rows):
    """``made(FOLDER, OVERRIDES)``: the rows of a dataset of what is in the folder, encoded by a VAE that loses nothing."""

    def make(folder, *more, job="encode", output="out"):
        command = [job, "cluster=inline", "vae.name=patches", "vae.side=8", f"source.path={folder}"]
        assert latentmill("run", *command, f"output={tmp_path / output}", *more) == 0, latentmill.said
        return rows(tmp_path / output)

    return make


def pixels(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def decoded(row, column="latents"):
    """The picture that the latents of the VAE ``patches`` are of."""
    channels, height, width = row["shape"]
    side = int((channels / 3) ** 0.5)
    values = np.reshape(row[column], (3, side, side, height, width)).transpose(3, 1, 4, 2, 0)
    return np.rint((values.reshape(height * side, width * side, 3) + 1) * 127.5).astype(np.uint8)


def test_forty_pictures_of_odd_shapes_get_the_trainer_s_buckets_pixels_and_columns(odd, made, tmp_path):
    folder, pictures = odd
    found = made(folder, *KOHYA, "size.pixels=kohya", "size.flip=true", "latents_std=true")
    assert len(found) == 40 and len({tuple(row["bucket"]) for row in found}) >= 12
    for row, picture in zip(found, pictures):
        height, width = picture.shape[:2]
        bucket = bucket_of(width, height)
        assert row["original_size"] == [width, height] and row["bucket"] == [*bucket]
        assert [row["width"], row["height"]] == row["bucket"] and row["shape"] == [192, bucket[1] // 8, bucket[0] // 8]
        expected = cut(scaled(picture, bucket), bucket)
        assert np.array_equal(decoded(row), expected)
        assert np.array_equal(decoded(row, "latents_flipped"), expected[:, ::-1])
        assert len(row["latents_std"]) == len(row["latents_std_flipped"]) == len(row["latents"])
        ratio = width / height
        if bucket[0] / bucket[1] > ratio:
            left = (bucket[0] - bucket[1] * ratio) // 2
            assert row["crop_ltrb"] == [left, 0, left + bucket[1] * ratio, bucket[1]]
        else:
            top = (bucket[1] - bucket[0] / ratio) // 2
            assert row["crop_ltrb"] == [0, top, bucket[0], top + bucket[0] / ratio]
    schema = pq.read_schema(tmp_path / "out/data/00000.parquet")
    assert schema.field("original_size").type == schema.field("bucket").type == pa.list_(pa.int32(), 2)
    assert schema.field("crop_ltrb").type == pa.list_(pa.float64(), 4)
    assert schema.field("latents_flipped") == schema.field("latents").with_name("latents_flipped")
    assert schema.field("latents_flipped").metadata == schema.field("latents").metadata
    card = (tmp_path / "out/README.md").read_text()
    assert "| `bucket` | width and height that the picture was brought to |" in card
    assert "| `latents_flipped` | the latents of the mirrored picture |" in card


@pytest.mark.parametrize("pixels_of", ["ours", "musubi"])
def test_a_row_is_the_same_whatever_the_batches_and_the_shards(few, made, pixels_of):
    folder, _ = few
    more = (*KOHYA, f"size.pixels={pixels_of}", "size.crop=random", "size.flip=true", "deterministic=true")
    one = made(folder, *more, "stages.read.batch_size=1", "stages.encode.batch_size=2", output="one")
    all_ = made(
        folder, *more, "stages.read.batch_size=40", "stages.encode.batch_size=7", "rows_per_shard=40", output="all"
    )
    assert one == all_


def test_random_crops_follow_the_row_s_seed_alone(few, made):
    folder, pictures = few
    more = (*KOHYA, "size.pixels=musubi", "size.crop=random", "samples_per_row=3")
    found, again = made(folder, *more), made(folder, *more, output="again")
    assert found == again
    other = made(folder, *more, "seed=1", output="other")
    places = [[row["crop_ltrb"] for row in each] for each in (found, other)]
    assert places[0] != places[1]
    several = 0
    for start in range(0, len(found), 3):
        samples, picture = found[start : start + 3], pictures[start // 3]
        for row in samples:
            left, top, right, bottom = map(int, row["crop_ltrb"])
            assert [right - left, bottom - top] == row["bucket"]
            assert np.array_equal(decoded(row), scaled(picture, row["bucket"])[top:bottom, left:right])
        several += len({tuple(row["crop_ltrb"]) for row in samples}) > 1
    assert several > 10  # of those that have something to cut


def test_ours_in_the_middle_is_what_the_job_s_width_and_height_make(few, made):
    folder, _ = few
    sized = made(folder, "size.buckets=[[96,64]]")
    plain = made(folder, "sampling.width=96", "sampling.height=64", output="plain")
    for row, same in zip(sized, plain):
        assert {**same, **{name: row[name] for name in ("original_size", "crop_ltrb", "bucket")}} == row
    # 300 x 100 scaled by 0.64 is 192 wide: 48 off at both sides.
    assert next(row for row in sized if row["original_size"] == [300, 100])["crop_ltrb"] == [48, 0, 144, 64]
    # A seed's part of it: as wide, within the picture, and not always the same.
    random = made(folder, "size.buckets=[[96,64]]", "size.crop=random", output="random")
    lefts = {row["row_id"]: row["crop_ltrb"][0] for row in random if row["original_size"] == [300, 100]}
    assert all(0 <= left <= 96 for left in lefts.values())
    assert sum(a["latents"] != b["latents"] for a, b in zip(sized, random)) > 10


def test_several_areas_are_samples_of_a_row(few, made, latentmill, tmp_path):
    folder, _ = few
    more = ("size.buckets=musubi", "size.area=[4096,16384]", "size.pixels=musubi")
    found = made(folder, *more, "samples_per_row=2")
    for area, rows in ((4096, found[::2]), (16384, found[1::2])):
        assert all(row["bucket"][0] * row["bucket"][1] <= area for row in rows)
        alone = made(folder, "size.buckets=musubi", f"size.area={area}", "size.pixels=musubi", output=f"alone{area}")
        assert [row["latents"] for row in alone] == [row["latents"] for row in rows]
    assert [row["row_id"] for row in found[:3]] == ["000000000-000", "000000000-001", "000000001-000"]
    square = [row["bucket"] for row in found if row["original_size"] == [64, 64]]
    assert square == [[64, 64], [128, 128]]
    assert (
        latentmill("run", "encode", "cluster=inline", f"source.path={folder}", f"output={tmp_path / 'x'}", *more) == 2
    )
    assert (
        "size.area has 2 areas, and sample k of a row is of the k-th: samples_per_row must be 2 or a multiple, not 1"
        in latentmill.err
    )


def test_without_upscale_a_small_picture_is_only_cut(few, made, failed, tmp_path):
    folder, pictures = few
    more = ("size.buckets=kohya", "size.area=4096", "size.step=8", "size.upscale=false")
    for way in ("kohya", "ours"):
        found = made(folder, *more, f"size.pixels={way}", output=way)
        small = [row for row in found if row["original_size"][0] * row["original_size"][1] <= 4096]
        assert len(found) == 14 and len(small) > 3
        for row in small:
            picture = next(p for p in pictures if [p.shape[1], p.shape[0]] == row["original_size"])
            assert row["bucket"] == [side - side % 8 for side in row["original_size"]]
            assert np.array_equal(decoded(row), cut(picture, row["bucket"]))
        [error] = failed(tmp_path / way)
        assert error["reason"] == "a picture of 1x50 pixels becomes 1x50, less than size.step=8"


def test_the_plan_counts_the_pictures_of_each_bucket_by_their_headers(odd, latentmill, tmp_path):
    folder, _ = odd
    (folder / "98.png").write_bytes((folder / "00.png").read_bytes()[:60])  # its header, and little more
    (folder / "99.png").write_bytes(b"no picture")
    command = (
        "plan",
        "encode",
        "cluster=inline",
        f"source.path={folder}",
        f"output={tmp_path / 'out'}",
        "vae.name=patches",
    )
    assert latentmill(*command, *KOHYA) == 0, latentmill.said
    lines = latentmill.out.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith("buckets "))
    end = next(k for k, line in enumerate(lines) if "pictures of" in line)
    told = dict(
        pair.rsplit(" ", 1) for line in lines[at:end] for pair in line.removeprefix("buckets").strip().split(", ")
    )
    expected = {}
    for sides in [*SHAPES, SHAPES[0]]:
        name = "{}x{}".format(*bucket_of(*sides))
        expected[name] = expected.get(name, 0) + 1
    assert {name: int(count) for name, count in told.items()} == expected
    assert lines[end].strip() == "41 pictures of 42 rows"
    assert not (tmp_path / "out").exists()


def test_the_plan_counts_the_picture_that_rows_have_by_default(odd, latentmill, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,seed\nx,1\ny,2\n")
    given = f"source.defaults={{image: {odd[0] / '34.png'}}}"  # 64 x 64
    source = ("source=prompts", f"source.path={tmp_path / 'rows.csv'}", given)
    output = f"output={tmp_path / 'out'}"
    command = ("plan", "encode", "cluster=inline", "vae.name=patches", "vae.side=8", *source, *KOHYA, output)
    assert latentmill(*command) == 0, latentmill.said
    assert "buckets       64x64 2\n" in latentmill.out and "  2 pictures of 2 rows\n" in latentmill.out


def test_a_row_s_own_width_and_height_stand_for_its_bucket(few, made, latentmill, tmp_path, failed):
    folder, pictures = few
    lines = [
        {"image": "02.png", "width": 48, "height": 24},
        {"image": "03.png"},
        {"image": "04.png", "width": 48},
        {"prompt": "a"},
    ]
    table = folder / "rows.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = made(table, *KOHYA, "size.pixels=musubi", "source.name=prompts")
    assert [row["bucket"] for row in found] == [[48, 24], [*bucket_of(*FEW[3])]]
    assert np.array_equal(decoded(found[0]), cut(scaled(pictures[2], (48, 24)), (48, 24)))
    assert [row["reason"] for row in failed(tmp_path / "out")] == [
        "width and height must be given together, or neither",
        "size is for rows with a picture, and there is none",
    ]
    command = (
        "plan",
        "encode",
        "cluster=inline",
        "source.name=prompts",
        f"source.path={table}",
        f"output={tmp_path / 'x'}",
    )
    assert latentmill(*command, *KOHYA, "vae.name=patches") == 0, latentmill.said
    assert "48x24 1, " in latentmill.out and "2 pictures of 4 rows" in latentmill.out


def test_a_reconstruction_is_measured_against_its_bucket(few, made):
    folder, _ = few
    found = made(folder, *KOHYA, "size.pixels=kohya", job="reconstruct")
    assert all(row["psnr"] == float("inf") for row in found)
    assert [pixels(row).shape[1::-1] for row in found] == [bucket_of(*sides) for sides in FEW]


def test_a_shard_without_rows_has_the_columns_and_so_have_tars(few, made, latentmill, tmp_path, rows):
    folder, _ = few
    (folder / "00.png").write_bytes(b"no picture")
    more = (*KOHYA, "size.pixels=kohya", "size.flip=true", "latents_std=true")
    found = made(folder, *more, "rows_per_shard=1")
    schemas = [pq.read_schema(path) for path in sorted((tmp_path / "out/data").iterdir())]
    assert len(found) == 14 and all(schema.remove_metadata() == schemas[1].remove_metadata() for schema in schemas)
    vae = ("cluster=inline", "vae.name=patches", "vae.side=8")
    for sink in ("webdataset", "parquet"):
        output = ("rows_per_shard=40", f"sink={sink}", f"output={tmp_path / sink}")
        latentmill("run", "encode", *vae, f"source.path={folder}", *more, *output)
        [point] = [point for point in entry_points(group="latentmill.sinks") if point.name == sink]
        [path] = (tmp_path / sink / "data").iterdir()
        with path.open("rb") as file:
            tables = list(point.load()().read(file, None, range(len(found)), lambda name: None))
        assert len(tables) > 3
        held = [(table, at) for table in tables for at in range(len(table))]
        for (table, at), one in zip(held, found, strict=True):
            assert table.schema.field("latents_flipped").metadata == table.schema.field("latents").metadata
            for name in ("latents", "latents_flipped", "latents_std", "latents_std_flipped"):
                assert tensors.from_arrow(table, name)[at].flatten().tolist() == one[name]
            assert table["crop_ltrb"][at].as_py() == one["crop_ltrb"]
    back = ("decode", *vae, f"source.path={tmp_path / 'webdataset'}", "source.keep=[bucket]")
    assert latentmill("run", *back, f"output={tmp_path / 'back'}") == 0, latentmill.said
    for row, one in zip(rows(tmp_path / "back"), found):
        assert row["bucket"] == one["bucket"] and np.array_equal(pixels(row), decoded(one))


WRONG = [
    ("size.bucket=kohya", "there is no key size.bucket (did you mean 'buckets'?)"),
    ("size.crop=center", "size.buckets must be automodel, kohya, musubi, sdxl or a list as [[1024, 1024], [832, 1216]], not None"),
    ("size.buckets=koyha", "size.buckets must be automodel, kohya, musubi, sdxl or a list as [[1024, 1024], [832, 1216]], not 'koyha' (did you mean 'kohya'?)"),
    ("size.buckets=[[64]]", "size.buckets must be automodel, kohya, musubi, sdxl or a list as [[1024, 1024], [832, 1216]], not [[64]]"),
    ("size.buckets=[]", "size.buckets must be automodel, kohya, musubi, sdxl or a list as [[1024, 1024], [832, 1216]], not []"),
    ("size.buckets=kohya size.area=0", "size.area must be a whole number of pixels from 1 on, or a list of them, not 0"),
    ("size.buckets=kohya size.area=[65536,big]", "size.area must be a whole number of pixels from 1 on, or a list of them, not 'big'"),
    ("size.buckets=kohya size.area=1024", "size.area=1024 is too small for buckets of multiples of size.step=64"),
    ("size.buckets=kohya size.area=65536", None),
    ("size.buckets=kohya size.area=2359296", "size.area=2359296 is a square of 1536, which must be from size.min_side=256 to size.max_side=1024"),
    ("size.buckets=kohya size.min_side=32", "size.min_side must be size.step=64 or more: no side of a bucket is less"),
    ("size.buckets=kohya source.name=prompts source.opened=comfy", "source prompts opens pictures as comfy (source.opened), and size as ours: leave one of them out"),
    ("size.buckets=kohya size.pixels=kohya source.name=prompts source.opened=comfy source.masks=image", "source prompts opens pictures as comfy (source.opened), and size as kohya: leave one of them out"),
    ("size.buckets=kohya size.step=0", "size.step must be a whole number of pixels from 1 on, not 0"),
    ("size.buckets=sdxl size.area=65536", "size.area means nothing with sdxl, which says itself how large each is: leave it out"),
    ("size.buckets=[[64,64]] size.step=8", "size.step means nothing with a list of buckets, which says itself how large each is: leave it out"),
    ("size.buckets=automodel size.upscale=false", "size.upscale means nothing with automodel, which says itself how large each is: leave it out"),
    ("size.buckets=musubi size.min_side=64", "size.min_side means nothing with musubi: leave it out"),
    ("size.buckets=kohya size.upscale=false size.max_side=64", "size.max_side means nothing with upscale: false, where a picture's own shape decides: leave it out"),
    ("size.buckets=kohya size.upscale=2", "size.upscale must be true or false, not 2"),
    ("size.buckets=kohya size.crop=middle", "size.crop must be center or random, not 'middle'"),
    ("size.buckets=kohya size.flip=1", "size.flip must be true or false, not 1"),
    ("size.buckets=kohya size.pixels=musubi-tuner", "size.pixels must be ours, kohya or musubi, not 'musubi-tuner'"),
    ("size.buckets=kohya sampling.width=64 sampling.height=64", "size gives each picture the size of its bucket: leave sampling.width and sampling.height out"),
    ("size.buckets=[[8192,4096]]", "size: buckets of 8192x4096 pixels are larger than sampling.max_pixels=16777216 allows"),
    ("size.buckets=[[72,60]]", "size: buckets of 72x60 are no multiples of 8, as the VAE needs"),
    ("size.buckets=musubi size.step=4 size.upscale=false", "size: buckets of 4x4 are no multiples of 8, as the VAE needs"),
    ("size.buckets=kohya size.flip=true flow=[read,encode,decode,write]", "size.flip is of latents as they were encoded, so flow must end with encode, write, not ['read', 'encode', 'decode', 'write']"),
    ("size.buckets=kohya source.keep=[bucket] source.name=prompts", "source.keep: the column bucket can't be kept, since that is a column that stage read adds"),
    ("size=kohya", "size: keys and their values are expected, not text"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), WRONG, ids=[wrong for wrong, _ in WRONG])
def test_a_wrong_size_is_one_line_that_names_the_key(few, latentmill, tmp_path, overrides, said):
    folder, _ = few
    pq.write_table(pa.table({"image": ["00.png"], "bucket": [1]}), folder / "rows.parquet")
    path = folder / "rows.parquet" if "prompts" in overrides else folder
    output = tmp_path / "out"
    command = (
        "plan",
        "encode",
        "cluster=inline",
        "vae.name=patches",
        "vae.side=8",
        f"source.path={path}",
        f"output={output}",
    )
    code = latentmill(*command, *overrides.split(" "))
    assert (code, said is None or latentmill.err.count("\n")) == ((0, True) if said is None else (2, 1)), (
        latentmill.said
    )
    assert said is None or latentmill.err.rstrip("\n").endswith(said), latentmill.err


def test_a_job_s_size_is_replaced_as_a_whole_or_key_by_key(few, latentmill, tmp_path):
    folder, _ = few
    job = {
        "defaults": ["job", "_self_"],
        "output": str(tmp_path / "out"),
        "flow": ["read", "encode", "write"],
        "cluster": {"kind": "inline"},
        "source": {"name": "images", "path": str(folder)},
        "sink": {"name": "parquet"},
        "vae": {"name": "patches", "side": 8},
        "size": {"buckets": "kohya", "area": 4096, "step": 8, "min_side": 32, "max_side": 128, "crop": "random"},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))

    def planned(*overrides):
        assert latentmill("plan", tmp_path / "job.yaml", "--json", *overrides) == 0, latentmill.said
        return json.loads(latentmill.out)["config"].get("size")

    about = {**job["size"], "area": [4096], "upscale": True, "flip": False, "pixels": "ours"}
    assert planned() == about and planned("size.crop=center") == {**about, "crop": "center"}
    sdxl = {"buckets": "sdxl", "crop": "center", "flip": True, "pixels": "ours"}
    assert planned("size={buckets: sdxl, flip: true}") == sdxl
    assert planned("size={buckets: [[64, 32]]}", "size.flip=true") == {**sdxl, "buckets": [[64, 32]]}
    assert planned("size=null") is None
    del job["size"]
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    assert planned("size={buckets: sdxl, flip: true}") == planned("size.buckets=sdxl", "size.flip=true") == sdxl
    assert planned() is None and "size" not in json.loads(latentmill.out)["config"]


def test_latents_have_no_size(few, made, latentmill, tmp_path):
    made(few[0], *KOHYA)
    command = ("run", "decode", "cluster=inline", "vae.name=patches", "vae.side=8", f"source.path={tmp_path / 'out'}")
    assert latentmill(*command, f"output={tmp_path / 'x'}", *KOHYA) == 2
    assert latentmill.err.endswith("decode: size is for pictures, and source latents gives latents\n")
