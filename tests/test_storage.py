"""Files appear whole, and the first of a name stays."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from latentmill import storage


def put(output, name, text):
    with storage.aside(str(output), name) as temporary:
        Path(temporary).write_text(text)
        return storage.publish(temporary, str(Path(output, "data", name)))


def left(output):
    return os.listdir(Path(output, ".tmp"))


def test_the_first_of_a_name_stays(tmp_path):
    output = tmp_path / "deep" / "out"
    assert put(output, "a", "first") is True
    assert put(output, "a", "second") is False
    assert (output / "data" / "a").read_text() == "first"
    assert left(output) == []


def test_what_fails_halfway_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), storage.aside(str(tmp_path), "a") as temporary:
        Path(temporary).write_text("half")
        raise RuntimeError("halfway")
    assert left(tmp_path) == [] and not (tmp_path / "data").exists()


def test_of_many_threads_one_publishes(tmp_path):
    barrier, outcomes = threading.Barrier(8), {}

    def race(i):
        with storage.aside(str(tmp_path), "a") as temporary:
            Path(temporary).write_text(str(i) * 10_000)
            barrier.wait()
            outcomes[i] = storage.publish(temporary, str(tmp_path / "data" / "a"))

    threads = [threading.Thread(target=race, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [i for i, first in outcomes.items() if first]
    assert len(outcomes) == 8
    assert (tmp_path / "data" / "a").read_text() == str(winner) * 10_000
    assert left(tmp_path) == []


RACER = """
import sys
from pathlib import Path
from latentmill import storage
output, me = sys.argv[1:]
won = []
print("ready", flush=True)
sys.stdin.readline()
for k in range(50):
    with storage.aside(output, str(k)) as temporary:
        Path(temporary).write_text(me)
        if storage.publish(temporary, f"{output}/data/{k}"):
            won.append(k)
print(won)
"""


def test_of_several_processes_one_publishes_each_name(tmp_path):
    source = str(Path(storage.__file__).parents[1])
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": source},
        )
        for i in range(2)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {i: eval(racer.communicate()[0]) for i, racer in enumerate(racers)}
    assert sorted(k for names in won.values() for k in names) == list(range(50))
    for i, names in won.items():
        assert all((tmp_path / "data" / str(k)).read_text() == str(i) for k in names)
    assert left(tmp_path) == []


def test_what_killed_processes_left_is_swept_a_day_later(tmp_path):
    with storage.aside(str(tmp_path), "new") as new, storage.aside(str(tmp_path), "old") as old:
        for path in (new, old):
            Path(path).write_text("x")
        os.utime(old, (time.time() - 90_000,) * 2)
        storage.sweep(str(tmp_path))
        assert Path(new).exists() and not Path(old).exists()
