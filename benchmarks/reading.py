"""Small pictures out of tars and out of an object store, in rows per second, beside a plain loop over the same.

    python benchmarks/reading.py [PICTURES] [--repeats N] [--late MILLISECONDS]

Each reads and decodes all pictures in one process. Ours are the source ``prompts`` over tars, on disk and in a store, and the source ``images`` over
the pictures one by one in a store. Beside the former stands webdataset's ``WebDataset(tars).decode("rgb8")``, from the store through curl; beside
the latter 32 threads that fetch with urllib, as img2dataset's do, and Pillow. The store is a server of this script's, in a process of its own, that
answers so many milliseconds late. Ratios are medians of pairs that were measured one after the other; CPU seconds are the reading process's own. What a plan
does before, once, is not in them.
"""

from __future__ import annotations

import argparse
import http.server
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.sax.saxutils import escape

import printed

TARS = 10
SIDE = 64
PAGE = 1000
Rows = Callable[[], Iterator[object]]
"""Reads all pictures."""


def make(folder: Path, count: int) -> None:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    (folder / "tars").mkdir()
    for number in range(TARS):
        pictures = folder / "pictures" / f"{number}"
        pictures.mkdir(parents=True)
        with tarfile.open(folder / "tars" / f"{number}.tar", "w") as tar:
            for k in range(number, count, TARS):
                file = io.BytesIO()
                small = Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8))
                small.resize((SIDE, SIDE)).save(file, "jpeg")
                (pictures / f"{k:06d}.jpg").write_bytes(file.getvalue())
                for suffix, content in (("jpg", file.getvalue()), ("txt", f"picture {k}".encode())):
                    member = tarfile.TarInfo(f"{k:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


# --------------------------------------------------------------------------------------------------- a store, and readers


class Store(http.server.BaseHTTPRequestHandler):
    """As much of S3 as reading takes, over the files of a folder."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path
    late: float
    keys: list[str] | None = None
    """What is there, once somebody has asked."""

    def do_GET(self) -> None:
        time.sleep(self.late)
        path, _, query = self.path.partition("?")
        if "list-type" in query:
            self._send(200, self._listing(dict(urllib.parse.parse_qsl(query))))
            return
        file = self.folder / urllib.parse.unquote(path).removeprefix("/bucket/")
        if not file.is_file():
            self._send(404, b"")
            return
        about = file.stat()
        tag = {"ETag": f'"{about.st_mtime_ns:x}"', "Last-Modified": self.date_time_string(int(about.st_mtime))}
        asked = self.headers.get("Range")
        with file.open("rb") as opened:
            if asked is None:
                self._send(
                    200, opened.read() if self.command == "GET" else b"", {**tag, "Content-Length": str(about.st_size)}
                )
                return
            start, _, last = asked.removeprefix("bytes=").partition("-")
            opened.seek(int(start))
            content = opened.read(int(last) + 1 - int(start))
        self._send(
            206, content, {**tag, "Content-Range": f"bytes {start}-{int(start) + len(content) - 1}/{about.st_size}"}
        )

    do_HEAD = do_GET

    def _listing(self, asked: dict[str, str]) -> bytes:
        prefix, after = asked.get("prefix", ""), asked.get("continuation-token", "")
        if Store.keys is None:
            Store.keys = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        found = [key for key in Store.keys if key.startswith(prefix) and key > after]
        inside: set[str] = set()
        if asked.get("delimiter"):
            inside = {prefix + key[len(prefix) :].partition("/")[0] + "/" for key in found if "/" in key[len(prefix) :]}
            found = [key for key in found if "/" not in key[len(prefix) :]]
        page = found[: int(asked.get("max-keys", PAGE))]
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(about := (self.folder / key).stat()).st_size}</Size>"
            f"<LastModified>{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(about.st_mtime))}</LastModified>"
            f'<ETag>"{about.st_mtime_ns:x}"</ETag></Contents>'
            for key in page
        )
        rows += "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in sorted(inside))
        more = len(page) < len(found)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{rows}</ListBucketResult>".encode()
        )

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def ours(source: str, path: str) -> Callable[[], Iterator[object]]:
    """The rows of a source that was planned."""
    from latentmill import registry

    built = registry.build("source", {"name": source, "path": path})
    fragments = built.fragments()

    def rows() -> Iterator[object]:
        reader = registry.build("source", {"name": source, "path": path})
        for fragment in fragments:
            assert not reader.changed(fragment)
            for row in reader.read(fragment.name, 0, fragment.rows):
                yield row["image"]

    return rows


def theirs(urls: list[str]) -> Callable[[], Iterator[object]]:
    import webdataset

    def rows() -> Iterator[object]:
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"):
            yield sample["jpg"]

    return rows


def one_by_one(folder: Path, url: str) -> Callable[[], Iterator[object]]:
    import numpy as np
    from PIL import Image

    def fetched(name: str) -> bytes:
        with urllib.request.urlopen(f"{url}/bucket/{name}") as answer:
            return bytes(answer.read())

    def rows() -> Iterator[object]:
        names = sorted(path.relative_to(folder).as_posix() for path in (folder / "pictures").rglob("*.jpg"))
        with ThreadPoolExecutor(32) as threads:
            for content in threads.map(fetched, names):
                yield np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    return rows


def measure(rows: Callable[[], Iterator[object]], count: int) -> tuple[float, float]:
    """Rows per second, and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = sum(1 for _ in rows())
    assert found == count, found
    return count / (time.perf_counter() - wall), time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pictures", nargs="?", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--late", type=float, default=10.0)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        Store.folder, Store.late = Path(options.serve), options.late / 1000
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
        print(server.server_port, flush=True)
        server.serve_forever()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.pictures)
        serve = [sys.executable, __file__, "--serve", name, "--late", str(options.late)]
        store = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
        try:
            assert store.stdout is not None
            url = f"http://127.0.0.1:{store.stdout.readline().strip()}"
            keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
            os.environ.update({**keys, "AWS_ENDPOINT_URL": url, "XDG_CACHE_HOME": f"{name}/cache"})
            compare(folder, url, options)
        finally:
            store.kill()


def compare(folder: Path, url: str, options: argparse.Namespace) -> None:
    printed.begin(__doc__ or "")
    tars = [f"{number}.tar" for number in range(TARS)]
    on_disk = theirs([f"{folder}/tars/{tar}" for tar in tars])
    in_store = theirs([f"pipe:curl -s {url}/bucket/tars/{tar}" for tar in tars])
    pairs = {
        "tars on disk": (ours("prompts", f"{folder}/tars"), on_disk),
        "tars in a store": (ours("prompts", "s3://bucket/tars"), in_store),
        "pictures in a store": (ours("images", "s3://bucket/pictures"), one_by_one(folder, url)),
    }
    printed.table(
        ("what", "ours, rows/s", "the loop, rows/s", "ratio", "CPU s, ours", "CPU s, the loop"), rows(pairs, options)
    )


def rows(pairs: dict[str, tuple[Rows, Rows]], options: argparse.Namespace) -> Iterator[Sequence[str]]:
    """Of the table: ours and the other, by what is read, measured one after the other."""
    for what, (mine, other) in pairs.items():
        found = [(measure(mine, options.pictures), measure(other, options.pictures)) for _ in range(options.repeats)]
        rates = [statistics.median(pair[k][0] for pair in found) for k in (0, 1)]
        cpu = [statistics.median(pair[k][1] for pair in found) for k in (0, 1)]
        ratio = statistics.median(a[0] / b[0] for a, b in found)
        yield what, f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{ratio:.2f}", f"{cpu[0]:.1f}", f"{cpu[1]:.1f}"


if __name__ == "__main__":
    main()
