"""The fault table: every fault at every place. After it the same command ends in the same dataset, byte for byte.

``docs/reliability.md`` holds what happens; a run of these tests compares, and with ``WRITE_DOCS=1 FAULTS=all`` writes it. Without
``FAULTS=all`` a node is removed at two of the places only, since it takes half a minute each.
"""

import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from tests.faults.forks import PROMPTS, Forks, command, shards

import latentmill
from latentmill import storage
from latentmill.verify import verify
from latentmill.workers.cluster import connect

DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"
PLACES = {
    "planning": "the plan is published",
    "encode": "encoding",
    "denoise": "denoising",
    "decode": "decoding",
    "writing": "half of a shard is in its temporary file",
    "data synced": "the shard is synced, without its name",
    "published": "it has its name, nobody has been told",
    "finishing": "all shards are there, `_SUCCESS` is not",
}
DRIVERS = {
    "driver SIGKILL": "kill",
    "SIGTERM": "SIGTERM",
    "Ctrl-C": "SIGINT",
    "out of memory": "memory",
    "disk full": "fill",
    "permission denied": "lock",
    "storage error": "store EIO",
}
WORKERS = {"worker SIGKILL": "kill", "worker hangs": "hang", "node removed": "pause"}

outcomes = {}
"""What happened: (fault, place) -> words."""


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "output").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def job(forks, tmp_path_factory):
    """A job of 12 rows in 3 shards, and the files that it makes when nothing happens."""
    alone = tmp_path_factory.mktemp("alone")
    (alone / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = [
        f"source.path={alone / 'prompts.txt'}", "samples_per_row=2", "rows_per_shard=4", "sampling.steps=3", "deterministic=true",
        *(f"stages.{name}.batch_size=4" for name in ("read", "encode", "denoise", "decode", "write")),
    ]  # fmt: skip
    assert forks.run(command(settings, alone / "out"), alone / "log") == 0, (alone / "log").read_text()
    return settings, shards(alone / "out")


def in_words(code):
    return {0: "goes on", -9: "killed; resumed"}.get(code, f"stops with {code}; resumed")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", DRIVERS)
def test_a_fault_of_driver_or_store(fault, place, job, forks, folder):
    settings, alone = job
    output, log, obeys = folder / "output", folder / "log", fault == "permission denied"
    if fault == "disk full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", output], check=True)
    try:
        code = forks.run(
            command(settings, output), log, obeys, LATENTMILL_FAILPOINT=f"{place}:{DRIVERS[fault]}:{folder}"
        )
        said = log.read_text()
        assert (folder / place).exists(), f"never reached\n{said}"
        after = shards(output)
        assert after.items() <= alone.items(), "what has a name is whole and right"
        assert (output / "_SUCCESS").exists() == (code == 0) and (code or after == alone)
        assert code != 99 and "Traceback" not in said, said
        if code in (1, 3):
            assert said.splitlines()[-1].startswith("latentmill: "), said
        if code != -9 and fault != "permission denied":  # who may write nothing may remove nothing
            assert not list((output / ".tmp").glob("*"))
        mend(folder)
        assert forks.run(command(settings, output), log, obeys) == 0, log.read_text()
        whole(output, alone)
    finally:
        if fault == "disk full":
            subprocess.run(["umount", output], check=True)
    outcomes[fault, place] = in_words(code)


def mend(folder):
    (folder / "broken").unlink(missing_ok=True)
    (folder / "output" / "filler").unlink(missing_ok=True)
    for path in (folder / "output", *(folder / "output").rglob("*")):
        if path.is_dir():
            path.chmod(0o755)


def whole(output, alone):
    """The dataset is that of a run to which nothing happened."""
    assert shards(output) == alone and (output / "_SUCCESS").exists()
    verdict = verify(storage.at(str(output)))
    assert verdict.sound and (verdict.ok, verdict.failed) == (12, 0)


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
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes, seen = [cluster.add_node(num_cpus=2)], []
    patience = ["stages.write.retries=5", *(f"stages.{name}.timeout=4" for name in (*COMPUTING, "write"))]
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
        ray.shutdown()
        cluster.shutdown()
    for place in places:
        assert (folder / place).exists(), f"{place} was never reached"
        outcomes[fault, place] = "goes on"
    assert (result.ok, result.failed) == (12, 0)
    whole(folder / "output", alone)


def test_the_table_in_the_docs_is_what_happened():
    """Last of all: each outcome stands in the docs."""
    text = DOCS.read_text()
    if os.environ.get("WRITE_DOCS"):
        text = re.sub(
            r"(<!-- table -->\n).*(<!-- end -->)", lambda found: found[1] + table() + found[2], text, flags=re.S
        )
        DOCS.write_text(text)
    for (fault, place), words in outcomes.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {PLACES[place]} "))
        head = next(line for line in text.splitlines() if line.startswith("| at this moment "))
        column = [cell.strip() for cell in head.split("|")].index(fault)
        assert row.split("|")[column].strip() == words, f"{fault}, {place}"


def table():
    faults = [*WORKERS, *DRIVERS]
    rows = [["at this moment", *faults], ["---"] * (1 + len(faults))]
    for place, words in PLACES.items():
        rows.append([words, *(outcomes.get((fault, place), "-") for fault in faults)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
