"""A small Hugging Face Hub: one dataset repository in memory, and what ``huggingface_hub`` asks of it to upload a folder."""

import base64
import hashlib
import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

REPO = "me/pictures"
TOKEN = "hf_abcdefghijklmnop"


class Hub:
    """``files`` is what the repository holds. ``kill``: what is asked, and how often before, at which ``victim`` is killed; ``meanwhile``:
    what else happens at such a moment."""

    def __init__(self):
        self.files, self.lfs, self.blobs = {}, set(), {}
        self.commits, self.asked = [], []
        self.kill, self.victim, self.large, self.meanwhile = None, None, False, {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def tree(self):
        for path, content in sorted(self.files.items()):
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            pointer = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            yield {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": oid,
                **({"lfs": pointer} if path in self.lfs else {}),
            }

    def commit(self, lines):
        told = [json.loads(line) for line in lines.splitlines()]
        for key, value in ((line["key"], line["value"]) for line in told):
            if key == "file":
                assert value["encoding"] == "base64"
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
                self.lfs.add(value["path"])
            elif key == "deletedFile":
                del self.files[value["path"]]
            else:
                assert key == "header"
        self.commits.append([line["value"]["path"] for line in told if line["key"] != "header"])

    def preupload(self, files):
        """Parquet and tar are large files, as on the Hub, if ``large``; what is there as it is has its oid."""
        there = {entry["path"]: entry.get("lfs", entry)["oid"] for entry in self.tree()}
        for path in (file["path"] for file in files):
            mode = "lfs" if self.large and path.endswith((".parquet", ".tar")) else "regular"
            yield {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there.get(path)}

    def batch(self, objects):
        for each in objects:
            href = {"href": f"{self.url}/blob/{each['oid']}"}
            yield {**each, **({} if each["oid"] in self.blobs else {"actions": {"upload": href}})}


class Handler(BaseHTTPRequestHandler):
    """Answers; remembers what it was asked."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, found, code=200):
        content = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _file(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _dispatch(self):
        hub, path = self.hub, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        what = (
            "blob"
            if path.startswith("/blob/")
            else next((w for w in ("commit", "tree", "preupload", "batch", "create") if w in path), path)
        )
        if hub.kill == (what, hub.asked.count(what)):
            hub.kill = None
            os.kill(hub.victim, signal.SIGKILL)
            self.close_connection = True
            return
        hub.meanwhile.pop((what, hub.asked.count(what)), lambda: None)()
        hub.asked.append(what)
        if what == "blob":  # its address is secret, and asks for nobody
            digest = hashlib.sha256(body).hexdigest()
            assert digest == path.removeprefix("/blob/")
            hub.blobs[digest] = body
            self._answer({})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": f"Invalid credentials: {self.headers.get('Authorization')}"}, 401)
        elif what == "create":
            url = {"url": f"{hub.url}/datasets/{REPO}"}
            self._answer(
                {**url, "error": "You already created this dataset repo"} if hub.commits else url,
                409 if hub.commits else 200,
            )
        elif what == "tree":
            self._answer([*hub.tree()])
        elif what == "preupload":
            self._answer({"files": [*hub.preupload(json.loads(body)["files"])]})
        elif what == "batch":
            self._answer({"transfer": "basic", "objects": [*hub.batch(json.loads(body)["objects"])]})
        elif what == "commit":
            hub.commit(body)
            oid = hashlib.sha1(body).hexdigest()
            self._answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/datasets/{REPO}/commit/{oid}"})
        elif path.startswith(start := f"/datasets/{REPO}/resolve/main/"):
            self._file(hub.files[path.removeprefix(start)])
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path in (f"/api/datasets/{REPO}", f"/api/datasets/{REPO}/revision/main"):
            self._answer({"id": REPO, "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
        else:
            self._answer({"error": f"nobody knows {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch
