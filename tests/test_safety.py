"""Who may enter a cluster that we start, and what a job must not bring out."""

import os
import subprocess
import sys
import traceback

import pytest

from latentmill import parts
from latentmill.cli import main
from latentmill.config import load_job
from latentmill.sources.prompts import Prompts

START = """
import os, sys
from latentmill.workers import cluster
assert cluster.connect(None)
import ray
print(
    ray.get_runtime_context().gcs_address,
    ray._private.worker._global_node.webui_url or "none",
    os.environ["RAY_AUTH_TOKEN"],
    flush=True,
)
sys.stdin.read()
cluster.disconnect()
"""
ENTER = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    print("in", len(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None)) > 0)
except AuthenticationError:
    print("refused")
"""


def test_a_cluster_that_we_start_lets_in_whoever_has_the_token_and_shows_no_dashboard(tmp_path):
    unset = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment = {**unset, "HOME": str(tmp_path)}
    driver = subprocess.Popen(
        [sys.executable, "-c", START], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        address, dashboard, token = driver.stdout.readline().split()
        assert dashboard == "none"
        assert not (tmp_path / ".ray").exists() and len(token) == 64

        def enter(**other):
            command = [sys.executable, "-c", ENTER, address]
            return subprocess.run(command, env={**environment, **other}, capture_output=True, text=True).stdout.split()

        assert enter(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) == ["in", "True"]
        assert enter(RAY_AUTH_MODE="disabled") == ["refused"]
        assert enter(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64) == ["refused"]
    finally:
        driver.communicate("")
    assert driver.returncode == 0


SECRET, FOLDER = "hunter2-and-more", "a-place-to-hide"
JOB = """
defaults: [job, model: shapes, scheduler: dpmpp_2m, source: prompts, sink: parquet, cluster: inline, _self_]
output: out
seed: 0
source: {path: "${oc.env:FOLDER}/p.txt"}
sampling: {steps: 1, guidance_scale: 1.0, strength: 1.0, width: 32, height: 32}
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOLDER", FOLDER)
    monkeypatch.setenv("SECRET", SECRET)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "p.txt").write_text("a red star\n")
    (tmp_path / "mine.yaml").write_text(JOB)
    return "mine.yaml"


def test_what_came_from_the_environment_is_in_no_file_and_no_line(job, tmp_path, capsys, caplog):
    assert main(["run", job, "--debug"]) == main(["plan", job]) == main(["run", job, "--cfg", "job"]) == 0
    said = capsys.readouterr()
    made = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"plan.json", "README.md", "report.html", "00000.parquet"} <= {path.name for path in made}
    for text in (said.out, said.err, caplog.text, *(path.read_bytes().decode("latin-1") for path in made)):
        assert FOLDER not in text
    assert "${oc.env:FOLDER}/p.txt" in (tmp_path / "out" / "plan.json").read_text()


def test_nor_is_it_in_what_a_plugin_says_when_a_run_fails(job, tmp_path, monkeypatch, capsys):
    def read(self, fragment, start, stop):
        raise RuntimeError(f"can't reach {self.path}")

    monkeypatch.setattr(Prompts, "read", read)
    assert main(["run", job]) == 1
    said = "".join(capsys.readouterr())
    errors = "".join(path.read_text() for path in (tmp_path / "out").rglob("*.jsonl"))
    assert FOLDER not in said + errors and "can't reach ${oc.env:FOLDER}/p.txt" in said + errors


@pytest.mark.parametrize(
    "override",
    [
        "source.path=[${oc.env:SECRET}]",
        "source.path=nowhere/${oc.env:SECRET}",
        "source.path=\"nowhere/${oc.env:'SECRET'}\"",
        "source.max_pixels=${oc.env:SECRET}",
        "cluster.kind=${oc.env:SECRET}",
        "seed=${oc.env:SECRET}",
        "vae.name=${oc.env:SECRET}",
        "sink.image_format=${oc.env:SECRET}",
        "scheduler.grid=${oc.env:SECRET}",
        "flow=[read,${oc.env:SECRET},write]",
        "sampling.first_noise=${oc.env:SECRET}",
    ],
)
def test_an_error_names_the_variable_and_not_its_value(job, override, capsys):
    assert main(["run", job, override]) == 2
    said = capsys.readouterr().err
    assert SECRET not in said and "${oc.env:SECRET}" in said and said.count("\n") == 1
    with pytest.raises(ValueError) as error:
        parts.parts(load_job(job, [override])).source.fragments()
    # What a source itself raises is redacted where it is told.
    assert "source.path" in override or SECRET not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("lines", "overrides"),
    [
        ("sink: {name: parquet, _target_: os.system}", []),
        ("stages: {write: {settings: {deep: [{_target_: os.system}]}}}", []),
        ("vae: {name: shapes, x: '${oc.create:{_target_: os.system}}'}", []),
        ("vae: {name: shapes, x: '${oc.decode:${oc.env:CODE}}'}", []),
        ("", ["+vae._target_=os.system"]),
        ("", ["++sink={name: parquet, a: [{_target_: os.system}]}"]),
        ("hydra: {searchpath: ['pkg://code_of_a_stranger']}", []),
        ("", ["hydra.searchpath=[pkg://code_of_a_stranger]"]),
        ("", ["+hydra.searchpath=[pkg://code_of_a_stranger]"]),
    ],
)
def test_a_job_names_nothing_to_be_run(job, lines, overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CODE", "{_target_: os.system}")
    (tmp_path / "mine.yaml").write_text(JOB + lines)
    assert main(["run", job, *overrides]) == 2
    said = capsys.readouterr().err
    assert ("_target_" in said or "hydra is refused" in said) and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_data_in_a_package_is_read_and_its_code_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "code_of_a_stranger").mkdir()
    (tmp_path / "code_of_a_stranger" / "__init__.py").write_text("raise SystemExit('run')")
    (tmp_path / "code_of_a_stranger" / "p.txt").write_text("a red star\n")
    (tmp_path / "a_module.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "code_of_a_stranger" / "below").mkdir()
    (tmp_path / "code_of_a_stranger" / "below" / "p.txt").write_text("a red star\n")
    for path in ("pkg://code_of_a_stranger/p.txt", "pkg://code_of_a_stranger.below/p.txt"):
        [fragment] = Prompts(path).fragments()
        assert fragment.rows == 1
    for path in ("pkg://a_module/p.txt", "pkg:///p.txt", "pkg://./p.txt", "pkg://no.such.thing/p.txt"):
        with pytest.raises(ValueError, match="there is no package"):
            Prompts(path).fragments()
    with pytest.raises(ValueError, match="leads out of the package"):
        Prompts("pkg://code_of_a_stranger/../a_module.py").fragments()
