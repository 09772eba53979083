"""A store that takes nothing, at every place: once it does, the same command ends in the same dataset, byte for byte."""

import pytest
from tests.faults.drivers import run_twice
from tests.faults.table import PLACES


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", ("disk full", "permission denied", "storage error"))
def test_a_fault_of_store(fault, place, job, forks, folder):
    run_twice(fault, place, job, forks, folder)
