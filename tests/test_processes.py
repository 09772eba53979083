"""``--processes``: tests in several processes are told of as those in one, and one that ends its process fails alone."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFTEST = """
import os, pytest
os.environ["COLLECTED"] = str(os.getpid())

@pytest.fixture(scope="session", autouse=True)
def whole():
    yield
    with open("torn-down", "a") as file:
        file.write(f"{os.getpid()}\\n")
"""
MEETING = """
import os, signal, warnings, pytest

def test_beside(tmp_path):
    assert os.environ["COLLECTED"] == str(os.getppid())
    with open("a", {!r}), open("b", {!r}):  # until the other file's test opens them
        pass
"""
FIRST = """
def test_passes():
    warnings.warn("a warning")

@pytest.mark.parametrize("number", range(2))
def test_fails(number):
    print("printed", number)
    assert number == 0

def test_ends_its_process():
    os.kill(os.getpid(), signal.SIGKILL)

def test_after_it():
    open("after", "x").close()
"""
SECOND = """
def test_skips():
    pytest.skip("not here")

@pytest.mark.xfail
def test_is_known():
    assert False
"""


def test_what_processes_report_is_what_one_would(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name, modes, tests in (("a", "wr", FIRST), ("b", "rw", SECOND)):
        (tmp_path / f"test_{name}.py").write_text(MEETING.format(*modes) + tests)
        os.mkfifo(tmp_path / name)
    command = [sys.executable, "-m", "pytest", "-p", "tests.processes", "--processes", "2", "-q", "-rA"]
    command += ["-p", "no:cacheprovider", "--import-mode=importlib", "--basetemp", tmp_path / "pytest-0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "200"}
    environment.pop("PYTEST_ADDOPTS", None)
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    lines = ran.stdout.splitlines()
    told = {line for line in lines if line.startswith(("PASSED", "FAILED", "SKIPPED", "XFAIL"))}
    assert told == {
        "PASSED test_a.py::test_beside",
        "PASSED test_a.py::test_passes",
        "PASSED test_a.py::test_fails[0]",
        "FAILED test_a.py::test_fails[1] - assert 1 == 0",
        "FAILED test_a.py::test_ends_its_process - The process of this test ended: SIGKILL.",
        "PASSED test_a.py::test_after_it",
        "PASSED test_b.py::test_beside",
        "SKIPPED [1] test_b.py:10: not here",
        "XFAIL test_b.py::test_is_known",
    }, ran.stdout
    assert sum(line == '    warnings.warn("a warning")' for line in lines) == 1
    assert lines.count("printed 1") == 1
    assert "2 failed, 5 passed, 1 skipped, 1 xfailed, 1 warning" in lines[-1]
    assert (ran.returncode, ran.stderr) == (1, "")
    assert (tmp_path / "after").exists()
    torn_down = (tmp_path / "torn-down").read_text().split()
    assert len(set(torn_down)) == len(torn_down) == 2, "of three processes one was killed"
