"""The suites that plugins inherit: each mistake is caught by the checks that should, with the sentence that says it."""

from pathlib import Path

import pytest
from tests.suites import (
    wrong_clips,
    wrong_denoisers,
    wrong_grids,
    wrong_imports,
    wrong_schedulers,
    wrong_sinks,
    wrong_sources,
    wrong_stages,
    wrong_text_encoders,
    wrong_vaes,
)
from tests.suites.mistakes import failures, line

TABLE = (Path(__file__).parents[2] / "docs" / "suites.md").read_text(encoding="utf-8")
MODULES = [
    wrong_schedulers, wrong_grids, wrong_vaes, wrong_text_encoders, wrong_denoisers, wrong_clips, wrong_imports, wrong_sources,
    wrong_stages, wrong_sinks,
]  # fmt: skip
MISTAKES = [mistake for module in MODULES for mistake in module.MISTAKES]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.kind}: {mistake.what}")
def test_a_mistake_is_caught_and_told(mistake):
    said = mistake.said()
    assert {*said} == mistake.caught_by, said
    assert any(mistake.says in sentence for sentence in said.values()), said
    assert line(mistake, said) in TABLE, "docs/suites.md is old: run docs/suites.py"


@pytest.mark.parametrize("suite", [suite for module in MODULES for suite in module.RIGHT])
def test_a_right_plugin_passes(suite):
    assert failures(suite) == {}


def test_the_table_has_a_line_for_each_mistake():
    assert sum(text.startswith("| ") for text in TABLE.splitlines()) == len(MISTAKES) + 1
