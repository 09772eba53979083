"""``latentmill submit JOB --to skypilot``: tasks against SkyPilot's own schema, and what sky is given."""

import json
import os
import subprocess

import pytest
from tests.outside.launch_parts import FUSED, JOBS, SECRET, SEVERAL, TOKEN, job, program, shown, wrong_in

IMAGE = "target.image=acme/latentmill:0.1.0"
ALIKE = SEVERAL.replace("L4", "H100")
pytestmark = pytest.mark.usefixtures("records")


@pytest.mark.parametrize(
    ("text", "words", "machines", "accelerators"),
    [
        # 16 GPUs for denoise, 2 x 0.25 + 4 x 0.5 for the others
        (ALIKE, ("target.gpus=8", "target.cpus=32"), 3, "H100:8"),
        (FUSED, ("target.accelerators=A100-80GB:4",), 3, "A100-80GB:4"),
        (FUSED, ("target.accelerators=A100", "target.gpus=4"), 3, "A100:4"),
        # Ray keeps a third of a machine's memory
        (JOBS["cpu"] + "stages: {denoise: {replicas: 2, memory: 10GiB}}\n", (), 1, None),
        (JOBS["cpu"] + "stages: {denoise: {replicas: 2, memory: 12GiB}}\n", (), 2, None),
        (JOBS["cpu"], ("target.nodes=4", "target.spot=true", "target.infra=aws/us-east-1"), 4, None),
        (
            JOBS["cpu"],
            (
                "target.mounts={/data: s3://bucket}",
                "export={to: [mds], folder: /data/e}",
                "target.setup=pip install latentmill",
            ),
            1,
            None,
        ),
        (SECRET, ("target.env=[ACME_TOKEN]",), 1, None),
    ],
)
def test_a_task_is_what_skypilot_takes(latentmill, text, words, machines, accelerators):
    task = shown(latentmill, job(text), "skypilot", IMAGE, *words)
    assert wrong_in(task, "skypilot") == [] and TOKEN not in latentmill.said
    assert (task["num_nodes"], task["resources"].get("accelerators")) == (machines, accelerators)
    # SkyPilot's list has no limit: an interruption is all that may stand there. Not 2 and 3; 1 and 4 have a limit of their own.
    recovery = {"max_restarts_on_errors": 0, "recover_on_exit_codes": [130]}
    assert task["resources"]["job_recovery"] == recovery
    assert set(task["secrets"].values()) == {None} and "RAY_AUTH_TOKEN" in task["secrets"]


@pytest.mark.parametrize(
    ("where", "key", "says"),
    [("resources", "accelerator", "'accelerator' was unexpected"), ("", "node_num", "'node_num' was unexpected")],
)
def test_the_schema_sees_what_is_wrong(latentmill, where, key, says):
    task = shown(latentmill, job(JOBS["cpu"]), "skypilot", IMAGE)
    (task[where] if where else task)[key] = 1
    [found] = wrong_in(task, "skypilot")
    assert says in found


def test_what_the_first_machine_does(latentmill, tmp_path, monkeypatch):
    task = shown(latentmill, job(JOBS["cpu"], "a $b c"), "skypilot", IMAGE, "target.retries=2", "--grow")
    monkeypatch.setenv("HOME", str(tmp_path))
    ray = program(tmp_path, monkeypatch, "ray", [["start", 0, ""]])
    program(tmp_path, monkeypatch, "sleep", [["", 0, ""]])
    around = {**os.environ, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "2"}  # fmt: skip
    for code, runs in [(0, 1), (1, 3), (2, 1), (3, 1), (4, 3), (5, 1), (130, 1)]:
        (tmp_path / "latentmill.calls").unlink(missing_ok=True)
        calls = program(tmp_path, monkeypatch, "latentmill", [["run", code, "x"]])
        ran = subprocess.run(
            ["bash", "-c", task["run"]], env={**around, "PATH": os.environ["PATH"]}, capture_output=True
        )
        assert (ran.returncode, len(calls())) == (code, runs)
    [call] = calls()
    assert call["words"] == [
        "run",
        "--grow",
        "a $b c.yaml",
        "cluster.wait=10m",
        "cluster.kind=ray",
        "cluster.address=10.0.0.1:6379",
    ]
    assert call["files"][0].startswith("defaults: [job, _self_]\n")
    started = ray()[0]
    # SkyPilot's own Ray has the usual port of the agent
    assert {"--head", "--port=6379", "--dashboard-agent-listen-port=52366"} <= set(started["words"])


def test_another_machine_joins_the_first(latentmill, tmp_path, monkeypatch):
    task = shown(latentmill, job(ALIKE), "skypilot", IMAGE)
    ray = program(tmp_path, monkeypatch, "ray", [["start", 0, ""]])
    slept = program(tmp_path, monkeypatch, "sleep", [["", 0, ""]])
    calls = program(tmp_path, monkeypatch, "latentmill", [["", 0, ""]])
    around = {**os.environ, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}  # fmt: skip
    assert subprocess.run(["bash", "-c", task["run"]], env=around, capture_output=True, cwd=tmp_path).returncode == 0
    assert {"--address=10.0.0.1:6379", "--num-gpus=8"} <= set(ray()[0]["words"]) and calls() == []
    assert len(ray()) == 1 and slept()[0]["words"] == ["5"], (
        "Ray is apart before SkyPilot ends what is left of the script"
    )


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        (SEVERAL, (IMAGE,), "the job asks for H100 and L4, and SkyPilot's machines of a job are alike"),
        (FUSED, (IMAGE,), "the job asks for GPUs, and not of what type: target.accelerators=H100:8"),
        (SECRET, (IMAGE,), "the job needs ACME_TOKEN of its environment: target.env=[ACME_TOKEN] sends it along"),
        (JOBS["cpu"], (IMAGE, "output=/shared/out"), "output=/shared/out would be lost with its machine: give a URL"),
        (
            JOBS["cpu"],
            (IMAGE, "export={to: [mds], folder: /e/f}"),
            "export.folder=/e/f would be lost with its machine: give a URL",
        ),
        (JOBS["cpu"], (IMAGE, "output=file:///out"), "file:///out is no place for a dataset"),
        (JOBS["cpu"], (IMAGE, "target.retries=-1"), "target.retries=-1: 0 or more are expected"),
        (FUSED, (IMAGE, "target.accelerators=A100:half"), "target.accelerators=A100:half: TYPE:NUMBER is expected"),
        (JOBS["cpu"], (), "target.image or target.setup must be given"),
        (JOBS["cpu"], (IMAGE, "cluster=inline"), "the job says cluster=inline"),
    ],
)
def test_what_cannot_be_is_a_line(latentmill, text, words, says):
    assert latentmill("submit", job(text), "--to", "skypilot", "--dry-run", *words) == 2, latentmill.said
    assert says in latentmill.err and len(latentmill.err.splitlines()) == 1


def test_what_is_submitted_and_what_becomes_of_it(latentmill, tmp_path, monkeypatch, records):
    calls = program(tmp_path, monkeypatch, "sky", [["jobs", 0, ""]], ["ACME_TOKEN", "RAY_AUTH_TOKEN"])
    words = ("--to", "skypilot", IMAGE, "target.env=[ACME_TOKEN]")
    assert latentmill("submit", job(SECRET), *words) == 0, latentmill.said
    [call] = calls()
    [file] = records.glob("*/task.yaml")
    name = file.parent.name
    given = ["--secret", "ACME_TOKEN", "--secret", "RAY_AUTH_TOKEN"]
    assert call["words"] == ["jobs", "launch", "--yes", "--detach-run", *given, str(file)]
    assert call["variables"]["ACME_TOKEN"] == TOKEN and len(call["variables"]["RAY_AUTH_TOKEN"]) == 64
    kept = [path.read_text() for path in records.rglob("*") if path.is_file()]
    assert not any(secret in text for secret in call["variables"].values() for text in [*kept, latentmill.said])

    for record, expected in [
        ({"status": "PENDING"}, ("queued", None, "pending")),
        ({"status": "RUNNING"}, ("running", None, "running")),
        ({"status": "RECOVERING", "recovery_count": 2}, ("queued", None, "recovered 2 times")),
        ({"status": "SUCCEEDED"}, ("ended", 0, "")),
        ({"status": "FAILED", "failure_reason": "Job exited with exit code 2"}, ("ended", 2, "Job exited with exit code 2")),
        ({"status": "FAILED", "failure_reason": "exit codes [3, 0]."}, ("ended", 3, "exit codes [3, 0].")),
        ({"status": "CANCELLED"}, ("ended", None, "cancelled")),
        (None, ("unknown", None, "sky knows no job of that name")),
    ]:  # fmt: skip
        queue = [{"job_name": "other", "status": "FAILED"}, *([{"job_name": name, **record}] if record else [])]
        said = ["jobs queue", 0, f"[2026-11-26] fetching\n[note] it lasts\n{json.dumps(queue, indent=1)}\n[3 jobs]\n"]
        calls = program(tmp_path, monkeypatch, "sky", [said, ["jobs logs", 0, "so far\n"], ["jobs cancel", 0, ""]])
        assert latentmill("jobs", "--json") == 0
        [found] = json.loads(latentmill.out)
        assert (found["state"], found["exit_code"], found["detail"]) == expected
        assert latentmill("cancel", "my-job") == 0, latentmill.said
        assert (calls()[-1]["words"] == ["jobs", "cancel", "--yes", "--name", name]) == (expected[0] in ("queued", "running"))  # fmt: skip
    assert latentmill("logs", "my-job") == 0 and latentmill.out == "so far\n"


def test_a_job_whose_name_begins_as_an_option_and_that_waits_by_itself(latentmill):
    task = shown(latentmill, f"./{job(JOBS['cpu'], '-x')}", "skypilot", IMAGE, "cluster=ray", "cluster.wait=1h")
    assert "latentmill run ./-x.yaml cluster.kind=ray cluster.address=" in task["run"]


def test_without_sky_its_log_is_a_line_too(latentmill, tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, "sky", [["jobs", 0, ""]])
    assert latentmill("submit", job(JOBS["cpu"]), "--to", "skypilot", IMAGE) == 0
    (tmp_path / "bin" / "sky").unlink()
    assert latentmill("logs", "my-job") == 2 and "sky is not installed here" in latentmill.err
