"""One pass over a dataset for eight trainers, killed five times: complete, once, and equal to one that nothing happened to."""

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
    assert not list((folder / ".tmp").iterdir())
