"""Filters in jobs: scores are columns of the dataset, filtered rows are in ``filtered/``, and all rows are accounted for."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import latentmill
from latentmill.cli import main
from latentmill.errors import PlanError, PluginError
from latentmill_filters.phash import phash

SMALL = ["cluster=inline", "samples_per_row=1", "sampling.steps=1", "rows_per_shard=16"]
GENERATE = "[read, encode, denoise, decode, {}, write]"


def rows(output):
    found = pa.concat_tables([pq.read_table(path) for path in sorted(Path(output).glob("data/*.parquet"))])
    return {row["row_id"]: row for row in found.to_pylist()}


def told(output, folder):
    lines = [line for path in sorted(Path(output).glob(f"{folder}/*.jsonl")) for line in path.open()]
    return {row["row_id"]: row for row in map(json.loads, lines)}


def run(job, output, *more):
    """The rows of a job's dataset, those that were filtered and those that failed, by row_id."""
    found = latentmill.run(job, [*more, "cluster=inline", f"output={output}"])
    ok, filtered, failed = rows(output), told(output, "filtered"), told(output, "errors")
    assert (found.ok, found.filtered, found.failed) == (len(ok), len(filtered), len(failed))
    assert found.ok + found.filtered + found.failed == found.planned
    assert len({*ok, *filtered, *failed}) == found.planned
    return ok, filtered, failed


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The shapes job with scores alone."""
    flow = GENERATE.format("{name: broken, min_contrast: null}, size, near_duplicates")
    ok, filtered, failed = run("txt2img", tmp_path_factory.mktemp("scored"), *SMALL, f"flow={flow}")
    assert not filtered and not failed
    return ok


def test_scores_are_columns_and_no_row_is_filtered_without_a_bound(scored):
    for row in scored.values():
        assert 0 < row["brightness"] < 1 and 0 < row["contrast"] < 0.5
        assert (row["short_side"], row["aspect"]) == (64, 1.0)
        assert re.fullmatch("[0-9a-f]{16}", row["phash"])


def test_rows_out_of_bounds_are_filtered_and_the_others_are_as_without_the_filter(scored, tmp_path):
    bound = float(np.median([row["contrast"] for row in scored.values()]))
    flow = GENERATE.format(f"size, {{name: broken, as: flat, min_contrast: {bound}}}, near_duplicates")
    ok, filtered, failed = run("txt2img", tmp_path, *SMALL, f"flow={flow}", "max_error_rate=0.01")
    assert not failed
    assert ok == {name: row for name, row in scored.items() if row["contrast"] >= bound}
    assert len(filtered) == len(scored) // 2
    for name, row in filtered.items():
        assert row["stage"] == "flat" and "is below" in row["reason"]
        assert row["scores"] == {score: scored[name][score] for score in ("brightness", "contrast")}


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("min_contrast: abc", "min_contrast must be float, not 'abc'"),
        ("max_brightness: nan", "max_brightness must be a number, not nan"),
        ("min_brightness: true", "min_brightness must be float, not True"),
    ],
)
def test_a_bound_that_is_no_number_is_refused(tmp_path, setting, told):
    with pytest.raises(PluginError, match=re.escape(told)):
        run("txt2img", tmp_path / "out", *SMALL, f"flow={GENERATE.format(f'{{name: broken, {setting}}}')}")


def test_no_score_takes_the_place_of_another_column(tmp_path, classifier_folder):
    twice = "{name: broken, min_contrast: null}, {name: broken, as: again}"
    with pytest.raises(PluginError, match="stage broken before it adds the column brightness, too"):
        run("txt2img", tmp_path / "out", *SMALL, f"flow={GENERATE.format(twice)}")
    field = f"{{name: safety, path: {classifier_folder}, label: unsafe, column: strength}}"
    with pytest.raises(PluginError, match="no score can be the column strength, which is another thing"):
        run("txt2img", tmp_path / "out", *SMALL, f"flow={GENERATE.format(field)}")


# ------------------------------------------------------------------------------------------------------ before encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory, drawn):
    """Twelve pictures. 00, 03, 05 and 09 are nearly the same, so are 02 and 10; 04 is black; 07 is long; 11 is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        of = {3: 0, 5: 0, 9: 0, 10: 2}.get(number, number)
        picture = np.asarray(drawn(of, 40 if number != 7 else 120, 40)).copy()
        if number != of:
            picture[number % 5 :: 7] ^= 3  # too little to be seen
        Image.fromarray(picture if number != 4 else picture * 0).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}")
    (folder / "11.png").write_bytes(b"no picture")
    return folder


ENCODE = "flow=[read, broken, {name: size, max_aspect: 2}, near_duplicates, encode, write]"
NEAR = {"03": "00", "05": "00", "09": "00", "10": "02"}


def numbered(found):
    """``row_id`` less what all have."""
    return {name.removeprefix("0000000").removesuffix("-000"): row for name, row in found.items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory, folder):
    """The folder's latents, filtered before they were encoded."""
    output = tmp_path_factory.mktemp("first") / "latents"
    ok, filtered, failed = run("encode", output, f"source.path={folder}", ENCODE, "rows_per_shard=5")
    assert {name: row["stage"] for name, row in numbered(filtered).items()} == {"04": "broken", "07": "size"}
    assert {*numbered(failed)} == {"11"}
    for name, row in numbered(ok).items():
        assert row["phash"] == phash(np.asarray(Image.open(folder / f"{name}.png")))
    return output


def test_pictures_that_are_nearly_the_same_have_hashes_that_are_near(first):
    hashes = {name: int(row["phash"], 16) for name, row in numbered(rows(first)).items()}
    for a in hashes:
        for b in hashes:
            near = NEAR.get(a, a) == NEAR.get(b, b)
            assert (hashes[a] ^ hashes[b]).bit_count() <= 3 if near else (hashes[a] ^ hashes[b]).bit_count() > 8


STORED = ["flow=[read, near_duplicates, write]", "source=latents"]


@pytest.mark.parametrize("shape", [["rows_per_shard=100"], ["rows_per_shard=2", "stages.near_duplicates.batch_size=1"]])
def test_of_near_duplicates_the_first_is_kept_whatever_the_batches(first, tmp_path, shape):
    more = [f"source.path={first}", "source.id_column=row_id", f"stages.near_duplicates.settings.of={first}"]
    ok, filtered, failed = run("encode", tmp_path / "kept", *STORED, *more, *shape)
    assert not failed
    before = numbered(rows(first))
    kept = {row["id"].removeprefix("0000000").removesuffix("-000"): row for row in ok.values()}
    assert [*kept] == [name for name in before if name not in NEAR]
    for name, row in kept.items():
        assert (row["latents"], row["phash"]) == (before[name]["latents"], before[name]["phash"])
    reasons = sorted(row["reason"] for row in filtered.values())
    assert reasons == sorted(f"a near duplicate of row 0000000{of}-000 of {first}" for of in NEAR.values())
    assert all(0 <= row["scores"]["bits"] <= 3 for row in filtered.values())


def test_the_same_source_is_read_again_by_its_row_ids(first, folder, tmp_path):
    """Rows that were filtered or failed in the first are so again, and pictures that changed since are errors."""
    more = [f"source.path={folder}", ENCODE, f"stages.near_duplicates.settings.of={first}"]
    ok, filtered, failed = run("encode", tmp_path / "again", *more)
    assert {name: row["stage"] for name, row in numbered(filtered).items()} == {
        "04": "broken",
        "07": "size",
        **dict.fromkeys(NEAR, "near_duplicates"),
    }
    assert len(ok) == 12 - 7
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in folder.glob("*.png"):
        (changed / path.name).write_bytes(path.read_bytes())
    Image.open(folder / "06.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(changed / "01.png")
    _, _, failed = run("encode", tmp_path / "other", f"source.path={changed}", *more[1:])
    assert f"row 000000001-000 of {first} is of another picture" in numbered(failed)["01"]["reason"]


def test_pictures_that_were_stored_with_a_loss_are_those_of_the_first_dataset(tmp_path):
    job = [*SMALL, "sink.image_format=jpeg", f"flow={GENERATE.format('near_duplicates')}"]
    first, _, _ = run("txt2img", tmp_path / "first", *job)
    again = ["source=prompts", f"source.path={tmp_path}/first/data", "source.id_column=row_id"]
    flow = f"flow=[read, {{name: near_duplicates, of: {tmp_path}/first}}, encode, write]"
    ok, filtered, failed = run("encode", tmp_path / "kept", *again, flow)
    assert not failed and len(ok) + len(filtered) == len(first)
    assert {row["id"]: row["phash"] for row in ok.values()}.items() <= {
        name: row["phash"] for name, row in first.items()
    }.items()


def test_ids_of_the_source_s_own_are_asked_for(folder, tmp_path):
    job = [f"source.path={folder}", "source.id_column=path", ENCODE]
    run("encode", tmp_path / "first", *job)
    ok, filtered, _ = run("encode", tmp_path / "kept", *job, f"stages.near_duplicates.settings.of={tmp_path / 'first'}")
    assert {row["id"] for row in ok.values()} == {"00.png", "01.png", "02.png", "06.png", "08.png"}
    assert f"a near duplicate of row 00.png of {tmp_path / 'first'}" in {row["reason"] for row in filtered.values()}


def test_a_dataset_that_has_no_hashes_or_is_not_finished_is_refused_before_anything_starts(first, folder, tmp_path):
    job = ["cluster=inline", f"source.path={first}", *STORED, f"output={tmp_path / 'kept'}"]
    of = "stages.near_duplicates.settings.of"
    with pytest.raises((PluginError, PlanError), match=r"of needs source\.id_column=row_id"):
        latentmill.run("encode", [*job, f"{of}={first}"])
    job.append("source.id_column=row_id")
    with pytest.raises(PluginError, match=r"has no ids: read it with source\.id_column=row_id"):
        more = [f"source.path={folder}", "source.id_column=path", ENCODE, f"output={tmp_path / 'kept'}"]
        latentmill.run("encode", ["cluster=inline", *more, f"{of}={first}"])
    plain = tmp_path / "plain"
    run("encode", plain, f"source.path={folder}")
    with pytest.raises(PluginError, match=r"has no column phash: a job with near_duplicates in its flow stores it"):
        latentmill.run("encode", [*job, f"{of}={plain}"])
    (plain / "_SUCCESS").unlink()
    with pytest.raises(PluginError, match=r"plain is not finished: "):
        latentmill.run("encode", [*job, f"{of}={plain}"])
    assert not (tmp_path / "kept").exists()


def test_the_original_size_is_what_bounds_go_by(folder, tmp_path):
    flow = "flow=[read, {name: size, max_aspect: 2}, encode, write]"
    job = ["size.buckets=[[32, 32]]", f"source.path={folder}", flow]
    ok, filtered, _ = run("encode", tmp_path, *job)
    assert {*numbered(filtered)} == {"07"} and numbered(filtered)["07"]["scores"] == {"short_side": 40.0, "aspect": 3.0}
    assert {(row["short_side"], row["width"]) for row in ok.values()} == {(40, 32)}


def test_a_network_scores_the_rows_of_a_job(clip_folder, folder, tmp_path):
    job = [f"source.path={folder}", f"flow=[read, {{name: clip_score, path: {clip_folder}}}, encode, write]"]
    all_of_them, _, _ = run("encode", tmp_path / "all", *job)
    fifth, sixth = sorted(row["clip_score"] for row in all_of_them.values())[4:6]
    bound = (fifth + sixth) / 2  # in batches of another size scores have other last digits
    more = [f"stages.clip_score.settings.min_score={bound}", "stages.clip_score.batch_size=3"]
    ok, filtered, failed = run("encode", tmp_path / "some", *job, *more)
    assert [*ok] == [name for name, row in all_of_them.items() if row["clip_score"] >= bound]
    assert len(filtered) > 3 and len(failed) == 1
    for name, row in {**ok, **{name: row["scores"] for name, row in filtered.items()}}.items():
        assert row["clip_score"] == pytest.approx(all_of_them[name]["clip_score"], abs=1e-3)


def test_a_dataset_goes_on_with_the_network_that_it_was_begun_with(clip_folder, other_clip_folder, folder, tmp_path):
    job = ["cluster=inline", f"source.path={folder}", "flow=[read, clip_score, encode, write]", f"output={tmp_path}"]
    at = "stages.clip_score.settings.path"
    latentmill.run("encode", [*job, f"{at}={clip_folder}"])
    moved = shutil.copytree(clip_folder, tmp_path / ".moved")
    latentmill.run("encode", [*job, f"{at}={moved}"])
    with pytest.raises(PlanError, match="fingerprint"):
        latentmill.run("encode", [*job, f"{at}={other_clip_folder}"])


# ------------------------------------------------------------------------------------------------------- what is typed


def test_what_the_readme_says_to_type_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "README.md").read_text()
    found = re.findall(r"^    latentmill (run .*)$", page, re.M)
    commands = [shlex.split(line) for line in found if "/models/" not in line]
    assert len(commands) == 3
    for command in commands:
        fewer = SMALL if command[1] == "txt2img" else []
        assert main([*command, *fewer, "cluster=inline"]) == 0
    first, kept = rows("out/first"), rows("out/kept")
    assert len(first) + len(told("out/first", "filtered")) == 40
    assert len(kept) + len(told("out/kept", "filtered")) == len(first)
    assert "contrast" in next(iter(kept.values())) and len(rows("out/latents")) == 12
