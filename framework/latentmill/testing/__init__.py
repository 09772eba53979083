"""Checks that a plugin inherits: subclass a suite in a test file, name the plugin, and pytest runs them.

class TestTrapezoid(SchedulerSuite):
    scheduler = Trapezoid
"""

from latentmill.testing.denoiser import DenoiserSuite
from latentmill.testing.gaussian import NOISE_SCHEDULES, GaussianField, check_moments, follow, measure_order
from latentmill.testing.grid import GridSuite
from latentmill.testing.scheduler import SchedulerSuite
from latentmill.testing.sink import SinkSuite
from latentmill.testing.source import SourceSuite
from latentmill.testing.stage import StageSuite
from latentmill.testing.text_encoder import TextEncoderSuite
from latentmill.testing.vae import VAESuite

__all__ = [
    "NOISE_SCHEDULES",
    "DenoiserSuite",
    "GaussianField",
    "GridSuite",
    "SchedulerSuite",
    "SinkSuite",
    "SourceSuite",
    "StageSuite",
    "TextEncoderSuite",
    "VAESuite",
    "check_moments",
    "follow",
    "measure_order",
]
