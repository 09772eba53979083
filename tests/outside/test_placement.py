"""Which stages share a process: ``placement``."""

import os

import pyarrow.parquet as pq
import pytest

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


@pytest.mark.parametrize("placement", ["split", "fused"])
def test_stages_share_a_process_where_they_are_fused(placement, install, latentmill, tmp_path, monkeypatch):
    install("acme", "[latentmill.stages]\nprocess = acme:Process\n", acme=PLUGIN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
    (tmp_path / "prompts.txt").write_text("a red circle\n" * 8)
    stages = "[read,encode,{name: process, as: first, column: a},denoise,{name: process, as: second, column: b},decode,write]"
    out = tmp_path / "out"
    words = [
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
    assert all((a == b) is (placement == "fused") for a, b in zip(rows["a"].to_pylist(), rows["b"].to_pylist()))
    assert os.getpid() not in rows["a"].to_pylist()
