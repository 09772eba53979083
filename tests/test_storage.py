"""Files appear whole, and the first of a name stays: in a folder, and on an S3 server over HTTP."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill import storage
from latentmill.errors import AddressError, StorageError


def put(output, name, text):
    store = storage.at(str(output))
    with store.aside(name) as temporary:
        Path(temporary).write_text(text)
        return store.create(f"data/{name}", temporary)


def left(output):
    return os.listdir(Path(output, ".tmp"))


def test_the_first_of_a_name_stays(tmp_path):
    output = tmp_path / "deep" / "out"
    assert put(output, "a", "first") is True
    assert put(output, "a", "second") is False
    assert (output / "data" / "a").read_text() == "first"
    assert left(output) == []


def test_a_name_that_another_driver_takes_away_just_then_is_free(tmp_path, monkeypatch):
    """Between the system's answer that it is there, and the look at what it is."""
    link, taken = os.link, []

    def meanwhile(source, final):
        try:
            link(source, final)
        except FileExistsError:
            taken.append(final)
            os.unlink(final)
            raise

    assert put(tmp_path, "a", "first")
    monkeypatch.setattr(os, "link", meanwhile)
    assert put(tmp_path, "a", "second") and (tmp_path / "data" / "a").read_text() == "second" and taken


def test_what_fails_halfway_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), storage.at(str(tmp_path)).aside("a") as temporary:
        Path(temporary).write_text("half")
        raise RuntimeError("halfway")
    assert left(tmp_path) == [] and not (tmp_path / "data").exists()


def test_of_many_threads_one_publishes(tmp_path):
    barrier, outcomes = threading.Barrier(8), {}

    def race(i):
        with storage.at(str(tmp_path)).aside("a") as temporary:
            Path(temporary).write_text(str(i) * 10_000)
            barrier.wait()
            outcomes[i] = storage.at(str(tmp_path)).create("data/a", temporary)

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
store, me = storage.at(sys.argv[1]), sys.argv[2]
won = []
print("ready", flush=True)
sys.stdin.readline()
for k in range(50):
    with store.aside(str(k)) as temporary:
        Path(temporary).write_text(me)
        if store.create(f"data/{k}", temporary):
            won.append(k)
print(won)
"""


def test_of_several_processes_one_publishes_each_name(tmp_path):
    source = str(Path(storage.__file__).parents[2])
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
    store = storage.at(str(tmp_path))
    with store.aside("new") as new, store.aside("old") as old:
        for path in (new, old):
            Path(path).write_text("x")
        os.utime(old, (time.time() - 90_000,) * 2)
        store.sweep()
        assert Path(new).exists() and not Path(old).exists()


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    if request.param == "folder":
        return storage.at(str(tmp_path / "out"))
    return storage.at(request.getfixturevalue("bucket") + "/some/out")


def test_a_folder_and_a_bucket_are_alike(store):
    assert store.names("data") == [] and store.names("") == [] and not store.exists("data/a")
    assert not store.holds_any("data")
    assert store.create("data/a", b"first") is True
    assert store.create("data/a", b"second") is False
    with store.aside("data/b") as temporary:
        Path(temporary).write_bytes(b"from a file")
        assert store.create("data/b", temporary) is True
        assert store.create("data/a", temporary) is False
    assert not Path(temporary).exists()
    assert sorted(store.names("data")) == ["a", "b"] and store.exists("data/a") and store.holds_any("data")
    assert (store.read("data/a"), store.read("data/b")) == (b"first", b"from a file")
    for content in (b"once", b"twice"):
        store.put("report.html", content)
    assert store.read("report.html") == b"twice"
    with store.open("data/b") as file:
        assert file.seek(-4, 2) == 7 and file.read() == b"file" and file.seek(0) == 0 and file.read(4) == b"from"
    store.delete("data/b")
    store.delete("data/b")
    assert store.names("data") == ["a"]
    for read in (store.read, store.open):
        with pytest.raises(FileNotFoundError):
            read("data/b")
    store.check()
    assert store.names(".tmp") == []


def test_of_many_threads_one_creates_in_a_bucket(bucket):
    outcomes, barrier = {}, threading.Barrier(8)

    def race(i):
        store = storage.at(f"{bucket}/out")
        barrier.wait()
        outcomes[i] = store.create("data/a", str(i).encode() * 100_000)

    threads = [threading.Thread(target=race, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [i for i, first in outcomes.items() if first]
    assert len(outcomes) == 8
    assert storage.at(f"{bucket}/out").read("data/a") == str(winner).encode() * 100_000


def test_a_parquet_file_is_read_by_ranges(bucket):
    store = storage.at(bucket)
    with store.aside("a.parquet") as temporary:
        pq.write_table(pa.table({"row_id": [str(n) for n in range(10_000)]}), temporary, row_group_size=1000)
        store.create("a.parquet", temporary)
    with store.open("a.parquet") as file:
        stored = pq.ParquetFile(file)
        assert stored.metadata.num_rows == 10_000
        assert stored.read_row_group(7).column("row_id")[0].as_py() == "7000"


def test_what_the_store_says_is_one_line_of_ours(bucket):
    for write in (lambda store: store.create("a", b""), lambda store: store.put("a", b""), lambda store: store.check()):
        with pytest.raises(StorageError, match=r"^s3://elsewhere/.*: The specified bucket does not exist$"):
            write(storage.at("s3://elsewhere"))
    with pytest.raises(AddressError, match=r"^ftp://x is no place for a dataset: a folder is, or s3://BUCKET/PREFIX"):
        storage.at("ftp://x")


class Careless(storage.LocalFolder):
    """A store that takes a second create for the first."""

    def _link(self, source, final):
        os.replace(source, final)
        return True


def test_where_a_name_cannot_be_created_only_once_nothing_begins(tmp_path, monkeypatch):
    with pytest.raises(StorageError, match=r"a second create of one name succeeded.*single_writer=true"):
        Careless(str(tmp_path)).check()

    def no_links(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StorageError, match=r"no hard links: Operation not permitted.*single_writer=true"):
        storage.at(str(tmp_path)).check()
    alone = storage.at(str(tmp_path), single_writer=True)
    alone.check()
    assert alone.create("data/a", b"first") is True and alone.create("data/a", b"second") is False
    assert alone.read("data/a") == b"first" and left(tmp_path) == []


def test_one_writer_alone_may_do_without_in_a_bucket_too(bucket):
    alone = storage.at(bucket, single_writer=True)
    assert alone.create("data/a", b"first") is True and alone.create("data/a", b"second") is False
    assert alone.read("data/a") == b"first"
