"""A distribution brings jobs and commands, and the command line starts without what it doesn't need."""

import json
import subprocess
import sys

import pytest

JOB = """\
defaults: [job, model: shapes, scheduler: euler, source: prompts, sink: parquet, cluster: inline, _self_]
output: out/theirs
source: {path: "pkg://acme_jobs/words.txt"}
samples_per_row: 1
rows_per_shard: 2
sampling: {steps: 2, width: 64, height: 64}
"""
COMMAND = """\
import sys
from latentmill.errors import PlanError

def count(words):
    print(f"{len(words)} words: {' '.join(words)}")
    return 7

def refuse(words):
    raise PlanError("there is nothing to\\ncount")
"""


@pytest.fixture
def acme(install, tmp_path, monkeypatch):
    site = tmp_path / "site"
    points = (
        "[latentmill.jobs]\ntheir_job = acme_jobs\ntheir_other = acme_jobs\ntxt2img = acme_jobs\nlost = acme_jobs\n"
    )
    points += "[latentmill.commands]\ncount = acme_commands:count\nrefuse = acme_commands:refuse\ntwice = acme_commands:count\nrun = acme_commands:count\ngone = acme_commands:gone\n"
    install("acme", points, acme_commands=COMMAND)
    install("zenith", "[latentmill.commands]\ntwice = acme_commands:refuse\n")
    (site / "acme_jobs").mkdir()
    (site / "acme_jobs" / "__init__.py").write_text("")
    for name in ("their_job", "txt2img"):
        (site / "acme_jobs" / f"{name}.yaml").write_text(JOB)
    other = "defaults: [their_job, _self_]\nsampling: {steps: 3}\n"
    (site / "acme_jobs" / "their_other.yaml").write_text(other)
    (site / "acme_jobs" / "words.txt").write_text("a red circle\na blue square\n")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("acme_jobs", None)


def test_a_plugin_s_job_is_run_by_its_name(acme, latentmill, tmp_path):
    assert latentmill("run", "their_job") == 0, latentmill.err
    assert (tmp_path / "out" / "theirs" / "_SUCCESS").exists()
    assert latentmill("run", "their_other", "--cfg", "job") == 0
    assert "steps: 3" in latentmill.out


def test_a_job_s_name_that_two_bring_is_chosen_with_the_distribution(acme, latentmill):
    assert latentmill("run", "txt2img", "--cfg", "job") == 2
    assert latentmill.err == (
        "latentmill: job 'txt2img' is in acme and latentmill: write acme:txt2img or latentmill:txt2img\n"
    )
    assert latentmill("run", "acme:txt2img", "--cfg", "job") == 0 and "out/theirs" in latentmill.out
    assert latentmill("run", "latentmill:txt2img", "--cfg", "job") == 0 and "out/txt2img" in latentmill.out


def test_a_job_that_is_not_there_is_answered_with_the_nearest(acme, latentmill):
    assert latentmill("plan", "their_jobs") == 2
    assert latentmill.err.startswith(
        "latentmill: there is no job 'their_jobs' (did you mean 'their_job'?); there are: "
    )


def test_a_plugin_s_command_is_given_its_words_and_says_the_exit_code(acme, latentmill):
    assert latentmill("count", "a", "--b", "key=value") == 7
    assert latentmill.out == "3 words: a --b key=value\n"
    assert latentmill("refuse") == 2
    assert latentmill.err == "latentmill: there is nothing to\\ncount\n"
    assert latentmill("acme:run", "a") == 7  # ours comes first
    assert latentmill("twice") == 2
    assert (
        latentmill.err
        == "latentmill: command 'twice' is in acme 1.0 and zenith 1.0: write acme:twice or zenith:twice\n"
    )
    assert latentmill("acme:twice") == 7 and latentmill("zenith:twice") == 2
    assert latentmill("gone") == 2
    assert latentmill.err.startswith("latentmill: command 'gone' of acme 1.0 can't be imported: AttributeError: ")


def test_jobs_and_commands_are_listed_without_being_imported(acme, latentmill):
    for words in (["plugins"], ["--help"], ["run", "--help"]):
        assert latentmill(*words) == 0
        assert all(name in latentmill.out for name in (["their_job"] if words[0] == "run" else ["count"]))
    assert not {"acme_jobs", "acme_commands"} & sys.modules.keys()
    latentmill("plugins", "--check", "--json")
    states = {entry["name"]: entry["state"] for entry in json.loads(latentmill.out) if entry["distribution"] == "acme"}
    assert states["their_job"] == states["count"] == "ok"
    assert states["lost"] == "there is no lost.yaml in acme_jobs"
    assert states["gone"].startswith("command 'acme:gone' of acme 1.0 can't be imported: AttributeError")


HEAVY = {"torch", "ray", "hydra", "scipy", "diffusers", "latentmill_shapes"}


@pytest.mark.parametrize(
    ("words", "spared"),
    [
        (["--help"], HEAVY | {"pyarrow"}),
        (["--version"], HEAVY | {"pyarrow"}),
        (["plugins"], HEAVY | {"pyarrow"}),
        (["status", "."], HEAVY),
        (["top", "."], HEAVY | {"pyarrow"}),
    ],
)
def test_a_command_imports_no_more_than_it_needs(words, spared, tmp_path):
    code = f"""
import sys
from latentmill.cli import main
try:
    main({words!r})
except SystemExit:
    pass
print(sorted({spared!r} & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("sink", ["parquet", "webdataset"])
def test_status_of_a_dataset_needs_neither_torch_nor_hydra(sink, latentmill, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\n")
    settings = ["cluster=inline", "source.path=p.txt", "samples_per_row=1", "sampling.steps=1", f"sink={sink}"]
    assert latentmill("run", "txt2img", *settings) == 0
    code = f"""
import sys
from latentmill.cli import main
main(["status", "out/txt2img"])
main(["top", "out/txt2img", "--once"])
print(sorted({(HEAVY | {"PIL", "pyarrow.compute"})!r} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_worker_that_reads_prompts_or_writes_pictures_imports_no_torch():
    stages = (
        "import latentmill.stages.read, latentmill.stages.write, latentmill.sources.prompts, latentmill.sinks.parquet"
    )
    code = f"""
import sys
import pyarrow as pa
import latentmill.workers.context, latentmill.workers.worker
{stages}
pixels = pa.FixedShapeTensorArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), (4, 4, 3)), pa.array([[7] * 48], pa.list_(pa.uint8(), 48)))
field = pa.field("image", pixels.type, metadata={{b"latentmill.dtype": b"uint8"}})
rows = pa.table([pa.array([0]), pa.array(["0"]), pixels], schema=pa.schema([("row", pa.int64()), ("row_id", pa.string()), field]))
packed = latentmill.sinks.parquet.Parquet().pack(rows)
print(packed.column("image")[0].as_py()["bytes"][1:4], "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "b'PNG' False\n", done.stderr
