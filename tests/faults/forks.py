"""A process with torch and latentmill imported forks one for each run: a run in a process of its own, in no time.

And the job that the tests of faults run, and what they compare.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
from tests import forked

SERVER = Path(__file__).with_name("server.py")
PROMPTS = [
    f"a {colour} {shape} on a white background" for shape in ("star", "ring") for colour in ("red", "blue", "green")
]


class Forks:
    """``begin`` starts ``latentmill ARGUMENTS`` and returns its process number; ``end`` waits, and returns the exit code.

    What it says comes to the file ``log``, or to ``err`` what it says on stderr. ``obeys``: permissions are for it, too, though
    it be root. ``path``: folders that come first on its ``sys.path``. ``prepare`` is code that may say otherwise what ``main`` is.
    """

    def __init__(self):
        forked.wait_for_server()
        command = [sys.executable, forked.__file__, str(SERVER), str(Path(__file__).parents[2])]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(self, arguments, log, obeys=False, path=(), err="", prepare="", **environment):
        told = {"arguments": list(map(str, arguments)), "log": str(log), "err": str(err), "path": list(map(str, path))}
        told |= {"folder": os.getcwd(), "obeys": obeys, "prepare": prepare}
        return self._ask({**told, "environment": environment})

    def end(self, process):
        return self._ask(process)

    def runs(self, process):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE

    def run(self, *arguments, **settings):
        return self.end(self.begin(*arguments, **settings))

    def close(self):
        self.server.stdin.close()
        self.server.wait()

    def _ask(self, asked):
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


def command(settings, output):
    return ["run", "txt2img", *settings, "cluster=inline", f"output={output}"]


def shards(output):
    return {path.name: path.read_bytes() for path in sorted(Path(output, "data").glob("*"))}
