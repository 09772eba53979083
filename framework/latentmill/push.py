"""A finished dataset, put on the Hugging Face Hub, with its card.

``huggingface_hub`` uploads. What is there already is passed over, so the same command goes on where it was stopped, and large folders
are committed in parts. First of all comes ``plan.json``, which says whose the repository is, and last of all ``_SUCCESS``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from latentmill import dataset, plan_files, storage, verify
from latentmill.dataset import Dataset
from latentmill.errors import PushError, RunError
from latentmill.shards import FOLDER
from latentmill.storage import Storage
from latentmill.text import one_line, plural

PUSHED_FOLDERS = "data", FOLDER, "errors", "filtered"
"""Whatever is right in these, but for what is hidden."""
CARD_FILES = "README.md", "contact_sheet.png", "report.html"
SUCCESS = "_SUCCESS"
KIND = {"repo_type": "dataset"}


def push(output: str, target: str) -> str:
    """Upload the dataset in the folder ``output`` to ``hf://datasets/OWNER/NAME``. Returns a line for people.

    The repository is made if there is none, and is as public as the account's new ones are. Who one is, the Hub's own login or
    ``HF_TOKEN`` says. Raises PushError, before anything is uploaded, if the dataset is not finished and sound, or the repository
    another's; RunError if the Hub fails, or refuses.
    """
    named = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)/?", target)
    if not named:
        raise PushError(f"{target} is no place to push to: hf://datasets/OWNER/NAME is")
    if "://" in output:
        raise PushError(f"{output}: what is pushed is read from a folder: copy the dataset into one")
    try:
        import huggingface_hub
    except ImportError as error:
        raise PushError("push needs huggingface_hub: pip install 'latentmill[hf]'") from error
    store = storage.at(output)
    there = _finished(store, output)
    with _said(target):
        return _upload(huggingface_hub, named[1], there)


def _finished(store: Storage, output: str) -> Dataset:
    """The dataset, read back whole. Raises PushError if a row is missing or anything is wrong."""
    found = verify.verify(store)
    if found.missing or not store.exists(SUCCESS):
        what = (
            f"{len(found.missing):,} of its {found.plan.shards:,} shards are missing"
            if found.missing
            else f"it has no {SUCCESS}"
        )
        raise PushError(f"{output} is not finished: {what}; the command that made it goes on with it")
    if not found.sound:
        raise PushError(f"{output} is not sound: latentmill verify says what is wrong, and --repair takes it out")
    return dataset.load(store)


def _upload(hub: Any, repo: str, dataset: Dataset) -> str:
    api, store, plan = hub.HfApi(), dataset.store, dataset.plan
    first_plan = store.read(plan_files.FIRST_PLAN)
    api.create_repo(repo, exist_ok=True, **KIND)
    there = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True, **KIND) if hasattr(entry, "size")}
    _require_ours(repo, there, first_plan)
    names = [*CARD_FILES, *map(plan_files.name_of, range(max(1, len(plan.generations)))), *dataset.made_for_all()]
    here = {name: size for name in names if (size := store.size(name)) is not None}
    for folder in PUSHED_FOLDERS:
        shown = [f"{folder}/{name}" for name in store.names(folder) if not name.startswith((".", "_"))]
        here |= dict(zip(shown, store.each(lambda name: store.size(name) or 0, shown)))
    message = f"{plan.name}: {plural(plan.rows, 'row')}, by latentmill"
    stale = [name for name in there if name not in here and name.partition("/")[0] in PUSHED_FOLDERS]
    complete = SUCCESS in there and not stale
    if not complete or any(name not in there or there[name].size != size for name, size in here.items()):
        complete = False
        first = [] if plan_files.FIRST_PLAN in there else [hub.CommitOperationAdd(plan_files.FIRST_PLAN, first_plan)]
        first += [hub.CommitOperationDelete(SUCCESS)] if SUCCESS in there else []
        if first:
            api.create_commit(repo, first, commit_message=f"{message}: begun", **KIND)
    wanted = [*names, *(f"{folder}/*" for folder in PUSHED_FOLDERS)]
    api.upload_folder(
        repo_id=repo,
        folder_path=store.url,
        allow_patterns=wanted,
        ignore_patterns=["*/.*", "*/_*"],
        commit_message=message,
        **KIND,
    )
    if not complete:
        last = [*map(hub.CommitOperationDelete, stale), hub.CommitOperationAdd(SUCCESS, b"")]
        api.create_commit(repo, last, commit_message=f"{message}: complete", **KIND)
    return f"{plural(len(here) + 1, 'file')} of {plural(plan.rows, 'row')} at {api.endpoint}/datasets/{repo}"


def _require_ours(repo: str, there: Mapping[str, Any], plan: bytes) -> None:
    """Raise PushError unless what is in the repository is nothing, or a part of this dataset."""
    if (found := there.get(plan_files.FIRST_PLAN)) is None:
        if foreign := next((name for name in there if name.partition("/")[0] in PUSHED_FOLDERS), None):
            raise PushError(
                f"hf://datasets/{repo} holds {foreign}, and no plan.json of this dataset: choose another name"
            )
        return
    if found.lfs is not None:
        same = found.lfs.sha256 == hashlib.sha256(plan).hexdigest()
    else:
        same = found.blob_id == hashlib.sha1(b"blob %d\0" % len(plan) + plan).hexdigest()  # as git names it
    if not same:
        raise PushError(f"hf://datasets/{repo} holds another dataset, by its plan.json: choose another name")


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
