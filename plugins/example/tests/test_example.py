"""The suites that every plugin inherits, and what is this one's own."""

import pytest
import torch

from latentmill.testing import SchedulerSuite, VAESuite
from latentmill_example import Patches, Trapezoid


class TestPatches(VAESuite):
    vae = Patches
    min_psnr = 100.0


class TestTrapezoid(SchedulerSuite):
    scheduler = Trapezoid


def test_nothing_is_lost():
    images = torch.rand(2, 3, 12, 8) * 2 - 1
    assert torch.equal(Patches(side=4).decode(Patches(side=4).encode(images)), images)


def test_a_side_that_is_none_is_refused():
    with pytest.raises(ValueError, match="1 or more"):
        Patches(side=0)
