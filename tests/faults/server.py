"""A process that forks one for each run that it is asked for, on its stdin. tests.forked runs it, where torch and Ray are imported."""

import ctypes
import faulthandler
import gc
import json
import os
import signal
import sys
import traceback

import PIL.Image

import latentmill.cli
import latentmill.conf
import latentmill.config
import latentmill.exports
import latentmill.jobs
import latentmill.parts
import latentmill.plan
import latentmill.report
import latentmill.runner
import latentmill.verify
import latentmill.workers.inline


def serve(folder):
    """Until its stdin ends. ``folder`` holds the package of tests."""
    sys.path[0] = folder
    from tests import forked, ray_forks

    PIL.Image.init()
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
        forked.draw_ids()
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        os.environ.update(asked["environment"])
        sys.path[:0] = asked["path"]
        os.chdir(asked["folder"])
        names = {**globals(), "main": latentmill.cli.main}
        exec(asked["prepare"], names)
        for number, path in ((1, asked["log"]), (2, asked["err"] or asked["log"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
        if encoding:
            sys.stdout.reconfigure(encoding=encoding, errors=errors)
        if asked["obeys"] and os.geteuid() == 0:
            # Root loses CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which it may all.
            header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None).capget(header, capabilities) == 0
            capabilities[0] &= ~0b110
            assert ctypes.CDLL(None).capset(header, capabilities) == 0
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell lets what it starts in the background ignore it
        faulthandler.dump_traceback_later(110)
        signal.alarm(120)  # whatever hangs ends, and has said where
        try:
            code = names["main"](asked["arguments"])
        except BaseException:
            traceback.print_exc()
            code = 99
        if asked["err"]:
            sys.exit(code)  # as Python ends, which writes to its streams
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    serve(sys.argv[1])
