"""A fault of a driver or of its store: what is there when it has ended, and that the same command ends in the same dataset."""

import subprocess

from tests.faults.forks import command, shards
from tests.faults.table import DRIVERS, told, whole


def in_words(code):
    return {0: "goes on", -9: "killed; resumed"}.get(code, f"stops with {code}; resumed")


def run_twice(fault, place, job, forks, folder):
    """With the fault at the place, and again without."""
    settings, alone = job
    output, log, obeys = folder / "output", folder / "log", fault == "permission denied"
    if fault == "disk full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", output], check=True)
    try:
        code = forks.run(
            command(settings, output), log, obeys, LATENTMILL_FAILPOINT=f"{place}:{DRIVERS[fault]}:{folder}"
        )
        said = log.read_text()
        assert (folder / place).exists(), f"never reached\n{said}"
        after = shards(output)
        assert after.items() <= alone.items(), "what has a name is whole and right"
        assert (output / "_SUCCESS").exists() == (code == 0) and (code or after == alone)
        assert code != 99 and "Traceback" not in said, said
        if code in (1, 3):
            assert said.splitlines()[-1].startswith("latentmill: "), said
        if code != -9 and fault != "permission denied":  # who may write nothing may remove nothing
            assert not list((output / ".tmp").glob("*"))
        mend(folder)
        assert forks.run(command(settings, output), log, obeys) == 0, log.read_text()
        whole(output, alone)
    finally:
        if fault == "disk full":
            subprocess.run(["umount", output], check=True)
    told(fault, place, in_words(code))


def mend(folder):
    (folder / "broken").unlink(missing_ok=True)
    (folder / "output" / "filler").unlink(missing_ok=True)
    for path in (folder / "output", *(folder / "output").rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
