"""Jobs composed once: for each set of choices Hydra is asked a single time in a process, and each who asks gets a copy.

Composition is most of what a small job costs, and its values are set afterwards: hundreds of tests would do the same again.
"""

import functools
import pickle
from pathlib import Path

from latentmill import registry
from latentmill.config import load, target


def remembered(composed):
    """``composed``, whose answers are kept; not those for job files, nor where a test installs config or jobs: those may change.

    Of the plugins that a test installs it is the names that count.
    """
    kept, ours = {}, files_of(registry.entries())

    @functools.wraps(composed)
    def answer(place, config_name, choices, held=None):
        installed = registry.entries()
        if isinstance(place, Path) or files_of(installed) != ours:
            return composed(place, config_name, choices, held)
        names = frozenset((entry.group, entry.name, entry.distribution) for entry in installed)
        key = place, config_name, *choices, names
        if key not in kept:
            kept[key] = pickle.dumps(composed(place, config_name, choices, held))
        return pickle.loads(kept[key])

    return answer


def files_of(installed):
    """Who brings config and jobs."""
    bringing = (registry.CONF_GROUP, registry.group("job"))
    return [(entry.name, entry.distribution, entry.version) for entry in installed if entry.group in bringing]


def once(patch=setattr):
    """From now on; ``patch`` is ``setattr``, or that of a MonkeyPatch."""
    composed = remembered(load.composed)
    for asks in (load, target):
        patch(asks, "composed", composed)
