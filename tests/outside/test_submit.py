"""``latentmill submit``, ``jobs``, ``logs`` and ``cancel``: what travels of a job, what is remembered, and a launcher of one's own."""

import json
import os
import re

import pytest

JOB = """\
defaults: [job, model: shapes, source: prompts, sink: parquet, cluster: inline, _self_]
output: /o
source: {path: pkg://latentmill.jobs/data/prompts.txt}
"""
MORE = "sampling: {prompt: 1_0, width: 64, height: 64}\n"
CODE = """
from latentmill.plugin import Launcher, LaunchState

class Desk(Launcher):
    contract = 2

    def __init__(self, room: str = "a", seats: int = 1, env: list[str] | None = None):
        self.room, self.seats, self.env = room, seats, env or []

    def files(self, submission):
        if self.seats < 1:
            raise ValueError(f"target.seats must be 1 or more, not {self.seats}")
        needs = "".join(f"{'+'.join(n.stages)} {n.replicas} {n.num_gpus:g} {n.memory}\\n" for n in submission.needs)
        return {submission.file: submission.text, "words": "\\n".join(submission.command(address="auto")), "needs": needs, "room": self.room}

    def submit(self, submission, folder):
        if self.room == "slow":
            raise KeyboardInterrupt
        if self.room == "closed":
            raise ConnectionError("the door is closed")
        (folder / "asked").write_text(submission.id)
        return "desk 1"

    def state(self, job):
        assert (job.folder / "asked").read_text() == job.id and job.handle == "desk 1"
        if self.room == "lost":
            raise OSError("nobody answers")
        return LaunchState("queued", detail="the desk [a] is taken")

    def log(self, job, follow):
        yield "first "
        yield f"follow {follow}"

    def cancel(self, job):
        (job.folder / "asked").unlink()
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state" / "latentmill" / "jobs"


@pytest.fixture
def desk(install, home):
    install("acme", "[latentmill.launchers]\ndesk = acme_desk:Desk\n", acme_desk=CODE)
    return home


def printed(text):
    """The files that a dry run shows, by name."""
    return dict(part.split("\n", 1) for part in text.split("# ---- ")[1:])


def test_a_dry_run_shows_all_and_does_nothing(latentmill, desk, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "hunter2hunter2")
    more = ("output=/shared/out", "sampling.prompt=${oc.env:A_TOKEN}", "target.env=[A_TOKEN]", "target.room=2026_11")
    assert latentmill("submit", "txt2img", "--to", "desk", "--dry-run", "stages=gpu", *more) == 0, latentmill.said
    files = printed(latentmill.out)
    assert files["words"].split("\n")[:5] == [
        "latentmill",
        "run",
        "txt2img.yaml",
        "cluster.kind=ray",
        "cluster.address=auto",
    ]
    assert "encode+denoise+decode None 1 None\n" in files["needs"] and files["room"].strip() == "2026_11"
    assert "hunter2" not in latentmill.said and not desk.exists()


def test_what_travels_is_one_file_that_means_the_same(latentmill, desk, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "mine.yaml").write_text("name: dpmpp_2m\ngrid: karras\n")
    (tmp_path / "My job.yaml").write_text(
        JOB.replace("_self_", "scheduler: euler, _self_, override stages: gpu") + MORE
    )
    flow = "flow=[read,encode,denoise,decode,{name: mean_brightness, as: dim},write]"
    words = ("output=/shared/out", "scheduler=mine", flow)
    assert latentmill("plan", "My job.yaml", "--json", *words) == 0, latentmill.said
    meant = json.loads(latentmill.out)
    assert latentmill("submit", "My job.yaml", "--to", "desk", *words) == 0, latentmill.said
    [file] = desk.glob("*/My job.yaml")
    assert latentmill("plan", file, "--json") == 0, latentmill.said
    assert json.loads(latentmill.out) == meant


def test_an_output_below_home_is_sent_as_it_was_checked(latentmill, desk, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    job = ("submit", "txt2img", "--to", "desk", "--dry-run", "output=~/out", "sampling.prompt=~/a fox")
    assert latentmill(*job) == 0, latentmill.said
    assert f"\noutput: {tmp_path}/out\n" in latentmill.out and "prompt: ~/a fox" in latentmill.out


def test_what_was_submitted_is_listed_told_and_ended(latentmill, desk):
    assert latentmill("submit", "txt2img", "--to", "desk", "output=/nowhere/out") == 0, latentmill.said
    assert latentmill("jobs", "--json") == 0
    [job] = json.loads(latentmill.out)
    told = {
        key: job[key]
        for key in ("job", "target", "state", "exit_code", "detail", "dataset", "unread", "output", "handle")
    }
    assert told == {
        "job": "txt2img", "target": "desk", "state": "queued", "exit_code": None, "detail": "the desk [a] is taken", "dataset": None,
        "unread": "not begun", "output": "/nowhere/out", "handle": "desk 1",
    }  # fmt: skip
    assert json.loads((desk / f"{job['id']}.json").read_text())["target"] == {"name": "desk"}
    assert (desk.stat().st_mode & 0o077) == 0, "what others submit is nobody's business"
    assert latentmill("jobs") == 0 and "the desk [a] is taken" in latentmill.out
    assert latentmill("logs", job["id"][:9]) == 0 and latentmill.out == "first follow False"
    assert latentmill("logs", job["handle"], "--follow") == 0 and latentmill.out == "first follow True"
    assert latentmill("cancel", job["id"]) == 0 and not (desk / job["id"] / "asked").exists()


def test_one_that_does_not_answer_is_unknown_and_hides_no_other(latentmill, desk):
    for room in ("lost", "a"):
        assert latentmill("submit", "txt2img", "--to", "desk", "output=/nowhere/out", f"target.room={room}") == 0
    [one, _] = sorted(desk.glob("*.json"))
    strange = {"target": {}}, {"id": 3}, {"target": ["a"]}, {"output": None}, {}  # the last: a copy by another name
    for number, other in enumerate(strange):
        (desk / f"strange{number}.json").write_text(json.dumps({**json.loads(one.read_text()), **other}))
    (desk / "strange.json").write_text("{}")
    assert latentmill("jobs", "--json") == 0
    assert {(job["state"], job["detail"]) for job in json.loads(latentmill.out)} == {
        ("unknown", "launcher desk of acme 1.0: nobody answers"),
        ("queued", "the desk [a] is taken"),
    }
    assert latentmill("cancel", "txt2img") == 2 and "may be txt2img-" in latentmill.err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--to", "desc", "output=/o"], 2, "--to desc: there is no target 'desc' (did you mean 'desk'?); there are: desk, "),
        (["--to", "desk", "output=/o", "target.seat=2"], 2, "launcher desk has no setting 'seat' (did you mean 'seats'?)"),
        (["--to", "desk", "output=/o", "target.seats=two"], 2, "launcher desk: seats must be int, not 'two'"),
        (["--to", "desk", "output=/o", "target.seats=0"], 2, "target.seats must be 1 or more, not 0"),
        (["--to", "desk", "output=/o", "target.room=${oc.env:NIX_IS_HERE}"], 2, "Environment variable 'NIX_IS_HERE' not found"),
        (["--to", "desk", "output=/o", "target.room=${oc.env:ROOM_KEY}"], 2, "the value of ${oc.env:ROOM_KEY} would stand in what is written"),
        (["--to", "desk", "output=/o", "target.room=${oc.env:ROOM_PASSWD}"], 2, "the value of ${oc.env:ROOM_PASSWD} would stand in what is written"),
        (["--to", "desk", "output=out/here"], 2, "output=out/here is relative, and --to desk runs the job where that is another folder: write a path"),
        (["--to", "desk", "output=/o", "source.path=rows.txt"], 2, "source.path=rows.txt is relative, and --to desk runs"),
        (["--to", "desk", "output=/o", "+source.defaults={image: rows.txt}"], 2, "source.defaults.image=rows.txt is relative"),
        (["--to", "desk", "output=/o", "+stages.denoise.denoiser.path=rows.txt"], 2, "stages.denoise.denoiser.path=rows.txt is relative"),
        (["--to", "desk", "output=/o", "+stages.denoise.settings.map_path=rows.txt"], 2, "stages.denoise.settings.map_path=rows.txt is relative"),
        (["--to", "desk", "output=/o", "+vae.models=rows.txt"], 2, "vae.models=rows.txt is relative"),
        (["--to", "desk", "output=/o", "prompt_cache=kept"], 2, "prompt_cache=kept is relative"),
        (["--to", "desk", "output=/o", "export={to: [mds], folder: for/training}"], 2, "export.folder=for/training is relative"),
        (["--to", "desk", "output=/o", "source.path=~/rows.txt"], 2, "source.path=~/rows.txt leads from your home, and --to desk runs"),
        (["--to", "desk", "output=/o", "prompt_cache=~/kept"], 2, "prompt_cache=~/kept leads from your home"),
        (["--to", "desk", "output=/o", "+vae.paths=['~/a']"], 2, "vae.paths.0=~/a leads from your home"),
        (["--to", "desk", "output=/o", "sampling.stepz=3"], 2, "there is no key sampling.stepz"),
        (["--to", "../desk", "output=/o"], 2, "the name of a target is expected"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_line_and_nothing_is_left(latentmill, desk, tmp_path, monkeypatch, words, code, says):
    monkeypatch.setenv("ROOM_KEY", "hunter2hunter2")
    monkeypatch.setenv("ROOM_PASSWD", "hunter2hunter2")
    (tmp_path / "rows.txt").write_text("a red circle\n")
    assert latentmill("submit", "txt2img", *words) == code, latentmill.said
    assert says in latentmill.err and len(latentmill.err.splitlines()) == 1
    assert not desk.exists() or not [*desk.iterdir()]


def test_a_target_of_ones_own_lies_beside_the_job(latentmill, desk, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "office.yaml").write_text("name: desk\nroom: 12e3\nseats: 3\n")
    (tmp_path / "mine.yaml").write_text(JOB)
    assert latentmill("submit", "mine.yaml", "--to", "office", "--dry-run") == 0, latentmill.said
    assert printed(latentmill.out)["room"].strip() == "12e3"


@pytest.mark.parametrize("name", ["x" * 90, "2 Über_Jobs", "---", "a", "-x"])
def test_an_id_is_a_label_of_dns(latentmill, desk, tmp_path, name):
    (tmp_path / f"{name}.yaml").write_text(JOB)
    assert latentmill("submit", f"./{name}.yaml", "--to", "desk") == 0, latentmill.said
    [file] = desk.glob("*/asked")
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,45}[a-z0-9]", file.read_text())
    assert (file.parent / f"{name}.yaml").exists(), "a job's name is its file's"
    assert not (file.parent / "words").read_text().split("\n")[2].startswith("-"), "that would be an option"


def test_a_submit_that_is_interrupted_is_remembered_as_one(latentmill, desk):
    assert latentmill("submit", "txt2img", "--to", "desk", "output=/nowhere/out", "target.room=slow") == 130
    assert latentmill("jobs", "--json") == 0
    [job] = json.loads(latentmill.out)
    assert job["state"] == "unknown" and "submitting it did not end; whether desk has it" in job["detail"]


def test_a_submit_whose_answer_does_not_come_is_remembered(latentmill, desk):
    """The target may have it: who sends it again would have two."""
    assert latentmill("submit", "txt2img", "--to", "desk", "output=/nowhere/out", "target.room=closed") == 4
    [record] = desk.glob("*.json")
    assert "launcher desk of acme 1.0: the door is closed; it may have been sent all the same" in latentmill.err
    assert f"look there for {record.stem} " in latentmill.err and len(latentmill.err.splitlines()) == 1
    assert latentmill("jobs", "--json") == 0
    [job] = json.loads(latentmill.out)
    assert job["state"] == "unknown" and "submitting it did not end; whether desk has it" in job["detail"]


def test_an_output_that_does_not_answer_holds_up_no_other(latentmill, desk, tmp_path, monkeypatch):
    monkeypatch.setattr("latentmill.submissions.OUTPUT_ANSWERS_WITHIN", 0.5)
    for output in ("hangs", "there"):
        (tmp_path / output).mkdir()
        assert latentmill("submit", "txt2img", "--to", "desk", f"output={tmp_path / output}") == 0
    for name in ("plan.json", "_SUCCESS"):
        os.mkfifo(tmp_path / "hangs" / name)  # whoever reads it waits
    assert latentmill("jobs", "--json") == 0
    unread = {job["output"].rpartition("/")[2]: job["unread"] for job in json.loads(latentmill.out)}
    assert unread == {"hangs": "it does not answer within 0.5 seconds", "there": "not begun"}


def test_only_the_newest_are_asked_for(latentmill, desk):
    assert latentmill("submit", "txt2img", "--to", "desk", "output=/nowhere/out") == 0
    [file] = desk.glob("*.json")
    record = json.loads(file.read_text())
    for number in range(60):
        old = {**record, "id": f"old-{number}", "submitted": f"2020-01-01T00:00:{number:02}+00:00", "handle": None}
        (desk / f"old-{number}.json").write_text(json.dumps(old))
    assert latentmill("jobs") == 0 and "11 older: latentmill jobs --all" in latentmill.out
    assert record["id"] in latentmill.out and "old-10 " not in latentmill.out and "old-11 " in latentmill.out
    assert latentmill("jobs", "--all", "--json") == 0 and len(json.loads(latentmill.out)) == 61


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        ('{"../../evil": "b"}', "files names '../../evil': a file's name without a folder is expected"),
        ('{"/evil": "b"}', "files names '/evil': a file's name without a folder is expected"),
        ("None", "files gave None, and texts by the names of their files are expected"),
        ('{"a": 1}', "files gave {'a': 1}, and texts by the names of their files are expected"),
    ],
)
def test_a_launcher_writes_texts_into_the_job_s_folder_and_nowhere_else(latentmill, install, home, gives, said):
    code = CODE.replace("        if self.seats < 1:", f"        return {gives}\n        if self.seats < 1:")
    install("acme", "[latentmill.launchers]\ndesk = acme_desk:Desk\n", acme_desk=code)
    assert latentmill("submit", "txt2img", "--to", "desk", "output=/shared/out") == 2
    assert latentmill.err.splitlines() == [f"latentmill: launcher desk of acme 1.0: {said}"] and not home.exists()


def test_a_state_that_is_none_is_that_job_s_alone(latentmill, install, home):
    code = CODE.replace('return LaunchState("queued", detail="the desk [a] is taken")', 'return "running"')
    install("acme", "[latentmill.launchers]\ndesk = acme_desk:Desk\n", acme_desk=code)
    for output in ("/shared/a", "/shared/b"):
        assert latentmill("submit", "txt2img", "--to", "desk", f"output={output}") == 0, latentmill.said
    assert latentmill("jobs", "--json") == 0, latentmill.said
    found = json.loads(latentmill.out)
    assert [job["state"] for job in found] == ["unknown"] * 2 and "state gave 'running'" in found[0]["detail"]
