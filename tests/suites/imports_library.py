"""A plugin's module that imports a library which asks for a GPU while it is imported, and takes functions of torch for its own."""

import sys
from pathlib import Path

from tests.suites import wrong_vaes

sys.path.insert(0, str(Path(__file__).parent / "installed"))
try:
    import library_that_asks
finally:
    del sys.path[0]


class Innocent(wrong_vaes.Right):
    """Asks that library in ``load``, when it may."""

    def load(self, device):
        library_that_asks.device()
