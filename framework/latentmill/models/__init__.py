"""Weights that lie elsewhere: in a plugin's setting a URL stands for them, and the plugin is given a path of its own machine.

The driver asks once what a URL means, a commit of the Hub or the objects of a bucket, and **pins** it: names, sizes and tags or digests
of the files. The pins travel with the plan. Each node fetches what its workers' plugins want of them into a cache folder, once,
whoever asks first, and compares what came with the pin.
"""

from __future__ import annotations

from latentmill.models.nodes import Lacking, lacking, seconds_to_fetch
from latentmill.models.pins import ModelFile, Pin
from latentmill.models.settings import Pins, with_local_paths

__all__ = ["Lacking", "ModelFile", "Pin", "Pins", "lacking", "seconds_to_fetch", "with_local_paths"]
