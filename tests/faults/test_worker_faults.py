"""A worker or a node that is lost, at every place: the run goes on by itself, and its dataset is the same, byte for byte."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests import ray_forks
from tests.faults.table import WORKERS, told, whole

import latentmill
from latentmill.workers.cluster import connect

COMPUTING, COMMITTING = ("encode", "denoise", "decode"), ("writing", "data synced", "published")
TRIPS = [("worker SIGKILL", COMPUTING + COMMITTING), ("worker hangs", COMPUTING + COMMITTING)]
TRIPS += (
    [("node removed", COMPUTING), ("node removed", COMMITTING)]
    if os.environ.get("FAULTS") == "all"
    else [("node removed", ("denoise", "data synced"))]
)


@pytest.mark.parametrize(("fault", "places"), TRIPS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_fault_of_a_worker_or_node(fault, places, job, folder, monkeypatch):
    """On a real Ray cluster of two nodes, at each of the places in one run; the run goes on by itself."""
    settings, alone = job
    monkeypatch.setenv("LATENTMILL_FAILPOINT", f"{','.join(places)}:{WORKERS[fault]}:{folder}")
    cluster = ray_forks.Cluster(num_cpus=0)
    nodes, seen = [cluster.add_node(num_cpus=2)], []
    patience = ["stages.write.retries=5", *(f"stages.{name}.timeout=2" for name in (*COMPUTING, "write"))]
    place = ["cluster=ray", f"cluster.address={cluster.address}", f"output={folder / 'output'}"]
    try:
        connect(cluster.address)
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(latentmill.run, "txt2img", [*settings, *patience, *place])
            while fault == "node removed" and not running.done():
                if reached := [place for place in places if (folder / place).exists() and place not in seen]:
                    seen += reached
                    cluster.remove_node(nodes.pop(), allow_graceful=False)
                    nodes.append(cluster.add_node(num_cpus=2))
                time.sleep(0.05)
            result = running.result()
    finally:
        cluster.shutdown()
    for place in places:
        assert (folder / place).exists(), f"{place} was never reached"
    assert (result.ok, result.failed) == (6, 0)
    whole(folder / "output", alone)
    for place in places:
        told(fault, place, "goes on")
