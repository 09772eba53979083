"""Files of a dataset on the Hugging Face Hub, at one commit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Any, ClassVar
from urllib.parse import unquote

from latentmill.errors import StorageError
from latentmill.sources.files.remote import RemoteFiles
from latentmill.storage import Stored
from latentmill.storage.hub import COMMIT_HASH, ask_hub, hub_endpoint

DATASET_URL = re.compile(
    r"hf://datasets/(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<key>.*))?"
)
HUB_TIMEOUT = 60.0
"""Seconds."""


class HubFiles(RemoteFiles):
    """``hf://datasets/OWNER/NAME[@REVISION]/PATH``. What the revision means is asked once; fingerprints begin with the commit.

    Tags are blob ids. Nothing changes at a commit, so none is compared when a file is read.
    """

    range: ClassVar[int] = 4 << 20  # it counts requests, and refuses who makes many

    def __init__(self, path: str) -> None:
        found = DATASET_URL.fullmatch(path)
        if not found:
            raise ValueError(f"{path} is no file or folder of a dataset: hf://datasets/OWNER/NAME@REVISION/PATH")
        super().__init__(path, found["key"] or "")
        self.repository, self.revision = found["repository"], unquote(found["revision"] or "main")
        try:
            import huggingface_hub
        except ImportError as error:
            raise ValueError(f"{path}: the Hub needs huggingface_hub: pip install 'latentmill[hf]'") from error
        self.endpoint = hub_endpoint()
        self.api: Any = huggingface_hub.HfApi(endpoint=self.endpoint)

    @cached_property
    def commit(self) -> str:
        """The commit that is read, 40 hex digits."""
        if COMMIT_HASH.fullmatch(self.revision):
            return self.revision
        return str(self._asked("", lambda: self.api.dataset_info(self.repository, revision=self.revision).sha))

    def _version(self) -> str:
        return f"{self.commit} "

    def url(self, key: str) -> str:
        return f"hf://datasets/{self.repository}@{self.commit}/{key}"

    def known_by_contents(self, names: Iterable[str]) -> bool:
        return True

    @property
    def knows_neighbours(self) -> bool:
        return True  # of one commit all is known

    def expect(self, fingerprint: str) -> None:
        if "commit" not in vars(self):  # the branch may have moved on
            self.commit = fingerprint.partition(" ")[0]

    def _list(self, folder: str, deep: bool) -> Iterator[tuple[str, Stored | None]]:
        tree = partial(self.api.list_repo_tree, self.repository, folder or None, recursive=deep, **self._where())
        try:
            found = self._asked(folder, lambda: list(tree()))
        except FileNotFoundError:
            return
        for each in found:
            if hasattr(each, "blob_id"):
                yield each.path, Stored(each.size, each.blob_id)
            elif not deep:
                yield each.path, None

    @cached_property
    def _has_any(self) -> bool:
        folders = [each for each in self._info(self.key) if not hasattr(each, "blob_id")] if self.key else [""]
        return bool(folders)  # each has a file somewhere, in git

    def _look(self, key: str) -> Stored | None:
        files = [Stored(each.size, each.blob_id) for each in self._info(key) if hasattr(each, "blob_id")]
        return files[0] if files else None

    def _info(self, key: str) -> list[Any]:
        """What a file or a folder is; nothing, if it is not there."""
        found = self._asked(key, partial(self.api.get_paths_info, self.repository, [key], **self._where()))
        return [each for each in found if each.path == key]

    def _where(self) -> dict[str, str]:
        return {"revision": self.commit, "repo_type": "dataset"}

    def _fetch(self, key: str, start: int, stop: int) -> tuple[bytes, Stored | None]:
        answer = self._answer(key, start, stop)
        content = bytes(answer.content)
        return (content if answer.status_code == 206 else content[start:stop]), None  # not all servers know parts

    def _first(self, key: str, stop: int) -> tuple[bytes, Stored]:
        answer = self._answer(key, 0, stop)
        content = bytes(answer.content)
        size = answer.headers.get("Content-Range", "").rpartition("/")[2] if answer.status_code == 206 else len(content)
        if not str(size).isdecimal():
            raise StorageError(f"{self.url(key)}: what came doesn't say how much there is (Content-Range)")
        return content[:stop], Stored(int(size), "")  # of one commit, there is no other

    def _answer(self, key: str, start: int, stop: int) -> Any:
        """To a request for bytes of a file."""
        from huggingface_hub import hf_hub_url, utils

        client: Any = utils  # whose types say of nothing that it is for others

        url = hf_hub_url(self.repository, key, endpoint=self.endpoint, **self._where())
        headers = {**client.build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}

        def get() -> Any:
            answer = client.get_session().get(url, headers=headers, timeout=HUB_TIMEOUT)
            client.hf_raise_for_status(answer)
            return answer

        return self._asked(key, get)

    def _another(self, path: str) -> RemoteFiles:
        other = HubFiles(path)
        other.commit = self.commit
        return other

    def _asked(self, key: str, ask: Callable[[], Any]) -> Any:
        return ask_hub(f"hf://datasets/{self.repository}", self.revision, key, ask)
