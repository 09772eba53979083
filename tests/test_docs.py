"""What the pages say that is made from the code is what the code says now: ``python docs/make.py`` makes it anew."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from latentmill.fields import IN_JOB

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
MAKE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MAKE)


@pytest.mark.parametrize("name", MAKE.PARTS)
def test_a_made_part_is_fresh(name):
    page, make = MAKE.PARTS[name]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert MAKE.renewed(text, name, make()) == text, "python docs/make.py"


def test_the_defaults_that_people_read_are_the_fields():
    shown = yaml.safe_load((ROOT / "conf" / "job.yaml").read_text())["sampling"]
    assert shown == {name: field.default for name, field in IN_JOB.items()}


def test_the_formats_that_the_readme_counts_are_there():
    assert f"exports in {len(MAKE.EXPORT_FORMATS)} formats" in (ROOT / "README.md").read_text(encoding="utf-8")
