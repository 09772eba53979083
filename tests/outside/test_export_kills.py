"""One pass over a dataset for eight trainers, killed five times: complete, once, and equal to one that nothing happened to."""

import os

from tests.outside.trainer_parts import files

EIGHT = "kohya-flux,kohya-lumina,musubi-z-image,simpletuner,automodel,comfyui,mds,energon"
SIZED = "size.buckets=[[16, 8], [8, 24], [24, 16]]"
PLACES = {
    1: "kohya-lumina synced",
    2: "exporting 1",
    3: "energon synced",
    4: "exporting 0",
    5: "automodel synced",
}
"""Places that an export comes to whatever the ones before it have done: each is of what they can't have written."""


def test_eight_formats_in_one_pass_killed_five_times(trainers, forks, tmp_path):
    output = trainers.encode("flux", SIZED)
    folder = trainers.export(output, EIGHT)
    alone = files(folder)
    counts = {name: len([1 for file in alone if file.startswith(f"{name}/")]) for name in EIGHT.split(",")}
    assert counts == {**dict.fromkeys(EIGHT.split(","), 3), "automodel": 5, "mds": 3, "energon": 2}
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()  # the list of automodel has the folder's path: the same place again
    export = ["export", output, folder, "--to", EIGHT]
    for number, place in PLACES.items():
        at, log = tmp_path / f"place-{number}", tmp_path / f"log-{number}"
        at.mkdir()
        code = forks.run(export, log, LATENTMILL_FAILPOINT=f"{place}:kill:{at}")
        assert code == -9, f"{place}\n{log.read_text()}"
        assert files(folder).items() <= alone.items(), f"{place}: what has a name is whole and right"
    assert forks.run(export, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert files(folder) == alone
    left = list((folder / ".tmp").iterdir())
    assert left, "what a killed export had not given its name yet; another may be at work there"
    (folder / ".tmp" / "mine").mkdir()
    for path in (folder / ".tmp").iterdir():
        os.utime(path, (0, 0))
    assert forks.run(export, tmp_path / "log") == 0
    assert [path.name for path in (folder / ".tmp").iterdir()] == ["mine"]


def test_a_shard_that_was_made_again_after_a_kill_is_exported_again(trainers, forks, monkeypatch, tmp_path):
    """The tar was there, and no mark said that it is ours."""
    monkeypatch.setenv("ACME_BROKEN", "1")
    one = "rows_per_shard=3"  # of two, either may be first
    output, folder = trainers.own("flux", one), tmp_path / "export"
    export = ["export", output, folder, "--to", "energon"]
    (tmp_path / "once").mkdir()
    at = f"energon settled:kill:{tmp_path / 'once'}"
    assert forks.run(export, tmp_path / "log", LATENTMILL_FAILPOINT=at) == -9, (tmp_path / "log").read_text()
    assert [*files(folder)] == ["shard_000000.tar"]
    monkeypatch.delenv("ACME_BROKEN")
    trainers.own("flux", one, "--retry-failed")
    assert files(trainers.export(output, "energon")) == files(trainers.export(output, "energon", folder="fresh"))


def test_a_tar_of_somebody_else_stays(trainers, tmp_path):
    """Though an export into its folder has been begun."""
    output, folder = trainers.encode("flux"), tmp_path / "export"
    folder.mkdir()
    (folder / "shard_000001.tar").write_bytes(b"theirs")
    for _ in range(2):
        assert trainers.latentmill("export", output, folder, "--to", "energon") == 3
        assert "shard_000001.tar is there, and is not what energon would write" in trainers.latentmill.err
    assert (folder / "shard_000001.tar").read_bytes() == b"theirs"
