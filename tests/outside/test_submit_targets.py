"""Jobs that are submitted to this machine, for real, and what would be sent to Ray's job server."""

import json
import os
import signal
import time

import pytest
from tests.outside.test_submit import printed

SMALL = ("cluster=inline", "samples_per_row=1", "sampling.steps=2")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def the_job(latentmill):
    assert latentmill("jobs", "--json") == 0, latentmill.said
    [job] = json.loads(latentmill.out)
    return job


def test_a_local_job_ends_with_its_dataset_and_its_code(latentmill, home):
    (home / "torch.py").write_text("raise SystemExit('this is not torch')\n")
    assert latentmill("submit", "txt2img", "--to", "local", "output=out", *SMALL) == 0, latentmill.said
    assert latentmill("logs", "txt2img", "--follow") == 0 and "40 of 40 rows" in latentmill.out
    job = the_job(latentmill)
    assert (job["state"], job["exit_code"], job["dataset"]["success"]) == ("ended", 0, True)
    assert job["output"] == str(home / "out")
    assert latentmill("cancel", job["id"]) == 0, "one that has ended is left alone"
    assert latentmill.out == f"{job['id']} has ended already\n"


def test_a_local_job_that_is_wrong_there_ends_with_2(latentmill, home):
    assert latentmill("submit", "txt2img", "--to", "local", "output=out", "source.path=/no/such", *SMALL) == 0
    assert latentmill("logs", "txt2img", "--follow") == 0 and "/no/such" in latentmill.out
    assert the_job(latentmill)["exit_code"] == 2


@pytest.mark.parametrize("how", ["cancel", "kill"])
def test_a_local_job_is_ended(latentmill, home, how):
    words = ("cluster=inline", "samples_per_row=500", "rows_per_shard=8")
    assert latentmill("submit", "txt2img", "--to", "local", "output=out", *words) == 0
    end = time.monotonic() + 60
    while how == "cancel" and not (home / "out" / "plan.json").exists():
        assert time.monotonic() < end, latentmill("logs", "txt2img")
        time.sleep(0.1)
    job = the_job(latentmill)
    assert (job["state"], job["exit_code"]) == ("running", None)
    if how == "cancel":
        assert latentmill("cancel", job["id"]) == 0
    else:
        os.killpg(int(job["handle"].rpartition(":")[2]), signal.SIGKILL)
    assert latentmill("logs", "txt2img", "--follow") == 0
    job = the_job(latentmill)
    assert (job["state"], job["exit_code"]) == ("ended", 130 if how == "cancel" else None)
    assert job["detail"] == ("" if how == "cancel" else "it was killed, or the machine was")


def test_what_is_sent_to_the_job_server(latentmill, home, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    words = (
        "output=s3://bucket/out",
        "target.env=[HF_TOKEN]",
        "target.grace=60",
        "target.num_cpus=0.5",
        "target.runtime_env={pip: [x]}",
    )
    assert latentmill("submit", "txt2img", "--to", "ray", "--dry-run", *words) == 0, latentmill.said
    assert "verysecret" not in latentmill.said
    request = json.loads(printed(latentmill.out)["request.json"])
    name = request.pop("submission_id")
    assert name.startswith("txt2img-")
    assert request == {
        "entrypoint": "latentmill run txt2img.yaml cluster.kind=ray cluster.address=auto",
        "entrypoint_num_cpus": 0.5,
        "metadata": {"latentmill_job": "txt2img", "latentmill_output": "s3://bucket/out"},
        "runtime_env": {"pip": ["x"], "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}},
    }


def test_a_variable_of_the_job_goes_along(latentmill, home, monkeypatch):
    """Else a default would stand for it there, and other rows be made."""
    monkeypatch.setenv("NOTE", "a moon")
    job = ("submit", "txt2img", "--dry-run", "output=/o", "sampling.prompt=${oc.env:NOTE,none}", "--to")
    for target in ("ray", "slurm"):
        assert latentmill(*job, target, "target.env=[HOME]") == 2, latentmill.said
        assert "the job needs NOTE of its environment: target.env=[NOTE] sends it along" in latentmill.err
        assert latentmill(*job, target, "target.env=[NOTE]") == 0, latentmill.said
    assert latentmill(*job, "ray", "target.runtime_env={env_vars: {NOTE: star}}") == 0, latentmill.said
    assert latentmill(*job, "slurm") == 0, "all go along"
    assert latentmill(*job, "slurm", "target.env=[HOME]", "target.setup=export NOTE=a; ls") == 0, latentmill.said
    monkeypatch.delenv("NOTE")
    assert latentmill("submit", "txt2img", "output=/o", "--to", "slurm", "target.env=[NOTE]") == 2
    assert "target.env names NOTE, which your shell does not have" in latentmill.err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["target.env=[NOT_SET_HERE]"], 2, "target.env names NOT_SET_HERE, which is not set here"),
        (["target.working_dir=/no/such"], 2, "target.working_dir=/no/such is no folder"),
        (["target.address=head:8265"], 2, "target.address must be that of a job server, as http://HEAD:8265, not 'head:8265'"),
        (["target.address=http://127.0.0.1:1"], 4, "no job server of Ray answers at target.address=http://127.0.0.1:1"),
    ],
)  # fmt: skip
def test_a_job_server_that_is_not_there(latentmill, home, words, code, says):
    assert latentmill("submit", "txt2img", "--to", "ray", "output=/o", *words) == code, latentmill.said
    assert says in latentmill.err and len(latentmill.err.splitlines()) == 1
