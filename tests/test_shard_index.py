"""The index is a help: whatever becomes of it, what is told of a dataset is what its files say."""

import hashlib
import json
import os
import re
import threading
import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill import report, storage
from latentmill.dataset import Dataset, load
from latentmill.plan import Plan
from latentmill.plugin import Fragment
from latentmill.shard_index import WORTH, Index, Summary
from latentmill.sinks.parquet import Parquet
from latentmill.storage import LocalFolder

SHARDS = WORTH + 100
PLAN = Plan("many", {"sink": {"name": "parquet"}}, {}, (Fragment("p.txt", SHARDS),), 1, 1, 0)


def shard_file(path, failed=(), plan=PLAN):
    """A shard of one row, that is ok or failed in these stages."""
    errors = [{"row": 0, "row_id": "0-000", "stage": stage, "reason": "a reason"} for stage in failed]
    rows = pa.table({"row_id": pa.array([] if failed else ["0-000"]), "prompt": pa.array([] if failed else ["a"])})
    path.unlink(missing_ok=True)  # it may be linked elsewhere
    Parquet().write(str(path), rows, {"latentmill.plan": plan.hash, "latentmill.errors": json.dumps(errors)})
    return path


@pytest.fixture
def out(tmp_path):
    """A dataset of many shards, each seventh with a failed row, and none of its copies in ``errors/``."""
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "plan.json").write_text(PLAN.to_json())
    files = [shard_file(tmp_path / "ok"), shard_file(tmp_path / "failed", ["decode"])]
    for shard in range(SHARDS):
        os.link(files[shard % 7 == 6], out / "data" / f"{shard:05d}.parquet")
    return out


class Counting(LocalFolder):
    """A folder that counts which shards are read."""

    def __init__(self, url):
        super().__init__(url)
        self.asked = []

    def open(self, name):
        self.asked.append(name)
        return super().open(name)


def told(out):
    """What is told of a dataset, and which of its shards were read for it."""
    there = load(Counting(str(out)))
    seen = there.look()
    now = there.status(seen)
    return {**now, "rows": seen.rows(), "failed_in": seen.failed_in()}, sorted(there.store.asked)


def remember(out):
    there = load(storage.at(str(out)))
    there.look()
    there.remember()
    return there


def files_of(out):
    return sorted((out / ".index").iterdir())


def data(out, shard):
    return out / "data" / f"{shard:05d}.parquet"


def test_what_was_read_once_is_not_read_again(out):
    truth, asked = told(out)
    assert len(asked) == SHARDS and truth["failed"] == SHARDS // 7 and truth["ok"] == SHARDS - SHARDS // 7
    assert not (out / ".index").exists()  # who looks leaves nothing
    remember(out)
    assert told(out) == (truth, [])
    assert len(files_of(out)) == 1 and remember(out).remembered().keys() == {*range(SHARDS)}


def test_shards_that_come_go_and_change_are_seen(out):
    remember(out)
    data(out, 0).unlink()
    os.rename(data(out, 1), data(out, 2))
    shard_file(data(out, 3), ["encode", "encode"])
    before = data(out, 5).stat()
    content = data(out, 5).read_bytes()
    data(out, 5).unlink()
    data(out, 5).write_bytes(content)
    os.utime(data(out, 5), ns=(before.st_atime_ns, before.st_mtime_ns))
    truth, asked = told(out)
    # Of what was moved and linked all have changed, since one file has all those names.
    assert {"data/00003.parquet", "data/00005.parquet"} <= {*asked} and truth["failed_in"]["encode"] == 2
    remember(out)
    (out / ".index").rename(out / "elsewhere")
    assert told(out)[0] == truth


def test_a_file_that_is_changed_in_place_and_dated_back_is_read_again(out):
    file = shard_file(data(out, 4))
    other = shard_file(out.parent / "other", ["decode"])
    size = max(file.stat().st_size, other.stat().st_size)
    for path in (file, other):  # of one size: Parquet's footer is at the end, and what is before it is passed over
        path.write_bytes(bytes(size - path.stat().st_size) + path.read_bytes())
    remember(out)
    before = file.stat()
    file.write_bytes(other.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )
    truth, asked = told(out)
    assert asked == ["data/00004.parquet"] and truth["rows"][4] == 0


def named(content):
    return f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.json"


def tear(content):
    return None, content[: len(content) // 2]


def flip(content):
    return None, content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def as_another_plan(content):
    content = content.replace(PLAN.hash.encode(), b"0" * 32).replace(b'{"decode":1}', b'{"decode":5}')
    return named(content), content


def nonsense(content):
    content = json.dumps({"plan": PLAN.hash, "shards": [[0, "tag", 1, 2], "x", None]}).encode()
    return named(content), content


@pytest.mark.parametrize("damage", [tear, flip, as_another_plan, nonsense, lambda _: (named(b""), b"")])
def test_a_damaged_index_is_passed_over(damage, out):
    truth, _ = told(out)
    remember(out)
    [file] = files_of(out)
    name, content = damage(file.read_bytes())
    file.unlink()
    file.with_name(name or file.name).write_bytes(content)
    found, asked = told(out)
    assert found == truth and len(asked) == SHARDS
    remember(out)
    assert told(out) == (truth, [])


def test_drivers_that_keep_it_at_the_same_time_do_each_other_no_harm(out):
    truth, _ = told(out)
    drivers = [load(storage.at(str(out))) for _ in range(4)]

    def keep(there):
        there.look()
        there.remember()
        there.remember(all_there=True)

    threads = [threading.Thread(target=keep, args=[there]) for there in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told(out) == (truth, [])


def test_many_pieces_are_put_together_and_what_others_add_stays(out):
    there = load(storage.at(str(out)))
    there.look()
    index = Index(there.store, PLAN.hash)
    entries = [(shard, tag, found) for shard, (tag, found) in there._seen.items()]
    for start in range(0, SHARDS - 50, 100):
        index.save(entries[start : start + 100])
    Index(there.store, PLAN.hash).save(entries[-50:])
    assert len(files_of(out)) == 12
    index.replace(entries[:-50])
    assert len(files_of(out)) == 2 and told(out)[1] == []


def test_a_word_that_a_shard_does_not_say_is_found_by_verify(out, capsys):
    """Of the right file, and under the right hash: nobody but we could have written it."""
    from latentmill.cli import main

    plan = Plan("few", {"sink": {"name": "parquet"}}, {}, (Fragment("p.txt", 1),), 1, 1, 0)
    few = out.parent / "few"
    (few / "data").mkdir(parents=True)
    (few / "plan.json").write_text(plan.to_json())
    file = data(few, 0)
    shard_file(file, plan=plan)
    pq.write_table(pq.read_table(file).set_column(0, "row_id", [["000000000-000"]]), file)
    assert main(["verify", str(few)]) == 0
    store = storage.at(str(few))
    tag = store.tags("data")["00000.parquet"]
    Index(store, plan.hash).save([(0, tag, Summary({"decode": 1}, {}, []))])
    assert load(store).remembered() == {0: Summary({"decode": 1}, {}, [])}
    capsys.readouterr()
    assert main(["verify", str(few)]) == 1
    assert ".index says of 1 shards what they don't" in capsys.readouterr().out
    assert main(["verify", str(few), "--repair"]) == 1
    assert files_of(few) == [] and main(["verify", str(few)]) == 0


def test_errors_are_copied_and_side_files_deleted_as_the_shards_say(out):
    """Whatever the index says of them."""
    there = load(storage.at(str(out)))
    there.look()
    wrong = Summary({"read": 3}, {"a warning": 1}, [])
    tags = there.store.tags("data")
    Index(there.store, PLAN.hash).save((shard, tags[data(out, shard).name], wrong) for shard in range(SHARDS))
    there = load(storage.at(str(out)))
    assert there.status()["failed"] == 3 * SHARDS
    there.settle()
    copies = {path.name: json.loads(path.read_text()) for path in (out / "errors").iterdir()}
    assert copies.keys() == {f"{shard:05d}.jsonl" for shard in range(6, SHARDS, 7)}
    assert {error["stage"] for error in copies.values()} == {"decode"}


def test_a_side_file_that_its_shard_names_stays_whatever_the_index_says(out):
    name = "00004-0123456789ab-x.bin"
    about = {"name": "x.bin", "stored_as": name, "bytes": 1, "digest": "0"}
    rows = pa.table({"row_id": ["0-000"], "prompt": ["a"]})
    data(out, 4).unlink()
    Parquet().write(str(data(out, 4)), rows, {"latentmill.plan": PLAN.hash, "latentmill.files": json.dumps([about])})
    (out / "files").mkdir()
    (out / "files" / name).write_bytes(b"x")
    (out / "files" / "00004-ba9876543210-x.bin").write_bytes(b"a writer's that lost")
    store = storage.at(str(out))
    tags = store.tags("data")
    Index(store, PLAN.hash).save((shard, tags[data(out, shard).name], Summary({}, {}, [])) for shard in range(SHARDS))
    assert load(store).stray_side_files() == ["00004-ba9876543210-x.bin"]


def test_no_more_is_held_than_is_ahead(tmp_path):
    store, begun, ahead = storage.at(str(tmp_path)), [], []
    for number in store.each(lambda number: begun.append(number) or number, range(2_000), in_flight=4):
        ahead.append(max(begun) - number)
    assert sorted(begun) == [*range(2_000)] and max(ahead) < 4 * 16


def test_a_footer_is_one_request_and_the_report_of_a_store_lists_once(bucket, tmp_path, caplog):
    store = storage.at(f"{bucket}/out")
    plan = Plan("few", {"sink": {"name": "parquet"}}, {}, (Fragment("p.txt", 20),), 1, 1, 0)
    store.put("plan.json", plan.to_json().encode())
    for shard in range(20):
        failed = ["decode"] if shard == 7 else []
        store.create(f"data/{shard:05d}.parquet", str(shard_file(tmp_path / "shard", failed, plan)))
    caplog.set_level("INFO", "werkzeug")

    def asked(do):
        caplog.clear()
        do()
        lines = [re.search(r"(GET|HEAD|PUT) /bucket(\S+)", record.getMessage()) for record in caplog.records]
        return Counter("list" if "list-type" in line[2] else line[1] + line[2] for line in lines)

    footers = {f"GET/out/data/{shard:05d}.parquet": 1 for shard in range(20)}
    found = asked(lambda: load(store).status())
    assert found == {**footers, "list": 1, "GET/out/plan.json": 1, "HEAD/out/_SUCCESS": 1}
    there = load(store)
    assert asked(lambda: report.finish(there))["list"] == 1 and store.exists("report.html")


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


class Failing(Counting):
    """A store that fails when a shard is read."""

    def peek(self, name):
        raise storage.store.StorageError(f"{name}: the store does not answer")


def test_a_store_that_fails_makes_no_shard_a_foreign_one(out):
    with pytest.raises(storage.store.StorageError):
        Dataset(Failing(str(out)), PLAN, Parquet()).adopt()


@pytest.fixture
def always(monkeypatch):
    """However few shards there are, there is an index, and it is kept without a pause."""
    for module in ("dataset", "runner"):
        monkeypatch.setattr(f"latentmill.{module}.WORTH", 1)
    monkeypatch.setattr("latentmill.runner.REMEMBER_EVERY", 0.01)


def test_a_run_leaves_an_index_and_goes_on_with_it(always, tmp_path, capsys):
    from latentmill.cli import main

    (tmp_path / "p.txt").write_text("a red circle\na star\na blue square\n")
    out = tmp_path / "out"
    settings = [f"source.path={tmp_path}/p.txt", "samples_per_row=1", "rows_per_shard=1", "sampling.steps=1"]
    run = ["run", "txt2img", "cluster=inline", f"output={out}", *settings]
    assert main(run) == 0
    remembered = load(storage.at(str(out))).remembered()
    assert sorted(remembered) == [0, 1, 2] and not any(map(any, remembered.values()))
    pages = {page: (out / page).read_bytes() for page in ("README.md", "contact_sheet.png")}
    for file in files_of(out):
        file.unlink()
    capsys.readouterr()
    assert main(run) == 0 and "nothing to do" in capsys.readouterr().out and files_of(out)
    data(out, 1).unlink()
    assert main(["status", str(out)]) == 0 and "2 of 3 rows: 2 ok, 0 failed" in capsys.readouterr().out
    assert main(run) == 0 and "3 of 3 rows, 1 of them now" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert sorted(load(storage.at(str(out))).remembered()) == [0, 1, 2]
    assert pages == {page: (out / page).read_bytes() for page in pages}
    assert {path.suffix for path in (out / "data").iterdir()} == {".parquet"}


def test_while_a_run_goes_on_its_shards_come_into_the_index(always, out):
    """So that of one that is killed few are left to be read."""
    from latentmill.runner import _remembering

    (out / "data" / "00007.parquet").rename(out / "later")
    there, look = load(storage.at(str(out))), load(storage.at(str(out)))

    def wait(shard):
        ends = time.monotonic() + 60
        while shard not in look.remembered():
            assert time.monotonic() < ends

    with _remembering(there):
        wait(0)
        shard_file(data(out, 7))
        wait(7)
    assert "index" not in {thread.name for thread in threading.enumerate()}
    assert told(out)[1] == []
