"""PNG, BMP, GIF, JPEG and WebP of every kind, written here: each is read right, or is an error row that says what it is."""

import io
import itertools
import struct

import numpy as np
from PIL import Image
from tests.outside.picture_files import (
    HEIGHT,
    PALETTE,
    WIDTH,
    bmp,
    chunk,
    gif,
    judge,
    masked,
    off,
    on_white,
    packed,
    png,
    samples,
)

from latentmill.plugin import RowError

RNG = np.random.default_rng(12)
RGB = samples(8, 3)


# ------------------------------------------------------------------------------------------------------------ PNG


def pngs():
    for (kind, depths), interlaced in itertools.product(
        {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items(), (False, True)
    ):
        for bits in depths:
            values, top = samples(bits, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]), (1 << bits) - 1
            shares = values / top
            palette = PALETTE[: 1 << bits] if kind == 3 else None
            alpha = shares[:, :, -1:] if kind in (4, 6) else 1
            rgb = palette[values[:, :, 0]] / 255 if kind == 3 else shares[:, :, : 3 if kind in (2, 6) else 1]
            looks = 255 * on_white(np.broadcast_to(rgb, (HEIGHT, WIDTH, 3)), alpha)
            yield (kind, bits, interlaced, False), png(values, bits, kind, interlaced, palette=palette), looks
            if kind == 3:
                clear = RNG.integers(0, 256, 1 << bits)
                looks = 255 * on_white(rgb, clear[values] / 255)
                before = chunk(b"tRNS", bytes(clear.tolist()))
                yield (kind, bits, interlaced, True), png(values, bits, kind, interlaced, before, palette), looks
            elif kind in (0, 2):
                values[3:5, 2:6] = values[0, 0]
                looks = np.where((values == values[0, 0]).all(2, keepdims=True), 255, 255 * values / top)
                looks = np.broadcast_to(looks, (HEIGHT, WIDTH, 3))
                before = chunk(b"tRNS", struct.pack(f">{values.shape[2]}H", *values[0, 0].tolist()))
                yield (kind, bits, interlaced, True), png(values, bits, kind, interlaced, before), looks


def test_every_png_is_read_right_or_refused(read):
    cases = {key: (file, looks) for key, file, looks in pngs()}
    _, errors = judge(read, cases, within=2, by_name=True)  # 16 bits are cut to the upper 8, and so is their alpha
    assert {key[:2] for key in errors} == {(0, 2), (0, 4), (2, 16)} and all(key[3] for key in errors)
    assert set(errors.values()) == {f"{at:05d}.png: a transparent colour among samples of 2, 4 or 16 bits" for at in (
        at for at, key in enumerate(cases) if key in errors)}  # fmt: skip


def test_a_bit_that_flips_in_a_png_changes_no_pixel_or_is_an_error_row(read):
    values = samples(8, 3, 5, 7)
    whole = png(values, 8, 2, before=chunk(b"tEXt", b"Title\0a") + chunk(b"gAMA", struct.pack(">I", 45455)))
    flipped = [
        whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :]
        for bit in range(8 * len(whole))
    ]
    [right, *found] = read([whole, *flipped])
    assert off(right, values) == 0 and len(found) > 1500
    assert all(isinstance(row, RowError) for row in found)


def test_a_png_with_fewer_lines_than_it_says_is_an_error_row(read):
    values = samples(8, 3)
    cases = [png(values, 8, 2, interlaced, drop=drop) for interlaced in (False, True) for drop in (64, 320)]
    assert [str(error) for error in read(cases)] == ["image: can't be decoded: it has fewer lines than it says"] * 4
    assert off(read([png(values, 8, 2)[:-12] + chunk(b"IDAT", b"more") + chunk(b"IEND", b"")])[0], values) == 0


def test_what_a_png_says_besides_its_pixels_never_costs_the_row(read):
    words = {
        "text of no EXIF": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  4\nwhat is this?\n"),
        "no EXIF": chunk(b"eXIf", b"garbage"),
        "half of EXIF": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x05"),
        "gamma 1": chunk(b"gAMA", struct.pack(">I", 100_000)),
        "a background": chunk(b"bKGD", struct.pack(">3H", 255, 0, 0)),
        "garbage for a profile": chunk(b"iCCP", b"x\0\0garbage"),
        "a private chunk": chunk(b"prVt", b"?"),
    }
    assert judge(read, {name: (png(RGB, 8, 2, before=word), RGB) for name, word in words.items()}, within=0)[1] == {}


# ------------------------------------------------------------------------------------------------------------ BMP


def bmps():
    for bits, header, top_down in itertools.product((1, 4, 8), (12, 40, 108, 124), (False, True)):
        for name, palette in {
            "colours": PALETTE[: 1 << bits],
            "a few colours": PALETTE[:2],
            "black and white": np.array([[0, 0, 0], [255, 255, 255]]),
            "grays": np.arange(1 << bits)[:, None].repeat(3, 1),
            "a few grays": np.arange(max(2, 3 * bits // 4))[:, None].repeat(3, 1),
        }.items():
            if header == 12 and (top_down or len(palette) != 1 << bits):
                continue
            values = RNG.integers(0, len(palette), (HEIGHT, WIDTH))
            yield (bits, name, header, top_down), bmp(values, bits, palette, header, None, top_down), palette[values]
    fields = [
        (16, 0x7C00, 0x3E0, 0x1F, 0), (16, 0x7C00, 0x3E0, 0x1F, 0x8000), (16, 0xF800, 0x7E0, 0x1F, 0),
        (16, 0xF00, 0xF0, 0xF, 0), (16, 0xF00, 0xF0, 0xF, 0xF000), (32, 0xFF0000, 0xFF00, 0xFF, 0),
        (32, 0xFF0000, 0xFF00, 0xFF, 0xFF000000), (32, 0xFF, 0xFF00, 0xFF0000, 0xFF000000),
        (32, 0xFF000000, 0xFF0000, 0xFF00, 0xFF), (32, 0xFF000000, 0xFF0000, 0xFF00, 0), (32, 0, 0, 0, 0),
        (32, 0x3FF00000, 0xFFC00, 0x3FF, 0), (32, 0xFF, 0xFF00, 0xFF0000, 0),
    ]  # fmt: skip
    for (bits, *masks), header in itertools.product(fields, (40, 52, 56, 108, 124)):
        values = RNG.integers(0, 1 << bits, (HEIGHT, WIDTH))
        rgb = np.stack([masked(values, mask) for mask in masks[:3]], 2) if masks[0] else np.full((HEIGHT, WIDTH, 3), 9)
        alpha = masked(values, masks[3])[:, :, None] if masks[3] and header >= 56 else 1
        yield (bits, *masks, header), bmp(values, bits, header=header, masks=masks), 255 * on_white(rgb, alpha)
    yield "24 bits", bmp(RGB[:, :, ::-1], 24), RGB
    values = RNG.integers(0, 1 << 32, (HEIGHT, WIDTH))  # the fourth byte is no alpha, whatever it holds
    looks = 255 * np.stack([masked(values, 0xFF << shift) for shift in (16, 8, 0)], 2)
    yield "32 bits", bmp(values, 32), looks
    values = RNG.integers(0, 1 << 24, (HEIGHT, WIDTH))
    looks = 255 * np.stack([masked(values, 0xFF << shift) for shift in (16, 8, 0)], 2)
    yield "alpha 0 everywhere", bmp(values, 32, header=124, masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000)), looks
    for bits in (8, 4):
        values = RNG.integers(0, 1 << bits, (HEIGHT, WIDTH))
        lines = [b"\0" + bytes([WIDTH]) + packed(line[None], bits) for line in values[::-1]]
        rle = b"".join(line + bytes(len(line) % 2) + b"\0\0" for line in lines) + b"\0\1"
        yield f"RLE of {bits} bits", bmp(values, bits, PALETTE[: 1 << bits], rle=rle), PALETTE[values]


def test_every_bmp_is_read_right_or_refused(read):
    cases = {key: (file, looks) for key, file, looks in bmps()}
    sixteen = {key: case for key, case in cases.items() if key[0] == 16}
    done, errors = judge(read, {key: case for key, case in cases.items() if key[0] != 16})
    done16, errors16 = judge(read, sixteen, within=1)
    assert {key for key in cases if key[1] in ("colours", "a few colours")} <= done
    assert {key for key in cases if key[0] in (1, 8) and key[1] == "grays"} <= done
    assert {"24 bits", "32 bits", "alpha 0 everywhere", "RLE of 8 bits", "RLE of 4 bits"} <= done
    assert {(16, 0x7C00, 0x3E0, 0x1F, 0x8000, 40), (16, 0xF800, 0x7E0, 0x1F, 0, 124)} <= done16
    assert (
        errors16[16, 0x7C00, 0x3E0, 0x1F, 0x8000, 124]
        == "a BMP of 16 bits with alpha of 1 bits, which is not read: save it as PNG"
    )
    assert {key for key in cases if key[0] == 8 and key[1] == "black and white"} <= done
    assert errors[4, "black and white", 40, False].startswith("a BMP of 4 bits with a palette of grays, which is not")
    assert all("is not read" in error or "Unsupported BMP" in error for error in [*errors.values(), *errors16.values()])


# ------------------------------------------------------------------------------------------------- GIF, JPEG, WebP


def test_every_gif_is_read_right(read):
    cases = {}
    for count, interlaced in itertools.product((2, 4, 16, 256), (False, True)):
        values = RNG.integers(0, count, (HEIGHT, WIDTH))
        colours, others, grays = PALETTE[:count], PALETTE[-count:], np.arange(count)[:, None].repeat(3, 1)
        for name, palette, local in [
            ("global", colours, None), ("local", None, others), ("both", colours, others),
            ("grays", grays, None), ("local grays", colours, grays),
        ]:  # fmt: skip
            looks = (palette if local is None else local)[values]
            cases[count, interlaced, name] = gif(values, palette, local, interlaced=interlaced), looks
            looks = np.where(values[:, :, None] == 1, 255, looks)
            file = gif(values, palette, local, transparent=1, interlaced=interlaced)
            cases[count, interlaced, name, "transparent"] = file, looks
        for transparent in (None, 1):  # what a frame leaves of its screen is white, whatever the background's colour is
            looks = np.full((30, 40, 3), 255)
            looks[7 : 7 + HEIGHT, 5 : 5 + WIDTH] = np.where(
                values[:, :, None] == (transparent or -1), 255, colours[values]
            )
            file = gif(values, colours, None, (40, 30), (5, 7), 1, transparent, interlaced)
            cases[count, interlaced, "screen", transparent] = file, looks
    assert judge(read, cases, within=0)[1] == {}


def saved(array, mode, format, **settings):
    file = io.BytesIO()
    image = Image.frombytes(mode, array.shape[1::-1], array.astype(np.uint8).tobytes())
    image.save(file, format, **settings)
    return file.getvalue()


def test_jpeg_in_gray_ycbcr_rgb_and_inks(read):
    down, across = np.mgrid[:48, :64]
    smooth = np.stack([3 * across + 20, 4 * down + 20, across + down + 60], 2)
    inks = np.dstack([smooth, across])
    cases = {
        "gray": (saved(smooth[:, :, 0], "L", "JPEG", quality=99), smooth[:, :, :1].repeat(3, 2)),
        **{
            f"YCbCr {sampling}": (saved(smooth, "RGB", "JPEG", quality=99, subsampling=sampling), smooth)
            for sampling in ("4:4:4", "4:2:2", "4:2:0")
        },
        "RGB": (saved(smooth, "RGB", "JPEG", quality=99, keep_rgb=True), smooth),
        "progressive": (saved(smooth, "RGB", "JPEG", quality=99, progressive=True), smooth),
        "inks": (
            saved(inks, "CMYK", "JPEG", quality=99),
            255 * (1 - inks[:, :, :3] / 255) * (1 - inks[:, :, 3:] / 255),
        ),
    }
    y = smooth @ [0.299, 0.587, 0.114]
    ycc = np.dstack([y, 128 + (smooth[:, :, 2] - y) / 1.772, 128 + (smooth[:, :, 0] - y) / 1.402, 255 - across])
    ycck = saved((255 - ycc).round(), "CMYK", "JPEG", quality=99, subsampling=0)  # Adobe's inks are stored inverted
    at = ycck.index(b"Adobe") + 11
    cases["inks as YCCK"] = ycck[:at] + b"\2" + ycck[at + 1 :], cases["inks"][1]
    assert judge(read, cases, within=6)[1] == {}


def test_webp_with_alpha_and_a_frame_that_is_smaller_than_the_canvas(read):
    rgba = samples(8, 4)
    frame = saved(RGB, "RGB", "WEBP", lossless=True)[12:]
    x, y = 4, 6
    anmf = struct.pack("<6I", x // 2, y // 2, WIDTH - 1, HEIGHT - 1, 100, 0)
    anmf = b"".join(anmf[at : at + 3] for at in range(0, 20, 4)) + b"\0" + frame
    canvas = b"\2\0\0\0" + (39).to_bytes(3, "little") + (29).to_bytes(3, "little")
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
        for kind, data in [(b"VP8X", canvas), (b"ANIM", b"\0\0\xff\xff\0\0"), (b"ANMF", anmf)]
    )
    looks = np.full((30, 40, 3), 255)
    looks[y : y + HEIGHT, x : x + WIDTH] = RGB
    cases = {
        "RGB": (saved(RGB, "RGB", "WEBP", lossless=True), RGB),
        "RGBA": (
            saved(rgba, "RGBA", "WEBP", lossless=True, exact=True),
            255 * on_white(rgba[:, :, :3] / 255, rgba[:, :, 3:] / 255),
        ),
        **{
            f"a frame {flags}": (b"RIFF" + struct.pack("<I", len(body)) + body[:12] + bytes([flags]) + body[13:], looks)
            for flags in (2, 18)  # animated, without and with alpha
        },
    }
    assert judge(read, cases)[1] == {}
