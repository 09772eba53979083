"""``latentmill verify``."""

from __future__ import annotations

import argparse
from typing import Any

from latentmill import storage
from latentmill.commands.command import Command


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", type=storage.place)
    parser.add_argument(
        "--repair",
        action="store_true",
        help="move damaged shards and foreign files to quarantine/; the next run does the shards again",
    )


def _verify(options: Any) -> int:
    from latentmill import verify

    store = storage.at(options.output)
    found = verify.verify(store)
    plan = found.plan
    print(f"{options.output}: job {plan.name}, {plan.rows:,} rows planned in {plan.shards:,} shards")
    filtered = f", {found.filtered:,} filtered with one" * bool(found.filtered)
    not_needed = f", {found.not_needed:,} not needed" * bool(found.not_needed)
    print(f"{found.ok:,} rows ok, {found.failed:,} failed with a reason{filtered}{not_needed}, each once")
    if found.missing:
        print(f"{len(found.missing):,} shards are not done yet")
    for shard, wrong in found.damaged.items():
        print(f"shard {shard} {wrong}")
    for line in [
        *(f"data/{name} is no shard of this dataset" for name in found.foreign),
        *(f"files/{name} is no file of this dataset" for name in found.stray),
        *(f"{name} is no shard's" for name in found.stray_copies),
        *found.strange,
    ]:
        print(line)
    if options.repair:
        for line in verify.repair(store, found):
            print(line)
    print("sound" if found.sound else "NOT SOUND" + ("" if options.repair else "; --repair takes out what is wrong"))
    return 0 if found.sound else 1


VERIFY_COMMAND = Command(
    "verify",
    "Read a dataset back whole: checksums, and each planned row exactly once.",
    _options,
    _verify,
    lambda options: False,
)
