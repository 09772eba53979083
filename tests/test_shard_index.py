"""The index is a help: whatever becomes of it, what is told of a dataset is what its files say."""

import hashlib
import json
import os
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.shard_folders import Counting, data, make, plan_of, shard_file

from latentmill import storage, verify
from latentmill.cli import main
from latentmill.dataset import load
from latentmill.errors import StorageError
from latentmill.shard_index import CLEAN, WORTH, Index, Summary
from latentmill.sinks.parquet import Parquet

SHARDS = 110
PLAN = plan_of(SHARDS)


@pytest.fixture
def hundred(monkeypatch):
    """An index is for a hundred shards, not for a thousand: as many as a test would make and read."""
    for module in ("dataset", "runner"):
        monkeypatch.setattr(f"latentmill.{module}.WORTH", 100)


@pytest.fixture
def out(tmp_path, hundred):
    """A dataset of many shards, each seventh with a failed row, and none of its copies in ``errors/``."""
    return make(tmp_path / "out", PLAN)


@pytest.fixture
def few(tmp_path):
    """A dataset of one shard, which is sound."""
    few = make(tmp_path / "few", plan_of(1))
    file = data(few, 0)
    Parquet().write(str(file), pq.read_table(file).set_column(0, "row_id", [["000000000-000"]]), {})
    return few


@pytest.fixture
def always(hundred, monkeypatch):
    """However few shards there are, there is an index, and it is kept without a pause."""
    for module in ("dataset", "runner"):
        monkeypatch.setattr(f"latentmill.{module}.WORTH", 1)
    monkeypatch.setattr("latentmill.runner.REMEMBER_EVERY", 0.01)


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


def remembered(store):
    there = load(store)
    return dict(there.remembered(there.tags()))


def save(store, *entries):
    """Into the index, what entries say: each a shard, and what it is of."""
    tags = load(store).tags()
    Index(store, load(store).plan.hash).save((shard, tags[shard], about) for shard, about in entries)


def files_of(out):
    return sorted((out / ".index").iterdir())


def test_what_was_read_once_is_not_read_again(tmp_path):
    """Of a dataset of as many shards as an index is made for."""
    shards = WORTH + 100
    out = make(tmp_path / "out", plan_of(shards))
    truth, asked = told(out)
    assert len(asked) == shards and truth["failed"] == shards // 7 and truth["ok"] == shards - shards // 7
    assert not (out / ".index").exists()  # who looks leaves nothing
    remember(out)
    assert told(out) == (truth, [])
    assert len(files_of(out)) == 1 and remembered(storage.at(str(out))).keys() == {*range(shards)}


def test_an_entry_says_what_was_filtered_where_there_is_something_to_say(out):
    """Those that were written before anything was filtered are right as they are."""
    remember(out)
    before = json.loads(files_of(out)[0].read_bytes())["shards"]
    assert {len(entry) for entry in before} == {2, 5}
    shard_file(data(out, 3), PLAN, filtered=["sieve"])
    truth, asked = told(out)
    assert asked == ["data/00003.parquet"] and truth["filtered"] == 1 and truth["rows"][3] == 0
    there = load(storage.at(str(out)))
    save(there.store, (3, there.look().readable[3]))
    entries = [json.loads(file.read_bytes())["shards"] for file in files_of(out)]
    assert [[entry[0], entry[5]] for some in entries for entry in some if len(entry) > 5] == [[3, {"sieve": 1}]]
    assert told(out) == (truth, [])


def test_shards_that_come_go_and_change_are_seen(out):
    remember(out)
    data(out, 0).unlink()
    os.rename(data(out, 1), data(out, 2))
    shard_file(data(out, 3), PLAN, ["encode", "encode"])
    before = data(out, 5).stat()
    content = data(out, 5).read_bytes()
    data(out, 5).unlink()
    data(out, 5).write_bytes(content)
    os.utime(data(out, 5), ns=(before.st_atime_ns, before.st_mtime_ns))
    truth, asked = told(out)
    assert asked == [f"data/{shard:05d}.parquet" for shard in (2, 3, 5)] and truth["failed_in"]["encode"] == 2
    assert truth["rows"].keys() == {*range(2, SHARDS)}
    remember(out)
    (out / ".index").rename(out / "elsewhere")
    assert told(out)[0] == truth


def test_a_file_that_is_changed_in_place_and_dated_back_is_read_again(out):
    file = shard_file(data(out, 4), PLAN)
    other = shard_file(out.parent / "other", PLAN, ["decode"])
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
    content = json.dumps({"format": 2, "plan": PLAN.hash, "shards": [[0, "tag", 1, 2], "x", None]}).encode()
    return named(content), content


def as_another_format(content):
    content = content.replace(b'"format":2', b'"format":3').replace(b'{"decode":1}', b'{"decode":5}')
    return named(content), content


def without_a_format(content):
    content = content.replace(b'"format":2,', b"").replace(b'{"decode":1}', b'{"decode":5}')
    return named(content), content


@pytest.mark.parametrize(
    "damage",
    [tear, flip, as_another_plan, as_another_format, without_a_format, nonsense, lambda _: (named(b""), b"")],
)
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


class Locked(Counting):
    """A folder whose index may be listed and not read, or not even listed."""

    def __init__(self, url, listed):
        super().__init__(url)
        self.listed = listed

    def names(self, folder):
        if folder == ".index" and not self.listed:
            raise PermissionError(13, "Permission denied")
        return super().names(folder)

    def read(self, name):
        if name.startswith(".index/"):
            raise StorageError(f"{name}: Access Denied")
        return super().read(name)


@pytest.mark.parametrize("listed", [True, False])
def test_an_index_that_may_not_be_read_is_none(listed, out, few):
    truth, _ = told(out)
    remember(out)
    there = load(Locked(str(out), listed))
    seen = there.look()
    assert seen.rows() == truth["rows"] and there.status(seen)["failed"] == truth["failed"]
    assert len(there.store.asked) == SHARDS
    save(storage.at(str(few)), (0, CLEAN))
    found = verify.verify(Locked(str(few), listed))
    assert found.sound and (found.ok, found.missing) == (1, [])


def test_drivers_that_keep_it_at_the_same_time_do_each_other_no_harm(always, out, monkeypatch):
    """Each has seen more shards than the one before; one has put the pieces together when the others begin to."""
    monkeypatch.setattr("latentmill.shard_index.ENTRIES_A_FILE", 10)
    truth, _ = told(out)
    later = {shard: data(out, shard).read_bytes() for shard in range(80, SHARDS)}
    for shard in later:
        data(out, shard).unlink()
    first = load(storage.at(str(out)))
    found = first.look().readable
    for start in range(0, 60, 2):
        save(first.store, *((shard, found[shard]) for shard in range(start, start + 2)))
    assert len(files_of(out)) == 30
    drivers = []
    for seen in (80, 90, 100, SHARDS):
        for shard in range(max(80, seen - 10), seen):
            data(out, shard).write_bytes(later[shard])
        drivers.append(load(storage.at(str(out))))
        assert len(drivers[-1].look().shards) == seen

    def keep(there):
        there.remember()
        there.remember(all_there=True)

    keep(drivers.pop())
    threads = [threading.Thread(target=keep, args=[there]) for there in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files_of(out)) == 11 and told(out) == (truth, [])


def test_many_pieces_are_put_together_and_what_others_add_stays(out):
    there = load(storage.at(str(out)))
    there.look()
    index = Index(there.store, PLAN.hash)
    entries = [(shard, tag, found) for shard, (tag, found) in there._seen.items()]
    for start in range(0, SHARDS - 5, 10):
        index.save(entries[start : start + 10])
    Index(there.store, PLAN.hash).save(entries[-5:])
    assert len(files_of(out)) == 12
    index.replace(entries[:-5])
    assert len(files_of(out)) == 2 and told(out)[1] == []


WRONG = Summary({"decode": 1}, {}, [])


@pytest.mark.parametrize("said", [[WRONG], [WRONG, CLEAN], [CLEAN, WRONG]])
def test_a_word_that_a_shard_does_not_say_is_found_by_verify(said, few, capsys):
    """Of the right file, and under the right hash: nobody but we could have written it. Beside one that is right, too."""
    assert main(["verify", str(few)]) == 0
    save(storage.at(str(few)), *((0, about) for about in said))
    capsys.readouterr()
    assert main(["verify", str(few)]) == 1
    assert ".index says of 1 shards what they don't" in capsys.readouterr().out
    assert main(["verify", str(few), "--repair"]) == 1
    assert files_of(few) == [] and main(["verify", str(few)]) == 0


def test_a_side_file_that_only_the_index_names_is_found_by_verify_and_taken_out(always, few, capsys):
    stray = few / "files" / "00000-0123456789ab-x.bin"
    stray.parent.mkdir()
    stray.write_bytes(b"a writer's that lost")
    save(storage.at(str(few)), (0, Summary({}, {}, [stray.name])))
    assert load(storage.at(str(few))).stray_side_files() == []
    assert main(["verify", str(few)]) == 1 and f"files/{stray.name}" in capsys.readouterr().out
    assert main(["verify", str(few), "--repair"]) == 1
    assert not stray.exists() and (few / "quarantine" / f"foreign-{stray.name}").exists()
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


def test_a_run_leaves_an_index_and_goes_on_with_it(always, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle\na star\na blue square\n")
    out = tmp_path / "out"
    settings = [f"source.path={tmp_path}/p.txt", "samples_per_row=1", "rows_per_shard=1", "sampling.steps=1"]
    run = ["run", "txt2img", "cluster=inline", f"output={out}", *settings]
    assert main(run) == 0
    assert remembered(storage.at(str(out))) == dict.fromkeys(range(3), CLEAN)
    pages = {page: (out / page).read_bytes() for page in ("README.md", "contact_sheet.png")}
    for file in files_of(out):
        file.unlink()
    capsys.readouterr()
    assert main(run) == 0 and "nothing to do" in capsys.readouterr().out and files_of(out)
    data(out, 1).unlink()
    assert main(["status", str(out)]) == 0 and "2 of 3 rows: 2 ok, 0 failed" in capsys.readouterr().out
    assert main(run) == 0 and "3 of 3 rows, 1 of them now" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert remembered(storage.at(str(out))).keys() == {0, 1, 2}
    assert pages == {page: (out / page).read_bytes() for page in pages}
    assert {path.suffix for path in (out / "data").iterdir()} == {".parquet"}


def test_while_a_run_goes_on_its_shards_come_into_the_index(always, out):
    """So that of one that is killed few are left to be read."""
    from latentmill.runner import _remembering

    for shard in range(7, SHARDS):  # few, for a pause is as long as twenty looks
        data(out, shard).unlink()
    there = load(storage.at(str(out)))

    def wait(shard):
        ends = time.monotonic() + 60
        while shard not in remembered(there.store):
            assert time.monotonic() < ends

    with _remembering(there):
        wait(0)
        shard_file(data(out, 7), PLAN)
        wait(7)
    assert "index" not in {thread.name for thread in threading.enumerate()}
    assert told(out)[1] == []
