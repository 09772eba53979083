"""Odd files that may lie in a folder of pictures, each with its verdict."""

import io
import os
import socket
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

SIZE = (8, 8)
RED, WHITE, BLACK, GRAY = (255, 0, 0), (255, 255, 255), (0, 0, 0), (100, 100, 100)
NO_PICTURE = "not a picture in PNG, JPEG, WEBP, BMP, TIFF or GIF"


def saved(mode="RGB", color=RED, format="PNG", size=SIZE, **options):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, format, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits, kind, pixel, size=SIZE, before=b""):
    """A PNG of one ``pixel`` (bytes; for fewer than 8 bits, a line), of a kind that Pillow doesn't write."""
    width, height = size
    line = b"\0" + (pixel if bits < 8 else pixel * width)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(line * min(height, 99)))
    return b"\x89PNG\r\n\x1a\n" + head + before + data + chunk(b"IEND", b"")


def tiff(bits, pixel, photometric=1, samples=1, sample_format=1, order="<", more=()):
    """An uncompressed TIFF of one ``pixel`` (bytes; for 12 bits, two), of a kind that Pillow doesn't write."""
    width, height = SIZE
    data = pixel * (width * height * samples * bits // 8 // len(pixel))
    tags = [(256, width), (257, height), (258, *[bits] * samples), (259, 1), (262, photometric), (277, samples)]
    tags += [(278, height), (279, len(data)), (339, *[sample_format] * samples), *more]
    lists = 8 + 2 + 12 * (len(tags) + 1) + 4
    long = {tag: values for tag, *values in tags if len(values) > 2}
    places = {tag: lists + sum(2 * len(v) for t, v in long.items() if t < tag) for tag in long}
    tags.append((273, lists + sum(2 * len(values) for values in long.values())))
    entries = b""
    for tag, *values in sorted(tags):
        value = (
            struct.pack(order + "I", places[tag]) if tag in long else struct.pack(order + "H" * len(values), *values)
        )
        entries += struct.pack(order + "HHI", tag, 3, len(values)) + value.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    return head + entries + bytes(4) + b"".join(struct.pack(order + "H" * len(v), *v) for v in long.values()) + data


def frames(format, **options):
    file = io.BytesIO()
    Image.new("RGB", SIZE, RED).save(
        file, format, save_all=True, append_images=[Image.new("RGB", SIZE, "blue")], **options
    )
    return file.getvalue()


def turned(orientation, format="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(format=format, size=(8, 16), exif=exif)


def inks(color=(0, 255, 255, 0), format="JPEG", **options):
    return saved("CMYK", color, format, **options)


def without_adobe(jpeg):
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


def palette(format, **options):
    image = Image.new("P", SIZE, 1)
    image.putpalette([1, 2, 3, *RED])
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def bmp(bits, pixel, alpha=0):
    """A BMP of one ``pixel`` (a number); with a mask of ``alpha`` it says where its colours are, too."""
    red, green, blue = (0xFF0000, 0xFF00, 0xFF) if bits == 32 else (0x7C00, 0x3E0, 0x1F)
    data = pixel.to_bytes(bits // 8, "little") * (SIZE[0] * SIZE[1])
    head = struct.pack("<IiiHHIIiiII", 108, *SIZE, 1, bits, 3 * bool(alpha), len(data), 0, 0, 0, 0)
    head += struct.pack("<4I", red, green, blue, alpha) + bytes(52)
    return b"BM" + struct.pack("<IHHI", 122 + len(data), 0, 0, 122) + head + data


def two_grays():
    data = b"\1" * (SIZE[0] * SIZE[1])
    head = struct.pack("<IiiHHIIiiII", 40, *SIZE, 1, 8, 0, len(data), 0, 0, 2, 0) + b"\0\0\0\0\xff\xff\xff\0"
    return b"BM" + struct.pack("<IHHI", 62 + len(data), 0, 0, 62) + head + data


def screen():
    """A GIF of a white frame, on a screen that is larger and red."""
    image = Image.new("P", SIZE, 1)
    image.putpalette([*RED, *WHITE])
    file = io.BytesIO()
    image.save(file, "GIF")
    return file.getvalue()[:6] + struct.pack("<HH", 20, 30) + file.getvalue()[10:]


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
WIDE = struct.pack(">H", 257 * 100)


def noisy(format, cut):
    file = io.BytesIO()
    NOISE.save(file, format)
    return file.getvalue()[:cut]


# What it is · its name · its bytes · the colour of all pixels, within 1, or the reason why there are none.
FILES = [
    ("RGB, in each format", "rgb.png", saved(), RED),
    ("", "rgb.jpg", saved(format="JPEG"), RED),
    ("", "rgb.webp", saved(format="WEBP", lossless=True), RED),
    ("", "rgb.bmp", saved(format="BMP"), RED),
    ("", "rgb.tif", saved(format="TIFF"), RED),
    ("", "rgb.gif", saved(format="GIF"), RED),
    ("1x1 pixel", "1x1.png", saved(size=(1, 1)), RED),
    ("1 pixel wide, 20000 high", "1x20000.png", saved(size=(1, 20_000)), RED),
    ("gray", "gray.jpg", saved("L", 100, "JPEG"), GRAY),
    ("1 bit", "bit.png", saved("1", 1), WHITE),
    ("gray of 2 bits", "gray2.png", png(2, 0, b"\xff\xff"), WHITE),
    ("gray of 4 bits", "gray4.png", png(4, 0, b"\x55\x55\x55\x55"), (85, 85, 85)),
    ("gray of 16 bits: scaled", "gray16.png", png(16, 0, WIDE), GRAY),
    ("RGB of 16 bits: scaled", "rgb16.png", png(16, 2, WIDE * 3), GRAY),
    ("gray of 16 bits, little-endian", "gray16.tif", tiff(16, struct.pack("<H", 257 * 100)), GRAY),
    ("gray of 16 bits, big-endian", "gray16be.tif", tiff(16, WIDE, order=">"), GRAY),
    ("gray of 16 bits, 0 being white", "gray16white.tif", tiff(16, struct.pack("<H", 257 * 155), 0), GRAY),
    ("gray of 12 bits: scaled", "gray12.tif", tiff(12, b"\x64\x66\x46"), GRAY),
    ("gray of 8 bits, 0 being white", "gray8white.tif", tiff(8, b"\x9b", 0), GRAY),
    ("RGB of 16 bits", "rgb16.tif", tiff(16, struct.pack("<H", 257 * 100), 2, 3), GRAY),
    ("RGB of 12 bits", "rgb12.tif", tiff(12, b"\x64\x66\x46", 2, 3), "a TIFF of a kind that is not read (RGB, 12 bits, 3 samples): save it as gray or RGB of 8 bits"),
    ("gray that is multiplied by alpha", "multiplied_gray.tif", tiff(8, b"\x80\x80", 1, 2, more=[(338, 1)]), (255, 255, 255)),
    ("a preview, as camera's raw files begin with", "preview.tif", tiff(8, b"\x64", more=[(254, 1)]), "the first page of the TIFF is a preview or a mask of another: is it a camera's raw file?"),
    ("a fourth sample that may be alpha or not", "fourth.tif", tiff(8, b"\xff\x00\x00\x80", 2, 4), "a TIFF with a fourth sample that it doesn't say the meaning of (ExtraSamples)"),
    ("signed samples", "signed.tif", tiff(8, b"\xfa", sample_format=2), "samples that are signed, or of 32 bits and more: nobody knows their range"),
    ("signed samples of 16 bits", "signed16.tif", tiff(16, b"\xfa\xff", sample_format=2), "samples that are signed, or of 32 bits and more: nobody knows their range"),
    ("samples of 32 bits", "int32.tif", saved("I", 70_000, "TIFF"), "samples that are signed, or of 32 bits and more: nobody knows their range"),
    ("floats", "float.tif", saved("F", 0.5, "TIFF"), "samples that are signed, or of 32 bits and more: nobody knows their range"),
    ("floats of 64 bits", "double.tif", tiff(64, struct.pack("<d", 0.5), sample_format=3), "samples that are signed, or of 32 bits and more: nobody knows their range"),
    ("RGBA: laid on white", "rgba.png", saved("RGBA", (0, 0, 0, 51)), (204, 204, 204)),
    ("RGBA, transparent", "rgba.webp", saved("RGBA", (255, 0, 0, 0), "WEBP", lossless=True), WHITE),
    ("RGBA of 16 bits", "rgba16.png", png(16, 6, struct.pack(">4H", 0, 0, 0, 51 * 257)), (204, 204, 204)),
    ("RGBA, multiplied by alpha", "multiplied.tif", tiff(8, b"\x80\x00\x00\x80", 2, 4, more=[(338, 1)]), (255, 127, 127)),
    ("gray and alpha", "la.png", saved("LA", (0, 51)), (204, 204, 204)),
    ("a fourth sample that is no alpha: dropped", "extra.tif", tiff(8, b"\xff\x00\x00\x80", 2, 4, more=[(338, 0)]), RED),
    ("a transparent colour", "key.png", saved(transparency=RED), WHITE),
    ("a transparent gray of 16 bits", "key16.png", png(16, 0, WIDE, before=chunk(b"tRNS", WIDE)), WHITE),
    ("a transparent RGB of 16 bits", "key48.png", png(16, 2, b"\x05\x00" * 3, before=chunk(b"tRNS", b"\x00\x05" * 3)), "a transparent colour among samples of 2, 4 or 16 bits"),
    ("a transparent gray of 2 bits", "key2.png", png(2, 0, b"\x55\x55", before=chunk(b"tRNS", b"\x00\x01")), "a transparent colour among samples of 2, 4 or 16 bits"),
    ("palette", "palette.png", palette("PNG"), RED),
    ("", "palette.gif", palette("GIF"), RED),
    ("", "palette.bmp", palette("BMP"), RED),
    ("", "palette.tif", palette("TIFF"), RED),
    ("palette with a transparent colour", "clear.png", palette("PNG", transparency=1), WHITE),
    ("", "clear.gif", palette("GIF", transparency=1), WHITE),
    ("a colour that the palette hasn't", "beyond.png", png(8, 3, b"\x05", before=chunk(b"PLTE", bytes(RED))), "a pixel of colour 5 in a palette of 1"),
    ("no palette", "none.png", png(8, 3, b"\x05"), "a pixel of colour 5 in a palette of 0"),
    ("CMYK", "inks.tif", inks(format="TIFF"), RED),
    ("CMYK, inverted as Adobe does", "adobe.jpg", inks(), RED),
    ("CMYK without Adobe's mark: taken for inverted, as browsers do", "inks.jpg", without_adobe(inks()), RED),
    ("CMYK with a profile of RGB", "mixed.jpg", inks(icc_profile=SRGB), "its colour profile is not one of CMYK: cannot build transform"),
    ("CMYK with garbage for a profile", "badicc.jpg", inks(icc_profile=b"garbage"), "its colour profile is not one of CMYK: cannot open profile from string"),
    ("RGB with a profile: ignored", "profile.png", saved(icc_profile=SRGB), RED),
    ("RGB with garbage for a profile: ignored", "badprofile.jpg", saved(format="JPEG", icc_profile=b"garbage"), RED),
    ("32 bits without a mask of alpha: the fourth byte is none", "filler.bmp", bmp(32, 0x40FF0000), RED),
    ("32 bits with a mask of alpha: laid on white", "alpha.bmp", bmp(32, 0x33000000, 0xFF000000), (204, 204, 204)),
    ("alpha that is 0 everywhere: a filler", "zeros.bmp", bmp(32, 0x00FF0000, 0xFF000000), RED),
    ("alpha of 1 bit", "alpha1.bmp", bmp(16, 0x7C00, 0x8000), "a BMP of 16 bits with alpha of 1 bits, which is not read: save it as PNG"),
    ("8 bits with a palette of black and white", "two.bmp", two_grays(), WHITE),
    ("a frame that is smaller than its screen: white around it", "screen.gif", screen(), WHITE),
    ("Lab", "lab.tif", tiff(8, bytes([136, 80, 67]), 8, 3), (250, 3, 11)),
    ("animated: frame 0", "moving.gif", frames("GIF"), RED),
    ("", "moving.webp", frames("WEBP", lossless=True), RED),
    ("", "moving.png", frames("PNG"), RED),
    ("several pages: the first", "pages.tif", frames("TIFF"), RED),
    *(("turned upright, EXIF 1 to 8" * (o == 1), f"turned{o}.jpg", turned(o), RED) for o in range(1, 9)),
    ("an EXIF orientation that is none", "turned9.jpg", turned(9), RED),
    ("garbage for EXIF", "exif.jpg", saved(format="JPEG", exif=b"Exif\0\0garbage, and more"), RED),
    ("another format than its name says", "really_png.jpg", saved(), RED),
    ("something behind its end", "tail.png", saved() + b"more" * 100, RED),
    ("empty", "empty.jpg", b"", "the file is empty"),
    ("cut off in the header", "header.png", saved()[:20], "can't be decoded: image file is truncated"),
    ("cut off", "cut.jpg", noisy("JPEG", -200), "can't be decoded: image file is truncated"),
    ("", "cut.png", noisy("PNG", -500), "can't be decoded: image file is truncated"),
    ("", "cut.webp", noisy("WEBP", -50), "can't be decoded: could not create decoder object"),
    ("", "cut.bmp", noisy("BMP", -50), "can't be decoded: image file is truncated"),
    ("", "cut.gif", noisy("GIF", -500), "can't be decoded: image file is truncated"),
    ("gamma: ignored", "gamma.png", png(8, 2, bytes(GRAY), before=chunk(b"gAMA", struct.pack(">I", 100_000))), GRAY),
    ("fewer lines than it says", "lines.png", png(8, 2, bytes(RED), size=(8, 120)), "can't be decoded: it has fewer lines than it says"),
    ("a wrong checksum", "crc.png", saved().replace(b"IDAT", b"IDAT\x01", 1), "can't be decoded: the checksum of its chunk 'IDAT' is wrong"),
    ("10000x10000 pixels in a few bytes", "bomb.png", png(8, 2, b"", size=(10_000, 10_000)), "more than 89478485 pixels (max_pixels): a decompression bomb?"),
    ("2147483647x2147483647 pixels", "huge.png", png(8, 2, b"", size=(2**31 - 1, 2**31 - 1)), "more than 89478485 pixels (max_pixels): a decompression bomb?"),
    ("text that unpacks to 50 MB", "text.png", png(8, 2, bytes(RED), before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))), "can't be decoded: Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK"),
    ("no pixels", "zero.png", png(8, 2, b"", size=(0, 8)), NO_PICTURE),
    ("formats that are not on the list", "icon.ico", saved(format="ICO", size=(16, 16)), NO_PICTURE),
    ("", "targa.tga", saved(format="TGA"), NO_PICTURE),
    ("", "map.ppm", saved(format="PPM"), NO_PICTURE),
    ("", "photo.psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3), NO_PICTURE),
    ("", "drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>", NO_PICTURE),
    ("", "brand.avif", bytes.fromhex("0000001c66747970") + b"avif" + bytes(16), NO_PICTURE),
    ("", "postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", NO_PICTURE),
    ("text", "text.jpg", b"hello\n" * 100, NO_PICTURE),
    ("Unicode twins, composed and not", "\u00e9.png", saved(), RED),
    ("", "e\u0301.png", saved("L", 100), GRAY),
    ("a name that is no UTF-8", os.fsdecode(b"\xff\xfe.png"), saved(), RED),
    ("a name with a line break and an escape", "a\nb\x1b[2J.png", saved(), RED),
    ("", "a\nc\x1b[2J.png", b"", "the file is empty"),
    ("a name of 255 bytes", "n" * 251 + ".png", saved(), RED),
    ("a caption of no UTF-8", "caption.png", saved(), "caption.txt: not UTF-8, at byte 0"),
    ("a caption that leads out of the folder", "leak.png", saved(), "leak.txt: a link out of the source's folder, which only follow_links: true follows"),
]  # fmt: skip

# Made by hand below: what it is · its name · its verdict.
MADE = [
    ("a link to a file in the folder", "inside.png", RED),
    ("a link to a file outside", "outside.png", "a link out of the source's folder, which only follow_links: true follows"),
    ("a link to nothing", "dangling.png", "no such file or directory"),
    ("a link to itself", "loop.png", "too many levels of symbolic links"),
    ("a link to a device that never ends", "device.png", "not a file"),
    ("a link to a folder", "folder_link.png", "not a file"),
    ("a pipe", "pipe.png", "not a file"),
    ("a socket", "socket.png", "not a file"),
]  # fmt: skip


def fill(folder):
    """The folder of odd files, and beside it what links lead to."""
    inside = folder / "odd"
    inside.mkdir()
    for _, name, content, _ in FILES:
        (inside / name).write_bytes(content)
    (inside / "caption.txt").write_bytes(b"\xff")
    (folder / "secret.txt").write_text("the key to the house")
    (inside / "leak.txt").symlink_to("../secret.txt")
    (folder / "secret.png").write_bytes(saved())
    (inside / "inside.png").symlink_to("rgb.png")
    (inside / "outside.png").symlink_to("../secret.png")
    (inside / "dangling.png").symlink_to("nowhere")
    (inside / "loop.png").symlink_to("loop.png")
    (inside / "device.png").symlink_to("/dev/zero")
    os.mkfifo(inside / "pipe.png")
    listening = socket.socket(socket.AF_UNIX)
    before = os.getcwd()
    os.chdir(inside)  # a socket's path may have 108 bytes, and a test's folder is deep
    listening.bind("socket.png")
    os.chdir(before)
    listening.close()
    (inside / "empty_folder.png").mkdir()  # a folder, whatever its name: no row
    (inside / "folder_link.png").symlink_to("empty_folder.png")
    (inside / ".hidden.png").write_bytes(b"no row")
    (inside / "notes.md").write_bytes(b"no row")
    return inside
