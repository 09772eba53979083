"""Ray's own autoscaler, with nodes that are processes here, sees what a job waits for and what more it could use. By hand:

FAULTS=all .venv/bin/python -m pytest tests/outside/test_autoscaler.py
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile

import psutil
import pytest
import ray
from tests.outside.test_wait_and_grow import ROOM, job, running, shards, until

import latentmill as door
from latentmill.workers.cluster import connect, disconnect

HEAD = 6379
"""The port of the head: where the nodes of Ray's fake provider look for it."""
CONFIG = {
    "cluster_name": "fake",
    "max_workers": 5,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": ROOM}, "node_config": {}, "min_workers": 0, "max_workers": 5},
    },
    "head_node_type": "head",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 1,
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
    **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
    **{"cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": []},
}

pytestmark = pytest.mark.skipif(os.environ.get("FAULTS") != "all", reason="takes minutes: FAULTS=all")
assert job  # a fixture


@pytest.fixture
def autoscaled(job, tmp_path, monkeypatch):
    """The address of a cluster of a head without room, whose autoscaler starts nodes."""
    with socket.socket() as asks:
        if asks.connect_ex(("127.0.0.1", HEAD)) == 0:
            pytest.skip(f"another Ray has port {HEAD}")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "nodes.json").write_text(json.dumps(CONFIG))
    folder = tempfile.mkdtemp(dir="/tmp")
    start = f"start --head --port {HEAD} --num-cpus 0 --include-dashboard false --temp-dir {folder} --block"
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *start.split()]
    environment = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    head = subprocess.Popen(
        [*command, f"--autoscaling-config={tmp_path / 'nodes.json'}"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while "ray stop" not in head.stdout.readline():
            assert head.poll() is None
        address = f"{ray.util.get_node_ip_address()}:{HEAD}"
        connect(address)
        yield address
    finally:
        disconnect()
        head.terminate()
        head.wait()
        for process in psutil.process_iter(["cmdline"]):  # the nodes are nobody's children
            if any(folder in word for word in process.info["cmdline"] or ()):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_nodes_come_for_what_a_job_waits_for_and_for_what_more_it_could_use(job, autoscaled, tmp_path, caplog):
    place = ["cluster=ray", f"cluster.address={autoscaled}", f"output={tmp_path / 'out'}", "cluster.wait=4m"]
    with running("encode", [*job, *place], tmp_path) as ended:
        until(lambda: ended.done() or len(list(tmp_path.glob("seen *"))) == 3, seconds=240)
        (tmp_path / "open").touch()
        result = ended.result(120)
    assert (result.ok, result.failed) == (12, 0) and len(list(tmp_path.glob("seen *"))) == 3
    assert any(line.getMessage().startswith("waiting up to 4 min 00 s for places: ") for line in caplog.records)
    assert all(place["state"] == "REMOVED" for place in ray.util.placement_group_table().values())
    door.run("encode", [*job, "cluster=inline", f"output={tmp_path / 'alone'}"])
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")
