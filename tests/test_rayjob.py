"""What a RayJob runs: whatever fails is tried again by KubeRay, so what no retry helps stops its own Ray job.

``CLUSTERS=all .venv/bin/python -m pytest tests/test_rayjob.py`` has it on a real Ray, too, in the shell line that KubeRay makes (some 40 s).
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest


@pytest.fixture
def dashboard():
    """A stand-in for Ray's job server; what it is asked to stop, and an event for it."""
    stopped, asked = [], threading.Event()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self._say({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})

        def do_POST(self):
            stopped.append(self.path)
            self._say({"stopped": True})
            asked.set()

        def _say(self, what):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(what).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", stopped, asked
    server.shutdown()
    server.server_close()


def started(code, address):
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": {"job_submission_id": "job-7"}})}
    command = ["sh", "-c", f"echo made; exit {code}"]
    return subprocess.Popen(
        [sys.executable, "-m", "latentmill.launchers.rayjob", *command],
        env={**os.environ, **job, "RAY_API_SERVER_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("code", [0, 1, 4, 137])
def test_what_a_retry_helps_ends_with_its_code(dashboard, code):
    address, stopped, _ = dashboard
    running = started(code, address)
    assert running.communicate(timeout=60) == ("made\n", f"latentmill: ended with exit code {code}\n")
    assert running.returncode == code and stopped == []


@pytest.mark.parametrize("code", [2, 3, 5])
def test_what_no_retry_helps_stops_its_job(dashboard, code):
    address, stopped, asked = dashboard
    running = started(code, address)
    assert asked.wait(60) and stopped == ["/api/jobs/job-7/stop"]
    running.terminate()  # as Ray does then
    assert running.communicate(timeout=60)[1] == f"latentmill: ended with exit code {code}\n"
    assert running.returncode == -15


def test_who_cannot_stop_it_says_so(dashboard):
    running = started(2, "http://127.0.0.1:1")
    said = running.communicate(timeout=60)[1].splitlines()
    assert said[0] == "latentmill: ended with exit code 2" and "can't be stopped" in said[-1]
    assert running.returncode == 2


KUBERAY = """\
if ! ray job status --address {address} {job} >/dev/null 2>&1 ; then
ray job submit --address {address} --no-wait --submission-id {job} -- {entrypoint} ; fi ;
ray job logs --address {address} --follow {job}"""
"""What KubeRay 1.7 has its submitter do (ray-operator/controllers/ray/common/job.go): an exit code of 0 with a Ray job that is STOPPED is the
end (rayjob_controller.go); anything else that is not SUCCEEDED gets a new cluster."""


def free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


@pytest.fixture
def head(tmp_path_factory, monkeypatch):
    """The address of the job server of a Ray of one node, with a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")
    port, dashboard, agent = free_ports(3)
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1", *ports]
    running = subprocess.Popen([*ray, "--temp-dir=/tmp/rayjob"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{dashboard}"
    running.terminate()
    running.wait(30)


@pytest.mark.skipif(os.environ.get("CLUSTERS") != "all", reason="starts Ray: CLUSTERS=all")
def test_on_a_real_ray(head, monkeypatch):
    python = f"{shlex.quote(sys.executable)} -m ray.scripts.scripts"
    with open("/dev/null") as nothing:
        for number, (command, status) in enumerate(
            [
                ("true", "SUCCEEDED"),
                ("sh -c 'exit 1'", "FAILED"),
                ("sh -c 'echo \"it'\\''s  \\$HOME\"; exit 2'", "STOPPED"),
                ("sh -c 'exit 3'", "STOPPED"),
            ]
        ):
            entrypoint = f"{shlex.quote(sys.executable)} -m latentmill.launchers.rayjob {command}"
            line = KUBERAY.format(address=head, job=f"job-{number}", entrypoint=entrypoint).replace(
                "ray job", f"{python} job"
            )
            wait = f"until {python} job list --address {head} >/dev/null 2>&1; do sleep 1; done; "
            ran = subprocess.run(
                ["bash", "-ce", "--", wait + line], stdin=nothing, capture_output=True, text=True, timeout=240
            )
            assert ran.returncode == 0, ran.stderr
            from ray.job_submission import JobSubmissionClient

            info = JobSubmissionClient(head).get_job_info(f"job-{number}")
            assert info.status == status, ran.stdout
            if number == 2:
                assert "it's  $HOME\n" in ran.stdout and "latentmill: ended with exit code 2" in ran.stdout
