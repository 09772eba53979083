"""``latentmill top``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from latentmill import storage
from latentmill.commands.command import Command
from latentmill.errors import JobError, PlanError
from latentmill.text import escaped, one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

    from latentmill.snapshots import Snapshot

EVERY, EVERY_IN_STORE = 2.0, 10.0
"""Seconds between two looks at a folder, and at an object store."""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", type=storage.place, nargs="?")
    parser.add_argument("--once", action="store_true", help="show how it stands now, and end")
    parser.add_argument("--json", action="store_true", help="the same as JSON, and end")
    parser.add_argument(
        "--dashboard", action="store_true", help="print a dashboard for Grafana, to be imported there, and end"
    )


def _top(options: Any) -> int:
    from latentmill.metrics import dashboard
    from latentmill.snapshots import read_all

    if options.dashboard:
        print(json.dumps(dashboard(), indent=1))
        return 0
    if options.output is None:
        raise JobError("say which job is to be shown: latentmill top OUT")
    store = storage.at(options.output)
    found = list(read_all(store).values())
    if not found and not store.exists("plan.json"):
        raise PlanError(f"{options.output} holds no dataset: there is no plan.json in it")
    if options.json:
        print(json.dumps(_as_json(options.output, found)))
        return 0
    with suppress(KeyboardInterrupt):  # who looks on ends nothing
        (_lines if options.once or not sys.stdout.isatty() else _on_screen)(options, store, found)
    return 0


def _lines(options: Any, store: storage.Storage, found: Sequence[Snapshot]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    before: tuple[Sequence[Snapshot], str] | None = None
    for now in _looks(store, found):
        if now != before:  # drivers say less often how they stand
            console.print(_rendered(options.output, *now))
        silent = [each for each in now[0] if each.silent_for(time.time()) is not None]
        if options.once or len(silent) == len(now[0]):  # nobody sits here who sees that they say no more
            return
        before = now


def _on_screen(options: Any, store: storage.Storage, found: Sequence[Snapshot]) -> None:
    from rich.live import Live

    with Live(auto_refresh=False) as screen:
        for now in _looks(store, found):
            screen.update(_rendered(options.output, *now), refresh=True)


def _looks(store: storage.Storage, found: Sequence[Snapshot]) -> Iterator[tuple[Sequence[Snapshot], str]]:
    """What there is to be seen, again and again until there is no driver, and why it could not be seen now: it is looked for again."""
    from latentmill.snapshots import read_all

    wrong = ""
    while True:
        yield found, wrong
        if not found:
            return
        time.sleep(_pause(store))
        try:
            found, wrong = list(read_all(store).values()), ""
        except OSError as error:
            wrong = one_line(error)


def _pause(store: storage.Storage) -> float:
    return EVERY_IN_STORE if isinstance(store, storage.Bucket) else EVERY


def _rendered(output: str, found: Sequence[Snapshot], wrong: str = "") -> RenderableType:
    """All drivers together, and of several each in a line; who is silent; what was said last."""
    from rich.console import Group
    from rich.text import Text

    from latentmill.progress import duration_text
    from latentmill.snapshots import added

    now = time.time()
    speaking = [each for each in found if each.silent_for(now) is None]
    parts: list[RenderableType] = []
    if speaking:
        shown = added([each.shown for each in speaking])
        parts.append(shown.table())
        if len(speaking) > 1:
            parts += [Text(f"{each.driver}: {each.shown.line()}") for each in speaking]
        parts += [Text(escaped(line)) for line in shown.lately]
    else:
        parts.append(Text(f"{output}: no driver works on it now; latentmill status says how far it is"))
    for each in found:
        if (silent := each.silent_for(now)) is not None:
            parts.append(Text(f"{each.driver}: silent for {duration_text(silent)}, by this machine's clock"))
    parts += [Text(f"not seen now: {wrong}")] * bool(wrong)
    return Group(*parts)


def _as_json(output: str, found: Sequence[Snapshot]) -> dict[str, Any]:
    """``output``; ``drivers``, each as in its file with ``silent_for`` seconds or null; ``together``, those that speak, or null."""
    from latentmill.snapshots import added

    now = time.time()
    speaking = [each.shown for each in found if each.silent_for(now) is None]
    return {
        "output": output,
        "drivers": [{**asdict(each), "silent_for": each.silent_for(now)} for each in found],
        "together": asdict(added(speaking)) if speaking else None,
    }


TOP_COMMAND = Command("top", "Show a job that runs, from wherever its output is seen.", _options, _top)
