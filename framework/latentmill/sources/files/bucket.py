"""Files in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure."""

from __future__ import annotations

from collections.abc import Iterator

from latentmill.sources.files.remote import RemoteFiles
from latentmill.storage import Bucket, Stored

READ_TIMEOUT = "60s"
"""Of one request, which is small here; the store's client tries again."""


class BucketFiles(RemoteFiles):
    """``s3://BUCKET/PATH`` and the like. A tag is the ETag, or where there is none the time of modification."""

    def __init__(self, path: str) -> None:
        scheme, _, rest = path.partition("://")
        bucket, _, key = rest.partition("/")
        if not bucket:
            raise ValueError(f"{path} names no bucket: {scheme}://BUCKET/PATH")
        super().__init__(path, key)
        self.bucket = Bucket(f"{scheme}://{bucket}", timeout=READ_TIMEOUT)

    def url(self, key: str) -> str:
        return f"{self.bucket.url}/{key}"

    def _list(self, folder: str, deep: bool) -> Iterator[tuple[str, Stored | None]]:
        return self.bucket.walk(folder, deep)

    def _look(self, key: str) -> Stored | None:
        return self.bucket.about(key)

    def _fetch(self, key: str, start: int, stop: int) -> tuple[bytes, Stored | None]:
        return self.bucket.part(key, start, stop)

    def _first(self, key: str, stop: int) -> tuple[bytes, Stored]:
        return self.bucket.part(key, 0, stop)

    def _another(self, path: str) -> RemoteFiles:
        return BucketFiles(path)
