"""Where a dataset lies: a folder, or a prefix of an object store. Files appear in it whole or not at all, and the first stays.

Names are relative, with slashes: ``data/00007.parquet``. A dataset rests on one promise, ``create``: of any number of
processes that create one name exactly one succeeds, and what it created stays. On a disk that is a hard link, which fails
if the name exists; on an object store a conditional put. Where neither is to be had, ``single_writer`` does without, for
people who know that nobody else writes there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from latentmill.errors import AddressError
from latentmill.storage.bucket import CREDENTIALS, Bucket, Stored
from latentmill.storage.folder import LocalFolder
from latentmill.storage.store import Storage

__all__ = ["CREDENTIALS", "Bucket", "LocalFolder", "Storage", "Stored", "at", "in_bucket", "place"]


def place(output: str) -> str:
    """A URL as it is, a folder with ``~`` for the home; ``~name`` that nobody is called is a folder's name."""
    return output if "://" in output else output and str(Path(os.path.expanduser(output)))


def at(output: str, single_writer: bool = False) -> Storage:
    """The storage that ``output`` names: a path, or a URL such as ``s3://bucket/prefix``. Touches nothing yet.

    Raises AddressError if it is neither. Credentials and endpoint of an object store are taken from the environment, as its own tools do (``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL``, ...), and never from a job.
    """
    return Bucket(output, single_writer) if in_bucket(output) else LocalFolder(output, single_writer)


def in_bucket(output: str) -> bool:
    """Whether ``output`` is a URL; if not, it is a folder. Raises AddressError if it can be neither."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", output)
    if scheme and (not re.fullmatch(r"[a-z0-9]+://[^/:]+(/[^/].*|/?)", output) or scheme[1] not in CREDENTIALS):
        places = ", ".join(f"{kind}://BUCKET/PREFIX" for kind in CREDENTIALS)
        raise AddressError(f"{output} is no place for a dataset: a folder is, or {places}")
    return scheme is not None
