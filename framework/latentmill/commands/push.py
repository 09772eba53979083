"""``latentmill push``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from latentmill import storage
from latentmill.commands.command import Command
from latentmill.notices import as_ctrl_c


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", type=storage.place)
    parser.add_argument("target", metavar="hf://datasets/OWNER/NAME", help="made if it is not there")


def _push(options: Any) -> int:
    from latentmill.push import push

    try:
        with as_ctrl_c():
            print(push(options.output, options.target))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


PUSH_COMMAND = Command("push", "Upload a finished dataset, with its card, to the Hugging Face Hub.", _options, _push)
