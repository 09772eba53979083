"""What a RayJob runs: whatever fails is tried again by KubeRay, so what no retry helps stops its own Ray job. And the image it runs in."""

import json
import os
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


@pytest.mark.parametrize("code", [0, 1, 4, 130, 137])
def test_what_a_retry_helps_ends_with_its_code(dashboard, code):
    address, stopped, _ = dashboard
    running = started(code, address)
    assert running.communicate(timeout=60) == ("made\n", f"latentmill: ended with exit code {code}\n")
    assert running.returncode == code and stopped == []


@pytest.mark.parametrize("code", [2, 3])
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
