"""Ray clusters whose workers are forked from a process that has torch and latentmill imported: a worker starts in no time.

Ray starts a worker as ``python SETUP ARGUMENTS``, and SETUP is this file. It gets a child in its place from the process that
has everything imported, hands on its arguments, environment, folder and outputs, and lives as long as the child.
"""

import array
import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache

SOCKET = "LATENTMILL_TESTS_FORKS"
"""The environment variable that says where to ask for a child."""
IMPORTED = """
import jsonschema, pandas, psutil, pyarrow.dataset, pyarrow.parquet, pytest, requests, torch
import latentmill.workers.context, latentmill.workers.worker
import latentmill.stages.decode, latentmill.stages.denoise, latentmill.stages.encode, latentmill.stages.read, latentmill.stages.write
import latentmill.sources.images, latentmill.sources.prompts
import latentmill.schedulers.dpmpp, latentmill.sinks.parquet
"""
"""What each worker of a job imports but for plugins, of which another cluster may have others."""


def cluster(**head):
    """A Ray cluster of a head alone, whose workers are forked. Its nodes are told by ``**forked()``, as ``head`` is."""
    from ray.cluster_utils import Cluster

    few = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    there = Cluster(initialize_head=True, head_node_args={**few, **forked(), **head})
    require_server()
    return there


def forked():
    """Settings of a Ray node whose workers are forked."""
    server()
    return {"setup_worker_path": __file__}


@cache
def server():
    folder = tempfile.mkdtemp(dir="/tmp")
    os.environ[SOCKET] = os.path.join(folder, "forks")
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # each worker has its own
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.environ[SOCKET])
        listening.listen(64)
        command = [sys.executable, __file__, "--serve", str(listening.fileno())]
        process = subprocess.Popen(command, env=elsewhere, pass_fds=[listening.fileno()], stdout=subprocess.PIPE)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(process.kill)
    return process


@cache
def require_server():
    assert server().stdout.readline() == b"ready\n", "workers would be asked for, and never come"


# ---------------------------------------------------------------------------------------- in place of Ray's worker


def ask():
    """Be a worker by proxy."""
    wanted = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[SOCKET])
        outputs = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))]
        server.sendmsg([b"."], outputs)
        server.sendall(json.dumps(wanted).encode() + b"\n")
        server.recv(1)  # nothing, when the child has ended


# ------------------------------------------------------------------------------------ the process that has imported


def serve(number):
    """Fork a child for each that asks; end it if who asked is killed, and let who asked end with it."""
    import gc
    import selectors

    paths = sys.path[1:]
    exec(IMPORTED, {})
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    children = {}
    ended, wakeup = socket.socketpair()
    for each in (ended, wakeup):
        each.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listening = socket.socket(fileno=number)
    selector = selectors.DefaultSelector()
    for each in (ended, listening):
        selector.register(each, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listening:
                asking, _ = listening.accept()
                _, outputs, _, _ = socket.recv_fds(asking, 1, 2)
                with asking.makefile() as lines:
                    wanted = json.loads(lines.readline())
                child = os.fork()
                if not child:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    selector.close()
                    for each in (listening, ended, wakeup, asking, *(asking for asking, _ in children.values())):
                        each.close()
                    return work(wanted, outputs, paths)
                for output in outputs:
                    os.close(output)
                selector.register(asking, selectors.EVENT_READ)
                children[asking.fileno()] = asking, child
            elif key.fileobj is ended:
                ended.recv(4096)
                while children:
                    gone, _ = os.waitpid(-1, os.WNOHANG)
                    if not gone:
                        break
                    for asking in [asking for asking, child in children.values() if child == gone]:
                        selector.unregister(asking)
                        del children[asking.fileno()]
                        asking.close()
            elif key.fd in children:  # who asked is gone
                os.kill(children[key.fd][1], signal.SIGKILL)


def work(wanted, outputs, paths):
    """Be the worker: what ``python ARGUMENTS`` would be with its environment."""
    import importlib
    import runpy

    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
        os.close(output)
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    script = next(at for at, argument in enumerate(wanted["arguments"]) if argument.endswith("default_worker.py"))
    sys.argv = [a for a in wanted["arguments"][script:] if not a.startswith(("--serialized-runtime-env", "--language"))]
    own = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [os.path.dirname(sys.argv[0]), *own, *paths]
    importlib.invalidate_caches()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(int(sys.argv[2]))
    else:
        ask()
