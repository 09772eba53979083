"""What a URL of a model means, and what it was found to be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote

from latentmill.storage import CREDENTIALS
from latentmill.storage.hub import COMMIT_HASH

HUB_MODEL = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<key>.*))?", re.ASCII
)
FORMS = ", ".join(["hf://OWNER/NAME@REVISION", *(f"{kind}://BUCKET/FOLDER" for kind in CREDENTIALS)])
_SHA256 = re.compile("[0-9a-f]{64}")


def is_url(value: object) -> bool:
    """Whether a setting says that the weights lie elsewhere; whether they can be had from there, ``ModelURL.of`` says."""
    return isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value) is not None


@dataclass(frozen=True)
class ModelURL:
    """A repository of the Hub or a bucket, and a folder or file in it."""

    scheme: str
    place: str
    """``OWNER/NAME``, or a bucket's name."""
    key: str
    revision: str = ""
    """Of the Hub."""

    @staticmethod
    def of(text: str, revision: str | None = None) -> ModelURL:
        """``revision``: of the Hub, where the URL says none. Raises ValueError for what is none, and for two revisions that differ."""
        scheme, _, rest = text.partition("://")
        if scheme not in ("hf", *CREDENTIALS):
            raise ValueError(f"{text} can't be fetched: give a path of this machine, or {FORMS}")
        if scheme != "hf":
            place, _, key = rest.partition("/")
            if not place:
                raise ValueError(f"{text} names no bucket: {scheme}://BUCKET/FOLDER")
            return ModelURL(scheme, place, _key(key))
        found = HUB_MODEL.fullmatch(text)
        if not found or found["repository"].split("/")[0] in ("datasets", "spaces", "models"):
            raise ValueError(f"{text} is no model of the Hub: hf://OWNER/NAME@REVISION, and a folder or file behind it")
        said = unquote(found["revision"] or "")
        if said and revision and said != revision:
            raise ValueError(
                f"{text} says revision {said}, and the setting beside it {revision}: leave one of them out"
            )
        said = said or revision or "main"
        if {"", ".", ".."} & {*said.split("/")}:
            raise ValueError(f"{said} is no revision of the Hub")
        return ModelURL("hf", found["repository"], _key(found["key"] or ""), said)

    def __str__(self) -> str:
        """As ``of`` reads it: a branch's name may have slashes, too."""
        whole = re.fullmatch(r"refs/(convert|pr)/[^/]+", self.revision)
        at = f"@{quote(self.revision, safe='/' if whole else '')}" if self.revision else ""
        return f"{self.scheme}://{self.place}{at}" + (f"/{self.key}" if self.key else "")


def _key(text: str) -> str:
    parts = [part for part in text.split("/") if part]
    if {".", ".."} & set(parts):
        raise ValueError(f"{text}: . and .. are no folders of a store")
    return "/".join(parts)


@dataclass(frozen=True)
class ModelFile:
    """A file of a model. Raises ValueError for what leads out of a folder: a listing and a plan may be a stranger's."""

    name: str
    """Below the URL's folder, with slashes."""
    size: int
    tag: str
    """The store's own: a blob of git, an ETag."""
    sha256: str = ""
    """Of its contents, 64 hex digits, where that is known."""

    def __post_init__(self) -> None:
        if {"", ".", ".."} & {*self.name.split("/")} or "\0" in self.name:
            raise ValueError(f"a model's file can't be called {self.name!r:.200}")
        if self.sha256 and not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self.name}: {self.sha256!r:.200} is no SHA-256")


@dataclass(frozen=True)
class Pin:
    """What a URL was found to be."""

    version: str
    """A commit of the Hub; "" of a bucket."""
    files: tuple[ModelFile, ...]
    is_file: bool = False
    """Whether the URL is one file's, and no folder's."""

    def __post_init__(self) -> None:
        if self.version and not COMMIT_HASH.fullmatch(self.version):
            raise ValueError(f"{self.version!r:.200} is no commit")

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def of(self, names: Iterable[str]) -> Pin:
        """Of these files alone."""
        wanted = {*names}
        return replace(self, files=tuple(file for file in self.files if file.name in wanted))

    def to_json(self) -> dict[str, Any]:
        files = [[file.name, file.size, file.tag, file.sha256] for file in self.files]
        return {"version": self.version, "is_file": self.is_file, "files": files}

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Pin:
        """Raises KeyError, TypeError or ValueError for what is none."""
        files = tuple(ModelFile(str(n), int(s), str(t), str(d)) for n, s, t, d in found["files"])
        return Pin(str(found["version"]), files, bool(found["is_file"]))
