"""How each benchmark says what it found: what it measures, on what machine, and a Markdown table. ``python -m benchmarks`` collects it."""

from __future__ import annotations

import inspect
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

COLLECTED = "LATENTMILL_BENCHMARKS"
"""An environment variable: set if the machine is told once for all."""
LIBRARIES = ("latentmill", "torch", "ray", "pyarrow", "numpy")


def begin(doc: str | None) -> None:
    """Print what is measured and, if nobody has, where."""
    if COLLECTED not in os.environ:
        print(machine() + "\n")
    print(inspect.cleandoc(doc or "") + "\n", flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table, each row when it is there."""
    for line in lines(head, rows):
        print(line, flush=True)


def lines(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """A table in Markdown."""
    return (f"| {' | '.join(map(str, each))} |" for each in chain((head, ["---"] * len(head)), rows))


def median(values: Iterable[float]) -> float:
    """The middle one, of an even number the larger of the two."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def machine() -> str:
    """Cores, memory, versions, commit and date, in a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    told = [f"{os.cpu_count()} CPUs ({_processor()}), {memory:.0f} GiB", f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            told.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{', '.join(told)}; commit {commit()}, {time.strftime('%Y-%m-%d')}."


def commit() -> str:
    """Of the checkout that this file is in, ``-dirty`` if it was changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "of no checkout"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
