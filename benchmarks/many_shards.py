"""What ``status`` and the report of a dataset of many shards take, on a disk and on a store that takes 50 ms a request.

    python benchmarks/many_shards.py [SHARDS]

The shards are links to a few real files; one of a hundred has a failed row. *cold* is without an index: each shard is read.
Then comes a look as a run takes it, which leaves the index. The store is a server that speaks as much S3 as is asked for.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
from PIL import Image
from printed import begin, table

from latentmill.plan import Plan
from latentmill.plugin import Fragment
from latentmill.shards import ERRORS_KEY, PLAN_KEY
from latentmill.sinks.parquet import FEATURES, PICTURE, Parquet

DELAY, LINKS = 0.05, 50_000
"""Seconds that the store waits before it answers; links of one file, of which file systems have a limit."""
THERE = "from latentmill import dataset, report, storage; there = dataset.load(storage.at({0!r})); "
STATUS = "from latentmill.cli import main; main(['status', {0!r}, '--json'])"
LOOK, REPORT = THERE + "there.look(); there.remember()", THERE + "report.finish(there)"
COMMANDS = {"status, cold": STATUS, "look, leaving the index": LOOK, "status": STATUS, "report": REPORT}
KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
ENTRY = (
    '<Contents><Key>{0}</Key><ETag>"{0}"</ETag><Size>9</Size>'
    "<LastModified>2026-11-26T00:00:00Z</LastModified></Contents>"
)


def make(root: Path, shards: int) -> None:
    """A dataset of one row a shard."""
    plan = Plan("many", {"sink": {"name": "parquet"}}, {}, [Fragment("prompts.txt", shards)], 1, 1, 0)
    (root / "data").mkdir(parents=True)
    (root / "plan.json").write_text(plan.to_json())
    Image.new("RGB", (64, 64), (200, 30, 30)).save(picture := io.BytesIO(), "PNG")
    row = {"row_id": "0-000", "prompt": "a red star", "image": {"bytes": picture.getvalue(), "path": "0.png"}}
    columns = [("row_id", pa.string()), ("prompt", pa.string()), ("image", PICTURE)]
    packed = pa.Table.from_pylist([row], pa.schema(columns, metadata={"huggingface": json.dumps(FEATURES)}))
    errors = json.dumps([{"row": 0, "row_id": "0-000", "stage": "decode", "reason": "a reason"}])
    for start in range(0, shards, LINKS):
        Parquet().write(str(root / f"ok-{start}"), packed, {PLAN_KEY: plan.hash, ERRORS_KEY: "[]"})
        Parquet().write(str(root / f"failed-{start}"), packed[:0], {PLAN_KEY: plan.hash, ERRORS_KEY: errors})
        for shard in range(start, min(start + LINKS, shards)):
            os.link(root / f"{'failed' if shard % 100 == 99 else 'ok'}-{start}", root / f"data/{shard:05d}.parquet")


async def serve(root: Path) -> None:
    """A bucket with what is in ``root``."""
    data = sorted(f"out/data/{path.name}" for path in (root / "out" / "data").iterdir())

    def listing(folder: str, start: int) -> bytes:
        names = data if folder == "out/data" else [f"{folder}/{p.name}" for p in (root / folder).glob("*")]
        found = "".join(map(ENTRY.format, names[start : start + 1000]))
        if start + 1000 < len(names):
            found += f"<IsTruncated>true</IsTruncated><NextContinuationToken>{start + 1000}</NextContinuationToken>"
        return f"<ListBucketResult>{found}</ListBucketResult>".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            method, target, _ = line.decode().split()
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
            head = dict(line.split(": ", 1) for line in lines if line)
            content = await reader.readexactly(int(head.get("content-length", 0)))
            await asyncio.sleep(DELAY)
            url = urlsplit(target)
            path, query = root / unquote(url.path).removeprefix("/bucket/"), parse_qs(url.query)
            code, more, body = "200 OK", 'ETag: "x"\r\nLast-Modified: Thu, 26 Nov 2026 00:00:00 GMT\r\n', b""
            if "list-type" in query:
                body = listing(query["prefix"][0].strip("/"), int(query.get("continuation-token", ["0"])[0]))
            elif method == "PUT":
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
            elif path.is_file():
                body = whole = path.read_bytes()
                if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", head.get("range", "")):
                    first = int(wanted[1]) if wanted[1] else max(0, len(whole) - int(wanted[2]))
                    body, code = whole[first : int(wanted[2]) + 1 if wanted[1] else None], "206 Partial Content"
                    more += f"Content-Range: bytes {first}-{first + len(body) - 1}/{len(whole)}\r\n"
            code = code if body or method == "PUT" else "404 Not Found"
            writer.write(f"HTTP/1.1 {code}\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode())
            writer.write(body * (method != "HEAD"))

    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=1 << 22)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == ["serve"]:
        return asyncio.run(serve(Path(sys.argv[2])))
    shards = int(sys.argv[1]) if sys.argv[1:] else 10_000
    begin(__doc__)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        make(root := Path(folder, "out"), shards)
        server = subprocess.Popen([sys.executable, __file__, "serve", folder], stdout=subprocess.PIPE, text=True)
        assert server.stdout
        env = {**os.environ, **KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}"}
        for place in (str(root), "s3://bucket/out"):
            shutil.rmtree(root / ".index", ignore_errors=True)  # they are the same files
            for name, code in COMMANDS.items():
                started = time.monotonic()
                done = subprocess.Popen([sys.executable, "-c", code.format(place)], env=env, stdout=subprocess.DEVNULL)
                _, failed, used = os.wait4(done.pid, 0)
                wall, cpu, most = time.monotonic() - started, used.ru_utime + used.ru_stime, used.ru_maxrss >> 10
                what = f"{name}{', failed' if failed else ''}"
                found.append(("S3, 50 ms a request" if "//" in place else "disk", what, wall, cpu, most))
        server.terminate()
    print(f"{shards:,} shards.\n")
    cold = {place: wall for place, name, wall, *_ in found if name.startswith("status, cold")}
    head = ("store", "what", "s", "of the cold status", "s of CPU", "MB")
    rows = [
        (place, name, f"{wall:.1f}", f"{wall / cold[place]:.2f}", f"{cpu:.1f}", most)
        for place, name, wall, cpu, most in found
    ]
    table(head, rows)


if __name__ == "__main__":
    main()
