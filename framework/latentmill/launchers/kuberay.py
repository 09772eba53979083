"""KubeRay: a RayJob, which makes a Ray cluster on Kubernetes for the time of the job. Asked through kubectl."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os.path import normpath
from pathlib import Path
from typing import Any, TypedDict

from latentmill.launchers.manifest import HEAD_STORE, SHARED_MEMORY, NodeGroup, Pods, PodSize, as_yaml, rayjob
from latentmill.launchers.nodes import ANY_GPU, NO_GPU, Group, at_least, size
from latentmill.launchers.nodes import groups as needed
from latentmill.launchers.programs import ask, check_variables, said_by, variables
from latentmill.launchers.rayjob import SAID
from latentmill.plugin import Launcher, LaunchState, Submission, Submitted
from latentmill.text import first_line

MANIFEST, CANCELLED = "rayjob.yaml", "cancelled"
"""Names in the job's folder."""
WITHIN, LOOK_AGAIN = 60.0, 5.0
"""Seconds for kubectl to answer, and between two looks for a log that is not there yet."""
REFUSED = re.compile(
    r"\((NotFound|Invalid|Forbidden|AlreadyExists)\)|no matches for kind|unknown field|validati|decoding"
)
"""In what kubectl says: the same command would fail again."""
ON_GPUS = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
QUEUED = {
    "Initializing": "its cluster starts",
    "Retrying": "it failed, and gets a new cluster",
    "Suspending": "it is suspended",
    "Suspended": "it is suspended",
}


class HeadSettings(TypedDict, total=False):
    """What may be said of the head alone."""

    cpus: int
    memory: str
    spill: str
    node_selector: dict[str, str]
    tolerations: list[dict[str, Any]]


class GroupSettings(HeadSettings, total=False):
    """What may be said of a group alone."""

    gpus: int
    object_store: float
    nodes: int | None
    max_nodes: int | None


class KubeRay(Launcher):
    """A RayJob. Its handle is ``NAMESPACE/NAME@CONTEXT``: people change kubectl's context from day to day."""

    contract = 2

    def __init__(
        self,
        image: str,
        namespace: str | None = None,
        volumes: dict[str, str] | None = None,
        env: list[str] | None = None,
        secrets: list[str] | None = None,
        auth_secret: str | None = None,
        retries: int = 3,
        grace: int = 120,
        gpus: int = 1,
        cpus: int = 8,
        memory: str = "32GiB",
        object_store: float = 0.3,
        spill: str = "100GiB",
        nodes: int | None = None,
        max_nodes: int | None = None,
        groups: dict[str, GroupSettings] | None = None,
        head: HeadSettings | None = None,
        node_selector: dict[str, str] | None = None,
        tolerations: list[dict[str, Any]] | None = None,
        service_account: str | None = None,
        pull_secrets: list[str] | None = None,
        labels: dict[str, str] | None = None,
    ) -> None:
        """What conf/target/kuberay.yaml says. Raises ValueError for values that can't be."""
        self.namespace, self.volumes, self.labels = namespace, volumes or {}, labels or {}
        self.env, self.secrets, self.auth_secret, self.retries = env or [], secrets or [], auth_secret, retries
        self.each: dict[str, Any] = {
            "gpus": gpus,
            "cpus": cpus,
            "memory": memory,
            "object_store": object_store,
            "spill": spill,
            "nodes": nodes,
            "max_nodes": max_nodes,
            "node_selector": node_selector or {},
            "tolerations": tolerations or [],
        }
        self.groups, self.head = groups or {}, head or HeadSettings(cpus=2, memory="8GiB")
        self.pods = Pods(image, self.volumes, [], service_account, pull_secrets or [], grace)
        at_least(0, retries=retries)
        at_least(1, grace=grace, nodes=nodes)
        for path in self.volumes.values():
            if not path.startswith("/"):
                raise ValueError(f"target.volumes: {path!r} is no path from the root")

    # ------------------------------------------------------------------------------------------ what is sent

    def files(self, submission: Submission) -> Mapping[str, str]:
        self._check_paths(submission)
        submission.check_grace(self.pods.grace)
        secrets = [*self.secrets, *([_secret_of(submission.id)] if self.env else [])]
        found = needed(submission.needs, lambda group: self._node(group).shape)
        head = self._node("head", {**self.head, "gpus": 0})
        document = rayjob(
            submission,
            replace(self.pods, secrets=secrets),
            head,
            [self._group(group) for group in found],
            self.auth_secret,
            self.retries,
            self.labels,
        )
        return {MANIFEST: as_yaml(document)}

    def _check_paths(self, submission: Submission) -> None:
        if submission.without_ray:
            raise ValueError("the job says cluster=inline, and a RayJob is a cluster: leave that out")
        if submission.file.startswith(".."):
            raise ValueError(f"the job's name, {submission.name}, begins with two dots: Kubernetes takes no such path")
        for key, folder in {"output": submission.output, **submission.folders}.items():
            on_volume = any(Path(normpath(folder)).is_relative_to(path) for path in self.volumes.values())
            if "://" not in folder and not on_volume:
                raise ValueError(
                    f"{key}={folder} would be lost with its pod: give a URL, or a path on a volume, as in target.volumes.CLAIM=/shared"
                )
        if not self.secrets:  # whose keys are not known here
            check_variables(submission, self.env, ", or name a Secret in target.secrets")

    def _group(self, group: Group) -> NodeGroup:
        said = self._said(group.name)
        least, most = max(group.nodes, said["nodes"] or 0), said["max_nodes"]
        if most is not None and most < least:
            raise ValueError(f"target.max_nodes={most} of group {group.name}: {least} are needed at least")
        if not group.grows:  # more nodes would find no worker
            most = None
        return NodeGroup(group.name, self._node(group.name), least, most or least)

    def _said(self, group: str) -> dict[str, Any]:
        return {**self.each, **self.groups.get(group, {})}

    def _node(self, group: str, said: Mapping[str, Any] | None = None) -> PodSize:
        """What a node of the group asks for."""
        found: dict[str, Any] = self._said(group) if said is None else {**self.each, "object_store": None, **said}
        if group not in (ANY_GPU, NO_GPU, "head") and not found["node_selector"]:
            raise ValueError(
                f"which nodes have the accelerator_type {group}? Labels say so: target.groups.{group}.node_selector={{nvidia.com/gpu.product: ...}}"
            )
        gpus = 0 if group == NO_GPU else found["gpus"]
        memory, share = size("memory", found["memory"]), found["object_store"]
        if share is not None and not 0 < share < 1:
            raise ValueError(f"target.object_store={share} leaves nothing: a share of the memory is expected, as 0.3")
        store = HEAD_STORE if share is None else int(memory * share) >> 20 << 20
        if store + SHARED_MEMORY >= memory:
            raise ValueError(f"target.memory={found['memory']} of {group} is too little for Ray's object store")
        tolerations = [*([ON_GPUS] if gpus else []), *found["tolerations"]]
        return PodSize(
            gpus, found["cpus"], memory, store, size("spill", found["spill"]), found["node_selector"], tolerations
        )

    # ---------------------------------------------------------------------------------------------- kubectl

    def submit(self, submission: Submission, folder: Path) -> str:
        values, context = variables(self.env), _context()
        at, made = _at(self.namespace, context), None
        try:
            made = json.loads(_kubectl([*at, "create", "-f", str(folder / MANIFEST), "-o", "json"]))["metadata"]
            at = _at(made["namespace"], context)
            if values:
                _kubectl([*at, "create", "-f", "-"], _secret(submission.id, made, values))
        except (
            BaseException
        ) as error:  # Ctrl-C, too: nobody would remember it, and its pods would wait for the Secret for ever
            if made or not isinstance(error, ValueError):  # else it was refused
                with suppress(OSError, ValueError):
                    _kubectl([*at, *_deleting(made["name"] if made else submission.id)])
            raise
        return f"{made['namespace']}/{made['name']}@{context}"

    def state(self, job: Submitted) -> LaunchState:
        try:
            status = self._status(job)
        except ValueError as error:
            if "(NotFound)" in str(error) and (job.folder / CANCELLED).exists():
                return LaunchState("ended", detail="cancelled")
            return LaunchState("unknown", detail=str(error))
        word, ray_job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
        failed = int(status.get("failed", 0))
        if word == "Running":
            return LaunchState("running", detail=f"retry {failed} of {self.retries}" if failed else "")
        if word == "Complete":
            if ray_job == "SUCCEEDED":
                return LaunchState("ended", 0)
            cancelled = (job.folder / CANCELLED).exists()
            return LaunchState("ended", self._said_code(job), "cancelled" if cancelled else "stopped")
        if word in ("Failed", "ValidationFailed"):
            said = status.get("message") or status.get("reason") or word
            return LaunchState("ended", self._said_code(job), first_line(said, 200))
        return LaunchState("queued", detail=QUEUED.get(word, ""))

    def log(self, job: Submitted, follow: bool) -> Iterator[str]:
        last: dict[str, str] = {}
        """By pod, of which each cluster that is tried has one of its own: when it said what was read last. Streams are cut after some hours."""
        how = ["--follow"] * follow + ["--timestamps"]
        while True:
            ended = not follow or self.state(job).word in ("ended", "unknown")
            for pod in self._pods(job, f"job-name={_name(job)}"):
                since = last.get(pod, "")
                words = ["kubectl", *_where(job), "logs", pod, *how, *([f"--since-time={since}"] if since else [])]
                for line in said_by(words, subprocess.DEVNULL):
                    time_said, _, text = line.partition(" ")
                    if time_said > since:  # what is asked for begins with the second
                        last[pod] = time_said
                        yield text
            if ended:
                return
            time.sleep(LOOK_AGAIN)

    def cancel(self, job: Submitted) -> None:
        if self.state(job).word == "ended":
            return
        status = self._status(job)
        if status.get("jobDeploymentStatus") != "Running":
            # Nothing of it runs. To suspend it would not do: a queue (Kueue) has its jobs wait so, and would begin with it later.
            _kubectl([*_where(job), *_deleting(_name(job))])
        else:
            # A RayJob that is deleted or suspended takes its pods away at once; a Ray job that is stopped has its time, and is over.
            heads = self._pods(job, f"ray.io/cluster={status['rayClusterName']},ray.io/node-type=head")
            if not heads:
                raise OSError("its head is not to be seen")
            stop = ["ray", "job", "stop", "--no-wait", "--address", "http://127.0.0.1:8265", status["jobId"]]
            _kubectl([*_where(job), "exec", heads[-1], "-c", "ray-head", "--", *stop])
        (job.folder / CANCELLED).touch()

    def _status(self, job: Submitted) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(_kubectl([*_where(job), "get", "rayjob", _name(job), "-o", "json"]))
        return found.get("status") or {}

    def _pods(self, job: Submitted, selector: str) -> list[str]:
        words = [*_where(job), "get", "pods", "-l", selector, "--sort-by=.metadata.creationTimestamp", "-o", "name"]
        return [pod for pod in _kubectl(words).split() if pod]

    def _said_code(self, job: Submitted) -> int | None:
        """What the log's end says, if it is still there: KubeRay knows no exit codes."""
        try:
            pods = self._pods(job, f"job-name={_name(job)}")
            said = _kubectl([*_where(job), "logs", pods[-1], "--tail=50"]) if pods else ""
        except (OSError, ValueError):
            return None
        codes = re.findall(rf"^latentmill: {SAID} (\d+)$", said, re.MULTILINE)
        return int(codes[-1]) if codes else None


def _deleting(name: str) -> list[str]:
    return ["delete", "rayjob", name, "--wait=false", "--ignore-not-found"]


def _secret_of(name: str) -> str:
    return f"{name}-env"


def _secret(name: str, owner: Mapping[str, str], values: Mapping[str, str]) -> str:
    """The Secret that pods wait for. It belongs to the RayJob, so it goes when that goes; no file and no command line has ever had it."""
    owned = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": owner["name"], "uid": owner["uid"]}
    about = {"name": _secret_of(name), "ownerReferences": [owned]}
    return json.dumps({"apiVersion": "v1", "kind": "Secret", "metadata": about, "stringData": dict(values)})


def _context() -> str:
    try:
        return _kubectl(["config", "current-context"]).strip()
    except (OSError, ValueError):  # in a pod there is none
        return ""


def _at(namespace: str | None, context: str) -> list[str]:
    return [*(["--context", context] if context else []), *(["--namespace", namespace] if namespace else [])]


def _where(job: Submitted) -> list[str]:
    namespace, _, rest = job.handle.partition("/")
    return _at(namespace, rest.partition("@")[2])


def _name(job: Submitted) -> str:
    return job.handle.partition("/")[2].partition("@")[0]


def _kubectl(words: Sequence[str], sent: str | None = None) -> str:
    """What kubectl says. Raises ValueError for what it would refuse again, and OSError for what it might not."""
    done = ask(["kubectl", *words], WITHIN, sent)
    if done.returncode:
        said = f"kubectl: {first_line(done.stderr) or f'exit code {done.returncode}'}"
        raise ValueError(said) if REFUSED.search(done.stderr) else OSError(said)
    return done.stdout
