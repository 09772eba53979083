"""benchmarks/gpu.py at toy size on the CPU: what must be exact is, each table is there, and a part that fails ends no other."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu  # noqa: E402
from gpu_parts import notes, table  # noqa: E402


def test_it_runs_as_a_toy(tmp_path):
    pytest.importorskip("latentmill_diffusers")
    told = [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy", "--output", str(tmp_path)]
    done = subprocess.run(told, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads((tmp_path / "gpu.json").read_text())
    text = (tmp_path / "gpu.md").read_text()
    assert text in done.stdout

    checks = {(line["what"], line["dtype"]): line for line in lines if line["kind"] == "correctness"}
    assert all(line["ok"] and line["found"] <= line["bound"] for line in checks.values())
    for what in (
        "a deterministic job twice, files that differ",
        "rows alone and in company, deterministic",
        "pictures alone and in company, deterministic",
    ):
        assert checks[what, "float32"]["found"] == checks[what, "float32"]["bound"] == 0
    assert {what for what, _ in checks} >= {
        "prompts encoded", "denoised in 2 steps", "decoded", "pictures encoded", "rows alone and in company",
        "our pictures and the pipeline's, mean difference of 255",
    }  # fmt: skip
    # Half precision errs by more than its eps at most, and float32 by far less: what is compared is not the same thing twice.
    assert checks["decoded", "bfloat16"]["found"] > 1e-3 and 0 < checks["decoded", "float32"]["found"] < 1e-5

    assert [line["kind"] for line in lines if line["kind"] not in ("correctness", "memory")] == [
        "machine", "rate", "operations", "speed", "speed", "left out", "split",
    ]  # fmt: skip
    for line in lines:
        if line["kind"] == "speed":
            assert line["ours"] > 0 and line["loop"] > 0 and line["roofline"] > 0
            assert ("ours_idle" in line) == ("loop_idle" in line) == (line["batch"] == 1)
    assert [line["stage"] for line in lines if line["kind"] == "memory"] == ["encode", "denoise", "decode"]
    for heading in ("Correctness", "Pictures a second", "Split against fused", "Memory of a stage", "Left out"):
        assert f"## {heading}\n" in text
    assert "## Failed" not in text and "WRONG" not in text


def test_a_part_that_fails_or_dies_or_hangs_is_a_line_and_ends_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy"])
    lines = tmp_path / "lines.jsonl"

    def inside(notes, device):
        notes.add("rate", model="m", dtype="float32", flops=1e12)
        with notes.attempt("the first"):
            raise ValueError("of two lines,\nand a reason")
        notes.add("left out", what="the second", why="it is here")

    works = {
        "raises": lambda notes, device: 1 // 0,
        "dies": lambda notes, device: os._exit(3),
        "hangs": lambda notes, device: time.sleep(60),
        "goes on": inside,
    }
    for name, work in works.items():
        gpu._run(
            name, work, lines, time.monotonic() + (0.2 if name == "hangs" else 60), 1.0
        )  # others may wait for a core
    gpu._run("is late", inside, lines, time.monotonic() - 1, 1.0)
    found = notes.read(lines)
    assert [(line["part"], line["kind"]) for line in found] == [
        ("raises", "failed"), ("dies", "failed"), ("hangs", "failed"), ("goes on", "rate"), ("goes on", "failed"),
        ("goes on", "left out"), ("is late", "left out"),
    ]  # fmt: skip
    assert "ZeroDivisionError" in found[0]["traceback"] and found[1]["why"] == "its process ended with 3"
    text = table.markdown(found)
    assert "- goes on: the first: ValueError: of two lines, and a reason\n" in text and table.verdict(found) == 1


def test_without_diffusers_it_says_what_it_left_out(tmp_path, monkeypatch):
    there = gpu.find_spec
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "diffusers" else there(name))
    (_, _), (name, work) = gpu._parts(tmp_path, toy=True)
    work(notes.Notes(tmp_path / "lines", name, 0.0), None)
    assert notes.read(tmp_path / "lines")[0]["why"] == "diffusers can't be imported here"
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "hydra" else there(name))
    with pytest.raises(SystemExit, match="nothing can be measured without hydra"):
        gpu._parts(tmp_path, toy=True)


def test_what_is_wrong_is_an_exit_code_and_a_word(tmp_path):
    right = {
        "kind": "correctness",
        "what": "decoded",
        "model": "m",
        "dtype": "float32",
        "found": 1e-7,
        "bound": 1e-6,
        "ok": True,
    }
    assert table.verdict([right]) == 0 and "| right |" in table.markdown([right])
    wrong = {**right, "found": 1e-5, "ok": False}
    assert table.verdict([right, wrong]) == 1 and "| WRONG |" in table.markdown([right, wrong])
