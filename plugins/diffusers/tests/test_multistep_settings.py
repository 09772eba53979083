"""The same as test_scheduler_settings, of the schedulers that remember what the network answered before."""

import pytest
from following import problems_of
from scheduler_settings import REMEMBERING


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REMEMBERING)
def test_each_is_followed_or_refused_by_name(name, model, tmp_path):
    problems = problems_of(name, model, tmp_path)
    assert not problems, "\n".join(problems)
