"""Models elsewhere: a Hub with one repository of a model, a plugin that reads a file of weights, and processes that ask for it."""

import hashlib
import json
import re
import urllib.parse
from pathlib import Path

from tests.outside.store_parts import Server

REPOSITORY = "some/model"
HUB_URL = f"hf://{REPOSITORY}"
FILES = {
    "config.json": "{}",
    "part/model.safetensors": "red",
    "part/model.bin": "not wanted",
    "picture.png": "not wanted",
    "other.safetensors": "green",
}
WANTED = ["config.json", "other.safetensors", "part/model.safetensors"]
LARGE = (".safetensors", ".bin", ".gguf")


class ModelHub(Server):
    """What a model is read by of the Hugging Face Hub. A commit is what a folder holds when it is made.

    ``damage``: of a file's name and contents what is sent in their place.
    """

    def __init__(self):
        self.commits, self.branches, self.damage = {}, {}, lambda name, content: content
        super().__init__(self._answered)

    def commit(self, folder, branch="main"):
        files = {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
        }
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def sent_files(self, pattern=""):
        """The names of files whose contents were asked for, each time."""
        found = [
            re.fullmatch(rf"/{REPOSITORY}/resolve/[0-9a-f]+/(.*)", path) for verb, path in self.asked if verb == "GET"
        ]
        return sorted(each[1] for each in found if each and re.search(pattern, each[1]))

    def _answered(self, method, path, headers, body):
        path, _, _ = path.partition("?")
        path = urllib.parse.unquote(path)
        about = f"/api/models/{REPOSITORY}"
        if path.startswith(f"{about}/revision/"):
            revision = path.removeprefix(f"{about}/revision/")
            commit = self.branches.get(revision, revision)
            if commit not in self.commits:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            return _json({"id": REPOSITORY, "sha": commit, "siblings": []})
        if path.startswith(f"{about}/tree/"):
            commit, _, folder = path.removeprefix(f"{about}/tree/").partition("/")
            below = f"{folder}/" if folder else ""
            found = [_file(n, c) for n, c in self.commits[commit].items() if n.startswith(below)]
            return _json(found) if found else (404, {"X-Error-Code": "EntryNotFound"}, b"")
        if path.startswith(f"{about}/paths-info/"):
            files = self.commits[path.rpartition("/")[2]]
            wanted = urllib.parse.parse_qs(body.decode())["paths"]
            return _json([_file(name, files[name]) for name in wanted if name in files])
        if path.startswith(f"/{REPOSITORY}/resolve/"):
            commit, _, name = path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")
            content = self.commits[commit].get(name)
            if content is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            about = _file(name, content)
            tag = about["lfs"]["oid"] if "lfs" in about else about["oid"]
            told = {"ETag": f'"{tag}"', "X-Repo-Commit": commit}
            if method == "HEAD":
                return 200, {**told, "Content-Length": str(len(content))}, b""
            content = self.damage(name, content)
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", {k.lower(): v for k, v in headers.items()}.get("range", "")):
                first, last = int(found[1]), int(found[2] or len(content) - 1)
                told["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                return 206, told, content[first : last + 1]
            return 200, told, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b""


def _file(name, content):
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return {
        "type": "file",
        "path": name,
        "size": len(content),
        "oid": oid,
        **({"lfs": lfs} if name.endswith(LARGE) else {}),
    }


def _json(content):
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def fetch(*urls, ready=None):
    """What a worker does before it loads; ``ready``: a barrier, at which others wait, too."""
    from latentmill.models import Pins
    from latentmill.models.pins import ModelURL
    from latentmill.plugin import WeightsPath

    for url in urls:
        if ready is not None:
            ready.wait(60)
        Pins("").local(ModelURL.of(url), WeightsPath())


POINTS = "[latentmill.stages]\ntint = acme_tint:Tint\n"
CODE = '''
"""A stage that adds to each picture the number that its model's file of weights says. What it does is noted, a line each, in NOTES."""

import os
from pathlib import Path
from typing import Annotated

import pyarrow as pa

from latentmill.plugin import Stage, WeightsPath
from latentmill.weights import digests, record


class Tint(Stage):
    contract = 2
    fingerprinted = ("path", "more")
    adds = (pa.field("tint", pa.string()),)

    def __init__(self, path: Annotated[str, WeightsPath(loads_late=True)] = "", revision: str | None = None,
                 more: Annotated[list, WeightsPath()] = ()) -> None:
        self.folder = Path(path)
        files = [self.folder] if self.folder.suffix else sorted(self.folder.rglob("*"))
        self.files = [p for p in files if p.is_file() or p.is_symlink()] + [Path(each["path"]) for each in more]
        self.note("built " + " ".join(p.name for p in self.files))

    def note(self, text):
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(text + "\\n")

    def fingerprint(self):
        return " ".join(f"{path.name} {found}" for path, found in zip(self.files, digests(self.files)))

    def setup_node(self):
        self.note("set up")

    def load(self, device):
        record(*self.files)
        self.text = " ".join(p.read_text() for p in self.files if p.suffix == ".safetensors")
        self.note("loaded")

    def __call__(self, batch, reject):
        return batch.append_column(self.adds[0], pa.array([self.text] * len(batch)))
'''
