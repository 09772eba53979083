"""What the tests of the fault table share: the job."""

import pytest
from tests.faults.forks import PROMPTS, command, shards

pytest.register_assert_rewrite("tests.faults.drivers", "tests.faults.table")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "output").mkdir()
    return tmp_path


@pytest.fixture(scope="session")
def job(forks, tmp_path_factory):
    """A job of 6 rows in 3 shards, and the files that it makes when nothing happens."""
    alone = tmp_path_factory.mktemp("alone")
    (alone / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = [
        f"source.path={alone / 'prompts.txt'}", "samples_per_row=1", "rows_per_shard=2", "sampling.steps=2", "deterministic=true",
        "sampling.height=32", "sampling.width=32", "grace=0",
        *(f"stages.{name}.batch_size=2" for name in ("read", "encode", "denoise", "decode", "write")),
    ]  # fmt: skip
    assert forks.run(command(settings, alone / "out"), alone / "log") == 0, (alone / "log").read_text()
    return settings, shards(alone / "out")
