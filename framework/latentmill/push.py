"""A finished dataset, put on the Hugging Face Hub, with its card.

``huggingface_hub`` uploads. What is there already is passed over, so the same command goes on where it was stopped, and large folders
are committed in parts. First of all comes ``plan.json``, which says whose the repository is, and last of all ``_SUCCESS``.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from latentmill import dataset, plan_files, storage, verify
from latentmill.dataset import Dataset
from latentmill.errors import PushError, RunError
from latentmill.report import MARK
from latentmill.shards import FOLDER, shard_numbers, side_file_shard
from latentmill.storage import Storage
from latentmill.text import one_line, plural

logger = logging.getLogger("latentmill")

PUSHED_FOLDERS = "data", FOLDER, "errors", "filtered"
CARD = "README.md"
PICTURES_OF_IT = "contact_sheet.png", "report.html"
SUCCESS = "_SUCCESS"
KIND = {"repo_type": "dataset"}
FILES_A_FOLDER = 10_000
"""Files in one folder, of which the Hub takes no more."""


def push(output: str, target: str) -> str:
    """Upload the dataset in the folder ``output`` to ``hf://datasets/OWNER/NAME``. Returns a line for people.

    The repository is made if there is none, and is as public as the account's new ones are. Who one is, the Hub's own login or
    ``HF_TOKEN`` says. Raises PushError, before anything is uploaded, if the dataset is not finished and sound, or the repository
    another's, or has it when it had grown further; RunError if the Hub fails, or refuses, or if the dataset changes meanwhile.
    """
    named = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)/?", target)
    if not named:
        raise PushError(f"{target} is no place to push to: hf://datasets/OWNER/NAME is")
    if "://" in output:
        raise PushError(f"{output}: what is pushed is read from a folder: copy the dataset into one")
    try:
        hub = import_module("huggingface_hub")
    except ImportError as error:
        raise PushError("push needs huggingface_hub: pip install 'latentmill[hf]'") from error
    try:
        import_module("huggingface_hub.utils").validate_repo_id(named[1])
    except ValueError as error:
        raise PushError(f"{target} is no name that the Hub takes: {one_line(error)}") from error
    store = storage.at(output)
    for folder in PUSHED_FOLDERS:
        if (many := len(store.names(folder))) > FILES_A_FOLDER:
            raise PushError(
                f"{output}/{folder} has {many:,} files, and the Hub takes {FILES_A_FOLDER:,} a folder: more rows_per_shard make fewer"
            )
    there = _finished(store, output)
    with _said(target):
        return _upload(hub, named[1], there)


@dataclass(frozen=True)
class _Finished:
    """A dataset that was read back whole, and its files as they were then."""

    there: Dataset
    tags: Mapping[int, str]

    def is_still(self) -> bool:
        """Whether it is what was read."""
        there = self.there
        return there.store.exists(SUCCESS) and there.tags() == self.tags and not there.outgrown()

    def files(self) -> tuple[dict[str, int], list[str]]:
        """What is to be pushed, with the sizes, but for ``_SUCCESS``; and what else lies in its folders."""
        there, store = self.there, self.there.store
        plans = map(plan_files.name_of, range(max(1, len(there.plan.generations))))
        names, others = [CARD, *PICTURES_OF_IT, *plans, *there.made_for_all()], list[str]()
        for folder in PUSHED_FOLDERS:
            found = store.names(folder)
            of = shard_numbers(found, there.sink.suffix if folder == "data" else ".jsonl")
            for name in found:
                shard = side_file_shard(name) if folder == FOLDER else of.get(name)
                (names if shard is not None and shard < there.plan.shards else others).append(f"{folder}/{name}")
        sizes = zip(names, store.each(store.size, names))
        return {name: size for name, size in sizes if size is not None}, others


def _finished(store: Storage, output: str) -> _Finished:
    """The dataset, read back whole. Raises PushError if a row is missing or anything is wrong."""
    there = dataset.load(store)
    tags, found = there.tags(), verify.verify(store)
    if found.missing or not store.exists(SUCCESS):
        what = (
            f"{len(found.missing):,} of its {found.plan.shards:,} shards are missing"
            if found.missing
            else f"it has no {SUCCESS}"
        )
        raise PushError(f"{output} is not finished: {what}; the command that made it goes on with it")
    if not found.sound:
        raise PushError(f"{output} is not sound: latentmill verify says what is wrong, and --repair takes it out")
    return _Finished(there, tags)


def _upload(hub: Any, repo: str, finished: _Finished) -> str:
    api, store, plan = hub.HfApi(), finished.there.store, finished.there.plan
    api.create_repo(repo, exist_ok=True, **KIND)
    there = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True, **KIND) if hasattr(entry, "size")}
    _require_ours(repo, there, finished)
    here, others = finished.files()
    stale = [name for name in there if name not in here and name.partition("/")[0] in PUSHED_FOLDERS]
    if CARD in there and CARD in here and not _may_replace(api, repo, there[CARD], store):
        del here[CARD]
        logger.warning(
            f"hf://datasets/{repo} has a {CARD} of its own, which stays: ours is {store.url.rstrip('/')}/{CARD}"
        )
    said = f"{plural(len(here) + 1, 'file')} of {plural(plan.rows, 'row')} at {api.endpoint}/datasets/{repo}"
    # Of what seems to be there all is compared: else another shard of the same size would come under a _SUCCESS.
    same = SUCCESS in there and not stale and here.keys() <= there.keys()
    if (
        same
        and all(there[name].size == size for name, size in here.items())
        and all(_is(there[name], store, name) for name in here)
    ):
        return said
    message = f"{plan.name}: {plural(plan.rows, 'row')}, by latentmill"
    plans = [name for name in here if plan_files.is_name(name) and name not in there]
    first = [hub.CommitOperationAdd(name, store.read(name)) for name in plans]
    first += [hub.CommitOperationDelete(SUCCESS)] if SUCCESS in there else []
    if first:
        api.create_commit(repo, first, commit_message=f"{message}: begun", **KIND)
    wanted = [glob.escape(name) for name in here if "/" not in name]
    api.upload_folder(
        repo_id=repo,
        folder_path=store.url,
        allow_patterns=[*wanted, *(f"{folder}/*" for folder in PUSHED_FOLDERS)],
        ignore_patterns=["*/.*", "*/_*", *map(glob.escape, others)],
        commit_message=message,
        **KIND,
    )
    if not finished.is_still():
        raise RunError(f"{store.url} changed while it was pushed")
    last = [*map(hub.CommitOperationDelete, stale), hub.CommitOperationAdd(SUCCESS, b"")]
    api.create_commit(repo, last, commit_message=f"{message}: complete", **KIND)
    return said


def _require_ours(repo: str, there: Mapping[str, Any], finished: _Finished) -> None:
    """Raise PushError unless what is in the repository is nothing, or a part of this dataset."""
    at, store = f"hf://datasets/{repo}", finished.there.store
    foreign = next((name for name in there if name.partition("/")[0] in PUSHED_FOLDERS), None)
    if foreign and plan_files.FIRST_PLAN not in there:
        raise PushError(f"{at} holds {foreign}, and no plan.json of this dataset: choose another name")
    for name in sorted(filter(plan_files.is_name, there), key=len):
        if name == plan_files.FIRST_PLAN:
            what = "another dataset"
        else:
            what = "this dataset, and it has grown further or otherwise there"
        if not store.exists(name) or not _is(there[name], store, name):
            raise PushError(f"{at} holds {what}, by its {name}: choose another name")


def _may_replace(api: Any, repo: str, found: Any, store: Storage) -> bool:
    """Whether a card in the repository is as ours is, or was made by us; what people wrote themselves, here, they want there."""
    if MARK.encode() not in store.read(CARD) or _is(found, store, CARD):
        return True
    with tempfile.TemporaryDirectory() as folder:
        return MARK.encode() in Path(api.hf_hub_download(repo, CARD, local_dir=folder, **KIND)).read_bytes()


def _is(entry: Any, store: Storage, name: str) -> bool:
    """Whether a file of the repository holds what the one of that name does here: large ones are known by SHA-256, others as git knows them."""
    size = store.size(name)
    digest = hashlib.sha256() if entry.lfs is not None else hashlib.sha1(b"blob %d\0" % (size or 0))
    if entry.size != size:
        return False
    with store.open(name) as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return bool(digest.hexdigest() == (entry.blob_id if entry.lfs is None else entry.lfs.sha256))


@contextmanager
def _said(target: str) -> Iterator[None]:
    """Whatever the Hub or the way to it says, as one line of ours, without the token."""
    from huggingface_hub import get_token

    try:
        yield
    except PushError:
        raise
    except Exception as error:
        said = one_line(error, 300).replace(get_token() or "\0", "[token]")
        status = getattr(getattr(error, "response", None), "status_code", None)
        who = "; HF_TOKEN or hf auth login says who you are" if status in (401, 403) else ""
        raise RunError(f"{target}: {said}{who}; the same command goes on") from error
