"""Seeds on all cores; which fail, and how to see them again."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence

from tests import simulation
from tests.simulation.world import World


def trial(seed: int, told: Callable[[str], None] = lambda line: None) -> str:
    """What is wrong with a seed; nothing, as it should be."""
    try:
        World(seed, told).run()
    except Exception as error:  # a KeyError in the driver is as wrong
        return f"{type(error).__name__}: {error}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run seeds, on all cores; say which fail and how to see them again."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=(simulation.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=1000, help="how many, from 0 on")
    parser.add_argument("--seed", type=int, help="this one alone, telling what happens")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        World(options.seed, print).run()
        return 0
    failed = 0
    with multiprocessing.Pool() as processes:
        for seed, wrong in enumerate(processes.imap(trial, range(options.seeds), chunksize=20)):
            if wrong:
                failed += 1
                print(f"seed {seed}: {wrong}\n    python -m tests.simulation --seed {seed}", flush=True)
    print(f"{options.seeds - failed} passed, {failed} failed")
    return 1 if failed else 0
