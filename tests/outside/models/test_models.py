"""Weights that lie elsewhere: fetched once a node, as they were pinned, and the same rows as from a folder.

``MODELS=all`` has workers of a real Ray cluster fetch them, too.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time

import pytest
from tests.outside.model_parts import FILES, HUB_URL, REPOSITORY, WANTED, fetch
from tests.outside.store_parts import Before, put


def hash_of(tmp_path, output="out"):
    return json.loads((tmp_path / output / "plan.json").read_text())["hash"]


def contents(cache):
    return sorted(path.read_text() for path in (cache / "blobs").iterdir())


# ------------------------------------------------------------------------------------------------- the same, from elsewhere


def test_a_model_makes_the_same_rows_and_the_same_plan_wherever_it_lies(made, local, model_hub, model_store, tmp_path):
    rows = made(local, output="of-disk")
    assert [row["tint"] for row in rows] == ["green red"] * 4
    for name, url in {"hub": HUB_URL, "bucket": "s3://bucket/models/red"}.items():
        assert made(url, output=name) == rows
        assert hash_of(tmp_path, name) == hash_of(tmp_path, "of-disk")
    assert "models" not in json.loads((tmp_path / "of-disk" / "plan.json").read_text())


def test_a_dataset_goes_on_when_its_model_has_moved(made, local, model_hub, tmp_path):
    made(local)
    (tmp_path / "out" / "data" / "00000.parquet").unlink()
    made(HUB_URL)
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_what_nobody_reads_is_not_fetched_and_all_else_once(made, model_hub, model_store, node):
    made(HUB_URL)
    assert model_hub.sent_files() == WANTED
    made("s3://bucket/models/red", output="other")
    sent = [path for verb, path in model_store.asked if verb == "GET" and "/models/red/" in path]
    assert sorted(path.partition("/red/")[2].partition("?")[0] for path in sent) == WANTED
    assert contents(node("node-1")) == sorted(FILES[name] for name in WANTED)


def test_a_single_file_and_a_list_of_files(made, model_hub, model_store):
    [row, *_] = made(f"{HUB_URL}/part/model.safetensors", output="a")
    assert row["tint"] == "red" and model_hub.sent_files() == ["part/model.safetensors"]
    more = "stages.tint.settings.more=[{path:'s3://bucket/models/red/other.safetensors',weight:2}]"
    [row, *_] = made("s3://bucket/models/red/part/model.safetensors", more, output="b")
    assert row["tint"] == "red green"


def test_a_folder_of_a_repository(made, model_hub):
    [row, *_] = made(f"{HUB_URL}/part")
    assert row["tint"] == "red" and model_hub.sent_files() == ["part/model.safetensors"]


def test_a_branch_that_moves_on_is_not_followed_by_a_dataset_that_is_there(made, model, model_hub, node, tmp_path):
    before = made(HUB_URL)
    (model / "other.safetensors").write_text("blue")
    model_hub.commit(model)
    (tmp_path / "out" / "data" / "00000.parquet").unlink()
    node("node-2")
    assert made(HUB_URL) == before
    [row, *_] = made(HUB_URL, output="anew")
    assert row["tint"] == "blue red"


def test_a_revision_beside_the_url_holds(made, model, model_hub):
    first = model_hub.branches["main"]
    (model / "other.safetensors").write_text("blue")
    model_hub.commit(model)
    [row, *_] = made(HUB_URL, f"stages.tint.settings.revision={first}", output="a")
    assert row["tint"] == "green red"
    said = made(f"{HUB_URL}@main", f"stages.tint.settings.revision={first}", output="b", code=2)
    assert f"stage tint: path: {HUB_URL}@main says revision main, and the setting beside it {first}" in said


# ------------------------------------------------------------------------------------------------------- before it starts


def test_plan_says_what_would_be_fetched_and_fetches_small_files_alone(latentmill, given, model_hub, tmp_path):
    assert latentmill("plan", *given(HUB_URL)) == 0
    commit = model_hub.branches["main"][:8]
    assert (
        f"fetched       {HUB_URL}@main at {commit}: 3 files, 10 B; 8 B are not on this machine yet\n" in latentmill.out
    )
    assert model_hub.sent_files() == ["config.json"]
    planned = latentmill.out.partition("hash     ")[2].split()[0]
    assert latentmill("run", *given(HUB_URL)) == 0
    assert hash_of(tmp_path) == planned
    assert latentmill("plan", *given(HUB_URL)) == 0
    assert f"{HUB_URL}@main at {commit}: 3 files, 10 B; all on this machine\n" in latentmill.out
    assert model_hub.sent_files() == WANTED


def test_doctor_says_what_a_node_would_fetch_and_whether_there_is_room(
    latentmill, given, model_hub, made, node, monkeypatch
):
    assert latentmill("doctor", *given(HUB_URL)) == 0, latentmill.said
    assert f"will fetch 8 B of {HUB_URL}@main into " in latentmill.out and model_hub.sent_files() == ["config.json"]
    real = shutil.disk_usage("/")
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: real._replace(free=4))
        assert latentmill("doctor", *given(HUB_URL)) == 2
        assert f"lacks 8 B of {HUB_URL}@main, and has 4 B free in " in latentmill.out
    made(HUB_URL)
    assert latentmill("doctor", *given(HUB_URL)) == 0 and "fetch" not in latentmill.out
    assert "each node has them, or has room for them" in latentmill.out


def test_a_url_that_leads_nowhere_is_one_line(made, model_hub, model_store):
    for url, said in {
        "hf://some/models": "hf://some/models is not there, or not for everybody: HF_TOKEN",
        f"{HUB_URL}@v2": f"{HUB_URL} has no revision v2",
        f"{HUB_URL}/no": f"there is no file or folder {HUB_URL}@main/no",
        "hf://model": "hf://model is no model of the Hub: hf://OWNER/NAME@REVISION",
        f"hf://datasets/{REPOSITORY}": "is no model of the Hub",
        "s3://bucket/nothing": "there is no file or folder s3://bucket/nothing",
        f"{HUB_URL}/picture.png/..": ". and .. are no folders of a store",
    }.items():
        code = 3 if "is not there, or" in said or "revision v2" in said else 2
        found = made(url, code=code).splitlines()
        assert sum(said in line for line in found) == 1 and not any("Traceback" in line for line in found), found


def test_a_secret_in_a_url_is_in_no_plan_and_in_nothing_that_is_said(
    made, model_store, tmp_path, monkeypatch, latentmill
):
    monkeypatch.setenv("SECRET_PLACE", "models/red")
    monkeypatch.setattr("latentmill.models.nodes.WORTH_TELLING", 1)
    [row, *_] = made("s3://bucket/${oc.env:SECRET_PLACE}")
    assert row["tint"] == "green red"
    assert "models/red" not in (tmp_path / "out" / "plan.json").read_text()
    [told] = [line for line in latentmill.said.splitlines() if "are fetched into" in line]
    assert told.startswith("s3://bucket/${oc.env:SECRET_PLACE}: 10 B are fetched into ") and "red" not in told


def test_offline_the_hub_s_cache_is_all_there_is(made, model_hub, node, monkeypatch):
    rows = made(HUB_URL)
    asked = len(model_hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert made(HUB_URL, output="again") == rows and len(model_hub.asked) == asked
    node("node-2")
    assert f"{HUB_URL}@main is not in " in made(HUB_URL, output="third", code=3)


# ------------------------------------------------------------------------------------------------------ once, and whole


def test_processes_of_a_node_fetch_once(model_hub, model_store, node):
    """Another process, and two threads of this one: a lock knows of no difference."""
    model_store.seconds = 0.05
    model_hub.damage = lambda name, content: time.sleep(0.1) or content  # late, and nothing else
    urls = [HUB_URL, "s3://bucket/models/red"]
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Barrier(3)
    running = [spawn.Process(target=fetch, args=(*urls,), kwargs={"ready": ready})]
    running += [threading.Thread(target=fetch, args=(*urls,), kwargs={"ready": ready}) for _ in range(2)]
    for each in running:
        each.start()
    for each in running:
        each.join(60)
    assert running[0].exitcode == 0 and not any(each.is_alive() for each in running)
    assert model_hub.sent_files() == WANTED
    assert sum(model_store.count("GET", f"/bucket/models/red/{name}$") for name in WANTED) == len(WANTED)


class Held(Before):
    """Sends no byte of an object behind ``until``."""

    until, go_on = 16 << 20, threading.Event()

    def _forward(self, method, path, headers, body):
        told = {name.lower(): value for name, value in headers.items()}.get("range", "")
        if told and int(told.partition("=")[2].partition("-")[0]) >= self.until:
            self.go_on.wait(60)
        return super()._forward(method, path, headers, body)


def test_a_fetch_that_is_killed_is_taken_up(node, store, monkeypatch):
    content = random.Random(1).randbytes(24 << 20)
    put(store.url, "big/model.safetensors", content)
    cache, held = node("node-1"), Held(store.upstream_url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", held.url)
    process = multiprocessing.get_context("spawn").Process(target=fetch, args=("s3://bucket/big",))
    process.start()
    while sum(path.stat().st_size for path in (cache / "partial").glob("*")) < held.until:
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    held.go_on.set()
    held.close()
    assert not (cache / "blobs").exists()
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    before = store.count("GET", "big/model")
    fetch("s3://bucket/big")
    assert store.count("GET", "big/model") - before == 1
    [blob] = (cache / "blobs").iterdir()
    assert blob.read_bytes() == content and blob.name == hashlib.sha256(content).hexdigest()
    assert not [*(cache / "partial").iterdir()]


def test_what_comes_damaged_is_fetched_again_and_then_refused(made, model_hub, node, tmp_path):
    sent = []

    def damage(name, content, until=1):
        sent.append(name)
        wrong = name == "other.safetensors" and sent.count(name) <= until
        return content[::-1] if wrong else content

    model_hub.damage = damage
    assert made(HUB_URL)[0]["tint"] == "green red" and sent.count("other.safetensors") == 2
    node("node-2")
    sent.clear()
    model_hub.damage = lambda name, content: damage(name, content, until=99)
    (tmp_path / "out" / "data" / "00000.parquet").unlink()
    said = made(HUB_URL, code=1)
    assert "other.safetensors came 3 times with other contents than it should have" in said


@pytest.mark.parametrize("where", ["hub", "bucket"])
def test_damage_in_the_cache_is_found_and_mended(where, made, model_hub, model_store, tmp_path, latentmill):
    url = HUB_URL if where == "hub" else "s3://bucket/models/red"
    rows = made(url)
    [blob] = [path for path in (tmp_path / "node-1").rglob("blobs/*") if path.read_bytes() == b"green"]
    blob.chmod(0o644)
    blob.write_text("grxxn")
    (tmp_path / "out" / "data" / "00000.parquet").unlink()
    assert made(url) == rows
    assert "is not what it was when it came: it is fetched anew" in latentmill.said


def test_an_object_that_changes_ends_the_job_where_it_is_not_cached_yet(made, model_store, node, tmp_path):
    url = "s3://bucket/models/red"
    rows = made(url)
    put(model_store.url, "models/red/other.safetensors", b"blue!")
    (tmp_path / "out" / "data" / "00000.parquet").unlink()
    assert made(url) == rows  # it has what was planned
    node("node-2")
    (tmp_path / "out" / "data" / "00000.parquet").unlink()
    said = made(url, code=1)
    assert "a worker is not what the plan says" in said
    assert "s3://bucket/models/red/other.safetensors was changed since the job was planned" in said


def test_no_room_is_one_line(made, model_hub, monkeypatch):
    real = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: real._replace(free=1))
    said = made(HUB_URL, code=3)
    assert "config.json has 2 B, and 1 B are free in" in said and "HF_HOME says another folder" in said


def test_an_etag_that_is_no_md5_is_believed_when_the_same_comes_twice(node, model_store, monkeypatch):
    """As of objects that are encrypted with a key of one's own."""
    from latentmill.storage import bucket

    real = bucket._stored
    monkeypatch.setattr(
        bucket, "_stored", lambda entry: real(entry)._replace(tag=hashlib.md5(real(entry).tag.encode()).hexdigest())
    )
    fetch("s3://bucket/models/red")
    assert sorted(contents(node("node-1"))) == sorted(FILES[name] for name in WANTED)


# --------------------------------------------------------------------------------------------------------- once a node


def test_a_node_is_set_up_once_before_its_workers_load(made, local, notes):
    made(local, output="a")
    assert [note for note in notes() if not note.startswith("built")] == ["set up", "loaded"]
    made(local, output="b")  # another run
    assert notes().count("set up") == 2


@pytest.mark.skipif(os.environ.get("MODELS") != "all", reason="MODELS=all: it starts Ray, and takes 10 s of CPU")
def test_workers_of_a_node_fetch_once_and_set_it_up_once(made, model_hub, notes, tmp_path, monkeypatch):
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    few = [f"stages.{stage}.num_cpus=0.1" for stage in ("read", "encode", "tint", "write")]
    made(HUB_URL, "cluster=local", "placement=split", "stages.tint.replicas=3", "rows_per_shard=1", *few)
    assert model_hub.sent_files() == WANTED
    said = [note for note in notes() if not note.startswith("built")]
    assert said == ["set up", "loaded", "loaded", "loaded"]
