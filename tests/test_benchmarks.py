"""What collects the benchmarks: every script's own words in one file, and one that fails is said and ends no other."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FIRST = """
import sys
sys.path.append({folder!r})
from printed import begin, table
begin('''What it measures.

    python first.py

In words.''')
table(("what", "ratio"), [("a", 0.5), ("told", " ".join(sys.argv[1:]))])
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_runner", BENCHMARKS / "__main__.py")
    found = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec.loader.exec_module(found)
    (tmp_path / "first.py").write_text(FIRST.format(folder=str(BENCHMARKS)))
    (tmp_path / "breaks.py").write_text("print('| a |', flush=True)\nraise SystemExit('why it broke')\n")
    monkeypatch.setattr(found, "HERE", tmp_path)
    monkeypatch.setattr(found, "SCRIPTS", {"breaks": ([], []), "first": (["--all"], ["--little"])})
    return found


def run(runner, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    return runner.main()


def test_each_script_s_words_are_a_section_and_one_that_fails_ends_no_other(runner, tmp_path, monkeypatch, capsys):
    assert run(runner, monkeypatch) == 1
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## breaks\n\n| a |\n\n`python benchmarks/breaks.py`, 0 s.\n\nIt failed with exit code 1.\n" in text
    assert (
        "## first\n\nWhat it measures.\n\n    python first.py\n\nIn words.\n\n| what | ratio |\n| --- | --- |\n| a | 0.5 |\n"
        in text
    )
    assert "| told | --all |" in text and "`python benchmarks/first.py --all`" in text
    assert text.count("CPUs") == text.count("commit ") == 1  # the machine is told once
    assert "why it broke" in capsys.readouterr().err


def test_where_this_machine_has_a_peer_is_not_told(runner, tmp_path, monkeypatch):
    (tmp_path / "pipeline.py").write_text("import sys\nassert sys.argv[1:] == ['--xenna', '/here/bin/python']\n")
    monkeypatch.setattr(runner, "SCRIPTS", {"pipeline": ([], []), "first": ([], []), "breaks": ([], [])})
    run(runner, monkeypatch, "--xenna", "/here/bin/python")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "`python benchmarks/pipeline.py --xenna PYTHON`, 0 s." in text and "/here" not in text


def test_a_few_are_printed_and_nothing_is_written(runner, tmp_path, monkeypatch, capsys):
    assert run(runner, monkeypatch, "first", "--quick") == 0
    assert "| told | --little |" in capsys.readouterr().out and not (tmp_path / "RESULTS.md").exists()
    with pytest.raises(SystemExit):
        run(runner, monkeypatch, "frist")
    assert "no benchmark frist: there are breaks, first" in capsys.readouterr().err


def test_all_that_are_told_something_are_there():
    spec = importlib.util.spec_from_file_location("benchmarks_runner", BENCHMARKS / "__main__.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    assert {*found.SCRIPTS} <= {path.stem for path in BENCHMARKS.glob("*.py")} - found.NO_SCRIPTS
