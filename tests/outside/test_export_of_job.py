"""A job that asks for an export: one command from pictures to a trainer's folder, with the bytes of ``latentmill export``."""

import re
import time
from functools import partial

import pytest
from tests.outside.test_export_texts import texts as texts
from tests.outside.trainer_parts import FAMILIES, files

from latentmill.text import in_units

TEXT = ["text_encoder.name=letters", "+text_encoder.model=sdxl", "flow=[read, encode_text, encode_images, write]"]


@pytest.fixture
def job(texts, trainers, tmp_path):
    """``job(FORMATS, *settings)``: the arguments of ``latentmill`` for a job over the pictures that exports into ``trainer``."""

    def job(formats, *settings, family="sdxl", folder=tmp_path / "trainer", output=tmp_path / "out", verb="run"):
        known = [f"vae.{name}={value}" for name, value in FAMILIES[family].items()]
        given = ["cluster=inline", "vae.name=known", *known, f"source.path={trainers.pictures}", "source.keep=[file]"]
        asked = [f"export={{to: [{formats}], folder: {folder}}}"] if formats else []
        return [verb, "encode_text", "source=images", *given, "rows_per_shard=2", *TEXT, *asked, *settings, f"output={output}"]  # fmt: skip

    return job


def test_a_run_s_export_is_that_of_its_dataset(job, trainers, latentmill, tmp_path):
    """Of all formats that one dataset can have; run again, it writes none, and makes what is lost."""
    formats, folder = (
        "pixart,comfyui,kohya,kohya-sdxl-text,simpletuner,simpletuner-sdxl-text,mds,energon",
        tmp_path / "trainer",
    )
    assert latentmill(*job(formats, "latents_std=true")) == 0, latentmill.said
    assert "  export        kohya-sdxl-text: 3 files written\n" in latentmill.out
    assert files(folder) == files(trainers.export(tmp_path / "out", formats))
    (lost := folder / "kohya-sdxl/a b_te_outputs.npz").unlink()
    assert latentmill(*job(formats, "latents_std=true")) == 0, latentmill.said
    assert "nothing to do, all 3 rows were finished before" in latentmill.out
    assert "  export        kohya-sdxl-text: 1 file written, 2 were there\n" in latentmill.out
    assert lost.exists()


@pytest.mark.parametrize("place", ["finishing", "exporting 1"])
def test_a_run_that_is_killed_before_or_in_its_export_goes_on(job, trainers, forks, tmp_path, place):
    formats, once, log = "kohya,energon", tmp_path / "once", tmp_path / "log"
    once.mkdir()
    run = partial(forks.run, job(formats), log, path=[tmp_path / "site"])
    assert run(LATENTMILL_FAILPOINT=f"{place}:kill:{once}") == -9, log.read_text()
    assert run() == 0, log.read_text()
    assert files(tmp_path / "trainer") == files(trainers.export(tmp_path / "out", formats))


@pytest.mark.parametrize(("verb", "notice"), [("run", "SIGTERM"), ("run", "SIGUSR1"), ("export", "SIGTERM")])
def test_a_notice_stops_an_export_as_ctrl_c_does(job, latentmill, forks, tmp_path, verb, notice):
    formats, once, log, exported = "kohya,energon", tmp_path / "once", tmp_path / "log", tmp_path / "trainer"
    once.mkdir()
    command = job(formats)
    if verb == "export":
        assert latentmill(*job("")) == 0, latentmill.said
        command = ["export", tmp_path / "out", exported, "--to", formats]
    run = partial(forks.run, command, log, path=[tmp_path / "site"])
    assert run(LATENTMILL_FAILPOINT=f"exporting 1:{notice}:{once}") == 130, log.read_text()
    assert "the same command goes on" in log.read_text()
    assert run() == 0, log.read_text()
    assert {name.split("/")[0] for name in files(exported)} >= {"kohya-sdxl", "energon"}


def test_two_drivers_of_one_job_write_one_export(job, trainers, forks, tmp_path):
    """One waits in the middle of its export; the other comes and writes all of it."""
    formats, held = "kohya,energon", tmp_path / "held"
    held.mkdir()
    logs = [tmp_path / "first", tmp_path / "second"]
    begin = partial(forks.begin, job(formats), path=[tmp_path / "site"])
    first = begin(logs[0], LATENTMILL_FAILPOINT=f"exporting 1:pause:{held}")
    while not (held / "exporting 1").exists():
        assert forks.runs(first), logs[0].read_text()
        time.sleep(0.01)
    assert forks.end(begin(logs[1])) == 0, logs[1].read_text()
    (held / "go").touch()
    assert forks.end(first) == 0, logs[0].read_text()
    assert files(tmp_path / "trainer") == files(trainers.export(tmp_path / "out", formats))
    counts = [re.findall(r"export        (\S+): (\d+) files? written", log.read_text()) for log in logs]
    assert [sum(int(dict(each)[name]) for each in counts) for name in ("kohya-sdxl", "energon")] == [3, 2]


def test_what_has_come_to_the_source_is_exported_with_it(job, trainers, latentmill, tmp_path):
    assert latentmill(*job("kohya")) == 0, latentmill.said
    before = files(tmp_path / "trainer")
    (trainers.pictures / "z.png").write_bytes((trainers.pictures / "a b.png").read_bytes())
    assert latentmill(*job("kohya"), "--grow") == 0, latentmill.said
    assert "  export        kohya-sdxl: 1 file written, 3 were there\n" in latentmill.out
    after = files(tmp_path / "trainer")
    assert before.items() <= after.items() and {*after} - {*before} == {"z_0016x0008_sdxl.npz"}


def test_kohya_s_files_go_beside_the_pictures_and_no_others(job, trainers, latentmill, tmp_path):
    """Latents and text of a picture in one command; the source reads none of it, and so the dataset is finished still."""
    formats, folder = "kohya, kohya-sdxl-text", trainers.pictures
    before = {*files(folder)}
    for _ in range(2):
        assert latentmill(*job(formats, folder=folder)) == 0, latentmill.said
    came = {f"{name}_{end}" for name, size in SIZES.items() for end in (f"{size}_sdxl.npz", "te_outputs.npz")}
    assert {*files(folder)} - before == came
    said = refused(latentmill, job("mds", folder=folder / "mds", output=tmp_path / "mds"))
    assert said.startswith(
        f"export.folder {folder}/mds lies in what the source reads, so that it would read what mds writes"
    )


SIZES = {"a b": "0016x0008", "cats/dog.v2": "0024x0016", "cats/tom": "0008x0024"}


def refused(latentmill, arguments):
    """The one line, of ``run`` and of ``plan`` alike."""
    assert latentmill(*arguments) == 2, latentmill.said
    [said] = latentmill.err.splitlines()
    assert latentmill("plan", *arguments[1:]) == 2 and latentmill.err.splitlines() == [said]
    return said.removeprefix("latentmill: ")


@pytest.mark.parametrize(
    ("formats", "settings", "said"),
    [
        ("kohya-flux", [], "kohya-flux takes latents of flux, and those of OUT are sdxl"),
        ("khoya", [], "there is no format 'khoya' (did you mean 'kohya-sd'?)"),
        ("kohya", ["source.keep=[]"], "kohya-sdxl is found by the pictures' names, and OUT doesn't say them"),
        ("folder", ["source.id_column=path", "samples_per_row=2", "flow=[read, encode_images, decode, write]"], "folder: the 2 samples of a row would be one file, called by file: export.names=row_id"),
        ("kohya-sdxl-text", ["samples_per_row=3"], "kohya-sdxl-text: the 3 samples of a row would be one file, called by file"),
        ("kohya", ["+export.names=title"], "--names title: OUT has no such column; it has: row_id,"),
        ("pixart", [], "pixart needs latents_std, and OUT has none: run the job again with latents_std=true"),
        ("folder", [], "folder needs image, and OUT has none"),
        ("kohya-sdxl-text", ["flow=[read, encode_images, write]"], "kohya-sdxl-text needs prompt:embeds, and OUT has none"),
        ("kohya-sdxl-text", ["+text_encoder.model=sd3"], "kohya-sdxl-text takes encodings of prompts of Stable Diffusion XL"),
        ("kohya-sdxl-text", ["+text_encoder.clip_skip=1"], "kohya-sdxl-text takes encodings of prompts of Stable Diffusion XL"),
        ("kohya", ["+export.to=[]"], "encode_text: export.to must be names of formats"),
        ("kohya", ["+export.folder=null"], "encode_text: export.folder must say where to, a folder or a URL, not None"),
        ("kohya", ["+export.folder=OUT/kohya"], "OUT/kohya lies in the dataset, which is to stay as it is"),
        ("kohya", ["+export.fodler=a"], "encode_text: there is no key export.fodler (did you mean 'folder'?)"),
    ],
)  # fmt: skip
def test_what_the_dataset_will_not_be_for_is_said_before_it_is_made(job, latentmill, tmp_path, formats, settings, said):
    out = str(tmp_path / "out")
    given = [each.replace("OUT", out) for each in settings]
    assert refused(latentmill, job(formats, *given)).startswith(said.replace("OUT", out))
    assert not (tmp_path / "out").exists() and not (tmp_path / "trainer").exists()


def test_a_job_with_size_may_make_texts_alone(job, latentmill, tmp_path, rows, failed):
    texts = job("kohya-sdxl-text", "flow=[read, encode_text, write]", "size.buckets=[[16,8]]")
    assert latentmill(*texts) == 0, latentmill.said
    assert not failed(tmp_path / "out") and [{"bucket"} & {*row} for row in rows(tmp_path / "out")] == [set()] * 3


def test_a_name_that_is_too_long_for_a_disk_is_said_before_anything_is_made(job, trainers, latentmill, tmp_path):
    (trainers.pictures / "a b.png").rename(trainers.pictures / f"{'x' * 240}.png")
    assert refused(latentmill, job("kohya")).startswith(f"{'x' * 240}.png: the name of its file, xxx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("formats", "of"),
    [("kohya", "kohya-sdxl, if they are of one size"), ("kohya,simpletuner", "kohya-sdxl, simpletuner")],
)
def test_two_pictures_whose_files_would_be_one_are_named_before_anything_is_made(
    job, trainers, latentmill, formats, of
):
    """In the end, where both are there and of one size, there is no export."""
    folder = trainers.pictures / "cats"
    (folder / "tom.PNG").write_bytes((folder / "tom.png").read_bytes())
    said = f"cats/tom.PNG and cats/tom.png would be one file of {of}, and then there is no export: rename one"
    assert latentmill(*job(formats, verb="plan")) == 0 and said in latentmill.said
    assert latentmill(*job(formats)) == 2 and said in latentmill.err
    assert re.search(r"rows \S+ and \S+ would both be cats/tom", latentmill.err)


def test_another_dataset_s_export_is_in_the_way_before_anything_is_made(job, latentmill, tmp_path):
    (tmp_path / "trainer").mkdir()
    assert latentmill(*job("mds")) == 0, latentmill.said
    said = refused(latentmill, job("mds", "seed=1", output=tmp_path / "other"))
    assert said == (
        f"{tmp_path}/trainer/.latentmill/mds.json is of another export to mds (another dataset, other --names, or beside other "
        "formats): choose another folder"
    )
    assert not (tmp_path / "other").exists()


def test_plan_says_where_the_export_goes_and_how_large_encoded_prompts_will_be(job, latentmill, tmp_path):
    formats = "mds,kohya-sdxl-text,simpletuner-sdxl-text"
    settings = "+text_encoder.dtype=bfloat16", "samples_per_row=2", "+export.names=row_id"
    assert latentmill(*job(formats, *settings, verb="plan")) == 0, latentmill.said
    lines = latentmill.out.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith("export "))
    assert [line[14:] for line in lines[at : at + 3]] == [
        f"mds, kohya-sdxl-text, simpletuner-sdxl-text in {tmp_path}/trainer",
        "kohya-sdxl-text: at most 6 files of 637 kB, 3.82 MB",
        "simpletuner-sdxl-text: at most 3 files of 320 kB, 959 kB",
    ]
    assert latentmill(*job(formats, *settings)) == 0, latentmill.said
    written = files(tmp_path / "trainer")
    sizes = [sum(len(file) for name, file in written.items() if name.startswith(of)) for of in ("kohya", "simple")]
    assert [in_units(size) for size in sizes] == ["3.82 MB", "959 kB"]


def test_jobs_of_a_sweep_need_folders_of_their_own(job, latentmill, tmp_path):
    swept = ["-m", "seed=1,2"]
    assert latentmill(*job("mds"), *swept) == 2
    assert "-m: each job's export needs a folder of its own: refer to the keys in it" in latentmill.err
    assert latentmill(*job("mds", folder=tmp_path / "of-${seed}"), *swept) == 0, latentmill.said
    assert files(tmp_path / "of-1") == files(tmp_path / "of-2") != {}
