"""Batch latent diffusion: rows of prompts, images or latents become datasets, each row exactly once.

``latentmill.run("txt2img", ["sampling.steps=10"])`` is what the command line does. Plugins import ``latentmill.plugin``.
"""

from latentmill.config import load_job
from latentmill.run import run, status  # imported here so that ``latentmill.run`` is the function, and not its module

__version__ = "0.1.0"
__all__ = ["load_job", "run", "status"]
