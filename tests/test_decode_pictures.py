"""Pictures of every kind become upright 8-bit RGB, or an error in one line."""

import io
import random
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from tests.files import picture

from latentmill.plugin import RowError
from latentmill.sources.pictures import decode, pillow


@pytest.mark.parametrize(
    ("file", "pixel"),
    [
        (picture("RGB", color=(1, 2, 3)), [1, 2, 3]),
        (picture("L", color=7), [7, 7, 7]),
        (picture("1", color=1), [255, 255, 255]),
        (picture("RGBA", color=(255, 0, 0, 0)), [255, 255, 255]),
        (picture("RGBA", color=(0, 0, 0, 51)), [204, 204, 204]),
        (picture("LA", color=(0, 255)), [0, 0, 0]),
        (picture("RGB", color=(9, 9, 9), transparency=(9, 9, 9)), [255, 255, 255]),
        (picture("P", color=0, format="GIF", transparency=0), [255, 255, 255]),
        (picture("I;16", color=65535), [255, 255, 255]),
        (picture("I;16", color=257 * 100), [100, 100, 100]),
        (picture("I;16", color=300), [1, 1, 1]),
        (picture("CMYK", color=(0, 255, 255, 0), format="TIFF"), [255, 0, 0]),
        (picture("RGB", color=(10, 20, 30), format="BMP"), [10, 20, 30]),
        (picture("RGB", color=(10, 20, 30), format="WEBP", lossless=True), [10, 20, 30]),
    ],
)
def test_every_kind_of_picture_becomes_rgb(file, pixel):
    array = decode(file)
    assert array.dtype == np.uint8 and array.shape == (3, 4, 3)
    assert array.reshape(-1, 3).tolist() == [pixel] * 12


def test_a_palette_is_looked_up():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = io.BytesIO()
    image.save(file, "PNG")
    assert decode(file.getvalue()).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.new("RGB", (2, 3), "black")
    upright.putpixel((0, 0), (255, 255, 255))
    upright.putpixel((1, 0), (255, 0, 0))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL.Image.Transpose that a camera's turn amounts to
    turned = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    assert decode(file.getvalue()).tolist() == np.asarray(upright).tolist()


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        file = io.BytesIO()
        frames[0].save(
            file, format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
        )
        assert decode(file.getvalue())[0, 0].tolist() == [255, 0, 0], format


def cmyk_profile(lab):
    """An ICC profile (v2, lut8) by which every mixture of inks is the one colour ``lab``."""
    number = int.to_bytes
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    table += b"".join(number(65536 * (i % 4 == 0), 4, "big") for i in range(9))  # identity, s15Fixed16
    table += bytes(range(256)) * 4 + bytes(lab) * 2**4 + bytes(range(256)) * 3
    tags = [
        (b"desc", b"desc" + bytes(4) + number(2, 4, "big") + b"x\0" + bytes(78)),
        (b"cprt", b"text" + bytes(4) + b"x\0"),
        (b"wtpt", b"XYZ " + bytes(4) + bytes.fromhex("0000f6d6000100000000d32d")),
        (b"A2B0", table),
    ]
    directory, data, offset = number(len(tags), 4, "big"), b"", 132 + 12 * len(tags)
    for name, content in tags:
        content += bytes(-len(content) % 4)
        directory += name + number(offset + len(data), 4, "big") + number(len(content), 4, "big")
        data += content
    header = bytes(8) + bytes.fromhex("02200000") + b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    header += bytes.fromhex("0000f6d6000100000000d32d")
    header += bytes(128 - len(header))
    return number(132 + 12 * len(tags) + len(data), 4, "big") + header[4:] + directory + data


def test_cmyk_with_a_profile_goes_through_it():
    inks = {"color": (200, 0, 0, 0), "format": "TIFF"}
    assert decode(picture("CMYK", **inks))[0, 0].tolist() == [55, 255, 255]
    red = cmyk_profile([136, 208, 195])  # sRGB's red: L 53.2, a 80.1, b 67.2
    through = decode(picture("CMYK", **inks, icc_profile=red))[0, 0].tolist()
    assert through[0] > 100 and max(through[1:]) < 20, "cyan ink, and a profile by which all inks are a red"
    rgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for wrong in (rgb, b"garbage"):
        with pytest.raises(RowError, match="its colour profile is not one of CMYK"):
            decode(picture("CMYK", **inks, icc_profile=wrong))


def png_header(width, height):
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello", "not a picture in PNG, JPEG, WEBP, BMP, TIFF or GIF"),
        (picture(size=(99, 99), format="JPEG")[:-200], "can't be decoded: .*truncated"),
        (picture(size=(99, 99), color="red")[:-30], "can't be decoded: .*[Tt]runcated"),
        (picture(size=(99, 99), format="WEBP")[:-20], "."),
        (png_header(10_000, 10_000), r"more than 89478485 pixels \(max_pixels\): a decompression bomb"),
        (png_header(2**31 - 1, 2**31 - 1), r"more than 89478485 pixels \(max_pixels\): a decompression bomb"),
        (picture(format="ICO"), "not a picture in"),
        (picture(format="PPM"), "not a picture in"),
        (picture("F", format="TIFF"), "samples that are signed, or of 32 bits and more"),
        (picture("I", format="TIFF"), "samples that are signed, or of 32 bits and more"),
    ],
)
def test_what_can_t_be_decoded_says_why_in_one_line(file, reason):
    with pytest.raises(RowError, match=reason) as error:
        decode(file)
    assert "\n" not in str(error.value) and "0x" not in str(error.value)


def test_every_truncation_is_a_row_error():
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        image = Image.effect_noise((40, 30), 60).convert("RGB")
        file = io.BytesIO()
        image.save(file, format)
        whole = file.getvalue()
        for length in range(0, len(whole) * 3 // 4, max(1, len(whole) // 40)):
            with pytest.raises(RowError):
                decode(whole[:length])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_whatever_is_wrong_with_a_file_it_is_a_picture_or_a_row_error(format):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, format)
    chance = random.Random(0)
    for _ in range(300):
        content = bytearray(file.getvalue())
        for _ in range(chance.randint(1, 6)):
            content[chance.randrange(chance.choice([len(content), 300]))] = chance.randrange(256)
        try:
            assert decode(bytes(content)).shape[2] == 3
        except RowError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("orientation", [2, 6])
def test_orientation_is_applied_once_to_tiff_and_to_16_bits(orientation):
    upright = Image.fromarray(np.array([[60_000, 300], [0, 0], [9000, 0]], np.uint16))
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 6: Image.Transpose.ROTATE_90}
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("TIFF", "PNG"):
        file = io.BytesIO()
        upright.transpose(undo[orientation]).save(file, format, exif=exif)
        assert decode(file.getvalue())[..., 0].tolist() == [[233, 1], [0, 0], [35, 0]]


def test_the_process_keeps_its_filters_of_warnings_while_pictures_are_opened():
    """They are one list for all threads: one that was put on in between would stay, or ours."""
    before = [*warnings.filters]
    with pillow(9):
        assert warnings.filters == before
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            warnings.warn("of a library", UserWarning, stacklevel=1)
    assert warnings.filters == before and [str(each.message) for each in heard] == ["of a library"]


@pytest.mark.parametrize("most", [8, 9])
def test_a_picture_of_as_many_pixels_as_are_allowed_is_opened(most):
    file = io.BytesIO()
    Image.new("RGB", (3, 3)).save(file, "PNG")
    if most == 9:
        assert decode(file.getvalue(), 9).shape == (3, 3, 3)
    else:
        with pytest.raises(RowError, match="more than 8 pixels"):
            decode(file.getvalue(), 8)
