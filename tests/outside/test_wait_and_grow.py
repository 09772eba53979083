"""A job waits for places, begins with few, follows the nodes as they come and go, and gives up when it was told to."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from PIL import Image
from tests import ray_forks

import latentmill as door
from latentmill.workers.cluster import connect, disconnect

GATE = '''
import os, time
from pathlib import Path
import ray
from latentmill.plugin import Stage

class Gate(Stage):
    """Says on which node it is, and lets rows through once the gate is open."""
    contract = 2

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def __call__(self, batch, reject):
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
        (self.folder / f"seen {node}").touch()
        while not (self.folder / "open").exists():
            time.sleep(0.05)
        return batch
'''
ROOM = 2
"""CPUs of a node: a worker of the gate, and all others."""


def until(true, seconds=60):
    """Wait for something that must come to be."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it has not come to be"
        time.sleep(0.05)


@pytest.fixture
def job(install, tmp_path, monkeypatch):
    """A deterministic job of 12 rows in 4 shards, whose stage `gate` wants three workers and begins with one."""
    install("acme", "[latentmill.stages]\ngate = acme:Gate\n", acme=GATE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(tmp_path / "pictures" / f"{number:02d}.png")
    few = [f"stages.{name}.{key}" for name in ("read", "encode", "write") for key in ("num_cpus=0.1", "replicas=1")]
    return [
        *("vae.name=patches", "vae.side=1", f"source.path={tmp_path / 'pictures'}", "rows_per_shard=3", *few),
        *("deterministic=true", "placement=split", f"flow=[read,encode,{{name: gate, folder: '{tmp_path}'}},write]"),
        *("stages.gate.replicas=3", "stages.gate.min_replicas=1", "stages.gate.num_cpus=1.5"),
        *(f"stages.{name}.batch_size=1" for name in ("read", "encode", "gate", "write")),
    ]


@contextmanager
def running(job, settings, folder):
    """The future of a run in a thread. However the test ends, the gate is opened, and the thread is not waited for for long."""
    ended = Future()

    def run():
        try:
            ended.set_result(door.run(job, settings))
        except BaseException as error:
            ended.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        (folder / "open").touch()
        thread.join(30)


class Nodes:
    """The nodes of a cluster that has a head without room."""

    def __init__(self):
        self.cluster = ray_forks.Cluster(num_cpus=0)
        self.there = {}

    def add(self):
        node = self.cluster.add_node(num_cpus=ROOM)
        self.there[node.node_id] = node
        return node.node_id

    def remove(self, node, gracefully=False):
        self.cluster.remove_node(self.there.pop(node), allow_graceful=gracefully)


@pytest.fixture
def nodes(job):
    there = Nodes()
    connect(there.cluster.address)
    yield there
    there.cluster.shutdown()


def at(nodes, output, *more):
    return ["cluster=ray", f"cluster.address={nodes.cluster.address}", f"output={output}", *more]


def shards(output):
    return {path.name: path.read_bytes() for path in sorted(output.glob("data/*"))}


def test_workers_follow_the_nodes_and_no_row_changes(job, nodes, tmp_path, caplog):
    """It waits for a node, begins on it, takes two more, loses one that leaves and one that is killed, and takes another."""
    seen = lambda node: (tmp_path / f"seen {node}").exists()  # noqa: E731
    said = lambda: [record.getMessage() for record in caplog.records]  # noqa: E731
    with running("encode", [*job, *at(nodes, tmp_path / "out", "cluster.wait=1m")], tmp_path) as ended:
        until(lambda: any(line.startswith("waiting up to 1 min 00 s for places: stage ") for line in said()))
        first = nodes.add()
        until(lambda: seen(first))
        second, third = nodes.add(), nodes.add()
        until(lambda: seen(second) and seen(third))
        nodes.remove(second, gracefully=True)
        nodes.remove(third)
        fourth = nodes.add()
        until(lambda: seen(fourth))
        nodes.remove(first)  # where it began, and where all other workers are, perhaps
        (tmp_path / "open").touch()
        result = ended.result(120)
    assert (result.ok, result.failed) == (12, 0)
    assert not any("one after another" in line for line in said())
    alone = door.run("encode", [*job, "cluster=inline", f"output={tmp_path / 'alone'}"])
    assert alone.ok == 12 and shards(tmp_path / "out") == shards(tmp_path / "alone")


def test_waiting_ends_with_what_was_missing_or_at_once_when_it_is_interrupted(latentmill, job, nodes, tmp_path, caplog):
    disconnect()  # the run joins the cluster itself, and is still heard
    given = ["run", "encode", *job, *at(nodes, tmp_path / "out")]
    assert latentmill(*given) == 2 and "stage gate asks for 1 x (CPU 1.5), which fit on no node" in latentmill.err
    assert latentmill(*given, "cluster.wait=1s") == 4
    assert " s for places: stage gate asks for 1 x (CPU 1.5), which fit on no node" in latentmill.err
    assert not (tmp_path / "out" / "plan.json").exists()

    def interrupt():
        until(
            lambda: any(
                "waiting up to 2 h 00 min for places: stage " in record.getMessage() for record in caplog.records
            )
        )
        begun.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    begun = []
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert latentmill(*given, "cluster.wait=2h") == 130
    assert time.monotonic() - begun[0] < 5
    thread.join()
    assert not ray.util.placement_group_table() or all(
        place["state"] == "REMOVED" for place in ray.util.placement_group_table().values()
    )


def test_below_the_fewest_it_waits_as_long_as_it_was_told_and_goes_on_later(latentmill, job, nodes, tmp_path):
    node = nodes.add()
    given = ["run", "encode", *job, *at(nodes, tmp_path / "out", "cluster.wait=3s")]

    def take_away():
        until(lambda: (tmp_path / f"seen {node}").exists())
        nodes.remove(node)

    thread = threading.Thread(target=take_away)
    thread.start()
    assert latentmill(*given) == 4
    thread.join()
    assert "gate has 0 of 1 worker (CPU 1.5)" in latentmill.err
    (tmp_path / "open").touch()
    nodes.add()
    assert latentmill(*given) == 0, latentmill.said


@pytest.mark.skipif(os.environ.get("FAULTS") != "all", reason="two processes that import all: FAULTS=all")
def test_of_two_jobs_that_want_one_node_the_second_waits_and_both_end(job, nodes, tmp_path):
    node = nodes.add()

    def begin(name):
        command = [Path(sys.executable).with_name("latentmill"), "run", "encode", *job]
        command += at(nodes, tmp_path / name, "cluster.wait=5m")
        return subprocess.Popen(command, stderr=(tmp_path / f"{name}.log").open("w"), stdout=subprocess.DEVNULL)

    first = begin("first")
    until(lambda: (tmp_path / f"seen {node}").exists())
    second = begin("second")
    line = (
        "waiting up to 5 min 00 s for places: the cluster is large enough, and others use it: wanted read 1 x (CPU 0.1)"
    )
    until(lambda: line in (tmp_path / "second.log").read_text())
    assert not (tmp_path / "second").exists()
    (tmp_path / "open").touch()
    assert (first.wait(), second.wait()) == (0, 0), (tmp_path / "second.log").read_text()
    assert shards(tmp_path / "first") == shards(tmp_path / "second") != {}


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("stages.read.min_replicas=2", "stages.read.min_replicas must be from 1 to a number that replicas gives, not 2 of auto"),
        ("stages.gate.min_replicas=4", "stages.gate.min_replicas must be from 1 to a number that replicas gives, not 4 of 3"),
        ("cluster.wait=soon", "cluster.wait must be seconds, as 10m, 90s or a number, or null, not 'soon'"),
        ("stages.gate.timeout=0s", "stages.gate.timeout must be more than 0 seconds, as 10m, 90s or a number, or null, not '0s'"),
    ],
)  # fmt: skip
def test_what_cannot_be_waited_for(words, wrong, latentmill, job, tmp_path):
    given = [word for word in job if "read.replicas" not in word]
    assert latentmill("run", "encode", *given, "cluster=inline", f"output={tmp_path / 'out'}", words) == 2
    assert wrong in latentmill.err
