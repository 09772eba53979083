"""A row is what it is alone, whatever shares its batches and its shard."""

import pytest
from tests.random_jobs import KINDS, differences


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_rows_of_a_random_job_do_not_hang_on_their_company(seed, tmp_path):
    assert differences(seed, tmp_path) == []
