"""``latentmill export``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from latentmill import storage
from latentmill.commands.command import Command
from latentmill.commands.listings import Formats
from latentmill.notices import as_ctrl_c
from latentmill.text import escaped


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", type=storage.place)
    parser.add_argument(
        "folder", metavar="FOLDER", type=storage.place, help="where to; of several formats each has a folder in it"
    )
    parser.add_argument("--to", metavar="FORMATS", required=True, help="names of formats, with commas between")
    parser.add_argument(
        "--names",
        metavar="COLUMN",
        help="the column that says what the pictures are called: file or id, if nothing is said",
    )
    parser.add_argument("--formats", action=Formats, nargs=0, help="list the formats, and end")


def _export(options: Any) -> int:
    from latentmill.exports.export import export

    def tell(line: str) -> None:
        print(escaped(line), file=sys.stderr)

    try:
        with as_ctrl_c():
            formats = [name.strip() for name in options.to.split(",")]
            found = export(options.output, formats, options.folder, options.names, tell)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(*found.lines(), sep="\n")
    return 0


EXPORT_COMMAND = Command("export", "Write a finished dataset in formats that trainers read.", _options, _export)
