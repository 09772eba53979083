"""A workflow over 1,000 rows by two drivers at once, killed three times, beside the run that nobody disturbed.

FAULTS=all .venv/bin/python -m pytest plugins/comfy/tests/test_comfy_killed.py
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import comfy_words
import pytest

pytestmark = pytest.mark.skipif(os.environ.get("FAULTS") != "all", reason="takes minutes: FAULTS=all")

ROWS, EACH = 1000, 50
KILLED_AT = ((3, 1), (8, 1), (14, 2))
"""So many shards are there when so many drivers are killed."""


def test_of_two_drivers_that_are_killed_come_the_undisturbed_run_s_bytes(comfy_models, comfyui, tmp_path):
    models = comfy_models("checkpoints/sd15")
    comfy_words.build(Path(models), "embeddings/two")
    nodes = {id: node for id, node in comfyui("workflows")["hires"]["workflow"].items() if id in "14567"}
    nodes["6"]["inputs"] |= {"width": 32, "height": 32, "batch_size": 1}
    for id in "457":
        nodes[id]["inputs"] |= {"model": ["1", 0], "steps": 2} if id == "7" else {"clip": ["1", 1]}
    nodes["8"] = {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 2]}}
    nodes["9"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "fox", "images": ["8", 0]}}
    (tmp_path / "workflow.json").write_text(json.dumps(nodes))
    lines = [f"a (red:1.{k % 9}) fox of {k},{k * 31}" for k in range(ROWS)]
    (tmp_path / "prompts.csv").write_text("\n".join(["prompt,seed", *lines]))

    def begin(name):
        command = [Path(sys.executable).with_name("latentmill"), "run", tmp_path / "workflow.json", "cluster=inline"]
        command += [f"comfy.models={models}", f"source.path={tmp_path / 'prompts.csv'}", "map.4.text=prompt"]
        command += ["map.7.seed=seed", "stages=cpu", "model.dtype=float32", f"rows_per_shard={EACH}"]
        log = (tmp_path / f"{name}.log").open("a")
        return subprocess.Popen([*command, f"output={tmp_path / name}"], stdout=log, stderr=log)

    def shards(name):
        return sorted((tmp_path / name / "data").glob("*"))

    assert begin("once").wait() == 0, (tmp_path / "once.log").read_text()
    drivers = [begin("killed"), begin("killed")]
    for there, count in KILLED_AT:
        while len(shards("killed")) < there:
            assert any(driver.poll() is None for driver in drivers), (tmp_path / "killed.log").read_text()
            time.sleep(0.05)
        assert len(shards("killed")) < ROWS // EACH
        for k in range(count):
            drivers[k].kill()
            drivers[k].wait()
        drivers = [*drivers[count:], *(begin("killed") for _ in range(count))]
    assert [driver.wait() for driver in drivers] == [0, 0], (tmp_path / "killed.log").read_text()
    once, killed = ({path.name: path.read_bytes() for path in shards(name)} for name in ("once", "killed"))
    assert len(once) == ROWS // EACH and once == killed
