"""The Ray cluster that a job's workers run on: joined where there is one, or started here for the time of a run."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private import services

from latentmill.errors import ClusterError, UnreachableError
from latentmill.launchers.ray_token import token, use_token
from latentmill.text import one_line

SOCKET_PATH = 107
"""Bytes that the path of a Unix socket may have on Linux."""
SESSION = "ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""The longest path of a socket that Ray makes below its temporary folder."""
ASK = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""A call that each Ray cluster answers."""


def connect(address: str | None) -> bool:
    """Join the Ray cluster at ``address``, or start one here if it is None; whether that was done, and is ours to end.

    Raises ClusterError.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        _start(quiet)
        return True
    if not address.startswith("ray://"):
        address = _found() if address == "auto" else address
        _require_ray(address)
    try:
        with _outside_of_here():
            ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise UnreachableError(f"no Ray cluster at cluster.address={address}: start one, or give HOST:PORT") from error
    except (RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(f"cluster.address={address}: {_line(error)}") from error
    return False


def disconnect() -> None:
    """Leave the cluster, and end it if ``connect`` started it.

    Ray ends this process if a thread lets go of one of its references meanwhile: so no thread may come to collect garbage.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if collects:
            gc.enable()


# ------------------------------------------------------------------------------------------------------ to start


def _start(options: Mapping[str, Any]) -> None:
    if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        # A token of this process's own, should Ray ask for one. In ~/.ray, where Ray would put it, it would also be sent to
        # clusters that others started, and Ray turns tokens on for whoever has that file.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("HOME", tempfile.gettempdir())  # a container's user of a number alone has none
    try:
        with _outside_of_here():
            # Without "local" Ray joins any cluster that it finds.
            ray.init(address="local", include_dashboard=False, _temp_dir=_temporary(), **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"Ray can't be started here: {_line(error)}. It needs a folder for sockets (RAY_TMPDIR, else TMPDIR) that it may "
            "write, and /dev/shm; cluster=inline needs no Ray"
        ) from error
    except Exception as error:
        if type(error) is not Exception or "timed out during startup" not in str(error):  # Ray has no class for it
            raise
        raise UnreachableError(
            f"Ray did not start here in time: {_line(error).rstrip('.')}. Is this machine too busy?"
        ) from error


def _temporary() -> str | None:
    """A folder for Ray's sockets, where its own choice has too long a name; None leaves it the choice."""
    wanted = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.path.join(wanted, SESSION).encode()) <= SOCKET_PATH:
        return None
    short = Path("/tmp", f"latentmill-{os.getuid()}")
    short.mkdir(mode=0o700, exist_ok=True)
    return str(short / "ray")


@contextmanager
def _outside_of_here() -> Iterator[None]:
    """In the root folder: Ray puts the folder that it is started in before all others that its workers import from.

    A ``torch.py`` that lies beside a job would be run by them. And Ray puts a handler of its own in the place of ours for SIGTERM.
    """
    before, heard = os.getcwd(), signal.getsignal(signal.SIGTERM)
    os.chdir("/")
    try:
        yield
    finally:
        os.chdir(before)
        if callable(heard) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, heard)


# ------------------------------------------------------------------------------------------------------- to join


def _found() -> str:
    """``HOST:PORT`` of the cluster that this machine is a node of, or that RAY_ADDRESS names."""
    try:
        return str(services.canonicalize_bootstrap_address_or_die("auto"))
    except ConnectionError as error:
        raise UnreachableError(
            "cluster.address=auto: no Ray cluster is running on this machine: start one, or give HOST:PORT"
        ) from error


def _require_ray(address: str) -> None:
    """Raise unless a Ray cluster answers at ``HOST:PORT``, and see to the token that it asks for, or that it doesn't."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"cluster.address must be auto or HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise UnreachableError(f"nobody answers at cluster.address={address}: {error}") from error
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    answer = _ask(address, ())
    if answer in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise ClusterError(
            f"what answers at cluster.address={address} is not a Ray cluster: the port of its head is meant (6379 unless "
            "set otherwise), not that of its dashboard or job server (8265)"
        )
    wants_token = answer is grpc.StatusCode.UNAUTHENTICATED
    if wants_token:
        known = token()
        if known is None:
            raise ClusterError(
                f"the Ray cluster at cluster.address={address} asks for a token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH "
                "to the file that has it"
            )
        if _ask(address, (("authorization", f"Bearer {known}"),)) is grpc.StatusCode.UNAUTHENTICATED:
            raise ClusterError(f"the Ray cluster at cluster.address={address} refuses this token")
    use_token(wants_token)


def _ask(address: str, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(ASK)(b"", timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def _line(error: BaseException) -> str:
    """The first lines of what Ray says, as one."""
    return one_line(error, 300) or type(error).__name__
