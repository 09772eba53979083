"""The fault table of ``docs/reliability.md``: which faults, at which places, and what happened.

The tests of faults compare it with what happens; with ``WRITE_DOCS=1 FAULTS=all`` they write it. Without ``FAULTS=all`` a node
is removed at two of the places only, since it takes half a minute each.
"""

import os
from pathlib import Path

from tests.faults.forks import shards

from latentmill import storage
from latentmill.verify import verify

DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"
PLACES = {
    "planning": "the plan is published",
    "encode": "encoding",
    "denoise": "denoising",
    "decode": "decoding",
    "writing": "half of a shard is in its temporary file",
    "data synced": "the shard is synced, without its name",
    "published": "it has its name, nobody has been told",
    "finishing": "all shards are there, `_SUCCESS` is not",
}
DRIVERS = {
    "driver SIGKILL": "kill",
    "SIGTERM": "SIGTERM",
    "Ctrl-C": "SIGINT",
    "out of memory": "memory",
    "disk full": "fill",
    "permission denied": "lock",
    "storage error": "store EIO",
}
WORKERS = {"worker SIGKILL": "kill", "worker hangs": "hang", "node removed": "pause"}


def told(fault, place, words):
    """What happened stands in the docs."""
    lines = DOCS.read_text().splitlines()
    heads = next(line for line in lines if line.startswith("| at this moment ")).split("|")
    column = [head.strip() for head in heads].index(fault)
    at = next(number for number, line in enumerate(lines) if line.startswith(f"| {PLACES[place]} "))
    cells = lines[at].split("|")
    if os.environ.get("WRITE_DOCS"):
        cells[column] = f" {words} "
        lines[at] = "|".join(cells)
        DOCS.write_text("\n".join(lines) + "\n")
    assert cells[column].strip() == words, f"{fault}, {place}"


def whole(output, alone):
    """The dataset is that of a run to which nothing happened."""
    assert shards(output) == alone and (output / "_SUCCESS").exists()
    verdict = verify(storage.at(str(output)))
    assert verdict.sound and (verdict.ok, verdict.failed) == (6, 0)
