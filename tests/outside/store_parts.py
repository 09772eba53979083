"""Stores that sources are read from, over HTTP: a proxy before S3 at which things happen, and a small Hugging Face Hub."""

import hashlib
import http.client
import json
import random
import re
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import obstore
from obstore.store import from_url


class Server:
    """A server of its own, in threads; what it was asked for stands in ``asked``: method and path."""

    def __init__(self, answer):
        self.answer, self.asked, self.sent = answer, [], 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one(inner):
                body = inner.rfile.read(int(inner.headers.get("Content-Length") or 0))
                self.asked.append((inner.command, urllib.parse.unquote(inner.path)))
                status, headers, content = self.answer(inner.command, inner.path, dict(inner.headers), body)
                self.sent += len(content)
                inner.send_response_only(status)
                for name, value in headers.items():
                    inner.send_header(name, value)
                if "Content-Length" not in headers:
                    inner.send_header("Content-Length", str(len(content)))
                inner.end_headers()
                if inner.command != "HEAD":
                    inner.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

            def log_message(inner, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def count(self, method, pattern=""):
        return sum(1 for verb, path in self.asked if verb == method and re.search(pattern, path))


class Before(Server):
    """A proxy before a store: ``seconds`` late, failing one time in ``fails``; ``first``, given method and path, may answer itself."""

    def __init__(self, upstream, seconds=0.0, fails=0, first=lambda method, path: None):
        self.upstream_url, self.upstream = upstream, urllib.parse.urlsplit(upstream).netloc
        self.seconds, self.fails, self.first = seconds, fails, first
        self.dice, self.failed = random.Random(0), 0
        super().__init__(self._forward)

    def _forward(self, method, path, headers, body):
        time.sleep(self.seconds)
        if self.fails and self.dice.randrange(self.fails) == 0:
            self.failed += 1
            return self.dice.choice([500, 503]), {}, b""
        if (status := self.first(method, urllib.parse.unquote(path))) is not None:
            return status, {}, b""
        connection = http.client.HTTPConnection(self.upstream)
        connection.request(method, path, body or None, {**headers, "Connection": "close"})
        answer = connection.getresponse()
        content = answer.read()
        kept = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "server", "date", "transfer-encoding")
        }
        connection.close()
        return answer.status, kept, content


def put(endpoint, key, content):
    """Write an object into s3://bucket; without content, delete it."""
    store = from_url("s3://bucket", endpoint=endpoint, client_options={"allow_http": True})
    if content is None:
        obstore.delete(store, key)
    else:
        obstore.put(store, key, content)


def put_as_is(endpoint, key, content=b""):
    """The same of a key that obstore would write in another way: folders are marked by an empty object with a slash behind."""
    headers = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket/{key}", content, headers, method="PUT")).close()


def upload(endpoint, folder, prefix):
    """Write all files below a folder."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            put(endpoint, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def errors(output):
    """The error rows of a dataset."""
    return [json.loads(line) for path in sorted(Path(output).glob("errors/*.jsonl")) for line in path.open()]


class Hub(Server):
    """The few endpoints of the Hugging Face Hub that a dataset is read by. A commit is what a folder holds when it is made."""

    def __init__(self, repository="some/pictures"):
        self.repository, self.commits, self.main = repository, {}, ""
        super().__init__(self._answered)

    def commit(self, folder):
        files = {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
        }
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name], self.main = files, name
        return name

    def _answered(self, method, path, headers, body):
        path, _, query = path.partition("?")
        path = urllib.parse.unquote(path)
        about = f"/api/datasets/{self.repository}"
        if path.startswith(f"{about}/revision/"):
            revision = path.removeprefix(f"{about}/revision/")
            if revision not in ("main", *self.commits):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            commit = self.main if revision == "main" else revision
            return _json({"id": self.repository, "sha": commit})
        if path.startswith(f"{about}/tree/"):
            commit, _, folder = path.removeprefix(f"{about}/tree/").partition("/")
            deep = "recursive=true" in query.lower()
            return self._tree(self.commits[commit], folder, deep)
        if path.startswith(f"{about}/paths-info/"):
            files = self.commits[path.rpartition("/")[2]]
            wanted = urllib.parse.parse_qs(body.decode())["paths"]
            there = [_file(name, files[name]) for name in wanted if name in files]
            folders = [name for name in wanted if any(file.startswith(f"{name}/") for file in files)]
            return _json(there + [_folder(name) for name in folders])
        if path.startswith(f"/datasets/{self.repository}/resolve/"):
            commit, _, name = path.removeprefix(f"/datasets/{self.repository}/resolve/").partition("/")
            content = self.commits[commit].get(name)
            if content is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            if found := re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", headers.get("Range", ""))):
                first, last = int(found[1]), min(int(found[2]), len(content) - 1)
                if first > last:
                    return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
                return 206, {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, content[first : last + 1]
            return 200, {}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _tree(self, files, folder, deep):
        prefix = f"{folder}/" if folder else ""
        below = {name: content for name, content in files.items() if name.startswith(prefix)}
        if folder and not below:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        right = {name: content for name, content in below.items() if deep or "/" not in name.removeprefix(prefix)}
        inside = {prefix + name.removeprefix(prefix).partition("/")[0] for name in below.keys() - right.keys()}
        return _json(
            [_file(name, content) for name, content in right.items()] + [_folder(name) for name in sorted(inside)]
        )


def _file(name, content):
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _folder(name):
    return {"type": "directory", "path": name, "oid": "0" * 40}


def _json(content):
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()
