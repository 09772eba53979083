"""Writes picture files of every kind, from samples that a test knows, and says what they look like by the formats' formulas."""

import struct
import zlib

import numpy as np

from latentmill.plugin import RowError

REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def packed(values, bits, order=">"):
    """Samples ``values[h, ...]`` as bytes, each line padded to whole ones."""
    if bits >= 8 and bits != 12:
        return values.astype(f"{order}u{bits // 8}").tobytes()
    lines = (values.reshape(len(values), -1)[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    return b"".join(np.packbits(line.ravel().astype(np.uint8)).tobytes() for line in lines)


def on_white(rgb, alpha):
    """RGB and alpha in [0, 1], on white."""
    return rgb * alpha + (1 - alpha)


# ----------------------------------------------------------------------------------------------------------- TIFF


def lzw(data):
    """LZW as TIFF has it, in codes of 9 bits: the table is cleared before it would need 10."""
    codes = []
    for start in range(0, len(data), 200):
        codes += [256, *data[start : start + 200]]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def packbits(data):
    return b"".join(bytes([len(data[at : at + 128]) - 1]) + data[at : at + 128] for at in range(0, len(data), 128))


COMPRESSIONS = {1: bytes, 5: lzw, 8: zlib.compress, 32773: packbits}


def tiff(
    values, bits, photometric, order="<", planar=1, predictor=1, compression=1, extra=(), lines=None, tile=None,
    fill=1, palette=None, tags=(), without=(),
):  # fmt: skip
    """A TIFF of samples ``values[h, w, s]``, in strips of so many ``lines`` or in tiles; ``tags`` are added or replaced."""
    height, width, samples = values.shape
    parts = []
    for plane in [values] if planar == 1 else np.split(values, samples, axis=2):
        if tile:
            padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
            parts += [padded[y : y + tile, x : x + tile] for y in range(0, height, tile) for x in range(0, width, tile)]
        else:
            parts += [plane[y : y + (lines or height)] for y in range(0, height, lines or height)]
    data = []
    for part in parts:
        if predictor == 2:
            part = np.concatenate([part[:, :1], (part[:, 1:] - part[:, :-1]) % (1 << bits)], 1)
        content = COMPRESSIONS.get(compression, bytes)(packed(part, bits, order))
        data.append(content.translate(REVERSED) if fill == 2 else content)
    starts = np.cumsum([8, *map(len, data)]).tolist()
    lengths = list(map(len, data))
    fields = {256: [width], 257: [height], 258: [bits] * samples, 259: [compression], 262: [photometric]}
    fields |= {277: [samples], 284: [planar], 266: [fill], 317: [predictor]}
    fields |= {338: list(extra)} if extra else {}
    fields |= {322: [tile], 323: [tile]} if tile else {278: [lines or height]}
    fields |= {324: starts[:-1], 325: lengths} if tile else {273: starts[:-1], 279: lengths}
    fields |= {320: (palette.T.ravel() * 257).tolist()} if palette is not None else {}
    fields = {**fields, **dict(tags)}
    entries, longer = b"", b""
    kept = [tag for tag in sorted(fields) if tag not in without]
    behind = starts[-1] + 2 + 12 * len(kept) + 4
    for tag in kept:
        letter = "I" if tag in (273, 279, 324, 325) else "H"
        content = struct.pack(order + letter * len(fields[tag]), *fields[tag])
        place = content.ljust(4, b"\0") if len(content) <= 4 else struct.pack(order + "I", behind + len(longer))
        longer += content if len(content) > 4 else b""
        entries += struct.pack(order + "HHI", tag, 4 if letter == "I" else 3, len(fields[tag])) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", starts[-1])
    return head + b"".join(data) + struct.pack(order + "H", len(kept)) + entries + bytes(4) + longer


COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}
"""Samples of a colour, by TIFF's photometric interpretation."""


def tiff_looks(values, bits, photometric, extra=(), palette=None):
    """What such samples look like, RGB in [0, 255]: TIFF 6.0, sections 4 to 6, 16, 18 and 21."""
    samples = values / ((1 << bits) - 1)
    colour = samples[:, :, : COLOURS[photometric]]
    if photometric == 3:
        rgb = palette[values[:, :, 0]] / 255
    elif photometric == 5:
        rgb = (1 - colour[:, :, :3]) * (1 - colour[:, :, 3:])
    elif photometric == 6:
        y, cb, cr = colour[:, :, 0], colour[:, :, 1] - 128 / 255, colour[:, :, 2] - 128 / 255
        rgb = np.stack([y + 1.402 * cr, y - (0.114 * 1.772 * cb + 0.299 * 1.402 * cr) / 0.587, y + 1.772 * cb], 2)
        rgb = rgb.clip(0, 1)
    else:
        rgb = np.broadcast_to(1 - colour if photometric == 0 else colour, (*values.shape[:2], 3))
    for at, kind in enumerate(extra, COLOURS[photometric]):
        alpha = samples[:, :, at : at + 1]
        if kind:
            return 255 * (on_white(rgb, alpha) if kind == 2 else rgb + 1 - alpha)
    return 255 * rgb


# ------------------------------------------------------------------------------------------------------------ PNG


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def filtered(values, bits):
    """Lines of a PNG, filtered by each of the five filters in turn."""
    if not values.size:
        return b""
    step, out = max(1, bits * values.shape[2] // 8), b""
    before = None
    for number, line in enumerate(values):
        now = np.frombuffer(packed(line[None], bits), np.uint8).astype(int)
        up = np.zeros_like(now) if before is None else before
        left, corner = (np.concatenate([np.zeros(step, int), line])[: len(now)] for line in (now, up))
        near = np.stack([abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)])
        paeth = np.choose(near.argmin(0), [left, up, corner])
        guess = [0 * now, left, up, (left + up) // 2, paeth][number % 5]
        out += bytes([number % 5]) + ((now - guess) % 256).astype(np.uint8).tobytes()
        before = now
    return out


def png(values, bits, kind, interlaced=False, before=b"", palette=None, drop=0):
    """A PNG of samples ``values[h, w, s]``, with chunks ``before`` its data; ``drop`` bytes of it are left out."""
    height, width, _ = values.shape
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    lines = b"".join(
        filtered(values[y::down, x::right], bits)
        for x, y, right, down in (passes if interlaced else [(0, 0, 1, 1)])
        if x < width
    )
    data = zlib.compress(lines[: len(lines) - drop])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced))
    colours = chunk(b"PLTE", bytes(palette.ravel().tolist())) if palette is not None else b""
    data = chunk(b"IDAT", data[:40]) + chunk(b"IDAT", data[40:])
    return b"\x89PNG\r\n\x1a\n" + head + colours + before + data + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------ BMP and GIF


def bmp(values, bits, palette=None, header=40, masks=None, top_down=False, rle=None):
    """A BMP of ``values[h, w]``, or ``[h, w, 3]`` as BGR for 24 bits; or of data that is packed already, as RLE of 8 or 4 bits."""
    height, width = values.shape[:2]
    content = rle
    if content is None:
        lines = values if top_down else values[::-1]
        content = b"".join(
            line + bytes(-len(line) % 4) for line in (packed(v[None], bits if bits != 24 else 8, "<") for v in lines)
        )
    colours = [] if palette is None else palette[:, ::-1].tolist()
    compression = 3 if masks else 0 if rle is None else {8: 1, 4: 2}[bits]
    if header == 12:
        head = struct.pack("<IHHHH", 12, width, height, 1, bits) + b"".join(map(bytes, colours))
    else:
        size = -height if top_down else height
        head = struct.pack(
            "<IiiHHIIiiII", header, width, size, 1, bits, compression, len(content), 0, 0, len(colours), 0
        )
        if masks:
            head += struct.pack("<4I", *masks)[: 16 if header >= 56 else 12]
        head = head.ljust(header, b"\0") + b"".join(bytes(colour) + b"\0" for colour in colours)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(content), 0, 0, 14 + len(head)) + head + content


def masked(values, mask):
    """The bits of ``values`` under a mask, from 0 to 1."""
    shift = (mask & -mask).bit_length() - 1
    return ((values & mask) >> shift) / (mask >> shift)


def gif(values, palette=None, local=None, screen=None, at=(0, 0), background=0, transparent=None, interlaced=False):
    """A GIF of ``values[h, w]``, a frame ``at`` a place of its logical ``screen``."""
    height, width = values.shape

    def table(colours):
        return (0, b"") if colours is None else (0x80 | len(colours).bit_length() - 2, bytes(colours.ravel().tolist()))

    flags, colours = table(palette)
    out = b"GIF89a" + struct.pack("<HHBBB", *(screen or (width, height)), flags, background, 0) + colours
    if transparent is not None:
        out += b"!\xf9\4\1\0\0" + bytes([transparent, 0])
    flags, colours = table(local)
    out += b"," + struct.pack("<HHHHB", *at, width, height, flags | 0x40 * interlaced) + colours
    passes = [(0, 8), (4, 8), (2, 4), (1, 2)] if interlaced else [(0, 1)]
    numbers = np.concatenate([values[y::step].ravel() for y, step in passes]).tolist()
    codes = []
    for start in range(0, len(numbers), 200):  # cleared before the table needs codes of 10 bits
        codes += [256, *numbers[start : start + 200]]
    bits = "".join(f"{code:09b}"[::-1] for code in [*codes, 257])
    bits += "0" * (-len(bits) % 8)
    data = bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))
    blocks = [data[at : at + 255] for at in range(0, len(data), 255)]
    return out + b"\x08" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0;"


HEIGHT, WIDTH = 11, 21
PALETTE = np.random.default_rng(12).integers(0, 256, (256, 3))


def samples(bits, count=1, height=HEIGHT, width=WIDTH):
    """Random ones, the same each time."""
    chance = np.random.default_rng([bits, count, height, width])
    return chance.integers(0, 1 << bits, (height, width, count))


def off(pixels, looks):
    """By how much the pixels differ from what they should be, at most."""
    return np.abs(pixels - looks).max() if pixels.shape == looks.shape else np.inf


def judge(read, cases, within=1.0, by_name=False):
    """Read ``{key: (file, looks)}``: the keys that are read, all within so many levels, and the errors of the others."""
    found = dict(zip(cases, read([file for file, _ in cases.values()], by_name)))
    wrong = {
        key: off(pixels, cases[key][1])
        for key, pixels in found.items()
        if not isinstance(pixels, RowError) and off(pixels, cases[key][1]) > within + 1e-9
    }
    assert not wrong
    errors = {key: str(error).removeprefix("image: ") for key, error in found.items() if isinstance(error, RowError)}
    assert all("\n" not in error for error in errors.values())
    return found.keys() - errors.keys(), errors
