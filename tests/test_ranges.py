"""A file that is read by ranges is the file, is asked for ahead, and holds no more than it says."""

import io
import random
import threading

import pytest

from latentmill.errors import StorageError
from latentmill.sources.files.ranges import LAST_RANGE, RANGE, RANGES_AHEAD, RANGES_BEHIND, opened

CONTENT = random.Random(0).randbytes(40 * RANGE + 12_345)


def fetch(start, stop):
    return CONTENT[start:stop]


@pytest.mark.parametrize("size", [0, 1, LAST_RANGE, LAST_RANGE + 1, RANGE, RANGE + LAST_RANGE + 1, 6 * RANGE + 7])
@pytest.mark.parametrize("range", [RANGE, 100_000])
def test_whatever_is_read_of_it_is_what_is_there(range, size):
    dice, content = random.Random(size), CONTENT[:size]
    plain, ranged = io.BytesIO(content), opened(lambda start, stop: content[start:stop], size, {}, range)
    for _ in [0] * 300:
        at, wanted = dice.randint(0, size + 5), dice.choice([1, 100, 70_000, 3 * RANGE, -1])
        if dice.random() < 0.5:  # else on from where it is
            assert plain.seek(at) == ranged.seek(at)
        assert ranged.read(wanted) == plain.read(wanted) and ranged.tell() == plain.tell()
    assert ranged.seek(-min(size, 9), io.SEEK_END) == plain.seek(-min(size, 9), io.SEEK_END)
    assert ranged.read() == plain.read()


def test_who_reads_on_is_waited_for_by_many_ranges_and_not_by_more():
    asked, lock = [], threading.Lock()

    def told(start, stop):
        with lock:
            asked.append(start)
        return fetch(start, stop)

    file, ahead = opened(told, len(CONTENT), {}), []
    for at in range(0, len(CONTENT), 10_000):
        assert file.read(10_000) == CONTENT[at : at + 10_000]
        ahead.append(len(file.raw.pieces))
    assert sorted(asked) == sorted({*asked}) and len(asked) == len(CONTENT) // RANGE + 1  # each once
    assert ahead[0] == 1 and max(ahead) > RANGES_AHEAD  # it begins with one
    assert max(ahead) <= RANGES_AHEAD + RANGES_BEHIND + 1
    file.close()
    assert not file.raw.pieces


def test_who_looks_here_and_there_gets_no_more_than_that():
    asked = []
    file = opened(lambda *bounds: asked.append(bounds) or fetch(*bounds), len(CONTENT), {})
    for at in (30 * RANGE, 3 * RANGE + 5, len(CONTENT) - 10):
        file.seek(at)
        assert file.read(10) == CONTENT[at : at + 10]
    tail = (len(CONTENT) - LAST_RANGE, len(CONTENT))
    assert asked == [(30 * RANGE, 31 * RANGE), (3 * RANGE, 4 * RANGE), tail]


def test_what_was_not_to_be_had_is_asked_for_again():
    fails = [True]

    def broken(start, stop):
        if fails:
            raise StorageError("no answer")
        return fetch(start, stop)

    file = opened(broken, len(CONTENT), {})
    with pytest.raises(StorageError):
        file.read(10)
    fails.clear()
    assert file.read(10) == CONTENT[:10]
