"""What is asked of a store to know what is in a dataset, and what of that is remembered."""

import os
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tests.shard_folders import Counting, make, plan_of, shard_file

from latentmill import report, storage
from latentmill.dataset import load
from latentmill.errors import StorageError
from latentmill.storage import LocalFolder

PLAN = plan_of(20)


@pytest.fixture
def many(bucket, tmp_path):
    """The store of a dataset of twenty shards, with a failed row in the eighth."""
    store = storage.at(f"{bucket}/out")
    store.put("plan.json", PLAN.to_json().encode())
    for shard in range(20):
        failed = ["decode"] if shard == 7 else []
        store.create(f"data/{shard:05d}.parquet", str(shard_file(tmp_path / "shard", PLAN, failed)))
    return store


@pytest.fixture
def asked(caplog):
    """The requests that something makes, each with how many there are."""
    caplog.set_level("INFO", "werkzeug")

    def asked(do):
        caplog.clear()
        do()
        lines = [re.search(r"(GET|HEAD|PUT) /bucket(\S+)", record.getMessage()) for record in caplog.records]
        return Counter("list" if "list-type" in line[2] else line[1] + line[2] for line in lines)

    return asked


def test_a_footer_is_one_request_and_the_report_of_a_store_lists_once(many, asked):
    footers = {f"GET/out/data/{shard:05d}.parquet": 1 for shard in range(20)}
    found = asked(lambda: load(many).status())
    assert found == {**footers, "list": 1, "GET/out/plan.json": 1, "GET/out/plan-1.json": 1, "HEAD/out/_SUCCESS": 1}
    there = load(many)
    assert asked(lambda: report.finish(there))["list"] == 1 and many.exists("report.html")


def test_an_index_in_a_store_is_of_the_objects_that_were_read(many, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("latentmill.dataset.WORTH", 1)
    there = load(many)
    truth = there.status()
    there.remember()
    [index] = many.names(".index")
    listed = {"list": 2, "GET/out/plan.json": 1, "GET/out/plan-1.json": 1, f"GET/out/.index/{index}": 1}
    assert asked(lambda: load(many).look()) == listed and load(many).status() == truth
    ok, failed = many.read("data/00003.parquet"), shard_file(tmp_path / "failed", PLAN, ["read", "read"]).read_bytes()
    size = max(len(ok), len(failed)) + 1  # Parquet's footer is at the end, and what is before it is passed over
    many.put("data/00003.parquet", bytes(size - len(ok)) + ok)
    there = load(many)
    there.look()
    there.remember()
    assert len(many.names(".index")) == 2 and load(many).status() == truth
    before = load(many).tags()
    many.put("data/00003.parquet", bytes(size - len(failed)) + failed)
    assert [shard for shard, tag in load(many).tags().items() if tag != before[shard]] == [3]
    assert asked(lambda: load(many).look())["GET/out/data/00003.parquet"] == 1
    assert load(many).look().failed_in() == {"decode": 1, "read": 2}


LISTING = """<ListBucketResult><Contents><Key>data/00000.parquet</Key><Size>9</Size>
<LastModified>2026-11-26T00:00:00Z</LastModified></Contents><Contents><Key>data/00001.parquet</Key><Size>9</Size>
<ETag>"e"</ETag><LastModified>2026-11-26T00:00:00Z</LastModified></Contents></ListBucketResult>"""


class Untagged(BaseHTTPRequestHandler):
    """A store whose listing has an ETag of one object, and none of another."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(LISTING)))
        self.end_headers()
        self.wfile.write(LISTING.encode())

    def log_message(self, *_):
        pass


def test_an_object_without_an_etag_has_no_tag(bucket, monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Untagged) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        tags = storage.at(bucket).tags("data")
        server.shutdown()
    assert tags["00000.parquet"] == "" and tags["00001.parquet"].startswith('"e" 9 2026-11-26')


def test_an_empty_and_a_small_and_a_large_object_are_read_by_pieces(bucket):
    store = storage.at(bucket)
    large = os.urandom(200_000)
    for name, content in (("empty", b""), ("small", b"from a file"), ("large", large)):
        store.put(name, content)
    for name, content in (("empty", b""), ("small", b"from a file"), ("large", large)):
        with store.peek(name) as file:
            assert file.read() == content and file.read() == b""
        with store.peek(name) as file:
            assert file.seek(0, 2) == len(content) and file.seek(max(0, len(content) - 4)) >= 0
            assert file.read() == content[-4:] and file.seek(0) == 0 and file.read(5) == content[:5]
    with pytest.raises(FileNotFoundError), store.peek("none") as file:
        file.read()


def test_a_large_object_is_read_by_large_pieces_and_the_last_of_them_are_held(bucket, asked):
    store, content = storage.at(bucket), os.urandom((4 << 20) + 100_000)
    store.put("large", content)

    def walk(file):
        for start in range(0, len(content), 10_000):
            assert file.read(10_000) == content[start : start + 10_000]

    with store.peek("large") as file:
        assert asked(lambda: walk(file)) == {"GET/large": 6}  # 64 KiB, four of 1 MiB, and what is left
        assert sum(len(piece) for _, piece in file.raw.pieces.values()) < 3 << 20
        assert file.seek(0) == 0 and not asked(lambda: file.read(1000)) and file.tell() == 1000
    with store.peek("large") as file:
        assert asked(lambda: file.seek(0, 2)) == {"GET/large": 1}
        assert file.seek(-75_000, 2) and asked(lambda: file.read()) == {"GET/large": 1}  # a footer with 150 errors
        assert file.seek(-75_000, 2) and file.read() == content[-75_000:]


@pytest.mark.parametrize("past", [0, 1, 5_000_000])
def test_there_is_nothing_past_the_end(past, bucket):
    store = storage.at(bucket)
    store.put("small", b"from a file")
    with store.peek("small") as file:
        assert file.seek(11 + past) == 11 + past and file.read() == b""
        assert file.seek(0) == 0 and file.read() == b"from a file"


def test_no_more_is_held_than_is_ahead(tmp_path):
    store, begun, ahead = storage.at(str(tmp_path)), [], []
    for number in store.each(lambda number: begun.append(number) or number, range(2_000), in_flight=4):
        ahead.append(max(begun) - number)
    assert sorted(begun) == [*range(2_000)] and max(ahead) < 4 * 16


class Failing(LocalFolder):
    """A store that fails when a shard is read."""

    def peek(self, name):
        raise StorageError(f"{name}: the store does not answer")


class Ending(Counting):
    """A folder at whose first shard a run ends."""

    def __init__(self, url):
        super().__init__(url)
        self.ended = threading.Event()

    def open(self, name):
        self.ended.set()
        return super().open(name)


def test_a_look_that_nobody_wants_any_more_reads_no_further(tmp_path):
    there = load(Ending(str(make(tmp_path / "out", plan_of(100)))))
    with pytest.raises(InterruptedError):
        there.look(until=there.store.ended)
    assert 1 <= len(there.store.asked) <= there.store.in_flight
    assert len(there.look().shards) == 100


def test_a_store_that_fails_makes_no_shard_a_foreign_one(tmp_path):
    with pytest.raises(StorageError):
        load(Failing(str(make(tmp_path / "out", PLAN)))).adopt()
