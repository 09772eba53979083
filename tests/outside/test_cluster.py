"""Joining and starting Ray clusters: what is wrong is one line with the right exit code, and our token is ours alone."""

import gc
import http.server
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import ray
from tests import ray_forks
from tests.outside.store_parts import upload

from latentmill.workers.cluster import disconnect

TOKEN = "0123456789abcdef0123456789abcdef"
COMMAND = Path(sys.executable).with_name("latentmill")


@pytest.fixture
def job(pictures, tmp_path):
    encode = ("encode", "vae.name=patches", "vae.side=1", f"source.path={pictures}", f"output={tmp_path / 'out'}")
    return (*encode, *(f"stages.{name}.num_cpus=0.1" for name in ("read", "encode", "write")))


@pytest.fixture
def alone(monkeypatch):
    """No Ray, and nothing that the environment says of one."""
    disconnect()
    for name in [name for name in os.environ if name.startswith(("RAY_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # put back by monkeypatch, whatever the run makes of it
    yield monkeypatch
    disconnect()


@pytest.fixture(scope="module")
def head():
    """The address of a cluster that asks for no token, and knows of no object store."""
    disconnect()
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith(("RAY_", "AWS_"))]:
            environment.delenv(name)
        environment.setenv("RAY_AUTH_MODE", "disabled")
        there = ray_forks.Cluster(num_cpus=2)
    yield there.address
    there.shutdown()


def test_a_token_of_this_user_keeps_nobody_from_a_cluster_without_one(latentmill, job, head, alone, tmp_path):
    alone.delenv("RAY_AUTH_MODE")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    alone.setenv("HOME", str(tmp_path))
    alone.setenv("RAY_ADDRESS", head)  # which auto means
    for address in ("auto", head):
        output = f"output={tmp_path / address}"
        assert latentmill("run", *job, output, "cluster=ray", f"cluster.address={address}") == 0, latentmill.err
        disconnect()


def test_a_ray_that_does_not_come_up_in_time_is_a_reason_to_try_later(latentmill, job, alone):
    def times_out(**_):
        raise Exception("The current node timed out during startup.")  # what Ray raises

    alone.setattr(ray, "init", times_out)
    assert latentmill("run", *job, "cluster=local") == 4
    assert "latentmill: Ray did not start here in time: The current node timed out during startup." in latentmill.err


def test_nobody_collects_garbage_while_ray_is_left(monkeypatch):
    """It may have references of Ray in it: Ray ends the process of whoever lets go of one meanwhile."""
    collects = []
    monkeypatch.setattr(ray, "shutdown", lambda: collects.append(gc.isenabled()))
    disconnect()
    assert collects == [False] and gc.isenabled()


def test_the_keys_of_an_object_store_reach_the_nodes(latentmill, job, head, alone, pictures, bucket):
    """The cluster was started before they were set. Rows come from the store, and go there."""
    upload(os.environ["AWS_ENDPOINT_URL"], pictures, "in")
    given = [*job, f"source.path={bucket}/in", "cluster=ray", f"cluster.address={head}"]
    assert latentmill("run", *given, f"output={bucket}/out") == 0, latentmill.err
    assert latentmill("verify", f"{bucket}/out") == 0


def test_a_cluster_that_asks_for_a_token(latentmill, job, alone):
    port = free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    folder = tempfile.mkdtemp(dir="/tmp")  # a session of its own, beside the other cluster's
    start = f"start --head --port {port} --num-cpus 0 --include-dashboard false --node-ip-address 127.0.0.1".split()
    start += ["--temp-dir", folder]
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
    node = subprocess.Popen([*command, *start, "--block"], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        while "ray stop" not in node.stdout.readline():
            assert node.poll() is None
        alone.setenv("HOME", "/nonexistent")
        address = ("cluster=ray", f"cluster.address=127.0.0.1:{port}")
        assert latentmill("run", *job, *address) == 2
        assert latentmill.err.strip() == (
            f"latentmill: the Ray cluster at cluster.address=127.0.0.1:{port} asks for a token: set RAY_AUTH_TOKEN, or "
            "RAY_AUTH_TOKEN_PATH to the file that has it"
        )
        alone.setenv("RAY_AUTH_TOKEN", "f" * 32)
        assert latentmill("run", *job, *address) == 2 and "refuses this token" in latentmill.err
    finally:
        node.terminate()
        node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_port_that_is_not_ray_s(latentmill, job, alone):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        assert latentmill("run", *job, "cluster=ray", f"cluster.address={address}") == 2
        server.shutdown()
    assert (
        f"what answers at cluster.address={address} is not a Ray cluster" in latentmill.err and "8265" in latentmill.err
    )


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        ("127.0.0.1:1", 4, "nobody answers at cluster.address=127.0.0.1:1: "),
        ("head", 2, "cluster.address must be auto or HOST:PORT, not 'head'"),
        ("auto", 4, "nobody answers at cluster.address="),
    ],
)
def test_no_cluster(address, code, said, latentmill, job, alone):
    alone.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert latentmill("run", *job, "cluster=ray", f"cluster.address={address}") == code
    assert said in latentmill.err and latentmill.err.count("\n") == 1


def test_a_cluster_of_our_own_where_little_is_set(job, tmp_path):
    """No HOME, a TMPDIR too long for sockets, and a torch.py where the command is run, which nobody must import."""
    long = tmp_path / ("long" * 25)
    long.mkdir()
    (tmp_path / "torch.py").write_text("open('imported', 'w').close()\nraise SystemExit('the wrong torch')\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    environment |= {"TMPDIR": str(long), "OMP_NUM_THREADS": "1"}
    environment.pop("HOME", None)
    token = Path(pwd.getpwuid(os.getuid()).pw_dir, ".ray", "auth_token")
    before = token.stat().st_mtime_ns if token.exists() else None
    run = subprocess.run([COMMAND, "run", *job], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "imported").exists()
    assert (token.stat().st_mtime_ns if token.exists() else None) == before


@pytest.mark.parametrize(
    "output", ["s3:/bucket/x", "S3://bucket/x", "s3:///x", "gcs://bucket/x", "s3://bucket://x", "ftp://h/x"]
)
def test_what_is_no_address_of_a_store_is_the_job_s_fault(output, latentmill, job, tmp_path):
    assert latentmill("run", *job[:-4], "cluster=inline", f"output={output}") == 2
    assert f"{output} is no place for a dataset: a folder is, or s3://BUCKET/PREFIX" in latentmill.err


def test_missing_credentials_are_named(latentmill, job, alone):
    assert latentmill("run", *job[:-4], "cluster=inline", "output=s3://bucket/x") == 3
    assert "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in latentmill.err
    assert "169.254" not in latentmill.err
