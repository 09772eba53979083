"""``contact_sheet.png``: pictures from all over a dataset, each with its prompt."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from latentmill.progress import counted
from latentmill.report.files import MARK, put
from latentmill.report.material import Material

INK, FAINT, PAPER = (32, 33, 36), (110, 113, 119), (255, 255, 255)
SIDE, GAP, MARGIN = 192, 20, 32
"""Pixels: a picture's longer side, between pictures, around the sheet."""
ENLARGED = 8
"""Times that a small picture is enlarged: one of a few pixels is no clearer for more, and its blur takes longest of all to compress."""


def make(dataset: Material) -> None:
    """Write the sheet, if there are pictures."""
    if not dataset.tiles:
        return
    pictures = [fit(tile.image) for tile in dataset.tiles]
    text, title = ImageFont.load_default(14), ImageFont.load_default(24)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    captions = [wrap(tile.caption, text, max(width, 160), 4) for tile in dataset.tiles]
    rows = -(-len(pictures) // 6)
    columns = -(-len(pictures) // rows)
    line, cell = 18, max(width, 160)
    below = 8 + line * max(map(len, captions))
    head = 56
    sheet = Image.new(
        "RGB",
        (
            2 * MARGIN + columns * cell + (columns - 1) * GAP,
            2 * MARGIN + head + rows * (height + below) + (rows - 1) * GAP,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), dataset.name, INK, title)
    shown = f"{len(pictures)} of {counted(dataset.ok, 'picture')}"
    draw.text((MARGIN, MARGIN + 25), shown, FAINT, text)
    for at, (picture, lines) in enumerate(zip(pictures, captions)):
        x = MARGIN + at % columns * (cell + GAP)
        y = MARGIN + head + at // columns * (height + below + GAP)
        sheet.paste(picture, (x, y + height - picture.height))
        for number, words in enumerate(lines):
            draw.text((x, y + height + 8 + number * line), words, INK, text)
    content = io.BytesIO()
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", MARK)
    sheet.save(content, "PNG", pnginfo=about, compress_level=1)  # 6 takes four times as long, for a tenth of the size
    put(dataset.store, "contact_sheet.png", content.getvalue())


def fit(image: Image.Image) -> Image.Image:
    """The picture with its longer side at SIDE pixels; a small one enlarged by a whole factor, ENLARGED at most."""
    scale: float = SIDE / max(image.size)
    scale = min(int(scale), ENLARGED) if scale > 1 else scale
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def wrap(text: str, font: Any, width: float, most: int) -> list[str]:
    """Lines of ``text`` no wider than ``width`` pixels, ``most`` at most."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        while font.getlength(word) > width:
            cut = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width))
            lines += [line] * bool(line) + [word[:cut]]
            line, word = "", word[cut:]
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
        else:
            lines.append(line)
            line = word
    lines += [line] * bool(line)
    if len(lines) > most:
        last = lines[most - 1]
        while font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return lines
