"""Named places at which tests make the worst happen. Without ``LATENTMILL_FAILPOINT`` in the environment they do nothing.

What happens there is no part of this package: it is in a module of the tests, ``latentmill_failpoints``, which is imported
then and must be found.

=============  ==================================================================================================
planning       the plan is published, nothing has started
read … decode  a worker is about to work on a batch
writing        some of a shard's rows are in its temporary file
data synced    the file is whole and synced, and has not its name yet
published      it has its name, and nobody has been told
finishing      all shards are there, _SUCCESS is not
store          the output's folder is used
half_done synced  rows that are half done are whole and synced, and their file has not its name yet
exporting 7    an export is about to write that shard's files
exported 7     it has written them, and said so
=============  ==================================================================================================
"""

from __future__ import annotations

import importlib
import os

VARIABLE = "LATENTMILL_FAILPOINT"


def reach(name: str) -> None:
    """This place has been reached."""
    if VARIABLE in os.environ:
        importlib.import_module("latentmill_failpoints").reach(name)
