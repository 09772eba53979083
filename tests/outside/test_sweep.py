"""``run JOB -m key=a,b``: each job's dataset is what it would be alone; the sheet shows the same rows of all."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.outside.conftest import table

TINY = ("cluster=inline", "samples_per_row=1", "sampling.steps=2", "rows_per_shard=2")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red star\na blue ring\na flibbertigibbet\na green circle\n")
    return f"source.path={path}"


def test_every_choice_of_values_is_a_dataset_as_if_alone(latentmill, prompts, tmp_path):
    sweep = ("run", "txt2img", "-m", *TINY, prompts, "sampling.guidance_scale=1,2", "scheduler=euler,dpmpp_2m")
    assert latentmill(*sweep, f"output={tmp_path}/out") == 0
    labels = [f"guidance_scale={scale},scheduler={name}" for scale in "12" for name in ("euler", "dpmpp_2m")]
    assert [line.split() for line in latentmill.said.splitlines() if line.startswith("[")] == [
        [f"[{number}/4]", label] for number, label in enumerate(labels, 1)
    ]
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."} == {
        *labels,
        "prompt_cache",
        "contact_sheet.png",
    }
    found = []
    for label in labels:
        scale, name = label[15], label.rpartition("=")[2]
        alone = ("run", "txt2img", *TINY, prompts, f"sampling.guidance_scale={scale}", f"scheduler={name}")
        assert latentmill(*alone, f"output={tmp_path}/{label}") == 0
        found.append(table(tmp_path / "out" / label))
        assert found[-1].equals(table(tmp_path / label)) and found[-1].num_rows == 3
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png").convert("RGB")
    side = 192  # pictures are 64 pixels, three times as large; gaps of 20, margins of 32, and a column of prompts
    for column, rows in enumerate(found):
        for down, row in enumerate(rows.to_pylist()):
            picture = Image.open(io.BytesIO(row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]))
            picture = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            x, y = 32 + side + 20 + column * (side + 20), sheet.height - 32 - (3 - down) * (side + 20)
            assert sheet.crop((x, y, x + side, y + side)).tobytes() == picture.tobytes(), (column, down)
    assert latentmill(*sweep, f"output={tmp_path}/out") == 0 and latentmill.said.count("were finished before") == 4


def test_a_prompt_of_several_jobs_is_encoded_once(acme):
    acme.source(["a fox", "a cat"])
    job = acme.job("rows_per_shard=1,2", "text_encoder.slotted=false")
    acme.notes.write_text("")
    assert acme.latentmill("run", "-m", *job) == 0
    assert acme.encoded() == {"a fox": 1, "a cat": 1, "": 1}


def test_an_output_may_refer_to_what_differs(latentmill, prompts, tmp_path):
    more = (*TINY, prompts, "scheduler=euler,heun")
    output = f"output={tmp_path}/out/${{scheduler.name}}/${{sampling.steps}}"
    assert latentmill("run", "txt2img", "-m", *more, output) == 0
    assert sorted(path.parent.parent.name for path in (tmp_path / "out").glob("*/2/_SUCCESS")) == ["euler", "heun"]
    assert (tmp_path / "out/contact_sheet.png").exists()
    assert latentmill("run", "txt2img", "-m", *more, output, "sampling.guidance_scale=1,2") == 2
    assert "4 jobs have only 2 outputs" in latentmill.said


def test_values_are_written_as_hydra_has_them(latentmill, prompts, tmp_path):
    several = {
        "sampling.prompt_suffix='a, b',c": None,
        "sampling.steps=range(1,4)": ["steps=1", "steps=2", "steps=3"],
        "sampling.guidance_scale=choice(1.5,3)": ["guidance_scale=1.5", "guidance_scale=3"],
        "rows_per_shard=1,2": ["rows_per_shard=1", "rows_per_shard=2"],
        "+sampling.eta=0.5,1": ["eta=0.5", "eta=1"],
    }
    for given, labels in several.items():
        code = latentmill("run", "txt2img", "-m", "--cfg", "job", *TINY, prompts, f"output={tmp_path}/out", given)
        said = [line[2:] for line in latentmill.said.splitlines() if line.startswith("# ")]
        assert said == labels if labels and code == 0 else code == 2, (given, latentmill.said)
    assert not (tmp_path / "out").exists()


def test_a_value_is_what_it_would_be_alone(latentmill, prompts, tmp_path):
    """Hydra makes numbers of what looks like one, in its own reading: 1.1, inf, 20261125, 1000.0."""
    texts = ["1.10", "12e4567", "2026_11_25", "1e3", "True", "NULL-1", "+5", "[1.10]", "a"]
    job = ("run", "txt2img", *TINY, prompts, f"output={tmp_path}/out", "--cfg", "job")
    alone = []
    for text in texts:
        assert latentmill(*job, f"sampling.negative_prompt={text}") == 0
        alone += [line for line in latentmill.said.splitlines() if line.startswith("  negative_prompt:")]
    for given in (",".join(texts), " , ".join(texts), f"choice({','.join(texts)})"):
        assert latentmill(*job, "-m", f"sampling.negative_prompt={given}") == 0
        lines = latentmill.said.splitlines()
        assert [line for line in lines if line.startswith("  negative_prompt:")] == alone
        assert [line for line in lines if line.startswith("# ")] == [f"# negative_prompt={text}" for text in texts]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["scheduler=euler"], "-m: no key has several values"),
        (["scheduler=glob(*)"], "glob is not known here"),
        (["scheduler=euler,euler"], "scheduler=euler is there twice"),
        (["scheduler=euler,eulr"], "there is no scheduler 'eulr'"),
        (["sampling.steps=1,(2"], "a value with a comma or a bracket in it stands in quotes"),
        (["sampling.steps=1,2", "--fork", "other"], "each job of a sweep has an output of its own"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_begun(given, said, latentmill, prompts, tmp_path):
    assert latentmill("run", "txt2img", "-m", *TINY, prompts, f"output={tmp_path}/out", *given) == 2
    assert said in latentmill.said and not (tmp_path / "out").exists()


def test_a_dataset_is_no_place_for_several(latentmill, prompts, tmp_path):
    job = ("txt2img", *TINY, prompts, f"output={tmp_path}/out")
    assert latentmill("run", *job) == 0
    assert latentmill("run", *job, "-m", "sampling.steps=1,2") == 2
    assert "is a dataset, and no place for several" in latentmill.said


def test_a_job_that_fails_stops_no_other(latentmill, prompts, tmp_path):
    """The first stops at a row that can't be made; the second leaves it out."""
    job = ("run", "txt2img", "-m", *TINY, prompts, f"output={tmp_path}/out", "on_error=stop,quarantine")
    assert latentmill(*job) == 1
    assert "1 of 2 jobs are done" in latentmill.said and "flibbertigibbet" in latentmill.said
    assert not (tmp_path / "out/on_error=stop/_SUCCESS").exists()
    assert pq.read_table(tmp_path / "out/on_error=quarantine/data").num_rows == 3
    assert Path(tmp_path / "out/contact_sheet.png").exists()


SOURCE = """
import signal
from pathlib import Path
from latentmill.sources.prompts import Prompts

class Told(Prompts):
    def __init__(self, path: str, told: str = ""):
        super().__init__(path)
        self.told, self.out = told, Path(path).parent / "out" / f"told={told}"

    def fragments(self):
        if self.told == "ctrl-c":
            signal.raise_signal(signal.SIGINT)
        if self.told == "in-the-way":
            self.out.parent.mkdir(exist_ok=True)
            self.out.write_text("")
        return super().fragments()
"""


def test_ctrl_c_and_a_disk_as_a_job_is_planned(latentmill, install, prompts, tmp_path):
    """What the disk says ends that job alone; Ctrl-C ends all, and how many are done is said."""
    install("acme", "[latentmill.sources]\ntold = acme_told:Told\n", acme_told=SOURCE)
    job = ("run", "txt2img", "-m", *TINY, "source.name=told", prompts, f"output={tmp_path}/out")
    assert latentmill(*job, "+source.told=in-the-way,a,ctrl-c,b") == 130, latentmill.said
    assert "stopped: 1 of 4 jobs are done" in latentmill.said and "before anything was begun" not in latentmill.said
    assert (tmp_path / "out/told=a/_SUCCESS").exists() and not (tmp_path / "out/told=b").exists()


def test_a_long_name_is_cut_by_bytes_and_does_not_hang_on_other_jobs(latentmill, prompts, tmp_path):
    def folders(*values):
        given = "sampling.negative_prompt=" + ",".join(f"'{value}'" for value in values)
        assert latentmill(*job, given) == 0, latentmill.said
        lines = [line for line in latentmill.said.splitlines() if line.startswith("output: ")]
        return [line.rpartition("/")[2] for line in lines]

    job = ("run", "txt2img", "-m", "--cfg", "job", *TINY, prompts, f"output={tmp_path}/out")
    long = ["a" * 300, "漢" * 119, "漢" * 70]
    one, two, three = folders(*long, "x")[:3]
    assert folders("y", *reversed(long))[1:] == [three, two, one]
    assert len({one, two, three}) == 3 and all(len(name.encode()) <= 140 for name in (one, two))
    assert three == "negative_prompt=" + "漢" * 70, "what fits stays what it was"
