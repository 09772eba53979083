"""Ray's job server: the job's file travels there, and its driver runs on the cluster's head."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from latentmill.launchers.programs import check_variables
from latentmill.launchers.ray_token import token, use_token
from latentmill.plugin import Launcher, LaunchState, StateWord, Submission, Submitted
from latentmill.text import first_line

T = TypeVar("T")
TIME_LIMIT = 20
"""Seconds in which the server must answer."""
REQUEST_FILE = "request.json"
STATES_OF_RAY: Mapping[str, StateWord] = {"PENDING": "queued", "RUNNING": "running"}
"""Ray's words for what has not ended."""
SENT_FOLDER = "sent"
"""The folder that travels, in the job's own."""


class RayJobs(Launcher):
    """Submits the job to a Ray cluster that runs. Its handle is the submission id, which is the job's own id."""

    contract = 2

    def __init__(
        self,
        address: str = "http://127.0.0.1:8265",
        working_dir: str | None = None,
        runtime_env: dict[str, Any] | None = None,
        env: list[str] | None = None,
        headers: dict[str, str] | None = None,
        verify: bool = True,
        num_cpus: float | None = None,
        resources: dict[str, float] | None = None,
        grace: int = 120,
    ) -> None:
        self.address, self.working_dir, self.headers, self.verify = address, working_dir, headers or {}, verify
        self.runtime_env, self.env, self.grace = dict(runtime_env or {}), env or [], grace
        self.num_cpus, self.resources = num_cpus, resources

    def files(self, submission: Submission) -> Mapping[str, str]:
        return {submission.file: submission.text, REQUEST_FILE: json.dumps(self._request(submission), indent=1) + "\n"}

    def submit(self, submission: Submission, folder: Path) -> str:
        request = self._request(submission)
        sent = folder / SENT_FOLDER
        if self.working_dir:
            if folder.resolve().is_relative_to(Path(self.working_dir).resolve()):
                raise ValueError(
                    f"target.working_dir={self.working_dir} holds {folder}, where what is sent is put together"
                )
            shutil.copytree(self.working_dir, sent, symlinks=False, ignore_dangling_symlinks=True)
        else:
            sent.mkdir()
        (sent / submission.file).write_text(submission.text, encoding="utf-8")
        runtime_env = {**request.pop("runtime_env"), "working_dir": str(sent)}
        runtime_env["env_vars"].update({name: os.environ[name] for name in self.env})
        try:
            return str(self._asked(lambda client: client.submit_job(**request, runtime_env=runtime_env)))
        finally:
            shutil.rmtree(sent, ignore_errors=True)

    def state(self, job: Submitted) -> LaunchState:
        found = self._asked(lambda client: _info(client, job.handle))
        if found is None:
            return LaunchState("unknown", detail="the cluster has no such job: it was started anew since")
        status = getattr(found.status, "value", str(found.status))
        if status in STATES_OF_RAY:
            return LaunchState(STATES_OF_RAY[status])
        code = 0 if status == "SUCCEEDED" else found.driver_exit_code
        return LaunchState(
            "ended", code, "cancelled" if status == "STOPPED" else "" if code is not None else str(found.message)
        )

    def log(self, job: Submitted, follow: bool) -> Iterator[str]:
        if not follow:
            yield self._asked(lambda client: str(client.get_job_logs(job.handle)))
            return
        with self._client() as client, asyncio.Runner() as runner:
            pieces = client.tail_job_logs(job.handle)
            while (piece := runner.run(_next(pieces))) is not None:
                yield piece

    def cancel(self, job: Submitted) -> None:
        self._asked(lambda client: client.stop_job(job.handle))

    def _request(self, submission: Submission) -> dict[str, Any]:
        """What is sent, but for the folder, and for the values of environment variables."""
        if self.grace < 1:
            raise ValueError(f"target.grace must be 1 or more, not {self.grace}")
        submission.check_grace(self.grace)
        if self.working_dir is not None and not Path(self.working_dir).is_dir():
            raise ValueError(f"target.working_dir={self.working_dir} is no folder")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f"target.env holds names of environment variables, and {name!r} is none")
            if name not in os.environ:
                raise ValueError(f"target.env names {name}, which is not set here")
        ours = {"RAY_JOB_STOP_WAIT_TIME_S": str(self.grace)}  # Ray kills a driver 3 seconds after it was asked to end
        given = self.runtime_env.get("env_vars") or {}
        check_variables(submission, [*self.env, *ours, *given])
        request: dict[str, Any] = {
            "entrypoint": shlex.join(submission.command(address="auto")),
            "submission_id": submission.id,
            "metadata": {"latentmill_job": submission.name, "latentmill_output": submission.output},
            "runtime_env": {**self.runtime_env, "env_vars": {**ours, **given}},
        }
        if self.num_cpus is not None:
            request["entrypoint_num_cpus"] = self.num_cpus
        if self.resources:
            request["entrypoint_resources"] = self.resources
        return request

    def _asked(self, ask: Callable[[Any], T]) -> T:
        with self._client() as client:
            return ask(client)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """Ray's client. What it raises becomes a ValueError, or an OSError where nobody answers."""
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        address = self.address.rstrip("/")
        if not re.match(r"https?://[^/]", address):
            raise ValueError(f"target.address must be that of a job server, as http://HEAD:8265, not {self.address!r}")
        try:
            answer = requests.get(
                f"{address}/api/version", headers=self.headers, verify=self.verify, timeout=TIME_LIMIT
            )
            wants_token = answer.status_code in (401, 403)
            if wants_token and token() is None:
                raise ValueError(
                    f"{address} asks for a token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that has it"
                )
            use_token(wants_token)
            logging.disable(logging.INFO)  # it tells of each package that it sends
            yield JobSubmissionClient(address, headers=dict(self.headers), verify=self.verify)
        except AuthenticationError:
            raise ValueError(f"{address} refuses this token") from None
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise OSError(
                f"no job server of Ray answers at target.address={address}: {first_line(error, 200)}"
            ) from error
        except RuntimeError as error:
            raise ValueError(f"{address}: {error}") from error
        finally:
            logging.disable(logging.NOTSET)


def _info(client: Any, handle: str) -> Any:
    """What the server knows of a job; None, if it knows none."""
    try:
        return client.get_job_info(handle)
    except RuntimeError as error:
        if "404" in str(error):
            return None
        raise


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)
