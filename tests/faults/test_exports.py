"""An export that is killed, and the same command again: complete, and equal to one that nothing happened to."""

import os

import pytest
from tests.faults.forks import command

PLACES = [
    ".latentmill synced",
    "exporting 1",
    "000000003-000.png synced",
    "000000004-000.txt synced",
    "exported 0",
    "metadata.jsonl synced",
]
ALWAYS = [".latentmill synced", "exporting 0", "exporting 1", "exporting 2", "metadata.jsonl synced"]
"""Those that each export comes to, whatever an earlier one has done."""


def files(folder):
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith((".tmp/", ".latentmill/"))}


@pytest.fixture(scope="module")
def dataset(job, forks, tmp_path_factory):
    """A dataset of 6 rows in 3 shards, and its export."""
    root = tmp_path_factory.mktemp("exported")
    assert forks.run(command(job[0], root / "out"), root / "log") == 0, (root / "log").read_text()
    assert forks.run(["export", root / "out", root / "export", "--to", "folder"], root / "log") == 0
    return root / "out", files(root / "export")


@pytest.mark.parametrize(
    "places", [*([place] for place in PLACES), ALWAYS], ids=lambda places: places[0] + "+" * len(places[1:])
)
def test_an_export_that_is_killed_and_goes_on_is_the_same(places, dataset, forks, tmp_path):
    output, alone = dataset
    assert len(alone) == 6 * 2 + 1  # pictures, captions, the list
    export = ["export", output, tmp_path / "export", "--to", "folder"]
    for number, place in enumerate(places):
        at, log = tmp_path / f"place-{number}", tmp_path / f"log-{number}"
        at.mkdir()
        assert forks.run(export, log, LATENTMILL_FAILPOINT=f"{place}:kill:{at}") == -9, f"{place}\n{log.read_text()}"
        assert files(tmp_path / "export").items() <= alone.items(), f"{place}: what has a name is whole and right"
    assert forks.run(export, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert files(tmp_path / "export") == alone
    left = list((tmp_path / "export" / ".tmp").iterdir())
    for path in left:
        os.utime(path, (0, 0))
    assert forks.run(export, tmp_path / "log") == 0
    assert files(tmp_path / "export") == alone
    assert not list((tmp_path / "export" / ".tmp").iterdir())


def test_an_interrupt_says_that_it_goes_on(dataset, forks, tmp_path):
    output, alone = dataset
    export = ["export", output, tmp_path / "export", "--to", "folder"]
    assert forks.run(export, tmp_path / "log", LATENTMILL_FAILPOINT=f"exporting 1:SIGINT:{tmp_path}") == 130
    assert (tmp_path / "log").read_text() == "interrupted; the same command goes on\n"
    assert forks.run(export, tmp_path / "log") == 0
    assert files(tmp_path / "export") == alone
