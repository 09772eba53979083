"""A node that Ray drains: its workers hand over what they hold, half done or whole, and nothing is computed twice."""

import os
import time

import pytest
import ray
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.experimental import get_local_object_locations
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tests.outside.drain_parts import CODE, POINTS, Counted
from tests.outside.test_wait_and_grow import Nodes, running, until

from latentmill.workers.cluster import connect
from latentmill.workers.draining import DrainedNodes
from latentmill.workers.nodes import Nodes as NodesSeen
from latentmill.workers.nodes import draining

PREDICT = "    def predict(self, x, t, conditioning):\n"


@pytest.fixture
def counted(latentmill, install, tmp_path, monkeypatch):
    """It takes its time, so that a node can be drained amid a batch."""
    slow = f"{PREDICT}        __import__('time').sleep(0.2)\n"
    install("acme", POINTS, acme_counts=CODE.replace(PREDICT, slow))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
    return Counted(latentmill, tmp_path)


def drain(nodes, node, seconds=120):
    told = GcsClient(address=nodes.cluster.address).drain_node(
        node,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a spot instance",
        int(time.time() + seconds) * 1000,
    )
    assert told[0], told


def test_what_is_half_done_on_a_node_that_is_drained_goes_on_elsewhere(counted, tmp_path, caplog):
    """Also what waits there for the rest of its shard: the node goes as soon as nobody works on it."""
    nodes = Nodes()
    connect(nodes.cluster.address)
    try:
        first = nodes.add()
        few = [f"stages.{stage}.num_cpus=0.1" for stage in ("read", "write")]
        place = ["cluster=ray", f"cluster.address={nodes.cluster.address}", "cluster.wait=1m", "placement=split", *few]
        place += [f"stages.{stage}.num_cpus=0.3" for stage in ("encode", "denoise", "decode")]
        place += ["deterministic=true", "rows_per_shard=12", f"output={tmp_path / 'out'}"]
        place += [f"stages.{stage}.replicas=1" for stage in ("read", "encode", "denoise", "decode", "write")]
        with running("txt2img", [*counted.settings, *place], tmp_path) as ended:
            until(lambda: counted.computed()[1] > 24 * 3)
            nodes.add()
            drain(nodes, first)
            until(lambda: not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == first))
            assert not ended.done()
            assert ended.result(120).ok == 24
        assert counted.computed()[1] == 24 * 10, "rows were evaluated again"
    finally:
        nodes.cluster.shutdown()
    said = [record.getMessage() for record in caplog.records]
    assert "1 node will be taken away: 5 workers there will hand over to others" in said
    assert not [line for line in said if " is gone: " in line], "what left was not lost"
    counted.run("alone", "deterministic=true", "rows_per_shard=12")
    assert counted.files("out") == counted.files("alone")


def test_what_lies_on_such_a_node_alone_is_copied_and_no_node_is_missed_before_its_workers_are(tmp_path):
    """A block of a size that Ray keeps in a node's store; that ends all at once."""
    nodes = Nodes()
    connect(nodes.cluster.address)
    try:
        first, _ = nodes.add(), nodes.add()
        there = NodeAffinitySchedulingStrategy(first, soft=False)
        block = ray.remote(lambda: bytes(1 << 20)).options(max_retries=0, scheduling_strategy=there).remote()
        ray.wait([block], fetch_local=False)
        whole = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == first)["object_store_memory"]

        def counted():  # as long as Ray has not, a node that is drained is idle, and gone at once; and a task's CPU is not yet free again
            there = available_resources_per_node()[first]
            return there.get("object_store_memory", 0) < whole and there.get("CPU") == 2

        until(counted)
        drained, seen = DrainedNodes(lambda: [block]), NodesSeen(dict, watch=True)
        assert drained.news() == [] and draining() == set()
        drain(nodes, first)
        until(lambda: draining() == {first})
        [told] = seen.news(True, drained.nodes)
        assert [node["CPU"] for node in told.nodes if "CPU" in node] == [2, 2]
        drained.node_of[7], drained._looked, seen.looked = first, -60, -60
        assert drained.news() == [7] and drained.nodes == {first}
        [told] = seen.news(True, drained.nodes)
        assert [node["CPU"] for node in told.nodes if "CPU" in node] == [2]
        driver = ray.get_runtime_context().get_node_id()
        until(lambda: driver in get_local_object_locations([block])[block]["node_ids"], 30)
        nodes.remove(first)
        assert ray.get(block, timeout=30) == bytes(1 << 20)
    finally:
        nodes.cluster.shutdown()
