"""A dataset that grows, of drivers that are killed and stopped, with files that are damaged, is that of one left alone."""

from tests.random_troubles import differences


def test_a_random_job_ends_in_the_bytes_of_one_that_nobody_disturbs(forks, tmp_path):
    assert differences(25, tmp_path, forks, on_ray=0) == []
