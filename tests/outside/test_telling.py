"""What can't be told stops nobody: a run ends as its dataset does."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

import latentmill as package


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shell(here, executable):
    """``shell(redirections, words...)``: the command as a shell starts it; what it says where nothing is redirected."""

    def run(redirections, *words, **environment):
        command = ["bash", "-c", f'"$@" {redirections}', "bash", *executable, *map(str, words)]
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def job(patches, pictures):
    return ("encode", *patches, f"source.path={pictures}")


@pytest.fixture
def loud(install, monkeypatch):
    """A stage that prints, on the path of other processes, too."""
    code = (
        "import sys\nfrom latentmill.plugin import Stage\n"
        "class Loud(Stage):\n"
        "    contract = 2\n"
        "    def __call__(self, batch, reject):\n"
        "        print('here', flush=True)\n        print('here', file=sys.stderr)\n        return batch\n"
    )
    install("loud", "[latentmill.stages]\nloud = loud:Loud\n", loud=code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return "flow=[read,encode,loud,write]"


@pytest.mark.parametrize("redirections", [">/dev/full 2>/dev/full", ">&- 2>&-"])
def test_a_run_ends_as_its_dataset_does_whoever_hears_it(redirections, here, shell, job, loud, rows, failed):
    assert shell(redirections, "run", *job, "output=out", loud).returncode == 0
    assert len(rows("out")) == 4 and failed("out") == [], "nor is a row to blame for what its stage can't print"
    assert (here / "out" / "_SUCCESS").is_file() and (here / "out" / "report.html").is_file()


def test_a_reader_that_is_gone_is_not_missed(here, executable, job, loud, rows):
    reading, writing = os.pipe()
    os.close(reading)
    told = subprocess.run([*executable, "run", *job, "output=out", loud], stdout=writing, stderr=writing, timeout=120)
    os.close(writing)
    assert told.returncode == 0 and len(rows("out")) == 4 and (here / "out" / "_SUCCESS").is_file()


def test_a_reader_that_reads_no_more_is_not_waited_for(here, executable, job, rows):
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETFL, os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writing, b"x" * 65536)
    fcntl.fcntl(writing, fcntl.F_SETFL, 0)
    command = [*executable, "run", *job, "output=out"]
    told = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing, timeout=120)
    os.close(reading)
    os.close(writing)
    assert told.returncode == 0 and b"4 of 4 rows" in told.stdout and len(rows("out")) == 4


def test_commands_that_only_tell_say_that_they_could_not(here, shell, job, latentmill):
    assert latentmill("run", *job, "output=out") == 0
    for words in (["status", "out"], ["run", *job, "--cfg", "job"]):
        told = shell(">/dev/full", *words)
        assert told.returncode == 3, words
        assert told.stderr == "latentmill: [Errno 28] No space left on device: 'stdout'\n"


def test_a_repair_is_done_though_nobody_hears_of_it(here, shell, job, latentmill):
    assert latentmill("run", *job, "output=out") == 0
    (here / "out" / "data" / "00000.parquet").write_bytes(b"damaged")
    shell(">/dev/full", "verify", "out", "--repair")
    assert not (here / "out" / "data" / "00000.parquet").exists()


def test_what_can_t_be_made_at_the_end_is_a_line_in_the_log(here, job, latentmill, caplog):
    for name in ("README.md", "report.html"):
        (here / "out" / name).mkdir(parents=True)
    assert latentmill("run", *job, "output=out") == 0 and (here / "out" / "_SUCCESS").is_file()
    lines = [line for line in caplog.messages if "could not be made" in line]
    assert [line.partition(" ")[0] for line in lines] == ["README.md", "report.html"]


def test_a_terminal_without_unicode_is_told_what_it_can_show(here, shell, job):
    told = shell("", "run", *job, "output=日本", PYTHONIOENCODING="ascii:strict")
    assert told.returncode == 0 and (here / "日本" / "_SUCCESS").is_file()
    assert r"dataset       \u65e5\u672c/data (4 rows)" in told.stdout


def test_a_program_s_own_stream_that_fails_ends_no_run(here, job, monkeypatch):
    class Broken:
        def isatty(self):
            return False

        def write(self, text):
            raise OSError("no more")

        flush = write

    for stream in (Broken(), None):
        with monkeypatch.context() as patched:
            patched.setattr("sys.stderr", stream)
            result = package.run("encode", [*job[1:], f"output=out{stream is None}"])
        assert (result.planned, result.ok) == (4, 4) and Path(result.output, "_SUCCESS").is_file()
