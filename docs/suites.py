"""Writes docs/suites.md: what each suite says of each mistake, as a run of the suites gives it.

.venv/bin/python docs/suites.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """# What the suites say

`latentmill.testing` has a suite for each kind of plugin. A plugin's test file inherits it:

    from latentmill.testing import VAESuite

    class TestMine(VAESuite):
        vae = MyVAE

Each line below is a wrong plugin of `tests/suites`, which has that one mistake, and the sentence by which the suite tells it. Made by
`docs/suites.py`; `tests/suites/test_suites.py` holds it.

| kind | mistake | what the suite says |
|---|---|---|
"""


def page() -> str:
    """The whole page. Runs every suite on every wrong plugin: a minute."""
    sys.path.insert(0, str(ROOT))
    from tests.suites.test_suites import MISTAKES, line

    return HEAD + "".join(line(mistake, mistake.said()) for mistake in MISTAKES)


if __name__ == "__main__":
    (ROOT / "docs" / "suites.md").write_text(page(), encoding="utf-8")
