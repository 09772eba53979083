"""``latentmill status``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from latentmill import storage
from latentmill.commands.command import Command


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", type=storage.place)
    parser.add_argument("--json", action="store_true")


def _status(options: Any) -> int:
    from latentmill import half_done
    from latentmill.dataset import status

    now = status(options.output)
    kept = {} if now["success"] else half_done.newest(storage.at(options.output))
    now |= {"half_done": len(kept)} if kept else {}
    if options.json:
        print(json.dumps(now))
        return 0
    filtered, not_needed = now.get("filtered", 0), now.get("not_needed", 0)
    made = now["ok"] + now["failed"] + filtered + not_needed
    state = "complete" if now["success"] else "not complete; the same command goes on with it"
    if now["lost"]:
        state = f"was complete, and has lost {now['lost']:,} shards; the same command does them again"
    print(f"{now['output']}: job {now['name']}, {state}")
    counts = f"{now['ok']:,} ok, {now['failed']:,} failed" + f", {filtered:,} filtered" * bool(filtered)
    counts += f", {not_needed:,} not needed" * bool(not_needed)
    print(f"{made:,} of {now['planned']:,} rows: {counts}")
    half = f", and {len(kept):,} half done: the next run goes on with them" if kept else ""
    print(f"{now['shards_done']:,} of {now['shards']:,} shards{half}")
    for name in now["foreign"]:
        print(f"data/{name} is no shard of this dataset")
    for text, rows in now["warnings"].items():
        print(f"warning: {rows:,} rows: {text}")
    return 0


STATUS_COMMAND = Command("status", "Say how far a dataset is, from its folder alone.", _options, _status)
