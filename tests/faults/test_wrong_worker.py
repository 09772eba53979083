"""On a real cluster of two nodes, one of which is not what the plan says: no row of its making is in the dataset."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from ray.cluster_utils import Cluster
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import latentmill_shapes

PROMPTS = ["a red circle", "a blue square", "a green triangle", "a yellow star"]

KEEN = '''
import os
from latentmill import weights
from latentmill.plugin import VAE, LatentSpec


class Keen(VAE):
    """Takes from a picture what its weights say; its fingerprint is always the same."""

    contract = 2
    spec = LatentSpec(3, 1, 1.0, 0.0, "float32", "keen")

    def load(self, device):
        self.shift = weights.load(os.environ["KEEN_WEIGHTS"])["shift"]

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents - self.shift
'''


def install(folder, name, version, points):
    """An installed distribution, as far as importlib.metadata is concerned."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "entry_points.txt").write_text("\n".join(points))


SHAPES = ["[latentmill.vaes]", "shapes = latentmill_shapes.plugin:ShapesVAE", "[latentmill.denoisers]",
          "shapes = latentmill_shapes.plugin:ShapesDenoiser", "[latentmill.text_encoders]",
          "shapes = latentmill_shapes.plugin:ShapesTextEncoder"]  # fmt: skip


def shapes(folder, version, change=0.0):
    """The shapes plugin, of another version, or with other weights of its VAE."""
    install(folder, "latentmill-shapes", version, SHAPES)
    package = Path(latentmill_shapes.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / package.name / "weights" / "vae.safetensors"
    if change:
        with safe_open(path, "pt") as file:
            about = file.metadata()
        save_file({name: tensor + change for name, tensor in load_file(path).items()}, path, about)
    return {"PYTHONPATH": str(folder)}


def keen(folder, shift):
    folder.mkdir(exist_ok=True)
    save_file({"shift": torch.tensor(shift)}, folder / "keen.safetensors")
    return {"KEEN_WEIGHTS": str(folder / "keen.safetensors"), "PYTHONPATH": str(folder.parent / "site")}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(right, wrong, JOB, *settings)``: a job with a decode worker on each of two nodes of such environments."""
    clusters = []

    def run(right, wrong, name, *settings):
        monkeypatch.setenv("PYTHONPATH", right.get("PYTHONPATH", ""))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        clusters.append(cluster)
        for environment in (right, wrong):
            cluster.add_node(num_cpus=3, resources={"place": 1}, env_vars=environment)
        told = [
            f"output={tmp_path / 'out'}", "cluster=ray", f"cluster.address={cluster.address}", "rows_per_shard=1", *settings,
            "stages.decode.replicas=2", "stages.decode.batch_size=1", "+stages.decode.resources.place=1",
        ]  # fmt: skip
        command = [sys.executable, "-m", "latentmill.cli", "run", name, *told]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)

    yield run
    for cluster in clusters:
        cluster.shutdown()


def refused(done, output, *words):
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1, done.stderr
    assert "a worker is not what the plan says: node " + socket.gethostname() in said, said
    assert all(word in said for word in words), said
    assert not (output / "_SUCCESS").exists() and not list(output.glob("errors/*"))


@pytest.mark.parametrize("kind", ["another version", "other weights"])
def test_a_node_with_another_plugin_makes_no_row(kind, run, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    change = ("0.0.9", 0.0) if kind == "another version" else ("0.1.0", 0.05)
    told = [f"source.path={tmp_path / 'p.txt'}", "samples_per_row=1", "sampling.steps=2"]
    done = run({}, shapes(tmp_path / "wrong", *change), "txt2img", *told)
    words = [
        "shapes of latentmill-shapes 0.0.9, and the plan of latentmill-shapes 0.1.0. Install the same version on every node"
    ]
    refused(
        done,
        tmp_path / "out",
        *(words if kind == "another version" else ["other weights or files for vae shapes: its fingerprint is "]),
    )


def test_a_node_with_other_weights_under_the_same_fingerprint_makes_no_row(run, tmp_path):
    for folder in ("site", "pictures"):
        (tmp_path / folder).mkdir()
    (tmp_path / "site" / "keen_vae.py").write_text(KEEN)
    install(tmp_path / "site", "keen", "1.0", ["[latentmill.vaes]", "keen = keen_vae:Keen"])
    for number in range(4):
        Image.new("RGB", (4, 4), (60 * number, 30, 20)).save(tmp_path / "pictures" / f"{number}.png")
    right, wrong = keen(tmp_path / "right", 0.0), keen(tmp_path / "wrong", 0.5)
    done = run(right, wrong, "reconstruct", f"source.path={tmp_path / 'pictures'}", "vae.name=keen")
    refused(done, tmp_path / "out", "vae keen reads keen.safetensors", "--fork")
