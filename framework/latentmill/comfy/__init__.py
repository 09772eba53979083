"""ComfyUI's workflows, as jobs: a file in its API format becomes the config of a job, or is refused node by node.

The way of a file: ``workflow`` reads its nodes, ``options`` what it is told beside; ``graph`` asks ``nodes`` for the function of each
node's class, which is in ``loaders``, ``conditioning``, ``pictures`` or ``sampling``, takes ``inputs`` and gives what goes over its ``links``;
``job`` makes the recipe of each output, with ``texts``; ``config`` puts source and rows around it, and ``explanation`` tells of it all.
"""

from __future__ import annotations

from latentmill.comfy.config import config_of
from latentmill.comfy.explanation import explained

__all__ = ["config_of", "explained", "is_workflow"]


def is_workflow(job: str) -> bool:
    """Whether a job is meant by the file of a workflow."""
    return job.endswith(".json")
