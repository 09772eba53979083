"""``latentmill doctor``: what is wrong with a node is found before a job starts, and nothing stays.

``DOCTOR=all`` plants each difference on a node of its own, which takes some minutes: mounts, so it is for root.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import ray_forks

import latentmill as package
import latentmill_shapes
from latentmill.workers.cluster import disconnect

ALL = os.environ.get("DOCTOR") == "all"
SHAPES = ["[latentmill.vaes]", "shapes = latentmill_shapes.plugin:ShapesVAE", "[latentmill.denoisers]",
          "shapes = latentmill_shapes.plugin:ShapesDenoiser", "[latentmill.text_encoders]",
          "shapes = latentmill_shapes.plugin:ShapesTextEncoder"]  # fmt: skip
PASSES = """
from latentmill.plugin import Stage

class Passes(Stage):
    contract = 2

    def __call__(self, batch, reject):
        return batch
"""


def distribution(folder, name, version, points=()):
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "entry_points.txt").write_text("\n".join(points))


@pytest.fixture
def words(tmp_path):
    """A job of this machine: its words."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "disk").mkdir()
    return ["txt2img", f"source.path={tmp_path / 'in' / 'prompts.txt'}", f"output={tmp_path / 'disk' / 'out'}"]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_one_machine_that_is_right(latentmill, words, tmp_path):
    before = files(tmp_path)
    assert latentmill("doctor", *words, f"output={tmp_path / 'new' / 'folder' / 'out'}", "cluster=inline") == 0
    lines = latentmill.out.splitlines()
    assert lines[-1] == "nothing stands in the way" and all(line.startswith("  ok   ") for line in lines[:-1]), lines
    assert [line[7:].split("  ")[0] for line in lines[:-1]][:4] == ["nodes", "versions", "libraries", "plugins"]
    assert files(tmp_path) == before


def test_a_dataset_that_is_there_stays_as_it_is(latentmill, words, tmp_path):
    words += ["cluster=inline", "samples_per_row=1", "sampling.steps=1"]
    assert latentmill("run", *words) == 0
    before = files(tmp_path)
    assert latentmill("doctor", *words) == 0
    assert files(tmp_path) == before


def test_what_a_run_refuses_at_once_stands_in_the_way(latentmill, words, tmp_path):
    out = tmp_path / "disk" / "out"
    words += ["cluster=inline", "samples_per_row=1", "sampling.steps=1"]
    assert latentmill("run", *words) == 0
    (tmp_path / "strange" / "data").mkdir(parents=True)
    (tmp_path / "strange" / "data" / "mine.parquet").write_bytes(b"PAR1")
    before = files(tmp_path)
    for more in (["sampling.steps=2"], ["export={to: [nothing], folder: /e}"], [f"output={tmp_path / 'strange'}"]):
        assert latentmill("run", *words, *more) == 2, more
        refused = latentmill.err
        assert (latentmill("doctor", *words, *more), latentmill.err) == (2, refused), more
    assert files(tmp_path) == before and out.exists()


def test_an_output_that_is_in_the_way_and_gpus_that_are_not_there(latentmill, words, tmp_path):
    (tmp_path / "disk" / "out").mkdir()
    (tmp_path / "disk" / "out" / ".tmp").write_text("a file\n")
    assert latentmill("doctor", *words, "cluster=inline", "stages.denoise.num_gpus=1") == 2
    wrong = [line.split(maxsplit=2)[1:] for line in latentmill.out.splitlines() if line.startswith(" WRONG ")]
    assert [what for what, _ in wrong] == ["GPUs", "output"]
    assert " claims 1, and torch sees 0: " in wrong[0][1]
    assert ".tmp is in the way: a file, where a folder is to be made" in wrong[1][1]
    assert latentmill.out.splitlines()[-1] == "2 things to mend"


def test_all_differences_of_a_node_are_told_at_once(latentmill, words, tmp_path):
    """A node has an old plugin, an old library, and fewer GPUs than it says; the job asks for nothing that only the other has."""
    old = tmp_path / "old"
    distribution(old, "latentmill-shapes", "0.0.9", SHAPES)
    distribution(old, "numpy", "1.0.0")
    there = ray_forks.Cluster(num_cpus=2)
    try:
        there.add_node(num_cpus=2, num_gpus=2, env_vars={"PYTHONPATH": str(old)})
        where = ["cluster=ray", f"cluster.address={there.address}"]
        code = latentmill("doctor", *words, *where, "--json")
        found = json.loads(latentmill.out)
    finally:
        there.shutdown()
    assert code == 2 and len(found["nodes"]) == 2
    [bad] = {remark["node"] for check in found["checks"] for remark in check["remarks"]}
    assert bad in found["nodes"]
    assert {check["what"] for check in found["checks"] if not check["ok"]} == {"libraries", "plugins", "GPUs"}
    told = [remark["said"] for check in found["checks"] for remark in check["remarks"]]
    assert sum(" of latentmill-shapes 0.0.9, and the plan of latentmill-shapes 0.1.0. " in line for line in told) == 3
    assert any(line.startswith("has numpy 1.0.0, and the driver ") for line in told)
    assert files(tmp_path / "disk") == []


# ----------------------------------------------------------------------------------------- each difference by itself

NODE = """
{mounts}
exec {python} -c 'from ray.scripts.scripts import main; main()' start --block --address {address} --num-cpus 2 \
    --num-gpus {gpus} --resources '{{"planted": 1}}' --object-store-memory 100000000
"""
VAE = Path(latentmill_shapes.__file__).parent / "weights" / "vae.safetensors"
EMPTY = "mount -t tmpfs none {}"
CASES = {
    # name: (how the node comes to differ, variables, the line of the table, what is said)
    "another version of a plugin": ("", {"PYTHONPATH": "{old}:{site}"}, "plugins", "has vae shapes of latentmill-shapes 0.0.9"),
    "no such plugin": (EMPTY.format("{site}"), {}, "plugins", "lacks stage passes, which the plan has of acme 1.0"),
    "another library": ("", {"PYTHONPATH": "{library}:{site}"}, "libraries", "has numpy 1.0.0, and the driver"),
    "other weights": (f"mount --bind {{changed}} {VAE}", {}, "plugins", "has other weights or files for vae shapes"),
    "no latentmill": (EMPTY.format(Path(package.__file__).parent), {}, "nodes", "can't run latentmill: "),
    "the output is another disk": (EMPTY.format("{disk}"), {}, "output", "doesn't see what the driver writes to "),
    "the output is read-only": ("mount --bind {disk} {disk}; mount -o remount,ro,bind {disk}", {}, "output", "Read-only file system"),
    "no source": (EMPTY.format("{in}"), {}, "source", "prompts.txt"),
    "another source": ("mount --bind {other} {in}/prompts.txt", {}, "source", "has another prompts.txt for source prompts"),
    "no file of credentials": (EMPTY.format("{keys}"), {}, "credentials", "which GOOGLE_APPLICATION_CREDENTIALS names"),
    "fewer GPUs than it claims": ("", {}, "GPUs", "claims 2, and torch sees 0"),
    "little shared memory": ("mount -t tmpfs -o size=20m none /dev/shm", {}, "shared memory", "has 20 MiB of /dev/shm"),
    "little disk": ("mount -t tmpfs -o size=20m none {tmp}", {"TMPDIR": "{tmp}"}, "disks", "has 20 MiB free for "),
    "another time": ("", {"PYTHONPATH": "{clock}:{site}"}, "clocks", "has a clock that is 3"),
    "it is stopped": ("", {}, "nodes", "has not answered in 60 s|can't be asked"),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What is different on nodes, by its name in CASES, and the address of a head that is right."""
    root = tmp_path_factory.mktemp("planted")
    at = {name: root / name for name in ("old", "site", "library", "in", "disk", "keys", "tmp", "clock")}
    for folder in at.values():
        folder.mkdir()
    at |= {name: root / name for name in ("changed", "other")}
    distribution(at["old"], "latentmill-shapes", "0.0.9", SHAPES)
    distribution(at["library"], "numpy", "1.0.0")
    distribution(at["site"], "acme", "1.0", ["[latentmill.stages]", "passes = acme_passes:Passes"])
    (at["site"] / "acme_passes.py").write_text(PASSES)
    (at["clock"] / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() + 3600\n")
    with safe_open(VAE, "pt") as file:
        about = file.metadata()
    save_file({name: tensor + 0.05 for name, tensor in load_file(VAE).items()}, at["changed"], about)
    (at["in"] / "prompts.txt").write_text("a red circle\na blue square\n")
    at["other"].write_text("a red circle\na blue triangle\n")
    (at["keys"] / "key.json").write_text("{}")
    (at["disk"] / "out" / ".tmp").mkdir(parents=True)
    (at["disk"] / "out" / ".tmp" / "kept").write_text("")
    with pytest.MonkeyPatch.context() as here:
        here.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(at["keys"] / "key.json"))
        here.setenv("PYTHONPATH", os.pathsep.join([str(at["site"]), os.environ["PYTHONPATH"]]))
        here.syspath_prepend(at["site"])
        there = ray_forks.Cluster(num_cpus=2)
        try:
            yield at, there.address
        finally:
            there.shutdown()


@pytest.fixture
def node(planted):
    """``node(CASE)``: a node of the head's that is different so. Returns the beginning of its number."""
    at, address = planted
    started = []

    def there():
        return [node["NodeID"] for node in ray.nodes() if node["Alive"] and "planted" in node["Resources"]]

    def node(case):
        mounts, variables, *_ = CASES[case]
        gpus = 2 if "GPUs" in case else 0
        script = NODE.format(mounts=mounts.format(**at), python=sys.executable, address=address, gpus=gpus)
        environment = {**os.environ, **{name: value.format(**at) for name, value in variables.items()}}
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", script], env=environment, stdout=subprocess.DEVNULL
        )
        started.append(psutil.Process(process.pid))
        while not there():
            assert process.poll() is None, "the node could not be started"
            time.sleep(0.1)
        if case == "it is stopped":
            [raylet] = [child for child in started[0].children(recursive=True) if child.name() == "raylet"]
            started.append(raylet)
            raylet.suspend()
        return there()[0][:8]

    ray.init(address=address, log_to_driver=False)
    yield node
    for process in reversed(started):
        with suppress(psutil.NoSuchProcess):  # else each test after this one would fail with it
            process.resume()
            process.terminate()
    while there():
        time.sleep(0.1)
    disconnect()


@pytest.mark.skipif(not ALL, reason="DOCTOR=all")
@pytest.mark.parametrize("case", CASES)
def test_a_difference_of_a_node(case, latentmill, planted, node):
    """It is found, as itself, and nothing else is; the node that is right is not blamed."""
    at, address = planted
    number = node(case)
    _, _, what, said = CASES[case]
    words = ["txt2img", f"source.path={at['in'] / 'prompts.txt'}", f"output={at['disk'] / 'out'}", "cluster=ray"]
    flow = "flow=[read,encode,denoise,decode,passes,write]"
    before = files(at["disk"])
    code = latentmill("doctor", *words, flow, f"cluster.address={address}", "--json")
    assert latentmill.out, latentmill.err
    found = json.loads(latentmill.out)
    wrong = {check["what"]: [r for r in check["remarks"] if r["wrong"]] for check in found["checks"] if not check["ok"]}
    assert code == 2 and len(found["nodes"]) == 2 and wrong.keys() == {what}, wrong
    assert all(f", {number})" in remark["node"] for remark in wrong[what]), wrong
    assert any(each in remark["said"] for each in said.split("|") for remark in wrong[what]), wrong
    assert files(at["disk"]) == before
    print(f"{case}: {wrong[what][0]['node']} {wrong[what][0]['said']}")
