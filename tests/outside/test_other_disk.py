"""The output's path is another disk on the workers' node: nothing is written there, and nobody says that all is done."""

import os
import subprocess

import pytest
from PIL import Image
from tests import ray_forks

JOB = """
defaults: [job, vae: patches, source: images, sink: parquet, _self_]
flow: [read, encode, write]
vae: {side: 1}
rows_per_shard: 2
stages: {write: {resources: {other: 1}}}
cluster: {kind: ray}
"""


@pytest.fixture
def cluster(tmp_path):
    """A cluster of two nodes; in the place of the folder ``disk`` the second has a disk of its own."""
    (tmp_path / "disk").mkdir()
    there = ray_forks.Cluster(num_cpus=2)
    try:
        there.add_node(f"mount -t tmpfs none {tmp_path / 'disk'}", num_cpus=2, resources={"other": 4})
        yield there.address
    finally:
        there.shutdown()


def can_mount():
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0 or not can_mount(), reason="mounts a disk")
def test_writers_that_see_another_disk_write_nothing(latentmill, cluster, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(8):
        Image.new("RGB", (4, 4), (30 * number, 0, 0)).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "job.of.mine.yaml").write_text(JOB)
    out = tmp_path / "disk" / "out"
    job = (tmp_path / "job.of.mine.yaml", f"cluster.address={cluster}", f"source.path={tmp_path / 'in'}")
    assert latentmill("run", *job, f"output={out}") == 1
    assert f"doesn't see the plan.json that the driver wrote in {out}: the output must be one folder" in latentmill.err
    assert "stage write can't start: RuntimeError: node " in latentmill.err
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == ["plan.json"]
    assert not list(out.rglob("*.parquet"))
    assert latentmill("run", *job, f"output={tmp_path / 'everywhere'}") == 0
    assert latentmill("verify", tmp_path / "everywhere") == 0
