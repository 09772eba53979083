"""Every setting of every scheduler of diffusers that we know is followed, or refused by name, or has no effect: see following.

A setting that diffusers adds stands in no table, and fails.
"""

import pytest
from following import problems_of
from scheduler_settings import NAMES, REMEMBERING, VALUES, known_of

from latentmill import registry


def test_every_setting_stands_in_the_table():
    """One that a newer diffusers brings has no value here, and has to get one."""
    missing = [f"{name}.{key}" for name in NAMES for key in known_of(name) if key not in VALUES]
    assert not missing, f"no value of {', '.join(missing)}"
    ours = {e.name for e in registry.entries("scheduler") if e.distribution == "latentmill-diffusers"}
    assert ours - {"model"} == set(NAMES) - {"DPMSolverSDEScheduler"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in REMEMBERING])
def test_each_is_followed_or_refused_by_name(name, model, tmp_path):
    problems = problems_of(name, model, tmp_path)
    assert not problems, "\n".join(problems)
