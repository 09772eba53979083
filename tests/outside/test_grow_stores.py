"""Growing where source and dataset are not on this disk, and with stages that filter and draw anew."""

import json
import os

import pyarrow.parquet as pq
import pytest
from tests.outside.store_parts import Hub, put, upload

SIEVE = '''
import pyarrow as pa
from latentmill.plugin import Filtered, Stage


class Even(Stage):
    """Lets those pass whose seed is even, and never a row whose id has an x."""

    contract = 2

    def __call__(self, batch, reject):
        rows = zip(batch.column("seed").to_pylist(), batch.column("id").to_pylist())
        good = [not seed % 2 and "x" not in name for seed, name in rows]
        for i, fine in enumerate(good):
            if not fine:
                reject(i, Filtered("odd"))
        return batch.filter(pa.array(good))
'''


@pytest.fixture
def encode(latentmill, patches, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def encode(source, output, *more, code=0):
        told = [*patches, "rows_per_shard=3", "source.keep=[file]", f"source.path={source}", f"output={output}", *more]
        assert latentmill("run", "encode", *told) == code, latentmill.said

    return encode


def whole(latentmill, output):
    assert latentmill("verify", output) == 0, latentmill.said
    assert latentmill("status", output, "--json") == 0
    now = json.loads(latentmill.out)
    assert now["success"] and not now["foreign"]
    return now


def files_of(output):
    return [row for path in sorted(output.glob("data/*")) for row in pq.read_table(path).column("file").to_pylist()]


def test_pictures_and_dataset_in_a_bucket(latentmill, encode, bucket, pictures):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    upload(endpoint, pictures, "in")
    encode(f"{bucket}/in", f"{bucket}/out")
    put(endpoint, "in/00.png", (pictures / "1.png").read_bytes())
    encode(f"{bucket}/in", f"{bucket}/out", code=2)
    encode(f"{bucket}/in", f"{bucket}/out", "--grow")
    assert whole(latentmill, f"{bucket}/out")["ok"] == 5
    put(endpoint, "in/2.png", (pictures / "1.png").read_bytes())
    put(endpoint, "in/01.png", (pictures / "1.png").read_bytes())
    encode(f"{bucket}/in", f"{bucket}/out", "--grow", code=2)
    assert "a row of 0.png+" in latentmill.err or "a row of 00.png+" in latentmill.err


def test_a_repository_grows_from_revision_to_revision(latentmill, encode, monkeypatch, pictures, tmp_path):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    try:
        hub.commit(pictures)
        source, output = f"hf://datasets/{hub.repository}", tmp_path / "out"
        encode(source, output)
        (pictures / "00.png").write_bytes((pictures / "1.png").read_bytes())
        hub.commit(pictures)
        encode(source, output, "--grow")
        assert files_of(output) == ["0.png", "1.png", "2.png", "3.png", "00.png"]
        (pictures / "3.png").write_bytes((pictures / "1.png").read_bytes())
        hub.commit(pictures)
        encode(source, output, "--grow", code=2)
        assert "can't grow, since what it was made from has changed: a row of " in latentmill.err
    finally:
        hub.close()


def test_what_is_accepted_is_the_same_as_in_a_fresh_dataset(latentmill, install, rows, tmp_path):
    install("sieve", "[latentmill.stages]\neven = sieve:Even\n", sieve=SIEVE)
    table = tmp_path / "rows.csv"
    flow = "flow=[read, encode, denoise, even, write]"
    told = ["run", "denoise", "cluster=inline", flow, "accept={attempts: 2}", "samples_per_row=2", "rows_per_shard=3"]
    told += [
        "sampling.width=16",
        "sampling.height=16",
        "sampling.steps=1",
        f"source.path={table}",
        "source.id_column=id",
    ]
    table.write_text("id,prompt\nb,a star\nd,a ring\n")
    assert latentmill(*told, f"output={tmp_path / 'out'}") == 0, latentmill.said
    table.write_text("id,prompt\na,a cross\nb,a star\nc,a circle\nd,a ring\nx,a star\n")
    assert latentmill(*told, f"output={tmp_path / 'out'}", "--grow") == 0, latentmill.said
    assert latentmill(*told, f"output={tmp_path / 'fresh'}") == 0, latentmill.said

    def known(output):
        return {(row["id"], row["row_id"][-3:], row["seed"], row["attempt"]) for row in rows(output)}

    found, fresh = (known(tmp_path / name) for name in ("out", "fresh"))
    assert found == fresh and {attempt for *_, attempt in found} == {0, 1}
    counts = [whole(latentmill, tmp_path / name) for name in ("out", "fresh")]
    assert {(count["planned"], count["ok"], count["filtered"]) for count in counts} == {
        (10, len(found), 10 - len(found))
    }
