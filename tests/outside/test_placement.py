"""Which stages share a process: ``placement``."""

import os

import pyarrow.parquet as pq
import pytest
from tests import ray_forks

PLUGIN = '''
import os
import pyarrow as pa
from latentmill.plugin import Stage

class Process(Stage):
    """The number of the process that a row was in, as a column."""
    contract = 2

    def __init__(self, column: str):
        self.adds = {column: pa.int64()}
        self.column = column

    def __call__(self, batch, reject):
        return batch.append_column(self.column, pa.array([os.getpid()] * len(batch), pa.int64()))
'''


@pytest.fixture
def cluster(install, tmp_path, monkeypatch):
    """Settings of a job on a cluster that has the plugin."""
    install("acme", "[latentmill.stages]\nprocess = acme:Process\n", acme=PLUGIN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
    there = ray_forks.Cluster(num_cpus=2)
    yield ["cluster=ray", f"cluster.address={there.address}"]
    there.shutdown()


@pytest.mark.parametrize("placement", ["split", "auto"])
def test_stages_share_a_process_where_they_are_fused(placement, cluster, latentmill, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n" * 8)
    stages = "[read,encode,{name: process, as: first, column: a},denoise,{name: process, as: second, column: b},decode,write]"
    out = tmp_path / "out"
    words = [
        *cluster,
        "samples_per_row=1",
        "sampling.steps=1",
        "stages.first.num_cpus=0.05",
        "stages.second.num_cpus=0.05",
        "stages.denoise.num_cpus=0.5",
    ]
    source = f"source.path={tmp_path / 'prompts.txt'}"
    assert (
        latentmill("run", "txt2img", source, *words, f"flow={stages}", f"placement={placement}", f"output={out}") == 0
    )
    rows = pq.read_table(out / "data")
    assert all((a == b) is (placement == "auto") for a, b in zip(rows["a"].to_pylist(), rows["b"].to_pylist()))
    assert os.getpid() not in rows["a"].to_pylist()


@pytest.mark.parametrize(
    "words, workers",
    [
        ((), "read, encode + denoise + decode, write (they ask for the same device, and it has room for all of them)"),
        (
            ("stages=gpu",),
            "read, encode + denoise + decode, write (they ask for the same device, and it has room for all of them)",
        ),
        (
            ("stages=gpu", "stages.decode.num_gpus=0.5"),
            "read, encode + denoise, decode, write (decode shares none with denoise: together they ask for 1.2 GPUs)",
        ),
        (
            ("stages.denoise.num_gpus=1",),
            "read, encode, denoise, decode, write (denoise shares none with encode: it asks for another device; "
            "decode shares none with denoise: it asks for another device)",
        ),
        (
            ("stages.decode.replicas=3",),
            "read, encode + denoise, decode, write (decode shares none with denoise: the job gives it other replicas)",
        ),
        (("placement=fused", "stages.denoise.num_gpus=1"), "read, encode + denoise + decode, write (placement=fused)"),
        (("placement=split",), "read, encode, denoise, decode, write (placement=split)"),
        (("cluster=inline",), "read, encode + denoise + decode, write (cluster=inline has one process)"),
    ],
)
def test_plan_says_which_stages_share_a_worker_and_why(words, workers, latentmill, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    source = f"source.path={tmp_path / 'prompts.txt'}"
    assert latentmill("plan", "txt2img", source, *words, f"output={tmp_path / 'out'}") == 0
    assert f"workers  {workers}\n" in latentmill.out


def test_plan_says_how_few_and_how_many_workers(latentmill, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    source, out = f"source.path={tmp_path / 'prompts.txt'}", f"output={tmp_path / 'out'}"
    words = ["stages.denoise.replicas=8", "stages.denoise.min_replicas=2", "stages.write.replicas=4"]
    assert latentmill("plan", "txt2img", source, *words, out) == 0
    assert "replicas read 1 or more, encode 1 or more, denoise 2 to 8, decode 1 or more, write 4\n" in latentmill.out
    assert latentmill("plan", "txt2img", source, *words, out, "cluster=inline") == 0
    assert "replicas" not in latentmill.out
