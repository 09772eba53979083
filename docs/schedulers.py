"""Make docs/schedulers.png: every scheduler at 5, 10, 20 and 40 steps, one prompt, one seed.

python docs/schedulers.py
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

import latentmill
from latentmill.commands.listings import scheduler_table

HERE = Path(__file__).parent
PROMPT = "a red star above a blue ring on a yellow background"
STEPS = (5, 10, 20, 40)
SIDE, LABEL, GAP, COLUMNS = 64, 150, 6, 2


def main() -> None:
    """Run the job, and draw what came out."""
    table = [row for row in scheduler_table() if row["distribution"] == "latentmill"]
    rows = [{"prompt": PROMPT, "seed": 3, "scheduler": row["name"], "steps": steps} for row in table for steps in STEPS]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "rows.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = [f"source.path={source}", "samples_per_row=1", "cluster=inline", f"output={folder}/out"]
        settings += [
            "deterministic=true",
            "stages.denoise.batch_size=8",
        ]  # the same picture on any machine that is alike
        result = latentmill.run("txt2img", settings)
        assert result.failed == 0, result.text
        files = sorted(Path(folder, "out", "data").glob("*.parquet"))
        made = [row["image"]["bytes"] for file in files for row in pq.read_table(file).to_pylist()]
    pictures = iter(Image.open(io.BytesIO(picture)).convert("RGB") for picture in made)

    lines = -(-len(table) // COLUMNS)
    width = LABEL + len(STEPS) * (SIDE + GAP) + 3 * GAP
    sheet = Image.new("RGB", (COLUMNS * width, 24 + lines * (SIDE + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column in range(COLUMNS):
        for at, steps in enumerate(STEPS):
            draw.text((column * width + LABEL + at * (SIDE + GAP), 4), f"{steps} steps", "black", font)
    for number, row in enumerate(table):
        x, y = number // lines * width, 24 + number % lines * (SIDE + GAP)
        draw.text((x + GAP, y + SIDE // 2 - 8), row["name"], "black", font)
        for at in range(len(STEPS)):
            sheet.paste(next(pictures), (x + LABEL + at * (SIDE + GAP), y))
    sheet.save(HERE / "schedulers.png")


if __name__ == "__main__":
    main()
