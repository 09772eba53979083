"""The command: one line and 2 for what a person has to put right, and nothing is begun or written before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import latentmill
from latentmill import cli, registry
from latentmill.config import load_job
from latentmill.errors import JobError

TINY = "cluster=inline samples_per_row=1 sampling.steps=1 sampling.width=32 sampling.height=32".split()
STATUS = {
    "name": "txt2img",
    "planned": 3,
    "ok": 2,
    "failed": 1,
    "shards": 1,
    "shards_done": 1,
    "success": True,
    "lost": 0,
    "foreign": [],
    "warnings": {},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with three prompts, the last of them impossible, and the dataset that became of them."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "prompts.txt").write_text("a red star\na blue ring\na flibbertigibbet\n")
    assert cli.main(["run", "txt2img", *TINY, f"source.path={folder}/prompts.txt", f"output={folder}/out"]) == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *arguments, code=0):
    """What the command prints: on stdout if all is well, else its one line on stderr."""
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == code
    out, err = capsys.readouterr()
    if code == 0:
        assert err == ""
        return out
    assert out == "" and err.startswith("latentmill: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("latentmill: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("run txt2img sede=1", "txt2img: there is no key sede (did you mean 'seed'?)"),
        ("run txt2img --cfg job sede=1", "txt2img: there is no key sede (did you mean 'seed'?)"),
        ("plan txt2img sampling.steps=0", "txt2img: sampling.steps must be from 1 to 100000, not 0"),
        ("run no.yaml", "there is no job file no.yaml; shipped jobs are chosen by name: "),
        ("run txt2img vae.name=shape", "no vae plugin 'shape' is installed (did you mean 'shapes'?); there are: "),
        ("run txt2img vae.tile=64", "vae shapes has no setting 'tile'; it has: none"),
        ("run txt2img sink.quality=high", "sink parquet: quality must be int, not 'high'"),
        ("run txt2img ~scheduler", "txt2img: denoise is in the flow, so the job needs scheduler.name"),
        ("run txt2img source.path=no.txt", "source prompts: "),
        ("run decode source.name=prompts source.path=no.txt", "decode: decode needs a source of latents; "),
        ("status .", ". holds no dataset of ours: it has no plan.json"),
        ("status no", "no holds no dataset of ours: it has no plan.json"),
    ],
)
def test_a_wrong_thing_is_2_and_one_line_and_nothing_is_written(arguments, line, here, capsys):
    assert said(capsys, *arguments.split(), code=2).startswith(line)
    assert list(here.iterdir()) == []


def test_in_a_shell_there_is_no_traceback_unless_it_is_asked_for(tmp_path):
    def shell(*arguments):
        command = [sys.executable, "-m", "latentmill.cli", "run", "txt2img", "vae=shape", *arguments]
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert told.stdout == "" and list(tmp_path.iterdir()) == []
        return told.returncode, told.stderr.splitlines()

    code, (line,) = shell()
    assert code == 2 and line.startswith("latentmill: txt2img: there is no vae 'shape' (did you mean 'shapes'?); ")
    code, lines = shell("--debug")
    assert code == 1 and "Traceback (most recent call last):" in lines
    assert lines[-1] == "latentmill.errors.JobError: " + line.removeprefix("latentmill: ")


GOMP = """
    import ctypes, glob, importlib.util
    torch = importlib.util.find_spec("torch").submodule_search_locations[0]
    for path in glob.glob(torch + "/lib/libgomp*") or glob.glob(torch + ".libs/libgomp*"):
        ctypes.CDLL(path)
"""
"""Loads the library of threads that torch loads, without torch."""


@pytest.mark.parametrize(
    ("more", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_threads_that_wait_let_others_work_unless_the_environment_says_more(more, spins, tmp_path):
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = "from latentmill.cli import main\ntry: main(['--version'])\nexcept SystemExit: " + GOMP
    told = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **more, "OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in told.stderr


def test_debug_may_stand_anywhere(here):
    for arguments in ("--debug txt2img sede=1", "txt2img --debug sede=1", "txt2img sede=1 --debug"):
        with pytest.raises(JobError, match="there is no key sede"):
            cli.main(["plan", *arguments.split()])


def test_what_is_no_command_shows_the_usage(here, capsys):
    for arguments in ([], ["runn"], ["run"], ["run", "txt2img", "--nope"], ["run", "txt2img", "--cfg", "hydra"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2 and capsys.readouterr().err.startswith("usage: latentmill")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"latentmill {latentmill.__version__}\n"


def test_cfg_prints_the_whole_job_with_overrides_from_before_and_behind_it(here, capsys, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    text = said(capsys, *"run txt2img seed=7 --cfg job sampling.steps=3 sampling.prompt=${oc.env:SECRET}".split())
    config = yaml.safe_load(text)
    assert (config["seed"], config["sampling"]["steps"], config["samples_per_row"]) == (7, 3, 4)
    assert config["sampling"]["prompt"] == "${oc.env:SECRET}" and config["vae"] == {"name": "shapes"}
    assert config["stages"]["denoise"]["batch_size"] == "auto" and list(here.iterdir()) == []
    (here / "again.yaml").write_text("defaults: [job, _self_]\n" + text)
    assert said(capsys, "run", "again.yaml", "--cfg", "job") == text
    assert load_job("again.yaml").sampling["prompt"] == "s3cr3t"


def test_plan_says_what_a_job_would_make_and_makes_nothing(made, here, capsys):
    same = ["plan", "txt2img", *TINY, f"source.path={made}/prompts.txt"]
    lines = said(capsys, *same, "rows_per_shard=2", "output=other").splitlines()
    assert lines[:5] == [
        "job      txt2img: read > encode > denoise > decode > write",
        "source   3 rows in 1 files, x 1 samples",
        "planned  3 rows in 2 shards of 2, of which 0 are done",
        "output   other",
        "workers  read, encode + denoise + decode, write (cluster=inline has one process)",
    ]
    plugins = "source prompts, sink parquet, vae shapes, text_encoder shapes, denoiser shapes, scheduler dpmpp_2m"
    assert [" ".join(line.split()[:2]) for line in lines[5:-2]] == plugins.split(", ")
    assert lines[-1].startswith("hash ")
    there = json.loads((made / "out" / "plan.json").read_text())
    assert json.loads(said(capsys, *same, "--json", "output=other")) == there
    assert "3 rows in 1 shards of 32, of which 1 are done" in said(capsys, *same, f"output={made}/out")
    assert list(here.iterdir()) == []


def test_a_changed_job_on_a_dataset_is_refused_with_what_differs(made, here, capsys):
    same = ["txt2img", *TINY, f"source.path={made}/prompts.txt", f"output={made}/out"]
    line = f"{made}/out holds another job's dataset: sampling.prompt:  -> x. Choose another output; --fork begins one."
    for command in ("run", "plan"):
        assert said(capsys, command, *same, "sampling.prompt=x", code=2) == line


def test_the_same_run_again_does_nothing_and_says_so(made, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    text = said(capsys, "run", "txt2img", *TINY, f"source.path={made}/prompts.txt", f"output={made}/out")
    assert text.startswith("txt2img: nothing to do, all 3 rows were finished before\n")
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_status_counts_what_is_in_a_dataset(made, capsys):
    out = made / "out"
    assert json.loads(said(capsys, "status", out, "--json")) == {"output": str(out), **STATUS}
    assert said(capsys, "status", out).splitlines() == [
        f"{out}: job txt2img, complete",
        "3 of 3 rows: 2 ok, 1 failed",
        "1 of 1 shards",
    ]


def test_plugins_are_listed_with_where_they_come_from_and_whether_they_work(capsys):
    found = json.loads(said(capsys, "plugins", "--json", "--check"))
    assert {tuple(plugin) for plugin in found} == {("group", "name", "distribution", "version", "state")}
    about = [tuple(plugin.values()) for plugin in found]
    assert [plugin[:4] for plugin in about] == [
        (e.group, e.name, e.distribution, e.version) for e in registry.entries()
    ]
    assert ("latentmill.schedulers", "euler", "latentmill", latentmill.__version__, "ok") in about
    assert {state for _, _, name, _, state in about if name in ("latentmill", "latentmill-shapes")} == {"ok"}
    kind, *rows = [line.split() for line in said(capsys, "plugins", "--check").splitlines()]
    assert kind == ["kind", "name", "distribution", "version", "state"]
    assert ["schedulers", "euler", "latentmill", latentmill.__version__, "ok"] in rows


def test_schedulers_are_listed_with_what_the_documentation_says_of_them(capsys):
    assert cli.main(["schedulers", "--json"]) == 0
    ours = [row for row in json.loads(capsys.readouterr().out) if row["distribution"] == "latentmill"]
    by_name = {row["name"]: row for row in ours}
    assert (by_name["heun"]["order"], by_name["heun"]["evaluations"], by_name["heun"]["stochastic"]) == (2, 2, False)
    assert by_name["ddim"]["paper"] == "arXiv:2010.02502"
    assert {row["name"] for row in ours if not row["paper"]} == {"comfy", "heunpp2"}  # of no paper
    page = (Path(__file__).parents[1] / "docs" / "schedulers.md").read_text()
    for row in ours:
        noise = "yes" if row["stochastic"] else ""
        line = f"| `{row['name']}` | {row['order']} | {row['evaluations']} | {noise} | {row['paper']} |"
        assert line in page, "python docs/schedulers.py makes the page anew"
