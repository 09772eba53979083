"""Jobs composed once: for each set of choices Hydra is asked a single time in a process, and each who asks gets a copy.

Composition is most of what a small job costs, and its values are set afterwards: hundreds of tests would do the same again.
"""

import copy
import functools
import sys

from hydra.core.global_hydra import GlobalHydra

from latentmill.config import load


def remembered(composed):
    """``composed``, whose answers are kept; not those for job files, nor for plugins that a test installs: those may change."""
    kept, path = {}, list(sys.path)

    @functools.wraps(composed)
    def answer(config_name, choices):
        if config_name == load.THE_FILE or sys.path != path:
            return composed(config_name, choices)
        searched = GlobalHydra.instance().config_loader().get_search_path().get_path()
        key = config_name, *choices, *((place.provider, place.path) for place in searched)
        if key not in kept:
            kept[key] = composed(config_name, choices)
        return copy.deepcopy(kept[key])

    return answer


def once(patch=setattr):
    """From now on; ``patch`` is ``setattr``, or that of a MonkeyPatch."""
    patch(load, "composed", remembered(load.composed))
