"""Batch latent diffusion: rows of prompts, images or latents become datasets, each row exactly once.

``latentmill.run("txt2img", ["sampling.steps=10"])`` is what the command line does. ``latentmill.read("out/txt2img",
["row_id", "prompt"])`` gives a finished dataset's rows. Plugins import ``latentmill.plugin``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentmill.config import load_job
    from latentmill.dataset import status
    from latentmill.runner import run
    from latentmill.stored import read

__version__ = "0.1.0"
__all__ = ["load_job", "read", "run", "status"]


def __getattr__(name: str) -> Any:
    """What is public is imported when it is asked for, so that ``latentmill --help`` needs neither torch nor Hydra."""
    if name == "load_job":
        from latentmill.config import load_job

        return load_job
    if name == "read":
        from latentmill.stored import read

        return read
    if name == "run":
        from latentmill.runner import run

        return run
    if name == "status":
        from latentmill.dataset import status

        return status
    raise AttributeError(f"module 'latentmill' has no attribute {name!r}")
