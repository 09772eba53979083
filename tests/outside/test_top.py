"""``latentmill top``: a job that runs, seen from elsewhere; and what its report shows of it afterwards."""

import json
import os
import re
import shutil
import threading
import time
import xml.etree.ElementTree as xml

import pytest
from tests.outside.store_parts import put

import latentmill as package

PLUGIN = '''
import time
from pathlib import Path
from latentmill.plugin import Stage

class Waits(Stage):
    """Has done its first batch when it waits with the second, for a file."""
    contract = 2

    def __init__(self, file: str):
        self.file, self.batches = Path(file), 0

    def __call__(self, batch, reject):
        self.batches += 1
        until = time.monotonic() + 60
        while self.batches == 2 and not self.file.exists() and time.monotonic() < until:
            time.sleep(0.02)
        return batch
'''

SLOW = '''
import time
from pathlib import Path
from latentmill.plugin import Stage

class Slow(Stage):
    """Waits until the driver's sweep is over."""
    contract = 2

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def __call__(self, batch, reject):
        until = time.monotonic() + 60
        while (self.folder / "logs" / "a-0@x.log").exists() and time.monotonic() < until:
            time.sleep(0.02)
        return batch
'''


def stands(file):
    """Of each stage the rows that it has done, and its workers that are busy."""
    return [(stage["done"], stage["busy"]) for stage in json.loads(file.read_text())["shown"]["view"]["stages"]]


@pytest.fixture
def running(install, patches, pictures, tmp_path):
    """The output of a job that waits with two of its four rows before the last stage, which may have made the others, or not yet."""
    install("acme", "[latentmill.stages]\nwaits = acme:Waits\n", acme=PLUGIN)
    go, out = tmp_path / "go", tmp_path / "out"
    waits = f"{{name: waits, file: '{go}'}}"
    words = [*patches, f"source.path={pictures}", f"output={out}", f"flow=[read,encode,{waits},write]"]
    words += [f"stages.{name}.batch_size=2" for name in ("read", "encode", "waits", "write")]
    thread = threading.Thread(target=package.run, args=("encode", words), daemon=True)
    thread.start()

    def end():
        go.touch()
        thread.join(60)
        assert (out / "_SUCCESS").exists()

    until = time.monotonic() + 60
    while not any(stands(file)[:3] == [(4, 0), (4, 0), (2, 1)] for file in out.glob("live/*")):
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.02)
    yield out, end
    end()


def made(out):
    """The rows that its last stage has made, as the driver told last."""
    [file] = out.glob("live/*.json")
    return stands(file)[-1][0]


def table_of(said):
    """Each line that has a stage's name first, as words."""
    return {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.split()}


def test_a_job_is_seen_while_it_runs_and_in_its_report(running, latentmill):
    out, end = running
    rows = made(out)
    assert rows in (0, 2)
    assert latentmill("top", out, "--json") == 0
    seen = json.loads(latentmill.out)
    [driver] = seen["drivers"]
    assert seen["output"] == str(out) and seen["together"] == driver["shown"] and driver["silent_for"] is None
    assert (seen["together"]["view"]["planned"], seen["together"]["rows"]) == (4, rows)
    assert [group["stages"] for group in seen["together"]["usage"]] == ["read+encode+waits+write"]
    assert seen["together"]["usage"][0]["memory"] > 2**20

    assert latentmill("top", out, "--once") == 0
    shown = table_of(latentmill.out)
    assert f"{rows} of 4 rows" in latentmill.out
    assert shown["waits"] == ["2", "0", shown["waits"][2], "1", "of", "1"]
    assert latentmill("verify", out) == 0, "live/ is nothing foreign"

    end()
    assert list(out.glob("live/*")) == []
    assert latentmill("top", out) == 0 and "no driver works on it now" in latentmill.out
    assert json.loads(latentmill.out if latentmill("top", out, "--json") == 0 else "")["together"] is None
    page = (out / "report.html").read_text()
    curves = {svg.get("aria-label"): svg for svg in map(xml.fromstring, re.findall("<svg.*?</svg>", page))}
    assert list(curves) == [f"read+encode+waits+write: {what}" for what in ("cores busy", "memory")]
    for svg in curves.values():
        points = [tuple(map(float, point.split(","))) for point in svg[0].get("points").split()]
        xs = [x for x, _ in points]
        assert xs == sorted(xs) and (xs[0], xs[-1]) == (0, 480) and all(0 <= y <= 100 for _, y in points)


def test_several_drivers_are_added_up_and_one_that_says_nothing_is_named(running, latentmill):
    out, _ = running
    [file] = out.glob("live/*.json")
    first, made_first = json.loads(file.read_text()), made(out)
    second = json.loads(file.read_text())
    second["driver"] = "elsewhere-7-abc"
    second["shown"]["counts"] = {"waits": {"deaths": 2}}
    second["shown"]["view"]["of_a_later_version"] = 7
    second["shown"]["view"]["stages"][0]["workers"], second["shown"]["busy"] = 3, [0.5] * 4
    for number, stage in enumerate(second["shown"]["view"]["stages"]):
        stage["done"] = 10 + number
    second["shown"]["rates"] = [1.0, 2.0, 3.0, 4.0]
    third = {**second, "driver": "gone-8-def", "at": first["at"] - 600}
    for other in (second, third):
        (out / "live" / f"{other['driver']}.json").write_text(json.dumps(other))
    (out / "live" / "half.json").write_text('{"driver"')

    assert latentmill("top", out, "--json") == 0
    seen = json.loads(latentmill.out)
    assert [(each["driver"], each["silent_for"] is None) for each in seen["drivers"]][:2] == [
        ("elsewhere-7-abc", True),
        ("gone-8-def", False),
    ]
    assert [stage["done"] for stage in seen["together"]["view"]["stages"]] == [14, 15, 14, 13 + made_first]
    own = next(each for each in seen["drivers"] if each["driver"] == first["driver"])["shown"]["rates"]
    busy = next(each for each in seen["drivers"] if each["driver"] == first["driver"])["shown"]["busy"]
    assert seen["together"]["busy"][0] == pytest.approx((3 * 0.5 + busy[0]) / 4)
    assert seen["together"]["counts"]["waits"] == {"deaths": 2}
    assert seen["together"]["rates"] == [rate + more for rate, more in zip(own, [1.0, 2.0, 3.0, 4.0])]

    assert latentmill("top", out, "--once") == 0
    assert re.search(r"^gone-8-def: silent for 10 min \d+ s", latentmill.out, re.M)
    assert re.search(r"^elsewhere-7-abc: encode: ", latentmill.out, re.M)

    (out.parent / "left" / "live").mkdir(parents=True)  # by a driver that was killed, whose file nobody takes away
    shutil.copy(out / "plan.json", out.parent / "left")
    shutil.copy(out / "live" / "gone-8-def.json", out.parent / "left" / "live")
    assert latentmill("top", out.parent / "left") == 0
    assert "no driver works on it now" in latentmill.out
    assert re.search(r"^gone-8-def: silent for", latentmill.out, re.M)


def test_in_a_store_and_while_it_does_not_answer(running, latentmill, store, monkeypatch):
    """What is looked at again says why it was not seen, and ends when the driver's file is gone."""
    out, _ = running
    [file] = out.glob("live/*.json")
    shown = f"{made(out)} of 4 rows"
    bucket = "s3://bucket/out"
    put(store.upstream_url, "out/plan.json", b"{}")
    put(store.upstream_url, "out/live/x.json", file.read_bytes())
    monkeypatch.setattr("latentmill.commands.top.EVERY_IN_STORE", 0.01)
    assert latentmill("top", bucket, "--once") == 0 and shown in latentmill.out
    looks = []

    def fails_once(method, path):
        if method == "GET" and "prefix=out/live" in path:
            looks.append(path)
            if len(looks) == 3:
                return 403
            if len(looks) == 4:
                put(store.upstream_url, "out/live/x.json", None)
        return None

    store.first = fails_once
    assert latentmill("top", bucket) == 0, latentmill.said
    assert latentmill.out.count(shown) == 2, (
        "as it was, once more with why it was not seen, and none that says nothing new"
    )
    assert latentmill.out.count("not seen now: ") == 1
    assert latentmill.out.splitlines()[-1].startswith(f"{bucket}: no driver works on it now")


def test_what_was_killed_long_ago_is_swept(install, patches, pictures, tmp_path, latentmill):
    out = tmp_path / "out"
    old = {"live/killed.json": 1, "live/new.json": 0, "logs/a-0@x.log": 31, "logs/b-0@x.log": 29}
    for name, days in old.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
        os.utime(out / name, (time.time() - 86_400 * days - 60,) * 2)
    install("acme", "[latentmill.stages]\nslow = acme:Slow\n", acme=SLOW)
    slow = f"flow=[read,encode,{{name: slow, folder: '{out}'}},write]"
    assert latentmill("run", "encode", *patches, f"source.path={pictures}", f"output={out}", slow) == 0, latentmill.said
    assert {name for name in old if (out / name).exists()} == {"live/new.json", "logs/b-0@x.log"}


def test_a_place_without_a_dataset(latentmill, tmp_path):
    assert latentmill("top", tmp_path, "--once") == 2
    assert latentmill.err == f"latentmill: {tmp_path} holds no dataset: there is no plan.json in it\n"
