"""TIFFs of every kind, written here sample by sample: each is read right, or is an error row that says what it is."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image
from tests.outside.picture_files import (
    COLOURS,
    PALETTE,
    judge,
    off,
    samples,
    tiff,
    tiff_looks,
)

# Photometric interpretation, bits and extra samples: what must be read, whatever its order of bytes and planes is.
READ = {
    *((0, bits, ()) for bits in (1, 2, 4, 8)),
    *((1, bits, ()) for bits in (1, 2, 4, 8, 16)),
    *((2, bits, extra) for bits in (8, 16) for extra in [(), (0,), (1,), (2,)]),
    *((3, bits, ()) for bits in (1, 2, 4, 8)),
    *((5, bits, ()) for bits in (8, 16)),
    (6, 8, ()),
}


def tiffs(photometric):
    """Every combination of what a TIFF can be made of, each with its key."""
    extras = [(), (0,), (1,), (2,), (0, 0), (1, 0), (2, 0), (0, 2)]
    for bits, extra in itertools.product((1, 2, 4, 8, 12, 16, 32), extras):
        count = COLOURS[photometric] + len(extra)
        if count > 6 or (photometric == 3 and bits > 8) or (photometric == 0 and 1 in extra):
            continue
        values = samples(bits, count)
        if 1 in extra:  # colours that are multiplied by their alpha are not above it
            values[:, :, : COLOURS[photometric]] = np.minimum(values, values[:, :, [extra.index(1) - len(extra)]])[
                :, :, : COLOURS[photometric]
            ]
        palette = PALETTE[: 1 << bits] if photometric == 3 else None
        looks = tiff_looks(values, bits, photometric, extra, palette)
        tags = {530: [1, 1]} if photometric == 6 else {}
        for order, planar, (compression, predictor), fill, parts in itertools.product(
            "<>", (1, 2), [(1, 1), (1, 2), (5, 1), (5, 2), (8, 1), (8, 2), (32773, 1)], (1, 2), ("strips", "tiles")
        ):
            if (predictor == 2 and bits not in (8, 16, 32)) or (fill == 2 and compression == 32773):
                continue
            if (len(extra) > 1 or bits in (12, 32)) and (compression != 1 or fill == 2 or parts == "tiles"):
                continue
            if (parts == "tiles" or fill == 2) and (compression == 5 or predictor == 2 or extra):
                continue
            shape = {"lines": 4} if parts == "strips" else {"tile": 16}
            key = (bits, extra, order, planar, predictor, compression, fill, parts)
            yield key, tiff(
                values, bits, photometric, order, planar, predictor, compression, extra,
                fill=fill, palette=palette, tags=tags, **shape,
            ), looks  # fmt: skip


@pytest.mark.parametrize("photometric", COLOURS)
def test_every_tiff_is_read_right_or_refused(read, photometric):
    cases = {key: (file, looks) for key, file, looks in tiffs(photometric)}
    # Of 16 bits the upper 8 are taken, of colours and of their alpha; YCbCr is turned into RGB in whole numbers.
    done, errors = judge(read, cases, within=3 if photometric in (2, 6) else 2 if photometric == 5 else 1)
    required = {
        key
        for key in cases
        if (photometric, *key[:2]) in READ
        and not (key[4] == 2 and key[5] == 1)  # a predictor, and nothing that it is for
        and not (
            key[6] == 2 and (key[0] == 16 or COLOURS[photometric] > 1)
        )  # bits in reverse, of what Pillow knows not
    }
    assert required and not required - done
    reasons = ("a TIFF of a kind that is not read (", "samples that are signed", "can't be decoded: decoder error")
    assert all(reason.startswith(reasons) for reason in errors.values())


def test_planes_of_16_bits_are_the_same_picture_from_a_file(latentmill, rows, tmp_path, patches):
    folder = tmp_path / "in"
    folder.mkdir()
    rgb, inks = samples(16, 3, 16, 16), samples(16, 4, 16, 16)
    for planar in (1, 2):
        (folder / f"rgb{planar}.tif").write_bytes(tiff(rgb, 16, 2, planar=planar))
        (folder / f"inks{planar}.tif").write_bytes(tiff(inks, 16, 5, planar=planar))
    output = tmp_path / "out"
    assert (
        latentmill("run", "reconstruct", f"source.path={folder}", "source.id_column=path", *patches, f"output={output}")
        == 0
    )
    found = {row["id"]: np.array(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows(output)}
    assert off(found["rgb2.tif"], tiff_looks(rgb, 16, 2)) <= 1
    assert (found["rgb1.tif"] == found["rgb2.tif"]).all() and (found["inks1.tif"] == found["inks2.tif"]).all()


GRAY, RGB = samples(8), samples(8, 3)
TIFFS = {
    "signed": (tiff(GRAY, 8, 1, tags={339: [2]}), "samples that are signed"),
    "floating": (tiff(samples(32), 32, 1, tags={339: [3]}), "samples that are signed, or of 32 bits and more"),
    "RGB of 12 bits": (tiff(samples(12, 3), 12, 2), "(RGB, 12 bits, 3 samples)"),
    "bits that differ": (tiff(samples(8, 4), 8, 2, planar=2, extra=(0,), tags={258: [8, 8, 8, 16]}), "8 and 16 bits"),
    "no photometric": (tiff(GRAY, 8, 1, without=[262]), "doesn't say what its samples are"),
    "RGBA without a word": (tiff(samples(8, 4), 8, 2), "a fourth sample that it doesn't say the meaning of"),
    "a preview": (tiff(GRAY, 8, 1, tags={254: [1]}), "a preview or a mask of another"),
    "a mask": (tiff(samples(1), 1, 1, tags={254: [4]}), "a preview or a mask of another"),
    "a raw file's filter": (tiff(samples(16), 16, 32803), "photometric interpretation 32803"),
    "other inks": (tiff(samples(8, 4), 8, 5, tags={332: [2]}), "ink set 2"),
    "a palette of 8 bits": (tiff(samples(4), 4, 3, tags={320: PALETTE[:16].T.ravel().tolist()}), "palette is of 8 bits"),
    "old JPEG": (tiff(RGB, 8, 6, tags={259: [6]}), "compression 6"),
    "a predictor of nothing": (tiff(GRAY, 8, 1, tags={317: [2]}), "predictor 2"),
    "YCbCr of video": (
        tiff(RGB, 8, 6, tags={530: [1, 1], 532: [16, 235, 128, 240, 128, 240]}), "a black, a white or coefficients of its own",
    ),
    "a tile of 4 GB": (tiff(GRAY, 8, 1, tile=16, tags={322: [65520], 323: [65520]}), "more than 89478485 pixels"),
}  # fmt: skip


def test_a_tiff_that_would_come_out_wrong_says_what_it_is(read):
    done, errors = judge(read, {name: (file, None) for name, (file, _) in TIFFS.items()}, by_name=True)
    assert not done
    assert [name for name, error in zip(TIFFS, errors.values()) if TIFFS[name][1] not in error] == []


def test_gray_that_is_multiplied_by_its_alpha_is_read(read):
    values = samples(8, 2)
    values[:, :, 0] = np.minimum(values[:, :, 0], values[:, :, 1])
    opaque = samples(8, 4)
    opaque[:, :, 3] = 255
    cases = {
        "gray": (tiff(values, 8, 1, extra=(1,)), tiff_looks(values, 8, 1, (1,))),
        "a fourth sample of 255": (tiff(opaque, 8, 2), opaque[:, :, :3]),
    }
    assert judge(read, cases)[1] == {}


def test_tiffs_are_turned_upright(read):
    turned = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1]}
    turned |= {5: turned[1], 6: turned[4], 7: turned[3], 8: turned[2]}
    cases = {
        (orientation, planar): (
            tiff(RGB, 8, 2, planar=planar, tags={274: [orientation]}),
            turned[orientation].transpose(1, 0, 2) if orientation > 4 else turned[orientation],
        )
        for orientation in turned
        for planar in (1, 2)
    }
    assert judge(read, cases, within=0)[1] == {}
