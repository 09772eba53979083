"""Leases: one driver a shard, as long as it lives; and nobody waits for one that is gone."""

import os
import subprocess
import sys
import threading

import pytest

from latentmill import storage
from latentmill.driver import leases
from latentmill.driver.leases import Leases
from latentmill.driver.messages import Claimed, LeasesSeen
from latentmill.storage import LocalFolder


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    output = str(tmp_path / "out") if request.param == "folder" else request.getfixturevalue("bucket")
    return storage.at(output)


@pytest.fixture
def clock():
    """Seconds that pass when a test says so."""
    return [0.0]


def claim(driver, shard):
    return driver.claim(shard).outcome


def test_a_shard_is_one_driver_s_until_it_gives_it_back(store):
    with Leases(store, "data/{:05d}.parquet".format) as a, Leases(store, "data/{:05d}.parquet".format) as b:
        assert (claim(a, 1), claim(b, 1), claim(b, 2), claim(a, 2)) == ("ours", "taken", "ours", "taken")
        assert a.held == {1} and b.held == {2}
        a.keep(set())
        assert claim(b, 1) == "ours" and b.held == {1, 2}
    assert store.names("leases") == []


def test_what_is_in_the_dataset_is_not_done_again(store):
    store.create("data/00003.parquet", b"")
    with Leases(store, "data/{:05d}.parquet".format) as a:
        assert claim(a, 3) == "done" and a.held == set()


def test_the_others_shards_are_looked_at_now_and_then(store, clock):
    with (
        Leases(store, "data/{:05d}.parquet".format) as a,
        Leases(store, "data/{:05d}.parquet".format, clock=lambda: clock[0]) as b,
    ):
        for shard in (1, 2, 3):
            claim(a, shard)
        assert b.look({1, 2, 3}) is None  # it looked when it began
        clock[0] += leases.BEAT_EVERY
        assert b.look(set()) is None
        store.create("data/00001.parquet", b"")
        a.keep({2})
        assert b.look({1, 2, 3}) == LeasesSeen(frozenset({1}), frozenset({3}))
        assert b.look({2}) is None


class Together(LocalFolder):
    """A folder that answers eight questions for leases at a time, and fewer never."""

    waiting = None

    def read(self, name):
        if self.waiting is not None and name.startswith("leases/"):
            self.waiting.wait(20)
        return super().read(name)


def test_many_leases_are_asked_for_together(tmp_path, clock):
    store = Together(str(tmp_path / "out"))
    drivers = [Leases(store, "data/{:05d}.parquet".format, clock=lambda: clock[0]) for _ in range(9)]
    for shard, driver in enumerate(drivers):
        driver.beat()
        assert claim(driver, shard) == "ours"
    first, others = drivers[0], {*range(1, 9)}
    clock[0] += leases.BEAT_EVERY
    store.waiting = threading.Barrier(8)
    assert first.look(others) == LeasesSeen(frozenset(), frozenset())  # eight leases, then eight signs of life
    store.waiting = None
    for shard in others:
        drivers[shard].give_back_all()
        claim(first, shard)
    store.waiting = threading.Barrier(8)
    first.keep({0})
    assert first.held == {0} and store.names("leases") and not {"00001", "00008"} & {*store.names("leases")}


def test_one_that_gives_no_sign_for_a_minute_is_gone(store, clock, monkeypatch):
    monkeypatch.setattr(Leases, "_beat", lambda self: None)  # it lives, and is stopped
    with (
        Leases(store, "data/{:05d}.parquet".format, clock=lambda: clock[0]) as a,
        Leases(store, "data/{:05d}.parquet".format, clock=lambda: clock[0]) as b,
    ):
        assert claim(a, 1) == "ours"
        assert claim(b, 1) == "taken"
        clock[0] += leases.MAX_SILENCE - 1
        assert claim(b, 1) == "taken"
        store.put(f"leases/{a.me.rpartition('/')[2]}.alive", b"7")  # one sign, and the minute begins anew
        clock[0] += leases.MAX_SILENCE - 1
        assert claim(b, 1) == "taken"
        clock[0] += leases.MAX_SILENCE - 1
        assert b.look({1}) == LeasesSeen(frozenset(), frozenset())
        clock[0] += 2 * leases.BEAT_EVERY
        assert b.look({1}) == LeasesSeen(frozenset(), frozenset({1}))
        assert claim(b, 1) == "ours"
        a.keep(set())  # it wakes up, is done with the shard, and leaves alone what is not its own any more
        assert claim(Leases(store, "data/{:05d}.parquet".format), 1) == "taken"


KILLED = """
import os, sys
from latentmill import storage
from latentmill.driver.leases import Leases
driver = Leases(storage.at(sys.argv[1]), "data/{:05d}.parquet".format)
driver.__enter__()
print(driver.claim(1).outcome, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/ns/pid"), reason="needs /proc")
def test_one_that_was_killed_on_this_machine_is_not_waited_for(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "ours\n" and done.returncode == -9
    with Leases(storage.at(str(tmp_path)), "data/{:05d}.parquet".format) as mine:
        assert mine.claim(1) == Claimed(1, "ours")


@pytest.mark.parametrize("damaged", [b"", bytes(40), b"\xff\0", "cut", "otherwise"], ids=ascii)
def test_files_that_name_no_driver_hold_up_nobody_for_long(damaged, tmp_path, clock):
    """As a machine leaves them that loses its power."""
    store = storage.at(str(tmp_path))
    with Leases(store, "data/{:05d}.parquet".format, clock=lambda: clock[0]) as mine:
        host, process, name = mine.me.split("/")
        content = {"cut": f"{host}/{process}".encode(), "otherwise": f"{host}/{process}?/{name}".encode()}
        store.put("leases/00001", content.get(damaged, damaged))
        store.put("leases/gone.alive", content.get(damaged, damaged))
        leases.sweep(store, {2})
        claim(mine, 1)
        clock[0] += leases.MAX_SILENCE
        assert claim(mine, 1) == "ours"


class Mishears:
    """A store whose answer is lost on the way: the request is made again, and the name is taken, by ourselves."""

    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        return getattr(self.store, name)

    def create(self, name, content):
        self.store.create(name, content)
        return False


def test_a_lease_that_we_got_without_hearing_of_it_is_ours(store):
    a, b = Leases(Mishears(store), "data/{:05d}.parquet".format), Leases(store, "data/{:05d}.parquet".format)
    a.beat()
    assert claim(a, 1) == "ours" and a.held == {1}
    assert claim(b, 1) == "taken"


class Fails:
    """A store that fails so many times."""

    def __init__(self, store, times):
        self.store, self.times = store, times

    def __getattr__(self, name):
        if name in ("create", "read", "exists", "names") and self.times:
            self.times -= 1
            raise OSError(116, "Stale file handle")
        return getattr(self.store, name)


def test_a_store_that_fails_once_costs_a_lease_and_no_more(store, clock):
    driver = Leases(Fails(store, 2), "data/{:05d}.parquet".format, clock=lambda: clock[0])
    assert [claim(driver, shard) for shard in (1, 2, 3)] == ["taken", "taken", "ours"]
    driver.store.times = 1
    driver.keep(set())
    assert driver.held == {3}  # given back the next time
    driver.store.times = 1
    clock[0] += leases.BEAT_EVERY
    assert driver.look({1, 2}) is None
    clock[0] += leases.BEAT_EVERY
    assert driver.look({1, 2}) == LeasesSeen(frozenset(), frozenset({1, 2}))
    driver.store.times = 99
    with pytest.raises(OSError, match="Stale"):
        for shard in range(9):
            claim(driver, shard)
