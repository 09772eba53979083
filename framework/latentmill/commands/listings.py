"""What is installed, as tables for people and as JSON: ``latentmill plugins``, ``schedulers``, ``export --formats``."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from latentmill import registry
from latentmill.commands.command import Command, print_table


class Formats(argparse.Action):
    """``--formats``: the table of formats, which is not imported for any other command's sake."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **more: Any) -> None:
        from latentmill.exports.table import EXPORT_FORMATS

        rows = [
            [each.name, each.of, ", ".join(each.needs), each.layout, each.reader] for each in EXPORT_FORMATS.values()
        ]
        print_table(["format", "latents of", "needs", "files", "read by"], rows)
        parser.exit()


def _plugin_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="import each, in another process, and say its state")


def _plugins(options: Any) -> int:
    found = registry.examine() if options.check else registry.entries()
    names = ["group", "name", "distribution", "version", *(["state"] if options.check else [])]
    if options.json:
        print(json.dumps([{name: getattr(entry, name) for name in names} for entry in found], indent=1))
        return 0
    rows = [[entry.group.removeprefix("latentmill."), *(getattr(entry, name) for name in names[1:])] for entry in found]
    print_table(["kind", *names[1:]], rows, ["" if entry.state == "ok" else "yellow" for entry in found])
    return 0


def scheduler_table() -> list[dict[str, Any]]:
    """What there is to say of each installed scheduler, ours first: keys name, order, evaluations, stochastic, paper, distribution.

    ``paper`` is the first arXiv number in the class's docstring or those of its parents.
    """
    from latentmill.plugin import Scheduler

    found = []
    there = registry.entries("scheduler")
    for entry in sorted(there, key=lambda e: (e.distribution != "latentmill", e.distribution, e.name)):
        cls = registry.load("scheduler", f"{entry.distribution}:{entry.name}")
        assert issubclass(cls, Scheduler)
        texts = " ".join(parent.__doc__ or "" for parent in cls.__mro__ if parent.__module__ == cls.__module__)
        paper = re.search(r"arXiv:\d{4}\.\d{4,5}", texts)
        found.append(
            {
                "name": entry.name,
                "order": cls.order,
                "evaluations": cls.evaluations,
                "stochastic": cls.stochastic,
                "paper": paper.group() if paper else "",
                "distribution": entry.distribution,
            }
        )
    return found


def _scheduler_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")


def _schedulers(options: Any) -> int:
    found = scheduler_table()
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [
        [
            row["name"],
            str(row["order"]),
            str(row["evaluations"]),
            "yes" * row["stochastic"],
            row["paper"],
            row["distribution"],
        ]
        for row in found
    ]
    print_table(["name", "order", "evaluations", "noise", "paper", "distribution"], rows)
    return 0


PLUGINS_COMMAND = Command("plugins", "List all installed plugins.", _plugin_options, _plugins)
SCHEDULERS_COMMAND = Command(
    "schedulers",
    "Say of each scheduler its order, what a step costs, and the paper.",
    _scheduler_options,
    _schedulers,
)
