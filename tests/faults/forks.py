"""A process with torch and latentmill imported that forks one for each run: a run in a process of its own, in no time.

And the job that the tests of faults run, and what they compare.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

PROMPTS = [
    f"a {colour} {shape} on a white background" for shape in ("star", "ring") for colour in ("red", "blue", "green")
]

SERVER = """
import ctypes, faulthandler, json, os, signal, sys
import latentmill.cli, latentmill.workers.inline, latentmill.sinks.parquet, latentmill_shapes.plugin
import latentmill.runner, latentmill.report, latentmill.verify, latentmill.sources.prompts, latentmill.stages.denoise, latentmill.stages.decode
import latentmill.stages.read, latentmill.stages.write, latentmill.schedulers.dpmpp, latentmill.conf, latentmill.jobs, torch.utils._device
import gc, pandas, PIL.Image, pyarrow.compute, pyarrow.pandas_compat

PIL.Image.init()
sys.path.append(sys.argv[1])
from tests import composing, ray_forks
composing.once()
ray_forks.fork()
job = latentmill.config.load_job("txt2img", ["output=nowhere", "cluster=inline"])
latentmill.plan.plan(job, latentmill.parts.parts(job))  # lists plugins, and what else is looked up once
gc.collect()
gc.freeze()
for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, int):
        print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    os.environ.update(asked["environment"])
    sys.path[:0] = asked["path"]
    os.chdir(asked["folder"])
    main = latentmill.cli.main
    exec(asked["prepare"])
    for number, path in ((1, asked["log"]), (2, asked["err"] or asked["log"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    if encoding:
        sys.stdout.reconfigure(encoding=encoding, errors=errors)
    if asked["obeys"] and os.geteuid() == 0:  # root loses CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which it may all
        header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capget(header, capabilities) == 0
        capabilities[0] &= ~0b110
        assert ctypes.CDLL(None).capset(header, capabilities) == 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    faulthandler.dump_traceback_later(110)
    signal.alarm(120)  # whatever hangs ends, and has said where
    try:
        code = main(asked["arguments"])
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    if asked["err"]:
        sys.exit(code)  # as Python ends, which writes to its streams
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)
"""


class Forks:
    """``begin`` starts ``latentmill ARGUMENTS`` and returns its process number; ``end`` waits, and returns the exit code.

    What it says comes to the file ``log``, or to ``err`` what it says on stderr. ``obeys``: permissions are for it, too, though
    it be root. ``path``: folders that come first on its ``sys.path``. ``prepare`` is code that may say otherwise what ``main`` is.
    """

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-c", SERVER, str(Path(__file__).parents[2])]
        self.server = subprocess.Popen(command, **pipes, text=True, env=environment)

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
