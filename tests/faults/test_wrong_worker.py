"""On a real cluster of nodes of which one is not what the plan says: no row of its making is in the dataset."""

import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import ray_forks

import latentmill_shapes
from latentmill.cli import main

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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a head that is what its driver is, and of a node for each case that isn't: decode has a place on both."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "site").mkdir()
    (folder / "site" / "keen_vae.py").write_text(KEEN)
    install(folder / "site", "keen", "1.0", ["[latentmill.vaes]", "keen = keen_vae:Keen"])
    cases = {
        "another version": shapes(folder / "old", "0.0.9"),
        "other weights": shapes(folder / "changed", "0.1.0", 0.05),
        "other weights under the same fingerprint": keen(folder / "wrong", 0.5),
    }
    with pytest.MonkeyPatch.context() as here:
        for name, value in keen(folder / "right", 0.0).items():
            here.setenv(name, value)
        here.syspath_prepend(folder / "site")
        there = ray_forks.Cluster(num_cpus=3, resources=dict.fromkeys(cases, 1))
        try:
            for case, environment in cases.items():
                there.add_node(num_cpus=0, resources={case: 1}, env_vars=environment)
            yield there.address
        finally:
            there.shutdown()


@pytest.fixture
def refused(cluster, tmp_path, capsys):
    """``refused(CASE, words, JOB, *settings)``: a job with a decode worker on the node of the case ends with that, and no row."""

    def refused(case, words, name, *settings, stage="decode"):
        output = tmp_path / "out"
        told = [
            f"output={output}", "cluster=ray", f"cluster.address={cluster}", "rows_per_shard=1", *settings,
            "stages.decode.replicas=2", "stages.decode.batch_size=1", "stages.decode.num_cpus=0",
            f"+stages.decode.resources={{{case}: 1}}",
        ]  # fmt: skip
        assert main(["run", name, *told]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        where = f"stage ({stage}): a worker is not what the plan says: node {re.escape(socket.gethostname())}"
        assert re.search(where, said), said
        assert all(word in said for word in words), said
        assert not (output / "_SUCCESS").exists() and not list(output.glob("errors/*"))

    return refused


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "another version",
            "shapes of latentmill-shapes 0.0.9, and the plan of latentmill-shapes 0.1.0. Install the same version on every node",
        ),
        ("other weights", "other weights or files for vae shapes: its fingerprint is "),
    ],
    ids=["another version", "other weights"],
)
def test_a_node_with_another_plugin_makes_no_row(case, words, refused, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    refused(case, [words], "txt2img", f"source.path={tmp_path / 'p.txt'}", "samples_per_row=1", "sampling.steps=2")


def test_a_node_with_other_weights_under_the_same_fingerprint_makes_no_row(refused, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.new("RGB", (4, 4), (60 * number, 30, 20)).save(tmp_path / "pictures" / f"{number}.png")
    words = ["vae keen reads keen.safetensors", "--fork"]
    case = "other weights under the same fingerprint"
    # Which of the two workers reads first is nobody's choice: the second is refused.
    refused(case, words, "reconstruct", f"source.path={tmp_path / 'pictures'}", "vae.name=keen", stage="encode|decode")
