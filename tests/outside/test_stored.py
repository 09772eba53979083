"""``latentmill.read``: a finished dataset's rows, of any sink, for whoever asks by name."""

import pyarrow as pa
import pytest

import latentmill
from latentmill.errors import PlanError


@pytest.fixture(params=["parquet", "webdataset"])
def stored(request, latentmill, patches, pictures, tmp_path):
    """A dataset of four rows in two shards; of the third picture there is only an error."""
    (pictures / "2.png").write_bytes(b"no picture")
    job = ["encode", *patches, f"source.path={pictures}", "source.id_column=path", "rows_per_shard=2"]
    assert latentmill("run", *job, f"sink={request.param}", f"output={tmp_path / 'out'}") == 0, latentmill.said
    return tmp_path / "out"


def test_rows_come_in_the_plan_s_order_with_the_columns_that_were_asked_for(stored):
    found = list(latentmill.read(str(stored), ["id", "seed", "nothing of that name"]))
    assert [{*piece.column_names} for piece in found] == [{"id", "seed"}] * 2
    assert pa.concat_tables(found)["id"].to_pylist() == ["0.png", "1.png", "3.png"]


def test_a_dataset_that_is_not_finished_is_refused(stored, tmp_path):
    next(stored.glob("data/00001.*")).unlink()
    with pytest.raises(
        PlanError, match=r"out is not finished: 1 of 2 shards are there; its job goes on with the others$"
    ):
        list(latentmill.read(str(stored), ["id"]))
    with pytest.raises(PlanError):
        list(latentmill.read(str(tmp_path), ["id"]))
