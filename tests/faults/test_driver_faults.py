"""A driver that ends, at every place: the same command ends in the same dataset, byte for byte."""

import pytest
from tests.faults.drivers import run_twice
from tests.faults.table import PLACES


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", ("driver SIGKILL", "SIGTERM", "Ctrl-C", "out of memory"))
def test_a_fault_of_driver(fault, place, job, forks, folder):
    run_twice(fault, place, job, forks, folder)
