import io
import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFont

from latentmill import progress, report, storage
from latentmill.dataset import load
from latentmill.plan import Plan
from latentmill.plugin import Fragment
from latentmill.progress import Live, Pace, StageView, View
from latentmill.report import contact_sheet as sheets

COLOURS = [(200, 30, 30), (30, 160, 60), (40, 70, 210), (240, 200, 40), (120, 40, 160), (20, 20, 20)]


def view(seconds, read, write, *, finished=0, failed=0, busy=1, planned=100, others=0):
    stages = [StageView("read", read, 0, 1, busy), StageView("write", write, read - write, 2, 1)]
    return View(stages, planned, finished, failed, seconds, 0, 10, others=others)


def dataset(root, rows, *, shard=4, errors=()):
    """A dataset folder as a run leaves it: ``rows`` are (row_id, prompt, colour or None for latents)."""
    (root / "data").mkdir(parents=True)
    (root / "errors").mkdir()
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = bool(rows) and rows[0][2] is not None
    last = pa.field("image", image) if pictures else pa.field("latents", pa.list_(pa.float16(), 4))
    schema = pa.schema([("row_id", pa.string()), ("prompt", pa.string()), last])
    if pictures:
        features = {name: {"dtype": "string", "_type": "Value"} for name in ("row_id", "prompt")}
        features["image"] = {"_type": "Image"}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    ended = [*rows, *errors]
    plugin = {"name": "shapes", "distribution": "latentmill-shapes", "version": "0.1.0", "fingerprint": "9f2c"}
    plan = Plan(
        name="test & try",
        config={"seed": 7, "sink": {"name": "parquet"}},
        plugins={"vae": plugin},
        fragments=(Fragment("prompts.txt", len(ended)),),
        samples_per_row=1,
        rows_per_shard=shard,
        seed=7,
    )
    (root / "plan.json").write_text(plan.to_json())
    for number, start in enumerate(range(0, len(ended), shard)):
        here = ended[start : start + shard]
        table = [
            {"row_id": row[0], "prompt": row[1], last.name: picture(row[2]) if pictures else [0.0] * 4}
            for row in here
            if isinstance(row, tuple)
        ]
        failed = [error for error in here if not isinstance(error, tuple)]
        about = {**(schema.metadata or {}), "latentmill.plan": plan.hash, "latentmill.errors": json.dumps(failed)}
        pq.write_table(
            pa.Table.from_pylist(table, schema.with_metadata(about)), root / "data" / f"{number:05d}.parquet"
        )
        if failed:
            lines = "".join(json.dumps(error) + "\n" for error in failed)
            (root / "errors" / f"{number:05d}.jsonl").write_text(lines)
    return str(root)


def picture(colour, size=(64, 64)):
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": "x.png"}


def six_prompts(samples=4):
    return [(f"{p}-{s}", f"prompt {p}", COLOURS[p]) for p in range(6) for s in range(samples)]


def html(output, pace=None):
    report.finish(load(storage.at(output)), pace)
    return Path(output, "report.html").read_text()


def contact_sheet(output):
    report.finish(load(storage.at(output)))
    path = Path(output, "contact_sheet.png")
    return path if path.exists() else None


def captions(output):
    return re.findall(r"<figcaption>(.*?)</figcaption>", html(output))


# ------------------------------------------------------------------------------------------------------- a run


def test_rates_are_those_of_the_window_and_the_slowest_stage_says_how_long_it_takes():
    pace = Pace()
    for second in range(31):  # write begins at 10 s: 2 rows/s; read 3 rows/s from the start
        pace.add(view(float(second), 3 * second, max(0, 2 * (second - 10))))
    assert pace.rate(0) == 3.0 and pace.rate(1) == 2.0
    assert pace.progress() == 40
    assert pace.left() == (100 - 40) / 2.0


def test_the_wait_for_the_first_row_counts_for_no_rate():
    pace = Pace()
    for second, done in enumerate((0, 0, 0, 0, 8, 16)):
        pace.add(view(float(second), done, 0))
    assert pace.rate(0) == 8.0
    assert pace.rate(1) == 0.0 and pace.left() is None


def test_rows_that_other_drivers_finish_meanwhile_are_not_left():
    """It has done half of them, and another four of ten: a tenth is left, at its own speed."""
    pace = Pace()
    for second in range(11):
        pace.add(view(10.0 * second, 5 * second, 5 * second, finished=9 * second, others=4 * second))
    assert (pace.progress(), pace.left()) == (90, 20.0)


def test_a_change_of_speed_shows_after_the_window():
    pace = Pace()
    for second in range(40):
        pace.add(view(float(second), second, 0, planned=10**6))
    for second in range(40, 60):
        pace.add(view(float(second), 40 + 100 * (second - 40), 0, planned=10**6))
    assert pace.rate(0) == 100.0


def test_rows_of_earlier_runs_count_for_progress_and_not_for_rates():
    pace = Pace()
    pace.add(view(0.0, 0, 0, finished=60, others=60))
    pace.add(view(10.0, 20, 10, finished=60, others=60))
    assert pace.progress() == 70
    assert pace.left() == 30.0  # write: 100 - 60 - 10 rows at 1 a second


def test_a_finished_run_has_nothing_left_and_a_fast_loop_of_a_long_run_keeps_few_views():
    pace = Pace()
    for turn in range(20_000):
        pace.add(view(turn * 0.5, turn, turn, finished=turn, planned=20_000))
    assert len(pace.views) < 200
    pace.add(view(10_000.0, 20_000, 20_000, finished=20_000, planned=20_000))
    assert pace.left() == 0.0 and pace.progress() == 20_000


def test_rows_that_end_before_a_stage_are_none_that_it_waits_for():
    """Read does 4 rows a second; of each 4 a stage between filters 3, and write has the other: all that are left take 15 s."""
    pace = Pace()
    for second in range(11):
        stages = [
            StageView("read", 4 * second, 0, 1, 1),
            StageView("write", second, 0, 1, 1, ended_before=3 * second),
        ]
        pace.add(View(stages, 100, 4 * second, 0, float(second), 0, 10, filtered=3 * second))
    assert pace.rate(1) == 1.0 and pace.progress() == 40 and pace.left() == 15.0
    shown = Live("job", io.StringIO())
    shown.pace = pace
    assert shown.line() == "job: 40 of 100 rows | 30 filtered | read 40 write 10 | 1.0 rows/s | 15 s left"


def test_a_dataset_that_ends_with_so_many_accepted_rows_is_finished_before_all_are_made():
    """Of four rows one is accepted, so 80 are needed for 20 of these; what is planned beyond takes no time."""
    pace = Pace()
    for second in range(11):
        stages = [StageView("write", 4 * second, 0, 1, 1)]
        pace.add(View(stages, 1000, 4 * second, 0, float(second), 0, 10, accepted=second, wanted=20))
    assert pace.left() == 10.0


def test_busy_is_the_share_of_the_workers_time():
    pace = Pace()
    pace.add(view(0.0, 0, 0, busy=1))
    pace.add(view(3.0, 1, 0, busy=0))
    pace.add(view(4.0, 2, 0, busy=0))
    assert pace.busy("read") == 0.75 and pace.busy("write") == 0.5


def test_elsewhere_than_on_a_terminal_a_line_every_five_seconds(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with progress.live("job") as live:
        for tenth in range(121):
            live.show(view(tenth / 10, tenth, tenth // 2, failed=tenth // 60))
    assert stream.getvalue().splitlines() == [
        "job: 0 of 100 rows | read 0 write 0 | 0.0 rows/s | starting",
        "job: 25 of 100 rows | read 50 write 25 | 5.1 rows/s | 15 s left",
        "job: 50 of 100 rows | 1 failed | read 100 write 50 | 5.1 rows/s | 10 s left",
    ]


def test_on_a_terminal_a_table(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    with progress.live("job") as live:
        live.show(view(0.0, 0, 0))
        live.show(view(10.0, 40, 20, failed=3))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = shown[shown.rindex("stage ") :]
    assert re.search(r"read +40 +0 +4\.0 +1 of 1", last)
    assert re.search(r"write +20 +20 +2\.0 +1 of 2", last)
    assert "20 of 100 rows" in shown and "about 40 s left" in shown
    assert "3 rows failed" in last


def test_lines_need_no_view_before():
    assert Live("job", io.StringIO()).table() == "job: starting"


# ------------------------------------------------------------------------------------------------------ summary


def test_summary_of_a_whole_run_says_where_everything_is(tmp_path):
    errors = [{"row": 24, "row_id": "24", "stage": "encode", "reason": "no such word"}]
    output = dataset(tmp_path / "out", six_prompts(), errors=errors)
    report.finish(load(storage.at(output)))
    text = report.summary("job", storage.at(output), planned=25, ok=24, failed=1, made=25, seconds=100.0)
    assert text.splitlines() == [
        "job: 25 of 25 rows, in 1 min 40 s (0.25 rows/s)",
        f"  dataset       {output}/data (24 rows)",
        f"  failed        {output}/errors (1 row, each with its reason)",
        f"  pictures      {output}/contact_sheet.png",
        f"  report        {output}/report.html",
    ]


def test_summary_of_an_interrupted_run_says_how_to_go_on(tmp_path):
    text = report.summary(
        "job", storage.at(str(tmp_path)), planned=2400, ok=1100, failed=100, made=600, seconds=4.0, interrupted=True
    )
    assert text.splitlines() == [
        "job: stopped after 1,200 of 2,400 rows, 600 of them now, in 4 s (150 rows/s)",
        "  to go on      run the same command again; finished shards stay as they are",
    ]


def test_summary_of_a_finished_job_says_that_there_was_nothing_to_do(tmp_path):
    text = report.summary("job", storage.at(str(tmp_path)), planned=24, ok=23, failed=1, made=0, seconds=0.0)
    assert text == "job: nothing to do, all 24 rows were finished before"


# ----------------------------------------------------------------------------------------------- what is shown


def test_pictures_are_one_of_each_prompt_first(tmp_path):
    rows = [(f"{p}-{s}", f"prompt {p}", COLOURS[p % 6]) for p in range(40) for s in range(4)]
    shown = captions(dataset(tmp_path / "many", rows, shard=16))
    assert len(shown) == len(set(shown)) == 24
    assert {"prompt 0", "prompt 38"} <= set(shown)  # from one end to the other
    shown = captions(dataset(tmp_path / "few", six_prompts(samples=40)))
    assert shown == [f"prompt {p}" for p in range(6) for _ in range(4)]


def test_pictures_without_prompts_come_from_all_over(tmp_path):
    rows = [(f"{number:03d}", "", COLOURS[number % 6]) for number in range(96)]
    assert captions(dataset(tmp_path / "out", rows, shard=8)) == [f"{number:03d}" for number in range(0, 96, 4)]


def test_contact_sheet_shows_each_picture_enlarged_by_a_whole_factor(tmp_path):
    path = contact_sheet(dataset(tmp_path / "out", six_prompts(samples=2)))
    assert path == tmp_path / "out" / "contact_sheet.png"
    sheet = Image.open(path).convert("RGB")
    counts = {colour: number for number, colour in sheet.getcolors(maxcolors=1 << 24)}
    ink = sheets.INK
    for colour in COLOURS[:5]:
        assert counts[colour] == 2 * (3 * 64) ** 2
    assert counts[ink] > 100, "captions"
    assert not list((tmp_path / "out" / ".tmp").iterdir())


@pytest.mark.parametrize(("size", "shown"), [((4, 2), (32, 16)), ((50, 30), (150, 90)), ((96, 200), (92, 192))])
def test_a_picture_of_a_few_pixels_stays_small(size, shown):
    assert sheets.fit(Image.new("RGB", size)).size == shown


def test_contact_sheet_of_latents_is_none(tmp_path):
    output = dataset(tmp_path / "out", [("0", "a prompt", None)])
    assert contact_sheet(output) is None
    report.finish(load(storage.at(output)))
    assert not (tmp_path / "out" / "contact_sheet.png").exists()
    assert "contact_sheet" not in (tmp_path / "out" / "README.md").read_text()


def test_a_dataset_of_nothing_but_errors_has_a_report(tmp_path):
    errors = [{"row": 0, "row_id": "0", "stage": "encode", "reason": "no such word"}]
    report.finish(load(storage.at(dataset(tmp_path / "out", [], errors=errors))))
    assert "no such word" in (tmp_path / "out" / "report.html").read_text()


def test_captions_are_wrapped_and_cut():
    font = ImageFont.load_default(14)
    words = "a red star above a blue ring on a yellow background"
    lines = sheets.wrap(words, font, 160, 4)
    assert " ".join(lines) == words and len(lines) > 1
    assert all(font.getlength(line) <= 160 for line in lines)
    cut = sheets.wrap(words * 9, font, 160, 4)
    assert len(cut) == 4 and cut[-1].endswith("…") and font.getlength(cut[-1]) <= 160
    long = sheets.wrap("x" * 60, font, 160, 9)
    assert "".join(long) == "x" * 60 and all(font.getlength(line) <= 160 for line in long)
    assert sheets.wrap("", font, 160, 4) == []


@pytest.mark.parametrize("size, shown", [((64, 64), (192, 192)), ((96, 64), (192, 128)), ((1024, 512), (192, 96))])
def test_pictures_keep_their_proportions(size, shown):
    assert sheets.fit(Image.new("RGB", size)).size == shown


def test_datasets_loads_the_folder_by_its_card(tmp_path):
    output = dataset(tmp_path / "out", six_prompts())
    report.finish(load(storage.at(output)))
    loaded = datasets.load_dataset(output, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 24
    assert loaded[23]["image"].getpixel((5, 5)) == COLOURS[5]
    assert "24 rows" in (tmp_path / "out" / "README.md").read_text()


def test_the_report_needs_no_other_file_and_escapes_what_rows_say(tmp_path):
    rows = [("0", "<script>alert(1)</script>", COLOURS[0])]
    errors = [{"row": 1, "row_id": "1", "stage": "encode", "reason": "word <b>zebra</b>"}]
    pace = Pace()
    pace.add(view(0.0, 0, 0, planned=2))
    pace.add(view(4.0, 2, 2, finished=2, planned=2))
    page = html(dataset(tmp_path / "out", rows, errors=errors), pace)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "word &lt;b&gt;zebra" in page
    assert "<title>test &amp; try</title>" in page
    assert re.findall(r'(?:src|href)="([a-z]+:[a-z/]+)', page) == ["data:image/png"]
    assert "http" not in page
    assert '<td>write</td><td class="number">2</td><td class="number">0.5</td>' in page
