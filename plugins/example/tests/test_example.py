"""The suites that every plugin inherits, and what is this one's own."""

import pytest
import torch

from latentmill.plugin import Filtered, tensors
from latentmill.testing import SchedulerSuite, SinkSuite, StageSuite, VAESuite
from latentmill.testing.batches import with_pictures
from latentmill_example import Brightness, Patches, Trapezoid
from latentmill_example.arrow_stream import ArrowStream


class TestPatches(VAESuite):
    vae = Patches
    name = "patches"
    min_psnr = 100.0

    def changed(self):
        return Patches(side=2)


class TestTrapezoid(SchedulerSuite):
    scheduler = Trapezoid
    name = "trapezoid"


class TestBrightness(StageSuite):
    stage = Brightness
    name = "mean_brightness"


class TestArrowStream(SinkSuite):
    sink = ArrowStream
    name = "arrow_stream"


def test_nothing_is_lost():
    images = torch.rand(2, 3, 12, 8) * 2 - 1
    assert torch.equal(Patches(side=4).decode(Patches(side=4).encode(images)), images)


def test_a_side_that_is_none_is_refused():
    with pytest.raises(ValueError, match="1 or more"):
        Patches(side=0)


def test_brightness_is_the_mean_and_dark_pictures_are_filtered():
    told = {}
    found = Brightness(least=0.1)(with_pictures(), told.__setitem__)
    images = tensors.from_arrow(with_pictures(), "image")
    assert told == {0: Filtered("brightness 0.000, which is not from 0.1 to 1.0", {"brightness": 0.0})}
    assert found.column("row").to_pylist() == [11, 12, 13, 14]
    assert found.column("brightness").to_pylist() == [float(i.double().mean()) / 255 for i in images[1:]]
