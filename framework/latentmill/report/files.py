"""Files that people might have under the same name: we replace our own, and leave theirs."""

from __future__ import annotations

import logging

from latentmill.storage import Storage

logger = logging.getLogger("latentmill")

MARK = "made by latentmill, which replaces it at the end of each run; without this line it is yours"
"""In every file that people might have under the same name."""


def put(store: Storage, name: str, content: bytes) -> None:
    """Put a file in place, unless there is one of that name that we did not make."""
    if store.exists(name) and MARK.encode() not in store.read(name):
        logger.warning(f"{store.url.rstrip('/')}/{name} was not made by latentmill, and stays as it is")
    else:
        store.put(name, content)
