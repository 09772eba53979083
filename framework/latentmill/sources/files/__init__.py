"""The files that a source reads, wherever they lie: on this machine, in an object store, on the Hugging Face Hub."""

from __future__ import annotations

import re

from latentmill.sources.files.files import Files, FolderEntry
from latentmill.sources.files.local import LocalFiles
from latentmill.sources.files.ranges import SourceFile, StoredFile
from latentmill.storage import CREDENTIALS

__all__ = ["FolderEntry", "Files", "SourceFile", "StoredFile", "at"]


def at(path: str) -> Files:
    """The files that ``path`` means. Touches nothing yet. Raises ValueError if there can be none, StorageError for a store without a client.

    Credentials and endpoint of a store are taken from the environment, as those of the output.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
    if scheme is None or scheme[1] == "pkg":
        return LocalFiles(path)
    if scheme[1] in CREDENTIALS:
        from latentmill.sources.files.bucket import BucketFiles

        return BucketFiles(path)
    if scheme[1] == "hf":
        from latentmill.sources.files.hub import HubFiles

        return HubFiles(path)
    stores = ", ".join(f"{kind}://BUCKET/PATH" for kind in CREDENTIALS)
    web = " (of pictures on the web img2dataset makes .tar files)" if scheme[1].startswith("http") else ""
    raise ValueError(
        f"sources are files of this machine or a shared disk, {stores} or hf://datasets/OWNER/NAME/PATH, "
        f"and {path} is not: copy it first{web}"
    )
