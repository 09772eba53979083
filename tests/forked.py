"""In place of a worker of Ray, an agent of a node, or tests.faults.server: a child of a process that has everything imported.

Ray starts a worker as ``python SETUP ARGUMENTS``, and SETUP is this file; see tests.ray_forks. It gets a child in its place,
hands on its arguments, environment, folder, input, outputs and mounts, and lives as long as the child.
"""

import array
import json
import os
import signal
import socket
import sys
import threading

SOCKET = "LATENTMILL_TESTS_FORKS"
"""The environment variable that says where to ask for a child."""
WORKER = "default_worker.py"
CLONE_FS = 0x200
CONFIGURED = b"_ZGVZN9RayConfig8instanceEvE6config"
"""The variable by which Ray's library in C++ knows that it has read Ray's environment variables, which it does when it is imported."""
IMPORTED = """
import logging; logging.disable()
import jsonschema, pandas, psutil, pyarrow.compute, pyarrow.dataset, pyarrow.pandas_compat, pyarrow.parquet, pytest, requests, scipy.special, torch
import latentmill.workers.actor, latentmill.workers.context, latentmill.workers.worker
import latentmill.stages.decode, latentmill.stages.denoise, latentmill.stages.encode, latentmill.stages.read, latentmill.stages.write
import latentmill.sources.images, latentmill.sources.prompts
import latentmill.schedulers.dpmpp, latentmill.sinks.parquet
import PIL.Image, ray.dag, ray.experimental.channel, ray.util.serialization_addons, torch.utils._device, unittest.mock
import ray._private.async_compat, ray._private.runtime_env.agent.main, ray._private.runtime_env.setup_hook
import ray.dashboard.agent, ray.dashboard.http_server_agent, ray.dashboard.utils
ray.dashboard.utils.get_all_modules(ray.dashboard.utils.DashboardAgentModule)
ray.util.serialization_addons.apply(unittest.mock.MagicMock())
PIL.Image.preinit()
logging.disable(logging.NOTSET)
"""
"""What each worker of a job imports but for plugins, of which another cluster may have others; and what agents import."""


def start_server():
    """Start the process that has imported, unless there is one: of tests that xdist shares out, that is one for all."""
    if SOCKET in os.environ:
        return
    import atexit
    import shutil
    import subprocess
    import tempfile

    folder = tempfile.mkdtemp(dir="/tmp")
    os.environ[SOCKET] = os.path.join(folder, "forks")
    elsewhere = {**os.environ, "OMP_NUM_THREADS": "1"}  # which is read once, as torch is imported
    elsewhere.pop("PYTHONPATH", None)  # each worker has its own
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.environ[SOCKET])
        listening.listen(64)
        serve = [sys.executable, __file__, "--serve", str(listening.fileno())]
        process = subprocess.Popen(serve, env=elsewhere, pass_fds=[listening.fileno()])
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(process.kill)


def wait_for_server():
    """Start it, and wait until it has imported: Ray gives its agents 30 seconds. Fails if it has died."""
    start_server()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[SOCKET])
        server.shutdown(socket.SHUT_WR)
        server.recv(1)  # whoever asks for nothing gets nothing


def ask():
    """Be a worker by proxy. An agent would look whether its parent, the raylet, is there; its proxy ends with that, and so does that of a server."""
    if WORKER not in map(os.path.basename, sys.argv):
        end_with_parent()
    wanted = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[SOCKET])
        given = array.array("i", [0, 1, 2, os.open("/proc/self/ns/mnt", os.O_RDONLY)])
        server.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)])
        server.sendall(json.dumps(wanted).encode() + b"\n")
        server.recv(1)  # nothing, when the child has ended


def end_with_parent():
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ------------------------------------------------------------------------------------ the process that has imported


def serve(number):
    """Fork a child for each that asks; end it if who asked is killed, and let who asked end with it."""
    import gc
    import select
    import selectors

    end_with_parent()
    paths = sys.path[1:]
    select.select([number], [], [])  # tests without Ray ask for nobody
    gc.disable()  # there is no garbage in what is imported
    exec(IMPORTED, {})
    configured = address(sys.modules["ray._raylet"].__file__, CONFIGURED)
    gc.collect()
    gc.freeze()
    gc.enable()
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
                _, given, _, _ = socket.recv_fds(asking, 1, 4)
                with asking.makefile() as lines:
                    line = lines.readline()
                if not line.endswith("\n"):  # who asked was killed before it had
                    for each in (asking.fileno(), *given):
                        os.close(each)
                    asking.detach()
                    continue
                wanted = json.loads(line)
                draw_ids()
                child = os.fork()
                if not child:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    selector.close()
                    for each in (listening, ended, wakeup, asking, *(asking for asking, _ in children.values())):
                        each.close()
                    return work(wanted, *given, paths, configured)
                for each in given:
                    os.close(each)
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
            elif (
                children.get(key.fd, (None,))[0] is key.fileobj
            ):  # who asked is gone, and nobody else has its number by now
                os.kill(children[key.fd][1], signal.SIGKILL)


def draw_ids():
    """Go on with the generators of Ray's random ids, one a thread, whose state a child takes over: else all children would draw the same,
    and two workers that begin at once would give one name to two objects. One died of that, and its driver waited for it for ever.
    """
    from ray import ObjectRef

    for _ in range(16):
        thread = threading.Thread(target=ObjectRef.from_random)
        thread.start()
        thread.join()
    for _ in range(256):
        ObjectRef.from_random()


def address(library, name):
    """Where a variable of a library is in this process."""
    import mmap
    import struct

    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        [at], [size, count] = struct.unpack_from("<Q", data, 40), struct.unpack_from("<HH", data, 58)
        sections = [struct.unpack_from("<IIQQQQII", data, at + size * number) for number in range(count)]
        _, _, _, _, symbols, length, names, _ = next(section for section in sections if section[1] == 2)
        named = data.find(b"\0%s\0" % name, sections[names][4]) + 1 - sections[names][4]
        table = struct.iter_unpack("<IBBHQQ", data[symbols : symbols + length])
        value = next(symbol[4] for symbol in table if symbol[0] == named)
    with open("/proc/self/maps") as maps:
        return value + min(int(line.partition("-")[0], 16) for line in maps if line.rstrip().endswith(library))


def work(wanted, stdin, stdout, stderr, mounts, paths, configured):
    """Be the worker: what ``python ARGUMENTS`` would be with its environment."""
    import ctypes
    import importlib
    import runpy

    os.dup2(stdin, 0), os.dup2(stdout, 1), os.dup2(stderr, 2)
    if os.fstat(mounts).st_ino != os.stat("/proc/self/ns/mnt").st_ino:
        system = ctypes.CDLL(None, use_errno=True)
        assert (
            system.unshare(CLONE_FS) == 0
        )  # from threads that libraries begin after a fork: the mounts of several can't be changed
        assert system.setns(mounts, 0) == 0, os.strerror(ctypes.get_errno())
    for each in (stdin, stdout, stderr, mounts):
        os.close(each)
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    script = next(at for at, argument in enumerate(wanted["arguments"]) if argument.endswith(".py"))
    if os.path.basename(wanted["arguments"][script]) != WORKER:
        os.environ["RAY_RAYLET_PID"] = str(os.getppid())
    sys.argv = [a for a in wanted["arguments"][script:] if not a.startswith(("--serialized-runtime-env", "--language"))]
    ctypes.c_char.from_address(configured).value = 0
    own = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [os.path.dirname(sys.argv[0]), *own, *paths]
    importlib.invalidate_caches()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(int(sys.argv[2]))
    else:
        ask()
