"""``latentmill comfy``."""

from __future__ import annotations

import argparse
from typing import Any

from latentmill.commands.command import Command, print_table


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workflow", metavar="WORKFLOW.json", help="a workflow of ComfyUI, in its API format")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="as of run: comfy.output=9, or map.6.text=prompt"
    )


def _comfy(options: Any) -> int:
    from latentmill import comfy

    found = comfy.explained(options.workflow, options.overrides)
    print_table(["node", "class", "title", "becomes"], found.rows)
    print("\n".join(["", *found.lines]))
    return 0 if found.runs else 2


COMFY_COMMAND = Command(
    "comfy", "Say what each node of a ComfyUI workflow becomes, and which are not supported.", _options, _comfy
)
