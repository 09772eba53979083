"""Run all benchmarks, one after another, and write benchmarks/RESULTS.md.

    python -m benchmarks [NAME ...] [--quick] [--xenna PYTHON]

Half an hour on an idle machine; on a busy one the figures are worth nothing. ``--quick`` tries every script at its smallest,
and prints what it would have written. benchmarks/gpu.py is for a machine with a GPU, and is not among them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE))

from printed import COLLECTED, machine  # noqa: E402

SCRIPTS: dict[str, tuple[list[str], list[str]]] = {
    "pipeline": ([], ["--rows", "64", "128", "--repeats", "1", "--peer-repeats", "1"]),
    "shapes": (
        ["--repeats", "1", "--rows", "640", "--loop", "128"],
        ["--repeats", "1", "--rows", "32", "--loop", "16"],
    ),
    "flow": ([], ["64"]),
    "dispatch": ([], ["2000"]),
    "denoise": (["--repeats", "9"], ["--repeats", "1", "--rows", "100"]),
    "planning": (["10000000"], ["100000"]),
    "probe": ([], ["--rows", "16", "--times", "2"]),
    "many_shards": ([], ["200"]),
    "memory": ([], ["--small"]),
    "reading": ([], ["200", "--repeats", "1"]),
    "first_row": ([], ["--repeats", "1"]),
    "replicas": ([], ["--batches", "40"]),
    "spilling": ([], ["--rows", "64"]),
}
"""What each is told: for RESULTS.md, and when it is only tried. One that is not here is told nothing."""
NO_SCRIPTS = {"__main__", "printed", "gpu"}


def main() -> int:
    """Run them; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCRIPTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--xenna", metavar="PYTHON", help="of a virtual environment that has cosmos-xenna")
    options = parser.parse_args()
    there = {path.stem for path in HERE.glob("*.py")} - NO_SCRIPTS
    if unknown := {*options.names} - there:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(sorted(there))}")
    sections, failed = [], False
    for name in options.names or [*SCRIPTS, *sorted(there - {*SCRIPTS})]:
        told = SCRIPTS.get(name, ([], []))[options.quick]
        if name == "pipeline" and options.xenna:
            told = [*told, "--xenna", options.xenna]
        text, right = _section(name, told, hidden=options.xenna)
        sections.append(text)
        failed |= not right
    whole = "\n".join(["# Benchmarks", "", "Written by `make bench`. " + machine(), "", *sections])
    if options.quick or options.names:
        print(whole)
    else:
        (HERE / "RESULTS.md").write_text(whole)
    return int(failed)


def _section(name: str, told: list[str], hidden: str | None = None) -> tuple[str, bool]:
    """What a script says, and whether it came to its end. ``hidden``: a path of this machine, which is nobody's business."""
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    started = time.monotonic()
    command = [sys.executable, str(HERE / f"{name}.py"), *told]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, COLLECTED: "1"})
    seconds = time.monotonic() - started
    print(f"{seconds:.0f} s", file=sys.stderr, flush=True)
    shown = " ".join([f"{name}.py", *("PYTHON" if each == hidden else each for each in told)])
    text = f"## {name}\n\n{done.stdout.strip()}\n\n`python benchmarks/{shown}`, {seconds:.0f} s.\n"
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        text += f"\nIt failed with exit code {done.returncode}.\n"
    return text, done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
