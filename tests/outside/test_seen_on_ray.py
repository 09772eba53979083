"""What is to be seen of workers on a cluster: their names, what they say, and when one is gone."""

import json
import os
import re
from pathlib import Path

import pytest
from tests import ray_forks

PLUGIN = '''
import json, logging, os, sys, warnings
import ray
from pathlib import Path
from latentmill.plugin import Stage

class Loud(Stage):
    """Prints and warns; says which names Ray knows; and its process ends once, at the first batch of its second life it doesn't."""
    contract = 2

    def __init__(self, word: str, folder: str):
        self.word, self.folder = word, Path(folder)

    def load(self, device):
        print("loading with", self.word)

    def __call__(self, batch, reject):
        if not (self.folder / "died").exists():
            actors = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
            table = ray.util.placement_group_table().values()
            places = [place["name"] for place in table if place["state"] == "CREATED"]
            (self.folder / "died").write_text(json.dumps([sorted(actors), sorted(places)]))
            print("last words", file=sys.stderr)
            os._exit(1)
        logging.getLogger("acme").warning("a message")
        warnings.warn("a warning")
        for number in range(14):
            print(f"\\rhalf\\rline {number:02d}", file=sys.stderr)
        print("unended", end="")
        return batch
'''
SECRET = "correct horse battery"


@pytest.fixture
def job(install, tmp_path, monkeypatch, pictures):
    install("acme", "[latentmill.stages]\nloud = acme:Loud\n", acme=PLUGIN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
    monkeypatch.setenv("MY_WORD", SECRET)
    there = ray_forks.Cluster(num_cpus=2)
    loud = f"{{name: loud, word: '${{oc.env:MY_WORD}}', folder: '{tmp_path}'}}"
    yield [
        *("encode", "vae.name=patches", "vae.side=1", f"source.path={pictures}"),
        *(f"stages.{name}.num_cpus=0.1" for name in ("read", "encode", "loud", "write")),
        *(f"flow=[read,encode,{loud},write]", "placement=split", "cluster=ray", f"cluster.address={there.address}"),
        *("stages.loud.replicas=1", "stages.loud.batch_size=4", "stages.write.replicas=1"),
    ]
    there.shutdown()


def test_workers_have_names_and_are_heard_and_their_end_is_told(latentmill, job, tmp_path, rows):
    out = tmp_path / "out"
    assert latentmill("run", *job, f"output={out}") == 0, latentmill.said
    assert len(rows(out)) == 4
    actors, places = json.loads((tmp_path / "died").read_text())
    [run] = {name.partition("@")[2] for name in actors}
    assert actors == [f"encode/{name}-0@{run}" for name in ("encode", "loud", "read", "write")]
    assert places == [f"encode/place of {name}-1@{run}" for name in ("encode", "loud", "read", "write")]

    told = latentmill.err.splitlines()
    gone = [line for line in told if " is gone: " in line]
    assert len(gone) == 1 and re.match(r"loud-0 on node \S+ \([\d.]+\) is gone: .+", gone[0])
    assert [line for line in told if re.fullmatch(r"loud-1 on node .+ has come in the place of loud-0", line)]
    by_first = [re.sub(r" on node \S+ \([\d.]+\)", "", line) for line in told if line.startswith("loud")]
    assert "loud-0: loading with ${oc.env:MY_WORD}" in by_first and "loud-1: loading with ${oc.env:MY_WORD}" in by_first
    assert by_first.count("loud (loud-1): acme: a message") == 1
    assert by_first.count("loud (loud-1): UserWarning: a warning") == 1
    lines = [line for line in by_first if re.match(r"loud-1: line \d\d", line)]
    assert lines == [f"loud-1: line {number:02d}" for number in range(9)], "after one of the load there is room for 9"
    assert by_first.count(f"loud-1: 5 more lines in logs/loud-1@{run}.log") == 1
    assert not [line for line in by_first if "message" in line and not line.startswith("loud (")], "each is told once"

    logs = {path.name: path.read_text() for path in (out / "logs").iterdir()}
    assert logs.keys() == {f"{name}@{run}.log" for name in ("encode-0", "loud-0", "loud-1", "read-0", "write-0")}
    said = [line[20:] for line in logs[f"loud-1@{run}.log"].splitlines()]
    assert said[0].startswith(f"loud-1 of run {run} on node ")
    assert [line for line in said if line.startswith("line ")] == [f"line {number:02d}" for number in range(14)]
    assert "a message" in said and any("UserWarning: a warning" in line for line in said)
    assert "last words" in logs[f"loud-0@{run}.log"]
    everything = latentmill.said + "".join(logs.values())
    assert SECRET not in everything
    assert latentmill("verify", out) == 0, latentmill.out
    assert Path(out, "_SUCCESS").exists()
