"""What a plugin does once a node: in one worker, while the others of the node wait."""

import threading
import time

from latentmill.plugin import Plugin
from latentmill.workers.node_setup import set_up_once


class Compiles(Plugin):
    contract = 2

    def __init__(self):
        self.begun, self.ended = [], []

    def setup_node(self):
        self.begun.append(time.monotonic())
        if len(self.begun) == 1:
            raise OSError("no compiler yet")
        time.sleep(0.2)
        self.ended.append(time.monotonic())


def test_workers_wait_for_the_one_that_sets_their_node_up_and_one_that_failed_counts_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plugin, ready, found = Compiles(), threading.Barrier(4), []

    def worker():
        ready.wait(10)
        try:
            set_up_once("run", "stage a/b", plugin)
            found.append(len(plugin.ended))
        except OSError as error:
            found.append(str(error))

    workers = [threading.Thread(target=worker) for _ in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join(30)
    assert sorted(map(str, found)) == ["1", "1", "1", "no compiler yet"] and len(plugin.begun) == 2
    set_up_once("another run", "stage a/b", plugin)
    assert len(plugin.begun) == 3
    monkeypatch.setattr("socket.gethostname", lambda: "another node")  # with the same folder for temporary files
    set_up_once("run", "stage a/b", plugin)
    assert len(plugin.begun) == 4
