"""What can't be told stops nobody: a run ends as its dataset does."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import latentmill as package

FULL = "/dev/full"
"""A disk on which nothing can be written."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def begin(here, forks):
    """``begin(out, err, words..., VARIABLE=value)``: the command with its stdout and stderr in these files; a function that gives its exit code."""

    def begin(out, err, *words, **environment):
        process = forks.begin(words, out, path=[here / "site"], err=err, **environment)
        return lambda: forks.end(process)

    return begin


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


def test_a_run_ends_as_its_dataset_does_whoever_hears_it(here, begin, job, loud, rows, failed):
    assert begin(FULL, FULL, "run", *job, "output=out", loud)() == 0
    assert len(rows("out")) == 4 and failed("out") == [], "nor is a row to blame for what its stage can't print"
    assert (here / "out" / "_SUCCESS").is_file() and (here / "out" / "report.html").is_file()


def test_a_run_of_which_nobody_wants_to_hear(here, executable, job, loud, rows, failed):
    told = subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "bash", *executable, "run", *job, "output=out", loud])
    assert told.returncode == 0 and len(rows("out")) == 4 and failed("out") == []
    assert (here / "out" / "_SUCCESS").is_file() and (here / "out" / "report.html").is_file()


@pytest.fixture
def pipe(here):
    """``here/pipe`` and the end at which it is read."""
    os.mkfifo("pipe")
    reading = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    yield here / "pipe", reading
    with suppress(OSError):
        os.close(reading)


def test_a_reader_that_is_gone_is_not_missed(here, begin, pipe, job, loud, rows):
    path, reading = pipe
    ended = begin(path, path, "run", *job, "output=out", loud, LATENTMILL_FAILPOINT=f"planning:pause:{here}")
    while not (here / "planning").exists():
        time.sleep(0.01)
    os.close(reading)
    (here / "go").touch()
    assert ended() == 0 and len(rows("out")) == 4 and (here / "out" / "_SUCCESS").is_file()


def test_a_reader_that_reads_no_more_is_not_waited_for(here, begin, pipe, job, rows):
    path, _ = pipe
    writing = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writing, b"x" * 65536)
    os.close(writing)
    assert begin("said", path, "run", *job, "output=out")() == 0
    assert "4 of 4 rows" in (here / "said").read_text() and len(rows("out")) == 4


def test_commands_that_only_tell_say_that_they_could_not(here, begin, job, latentmill):
    assert latentmill("run", *job, "output=out") == 0
    asked = ["status", "out"], ["run", *job, "--cfg", "job"], ["--version"], ["run", "--help"], ["export", "--formats"]
    for number, words in enumerate(asked):
        assert begin(FULL, here / f"{number}", *words)() == 3, words
        assert (here / f"{number}").read_text() == "latentmill: [Errno 28] No space left on device: 'stdout'\n"


def test_commands_that_only_tell_end_with_3_where_nobody_reads_and_say_no_more(executable, here, job):
    for words in (["plan", *job, "output=out"], ["--version"]):
        reading, writing = os.pipe()
        os.close(reading)
        told = subprocess.run([*executable, *words], stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        assert (told.returncode, told.stderr) == (3, b""), words


def test_a_repair_is_done_though_nobody_hears_of_it(here, begin, job, latentmill):
    assert latentmill("run", *job, "output=out") == 0
    (here / "out" / "data" / "00000.parquet").write_bytes(b"damaged")
    begin(FULL, here / "said", "verify", "out", "--repair")()
    assert not (here / "out" / "data" / "00000.parquet").exists()


def test_what_can_t_be_made_at_the_end_is_a_line_in_the_log(here, job, latentmill, caplog):
    for name in ("README.md", "report.html"):
        (here / "out" / name).mkdir(parents=True)
    assert latentmill("run", *job, "output=out") == 0 and (here / "out" / "_SUCCESS").is_file()
    lines = [line for line in caplog.messages if "could not be made" in line]
    assert [line.partition(" ")[0] for line in lines] == ["README.md", "report.html"]


def test_a_terminal_without_unicode_is_told_what_it_can_show(here, begin, job):
    assert begin("said", "log", "run", *job, "output=日本", PYTHONIOENCODING="ascii:strict")() == 0
    assert (here / "日本" / "_SUCCESS").is_file()
    assert r"dataset       \u65e5\u672c/data (4 rows)" in (here / "said").read_text()


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
