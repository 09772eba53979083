"""Ray clusters whose workers are forked from a process that has torch, Ray and latentmill imported: a worker starts in no time.

So are the two agents of a node; a dashboard that shows nothing is not started.
"""

import sys
from contextlib import suppress

import psutil
import pytest
import ray.cluster_utils
from ray._private import ray_constants, services
from tests import forked

from latentmill.workers.cluster import disconnect


class Cluster(ray.cluster_utils.Cluster):
    """A Ray cluster, of a head alone until nodes are added."""

    def __init__(self, **head):
        forked.wait_for_server()
        few = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        super().__init__(initialize_head=True, head_node_args={**few, **head})

    def add_node(self, mounts="", **node):
        """``mounts``: what ``sh`` does first, in a view of the disks that is the node's own."""
        with pytest.MonkeyPatch.context() as patch:
            fork(patch.setattr, mounts)
            return super().add_node(**node)

    def actors(self):
        """Process numbers of its actors, which are no children of this process: each writes a log of this cluster's session."""
        logs, found = self.head_node.get_logs_dir_path(), set()
        for process in psutil.process_iter(["name"]):
            with suppress(psutil.Error):
                if process.info["name"].startswith("ray::_Actor") and any(
                    file.path.startswith(logs) for file in process.open_files()
                ):
                    found.add(process.pid)
        return found

    def shutdown(self):
        """Of the driver that this process is, too: one whose cluster ends before it may end its process."""
        disconnect()
        super().shutdown()


def fork(setattr=setattr, mounts=""):
    """Have the workers and agents of all nodes forked that this process starts, if ``forked.start_server`` has been called in a process before."""
    start, dashboard = services.start_ray_process, services.start_api_server
    own = ["unshare", "--mount", "sh", "-ec", f'{mounts}\nexec "$@"', "sh"] if mounts else []

    def start_process(command, process, **told):
        return start([*own, *command] if process == "raylet" else command, process, **told)

    def start_dashboard(shown, *told, **more):
        return dashboard(shown, *told, **more) if shown else (None, None)

    def python(process, *_, **__):
        return [sys.executable, *([forked.__file__] if process.endswith("agent") else [])]

    setattr(services, "start_ray_process", start_process)
    setattr(services, "start_api_server", start_dashboard)
    setattr(services, "_build_python_executable_command_memory_profileable", python)
    setattr(ray_constants, "SETUP_WORKER_FILENAME", forked.__file__)
