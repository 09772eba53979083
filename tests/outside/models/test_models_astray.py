"""Weights that lie elsewhere, where something is amiss: with a plan, a plugin, a URL, a cache, a bucket."""

import json
import os
import random
import shutil
import time

import pytest
from tests.outside.model_parts import HUB_URL, WANTED, fetch
from tests.outside.store_parts import Before, Server, put, put_as_is

S3_URL = "s3://bucket/models/red"


@pytest.fixture
def plugin(made, tmp_path):
    """``plugin(OLD, NEW)``: the stage's code is another."""
    path = tmp_path / "site" / "acme_tint.py"

    def plugin(old, new):
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return plugin


def undone(tmp_path):
    """The dataset lacks its first shard, so that the same command has something to do."""
    (tmp_path / "out" / "data" / "00000.parquet").unlink()


# ------------------------------------------------------------------------------------------------- plans of strangers


@pytest.mark.parametrize(("at", "value"), [(0, "../precious"), (0, "/precious"), (3, "PRECIOUS")])
def test_a_plan_that_was_tampered_with_leads_to_no_file_of_ours(at, value, made, model_store, node, tmp_path):
    made(S3_URL)
    undone(tmp_path)
    precious, path = tmp_path / "precious", tmp_path / "out" / "plan.json"
    precious.write_text("ours")
    plan = json.loads(path.read_text())
    plan["models"][S3_URL]["files"][0][at] = str(precious) if value == "PRECIOUS" else value
    path.write_text(json.dumps(plan))
    node("node-2")
    assert f"{path} can't be read as a plan" in made(S3_URL, code=2)
    assert precious.read_text() == "ours"


# ------------------------------------------------------------------------------------------------------------- plugins


MARK = "Annotated[str, WeightsPath(loads_late=True)]"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (MARK, f"{MARK} | None"),
        (MARK, "Annotated[str, WeightsPath]"),
        (MARK, f"'{MARK}', seen: 'Sequence[int]' = (), _: {MARK}"),  # a name that is imported for those who check types
    ],
)
def test_a_mark_is_seen_whatever_stands_around_it(old, new, made, plugin, model_hub):
    plugin(old, new)
    assert made(HUB_URL)[0]["tint"] == "green red"


def test_each_path_within_a_mapping_is_meant(made, plugin, model_hub):
    plugin("Annotated[list, WeightsPath()]", "Annotated[dict, WeightsPath()]")
    plugin("for each in more]", "for each in dict(more).values()]")
    more = f"stages.tint.settings.more={{first:{{path:'{HUB_URL}/other.safetensors',weight:2}}}}"
    assert made(f"{HUB_URL}/part", more)[0]["tint"] == "red green"


def test_a_plugin_that_can_t_say_which_files_it_wants_is_one_line(made, plugin, model_hub):
    plugin("WeightsPath(loads_late=True)", "WeightsPath(files=lambda names: {}['x'])")
    assert "stage tint: path: which files are wanted: KeyError: 'x'" in made(HUB_URL, code=2)


# ---------------------------------------------------------------------------------------------------------------- URLs


def test_what_is_no_place_of_weights_is_one_line(made):
    for url in ("https://huggingface.co/some/model", "file:///models/red", "gcs://bucket/red", "HF://some/model"):
        said = (
            f"stage tint: path: {url} can't be fetched: give a path of this machine, or hf://OWNER/NAME@REVISION, s3://"
        )
        assert said in made(url, code=2)


def test_a_branch_may_have_slashes(made, latentmill, given, model, model_hub):
    model_hub.commit(model, branch="new/red")
    assert latentmill("plan", *given(HUB_URL, "stages.tint.settings.revision=new/red")) == 0
    assert f"fetched       {HUB_URL}@new%2Fred at " in latentmill.out
    assert made(f"{HUB_URL}@new%2Fred")[0]["tint"] == "green red"


def test_no_revision_leads_out_of_the_cache(made, model, model_hub, tmp_path):
    for revision in (str(tmp_path / "evil"), "../../evil"):
        model_hub.commit(model, branch=revision)
        assert f"{revision} is no revision of the Hub" in made(
            HUB_URL, f"stages.tint.settings.revision={revision}", code=2
        )
    assert not [*tmp_path.rglob("evil")]


# -------------------------------------------------------------------------------------------------------------- caches


def test_caches_may_be_given_from_here(made, model_hub, model_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(variable, "here")
    for url in (HUB_URL, HUB_URL, S3_URL):
        assert made(url)[0]["tint"] == "green red"
        undone(tmp_path)


def test_a_cache_without_links_is_mended(made, model_hub, tmp_path, latentmill):
    """As one that was copied."""
    rows = made(HUB_URL)
    undone(tmp_path)
    for link in (tmp_path / "node-1" / "hf").rglob("snapshots/*/*.safetensors"):
        link.unlink()
        link.write_text("grxxn")
    assert made(HUB_URL) == rows
    assert "is not what it was when it came: it is fetched anew" in latentmill.said


def test_what_the_hub_s_client_left_when_it_was_killed_is_removed(made, model_hub, tmp_path):
    made(HUB_URL)
    undone(tmp_path)
    [blob] = [path for path in (tmp_path / "node-1" / "hf").rglob("blobs/*") if path.read_bytes() == b"green"]
    left, written = blob.with_name(f"{blob.name}.1.incomplete"), blob.with_name(f"{blob.name}.2.incomplete")
    for path in (left, written):
        path.write_bytes(b"gre")
    os.utime(left, (time.time() - 7200,) * 2)
    blob.unlink()
    made(HUB_URL)
    assert not left.exists() and written.exists()


class Refusing(Before):
    """Has no byte of an object behind ``until``, for now."""

    until = 16 << 20

    def _forward(self, method, path, headers, body):
        told = {name.lower(): value for name, value in headers.items()}.get("range", "")
        if told and int(told.partition("=")[2].partition("-")[0]) >= self.until:
            return 403, {}, b""
        return super()._forward(method, path, headers, body)


def test_what_has_come_of_a_file_needs_no_room_again(node, store, monkeypatch):
    put(store.url, "big/model.safetensors", random.Random(1).randbytes(24 << 20))
    refusing = Refusing(store.upstream_url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", refusing.url)
    with pytest.raises(OSError, match="s3://bucket/big/model.safetensors"):
        fetch("s3://bucket/big")
    refusing.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    real = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: real._replace(free=9 << 20))
    fetch("s3://bucket/big")


# ------------------------------------------------------------------------------------------------------------- buckets


def test_an_empty_file_is_one_and_what_marks_a_folder_is_none(made, model, local, model_store, tmp_path):
    for folder in (model, local):
        (folder / "merges.txt").write_text("")
    put(model_store.url, "models/red/merges.txt", b"")
    for folder in ("", "part/", "empty/"):
        put_as_is(model_store.url, f"models/red/{folder}")
    made(S3_URL)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [name for name, *_ in plan["models"][S3_URL]["files"]] == sorted(["merges.txt", *WANTED])
    undone(tmp_path)
    made(local)  # the same plan


def test_a_bucket_without_end_is_not_listed_to_its_end(made, node, monkeypatch):
    def page(method, path, headers, body):
        at = len(endless.asked)
        names = [
            f"<Contents><Key>{at}-{n}.bin</Key><Size>1</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
            for n in range(3)
        ]
        more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{at}</NextContinuationToken>"
        return (
            200,
            {"Content-Type": "application/xml"},
            f"<ListBucketResult>{more}{''.join(names)}</ListBucketResult>".encode(),
        )

    endless = Server(page)
    monkeypatch.setattr("latentmill.models.places.MOST_FILES", 10)
    for name, value in {
        "AWS_ENDPOINT_URL": endless.url,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(name, value)
    assert "s3://bucket has more than 10 files: give the folder of one model" in made("s3://bucket", code=2)
    endless.close()
