"""Jobs that KubeRay has: what kubectl is given, what is told of them, their log, their end."""

import json

import pytest
from tests.outside.launch_parts import JOBS, SECRET, TOKEN, job, program

IMAGE = "target.image=acme/latentmill:0.1.0"
pytestmark = pytest.mark.usefixtures("records")


MADE = json.dumps({"metadata": {"namespace": "team", "name": "my-job-1", "uid": "1234"}})
CONTEXT = ["config current-context", 0, "arn:aws:eks:eu:1:cluster/a\n"]


def status(**values):
    return ["get rayjob", 0, json.dumps({"status": values})]


def submitted(latentmill, tmp_path, monkeypatch, *answers):
    """A job that was submitted; what kubectl was given until now."""
    answers = [CONTEXT, ["create", 0, MADE], *answers]
    calls = program(tmp_path, monkeypatch, "kubectl", answers, ["ACME_TOKEN"])
    assert latentmill("submit", job(SECRET), "--to", "kuberay", IMAGE, "target.env=[ACME_TOKEN]") == 0, latentmill.said
    return calls


AT = ["--context", "arn:aws:eks:eu:1:cluster/a", "--namespace", "team"]


def test_what_is_submitted_and_the_secret_that_goes_along(latentmill, tmp_path, monkeypatch, records):
    calls = submitted(latentmill, tmp_path, monkeypatch)
    [_, created, secret] = calls()
    assert created["words"][:2] == AT[:2] and created["words"][2:4] == ["create", "-f"]
    assert created["files"] == [next(records.glob("*/rayjob.yaml")).read_text()]
    sent = json.loads(secret["stdin"])
    assert secret["words"] == [*AT, "create", "-f", "-"] and sent["stringData"] == {"ACME_TOKEN": TOKEN}
    assert sent["metadata"]["ownerReferences"] == [
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": "my-job-1", "uid": "1234"}
    ]
    assert f"secretRef: {{name: {sent['metadata']['name']}}}" in created["files"][0], "the pods take it"
    kept = [file.read_text() for file in records.rglob("*") if file.is_file()]
    assert kept and not any(
        TOKEN in text for text in [*kept, latentmill.said, *(str(call["words"]) for call in calls())]
    )


def test_how_it_is(latentmill, tmp_path, monkeypatch):
    submitted(latentmill, tmp_path, monkeypatch)
    for word, more, log, expected in [
        ("", {}, "", ("queued", None, "")),
        ("Initializing", {}, "", ("queued", None, "its cluster starts")),
        ("Running", {"jobStatus": "RUNNING"}, "", ("running", None, "")),
        ("Running", {"failed": 1}, "", ("running", None, "retry 1 of 3")),
        ("Retrying", {"failed": 1}, "", ("queued", None, "it failed, and gets a new cluster")),
        ("Complete", {"jobStatus": "SUCCEEDED"}, "", ("ended", 0, "")),
        ("Complete", {"jobStatus": "STOPPED"}, "no\nlatentmill: ended with exit code 2\n", ("ended", 2, "stopped")),
        ("Complete", {"jobStatus": "STOPPED"}, "it was killed\n", ("ended", None, "stopped")),
        ("Failed", {"message": "it\nfailed"}, "latentmill: ended with exit code 1\n", ("ended", 1, "it")),
        ("ValidationFailed", {"message": "bad"}, "", ("ended", None, "bad")),
    ]:
        pods = ["get pods -l job-name=my-job-1 ", 0, "pod/a\npod/b\n"]
        answers = [status(jobDeploymentStatus=word, **more), pods, ["logs pod/b --tail", 0, log]]
        program(tmp_path, monkeypatch, "kubectl", answers)
        assert latentmill("jobs", "--json") == 0, latentmill.said
        [found] = json.loads(latentmill.out)
        assert (found["state"], found["exit_code"], found["detail"]) == expected


def test_one_that_is_gone_and_one_that_cannot_be_asked(latentmill, tmp_path, monkeypatch):
    gone = 'Error from server (NotFound): rayjobs.ray.io "my-job-1" not found\n'
    submitted(latentmill, tmp_path, monkeypatch, ["get rayjob", 1, gone])
    assert latentmill("jobs", "--json") == 0 and json.loads(latentmill.out)[0]["detail"] == f"kubectl: {gone.strip()}"
    assert latentmill("cancel", "my-job") == 2
    program(tmp_path, monkeypatch, "kubectl", [["get rayjob", 1, "Unable to connect to the server\n"]])
    assert latentmill("cancel", "my-job") == 4 and "Unable to connect" in latentmill.err


def test_without_its_secret_nothing_is_left(latentmill, tmp_path, monkeypatch, records):
    answers = [
        CONTEXT,
        ["create -f -$", 1, "Error from server (Forbidden): secrets\n"],
        ["create", 0, MADE],
        ["delete", 0, ""],
    ]
    calls = program(tmp_path, monkeypatch, "kubectl", answers)
    assert latentmill("submit", job(SECRET), "--to", "kuberay", IMAGE, "target.env=[ACME_TOKEN]") == 2
    assert calls()[-1]["words"] == [*AT, "delete", "rayjob", "my-job-1", "--wait=false", "--ignore-not-found"] and not [
        *records.iterdir()
    ]


NOON = "2026-11-26T12:00:0"


def test_its_log_goes_on_where_a_stream_was_cut(latentmill, tmp_path, monkeypatch):
    submitted(latentmill, tmp_path, monkeypatch)
    answers = [
        status(jobDeploymentStatus="Running"),
        ["get pods", 0, "pod/a\npod/b\npod/c\n"],
        ["logs pod/a --follow", 0, f"{NOON}1.5Z once\n{NOON}1.5Z \udcff\n"],
        ["logs pod/b --follow", 1, "Error: it is waiting to start\n"],
        ["logs pod/c --follow", 0, f"{NOON}2.0Z and again\n"],
    ]
    program(tmp_path, monkeypatch, "kubectl", answers)
    again = [
        status(jobDeploymentStatus="Failed", message="it ended"),
        ["get pods", 0, "pod/a\n"],
        [f"logs pod/a --follow --timestamps --since-time={NOON}1.5Z$", 0, f"{NOON}1.0Z x\n{NOON}1.5Z once\n{NOON}1.6Z more\n"],
    ]  # fmt: skip
    monkeypatch.setattr("latentmill.launchers.kuberay.LOOK_AGAIN", 0)
    (tmp_path / "kubectl.then").write_text(json.dumps(["logs pod/c", again]))
    assert latentmill("logs", "my-job", "--follow") == 0, latentmill.said
    assert latentmill.out == "once\n\ufffd\nand again\nmore\n"


def test_one_that_runs_is_stopped_by_ray_and_one_that_has_ended_is_left_alone(latentmill, tmp_path, monkeypatch):
    submitted(latentmill, tmp_path, monkeypatch)
    answers = [
        status(jobDeploymentStatus="Running", rayClusterName="c-1", jobId="j-1"),
        ["get pods -l ray.io/cluster=c-1,ray.io/node-type=head ", 0, "pod/head\n"],
        ["exec pod/head", 0, ""],
    ]
    calls = program(tmp_path, monkeypatch, "kubectl", answers)
    assert latentmill("cancel", "my-job") == 0, latentmill.said
    stop = ["ray", "job", "stop", "--no-wait", "--address", "http://127.0.0.1:8265", "j-1"]
    assert calls()[-1]["words"] == [*AT, "exec", "pod/head", "-c", "ray-head", "--", *stop]
    program(tmp_path, monkeypatch, "kubectl", [status(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")])
    assert latentmill("cancel", "my-job") == 0 and calls()[-1]["words"][4:6] == ["get", "rayjob"]


def test_one_that_does_not_run_yet_is_deleted_since_a_queue_would_let_it_go_on(latentmill, tmp_path, monkeypatch):
    calls = submitted(latentmill, tmp_path, monkeypatch, status(jobDeploymentStatus="Suspended"), ["delete", 0, ""])
    assert latentmill("cancel", "my-job") == 0, latentmill.said
    assert calls()[-1]["words"] == [*AT, "delete", "rayjob", "my-job-1", "--wait=false", "--ignore-not-found"]
    program(tmp_path, monkeypatch, "kubectl", [["get rayjob", 1, 'Error from server (NotFound): rayjobs "my-job-1"\n']])
    assert latentmill("jobs", "--json") == 0
    [found] = json.loads(latentmill.out)
    assert (found["state"], found["detail"]) == ("ended", "cancelled")
    assert latentmill("cancel", "my-job") == 0, "it has ended"


def test_who_breaks_off_leaves_no_rayjob_that_waits_for_its_secret(latentmill, tmp_path, monkeypatch):
    answers = [CONTEXT, ["create -f -$", "interrupt", ""], ["create", 0, MADE], ["delete", 1, "it is gone\n"]]
    calls = program(tmp_path, monkeypatch, "kubectl", answers)
    assert latentmill("submit", job(SECRET), "--to", "kuberay", IMAGE, "target.env=[ACME_TOKEN]") == 130, (
        latentmill.said
    )
    assert calls()[-1]["words"][4:7] == ["delete", "rayjob", "my-job-1"]
    program(tmp_path, monkeypatch, "kubectl", [["get rayjob", 1, 'Error from server (NotFound): rayjobs "my-job-1"\n']])
    assert latentmill("jobs", "--json") == 0
    assert [found["state"] for found in json.loads(latentmill.out)] == ["unknown"], (
        "it is remembered: it may have been sent"
    )


@pytest.mark.parametrize(
    ("said", "code"),
    [("error: unknown field \"spec.more\"\n", 2), ("Unable to connect to the server: timeout\n", 4)],
)  # fmt: skip
def test_a_refusal_is_final_and_silence_is_not(latentmill, tmp_path, monkeypatch, records, said, code):
    program(tmp_path, monkeypatch, "kubectl", [CONTEXT, ["create", 1, said]])
    assert latentmill("submit", job(JOBS["cpu"]), "--to", "kuberay", IMAGE) == code
    assert said.strip() in latentmill.err and len([*records.glob("*.json")]) == (code == 4), "it may have come"
