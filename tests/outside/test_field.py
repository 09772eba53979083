"""Public reports about other tools, tried here. docs/field.md names them, and the tests that hold the outcome."""

import ast
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "field.md"


def pixels(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).astype(int)


def reported():
    """The rows of the table in docs/field.md: the reports, and the tests that hold the outcome, each as FILE::NAME."""
    for line in DOCS.read_text().splitlines():
        if line.startswith("| [") and line.count("|") >= 5:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            yield re.findall(r"\[([\w.-]+/[\w.-]+#\d+)\]", cells[0]), re.findall(r"`([\w/.]+::\w+)`", cells[-1])


def test_every_report_in_the_docs_is_held_by_a_test_that_is_there():
    rows = list(reported())
    assert len(rows) >= 25 and all(reports and tests for reports, tests in rows)
    names = [report for reports, _ in rows for report in reports]
    assert len(names) == len(set(names))
    for _, tests in rows:
        for test in tests:
            path, _, name = test.partition("::")
            tree = ast.parse((ROOT / path).read_text())
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test
    here = {node.name for node in ast.parse(Path(__file__).read_text()).body if isinstance(node, ast.FunctionDef)}
    told = {test.partition("::")[2] for _, tests in rows for test in tests}
    assert {name for name in here if name.startswith("test_")} - told == {
        "test_every_report_in_the_docs_is_held_by_a_test_that_is_there"
    }


def test_latents_of_another_size_are_not_taken_for_these(latentmill, patches, pictures, tmp_path):
    job = ("encode", *patches, f"source.path={pictures}", f"output={tmp_path / 'out'}")
    assert latentmill("run", *job, "sampling.width=2", "sampling.height=2") == 0
    assert latentmill("run", *job, "sampling.width=4", "sampling.height=4") == 2
    assert "sampling.width: 2 -> 4" in latentmill.err
    assert (
        latentmill("run", *job, "sampling.width=2", "sampling.height=2", "vae.side=2") == 2 and "vae" in latentmill.err
    )


@pytest.fixture
def drawn(latentmill, rows, tmp_path):
    """``drawn(NAME, ...)``: the rows that the shapes model makes of five prompts."""
    (tmp_path / "prompts.txt").write_text("".join(f"a {c} star\n" for c in ("red", "blue", "green", "black", "yellow")))

    def run(name, *settings):
        job = ("txt2img", "cluster=inline", "samples_per_row=1", "sampling.steps=3", f"output={tmp_path / name}")
        assert latentmill("run", *job, f"source.path={tmp_path / 'prompts.txt'}", *settings) == 0, latentmill.err
        return rows(tmp_path / name)

    return run


@pytest.mark.parametrize("scheduler", ["euler_ancestral", "ddpm", "dpmpp_sde"])
def test_the_batch_that_a_row_is_in_changes_no_picture(scheduler, drawn):
    """Schedulers that draw noise at each step, where a batch's rows took it in turn from one generator."""
    one, five = (
        drawn(f"{size}", f"scheduler={scheduler}", f"stages.denoise.batch_size={size}", "sampling.guidance_scale=1")
        for size in (1, 5)
    )
    for a, b in zip(one, five):
        assert a["seed"] == b["seed"] and np.abs(pixels(a) - pixels(b)).max() <= 1


def test_a_row_of_a_batch_is_made_again_alone_from_the_seed_beside_it(drawn, tmp_path):
    row = drawn("many", "scheduler=euler_ancestral")[3]
    (tmp_path / "one.csv").write_text(f"prompt,seed\n{row['prompt']},{row['seed']}\n")
    [again] = drawn("one", "scheduler=euler_ancestral", f"source.path={tmp_path / 'one.csv'}")
    assert again["seed"] == row["seed"] and np.abs(pixels(again) - pixels(row)).max() <= 1


def test_what_a_full_disk_or_a_person_took_is_made_again_and_nothing_else(latentmill, patches, pictures, tmp_path):
    out = tmp_path / "out"
    job = ("encode", *patches, f"source.path={pictures}", f"output={out}", "rows_per_shard=1")
    assert latentmill("run", *job) == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "data").iterdir()}
    for shard in ("00000", "00002"):
        (out / "data" / f"{shard}.parquet").unlink()
    (out / "data" / "00002.parquet.partial").write_bytes(b"PAR1")
    assert latentmill("run", *job) == 0 and "2 of them now" in latentmill.out
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "data").glob("*.parquet")}
    assert {name: content for name, (content, _) in after.items()} == {n: content for n, (content, _) in before.items()}
    assert {name for name in after if after[name][1] == before[name][1]} == {"00001.parquet", "00003.parquet"}


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_gray_of_16_bits_is_scaled_and_not_cut_off(latentmill, patches, rows, tmp_path):
    (tmp_path / "in").mkdir()
    values = [0, 300, 20000, 40000, 65535]
    lines = b"\0" + struct.pack(">5H", *values)
    header = struct.pack(">IIBBBBB", 5, 1, 16, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    (tmp_path / "in" / "a.png").write_bytes(png)
    job = ("reconstruct", *patches, f"source.path={tmp_path / 'in'}", f"output={tmp_path / 'out'}")
    assert latentmill("run", *job) == 0
    [row] = rows(tmp_path / "out")
    assert pixels(row)[0, :, 0].tolist() == [round(value / 257) for value in values]


def test_what_is_transparent_is_laid_on_white(latentmill, patches, rows, tmp_path):
    (tmp_path / "in").mkdir()
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    image.save(tmp_path / "in" / "a.png")
    assert (
        latentmill("run", "reconstruct", *patches, f"source.path={tmp_path / 'in'}", f"output={tmp_path / 'out'}") == 0
    )
    [row] = rows(tmp_path / "out")
    assert pixels(row).tolist() == [[[255, 255, 255], [200, 0, 0]]]


def test_a_line_end_between_quotes_parts_no_row_wherever_the_reader_s_chunks_end(latentmill, patches, rows, tmp_path):
    prompts = [f"row {n}\n" + "x" * (40_000 + 997 * (n % 37)) for n in range(60)]  # over the ends of chunks of 512 KiB
    text = "prompt,seed\n" + "".join(f'"{prompt}",{n}\n' for n, prompt in enumerate(prompts))
    (tmp_path / "p.csv").write_text(text)
    size = ("sampling.width=2", "sampling.height=2", "source=prompts", f"source.path={tmp_path / 'p.csv'}")
    assert latentmill("run", "encode", *patches, *size, f"output={tmp_path / 'out'}") == 0
    assert [(row["prompt"], row["seed"]) for row in rows(tmp_path / "out")] == list(zip(prompts, range(60)))


def test_one_damaged_picture_costs_its_row_and_no_other(latentmill, patches, pictures, rows, failed, tmp_path):
    good = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(good, "JPEG")
    (pictures / "1.png").write_bytes(good.getvalue()[:-300])
    (pictures / "2.png").write_bytes(b"")
    job = ("encode", *patches, f"source.path={pictures}", f"output={tmp_path / 'out'}")
    assert latentmill("run", *job) == 0
    assert [row["row_id"] for row in rows(tmp_path / "out")] == ["000000000-000", "000000003-000"]
    reasons = [error["reason"] for error in failed(tmp_path / "out")]
    assert "truncated" in reasons[0] and reasons[0].startswith("1.png: ") and reasons[1] == "2.png: the file is empty"
