"""A device of a node is one worker's at a time, or that of as many as have shares of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentmill.workers.devices import wait_for
from latentmill.workers.node_folder import node_folder

HOLDS = """
import sys
from latentmill.workers.devices import wait_for
print(wait_for("node", ["GPU 0"], *map(float, sys.argv[1:]))[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holds(tmp_path, monkeypatch):
    """Starts a process that takes a share of GPU 0, says who is in its way then, and lives on."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    started = []

    def start(*share_within):
        command = [sys.executable, "-c", HOLDS, *map(str, share_within)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def said(process):
    return process.stdout.readline().strip()


def in_line():
    """The numbers of the processes that stand in the device's file."""
    file = node_folder("devices") / "node-GPU-0"
    return [int(line.split()[0]) for line in file.read_text().splitlines()]


def is_in_line(process):
    while process.pid not in in_line():
        time.sleep(0.01)


def test_who_comes_waits_until_the_process_is_gone_that_was_there_before(holds):
    first = holds(1)
    assert said(first) == ""
    late = holds(1, 0.1)
    assert said(late) == "GPU 0"  # nobody waits for ever
    late.kill()
    late.wait()
    second = holds(1)
    is_in_line(second)
    first.stdin.close()
    assert said(second) == "" and first.poll() == 0
    assert in_line() == [first.pid, second.pid]  # of whom the first is gone: the next one sees that


def test_as_many_have_shares_as_fill_it_and_who_comes_waits_for_those_before_it_alone(holds):
    shares = [holds(0.5)]
    for share in (0.25, 0.25):
        assert said(shares[-1]) == ""
        shares.append(holds(share))
    assert said(shares[-1]) == ""
    fourth = holds(0.25)
    is_in_line(fourth)
    whole = holds(1)  # behind it, and it waits for all of them
    is_in_line(whole)
    shares[1].kill()
    assert said(fourth) == "" and shares[1].poll() is not None and whole.poll() is None


def test_a_number_that_another_process_has_now_is_nobodys(holds):
    (node_folder("devices") / "node-GPU-0").write_text(f"{os.getppid()} 1 1\n4194304 77 1\ntorn\n")
    assert wait_for("node", ["GPU 0"], 1)[1] == ""
    assert in_line() == [os.getpid()]
    assert Path(f"/proc/{os.getppid()}").exists()
    assert wait_for("node", ["GPU 0"], 1)[1] == ""  # nor is one's own a reason to wait
